"""The policy of docs/policies.md, run from a file as it is printed there; and files that are refused as policies."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from avl_cases import tiny_model
from cache_helpers import Replay, replay_prefill
from minivlm.app import policy_flags
from minivlm.app.cli import Parser
from minivlm.cache import policies as shipped
from minivlm.cache.accounting import full_bytes, live_bytes
from minivlm.cache.policies.avl import AVLSettings
from minivlm.cache.policy import Policy
from minivlm.cache.prefill_pass import PrefillPass
from minivlm.errors import UserError
from paths import ROOT
from policies import prompt_ids

GUIDE = ROOT / "docs" / "policies.md"
MODEL = tiny_model(8, layers=2, heads=(4, 2))
PROMPTS = [prompt_ids(MODEL, 3, 30, 9), prompt_ids(MODEL, 2, 12, 20)]


@pytest.fixture
def tova(tmp_path) -> Path:
    """The guide's file."""
    file, _ = python_blocks()
    assert file.count("\n") < 45
    path = tmp_path / "tova.py"
    path.write_text(file)
    return path


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)


def policy_of(file: Path, line: str = "") -> Policy:
    """The policy of a command line that names this file."""
    words = ["--policy_file", str(file), *line.split()]
    parser = Parser("")
    policy_flags.add_arguments(parser, words)
    return policy_flags.from_args(parser.parse_args(words)).build(2)


def replay_answer(file: Path, **options: bool) -> Replay:
    replayed = replay_prefill(MODEL, policy_of(file, "--kv_budget 0.25"), PROMPTS, 12, **options)
    for step in range(11):
        replayed.step([10 + step, 30 + step])
    return replayed


def test_it_holds_what_the_last_query_attends_to_most(tova, monkeypatch):
    policy = policy_of(tova, "--kv_budget 0.25")
    budget = type(policy.budget)
    projected = []  # queries and keys of the prefill, by layer
    least_attended = []  # by step and layer: for each row a place in the tail
    attend, score_step = PrefillPass.attend, budget.score_step

    def attended(self, layer_idx, q, k, v):
        projected.append((q, k))
        return attend(self, layer_idx, q, k, v)

    def scored(self, scores, attn, live, new):
        mean = attn.mean(dim=1).masked_fill(~live[:, 0], torch.inf)  # [B, slots]
        least_attended.append(mean.argmin(dim=1).tolist())
        return score_step(self, scores, attn, live, new)

    monkeypatch.setattr(PrefillPass, "attend", attended)
    monkeypatch.setattr(budget, "score_step", scored)
    replayed = replay_prefill(MODEL, policy, PROMPTS, 12)
    for layer_idx, (q, k) in enumerate(projected):
        for row, ids in enumerate(PROMPTS):
            n = len(ids)
            keys = k[row, :, :n].repeat_interleave(2, dim=0)  # [H, n, D]
            scores = keys @ q[row, :, n - 1, :, None] / k.shape[-1] ** 0.5  # [H, n, 1]
            mean = scores.softmax(dim=1).mean(dim=0)[:, 0]
            assert replayed.live[0][row][layer_idx] == [set(mean.topk(n // 4).indices.tolist())] * 2
    for step in range(11):
        evicts = replayed.cache.tables[0][1, :, step].tolist()
        replayed.step([10 + step, 30 + step])
        for layer_idx, buffers in enumerate(replayed.cache.layers):
            for row in range(2):
                new = replayed.lengths[-1][row] - 1
                expected = replayed.live[-2][row][layer_idx][0] | {new}
                if evicts[row]:
                    slot = buffers.layout.tail_start + least_attended[layer_idx - 2][row]
                    expected -= {int(buffers.position[row, 0, slot])}
                assert replayed.live[-1][row][layer_idx] == [expected] * 2


def test_it_has_all_that_a_policy_has(tova):
    """Bytes within the share, the same answer from both decode implementations, and dead slots that do not matter."""
    plain, static, poisoned = (replay_answer(tova, **options) for options in ({}, {"static": True}, {"poison": True}))
    assert plain.live == static.live == poisoned.live
    for expected, from_static, from_poisoned in zip(plain.logits, static.logits, poisoned.logits, strict=True):
        torch.testing.assert_close(from_static, expected, atol=1e-4, rtol=0)
        assert torch.equal(from_poisoned, expected)
    assert 0 < live_bytes(plain.cache) <= 0.25 * full_bytes(plain.cache)
    assert policy_of(tova).name == "tova" and policy_of(tova).budget.share == 0.5
    assert policy_of(tova, "--policy avl") == shipped.preset("avl").build(2)
    with pytest.raises(UserError, match="--text_pruning_flag is not a setting of --policy tova"):
        policy_of(tova, "--text_pruning_flag")
    assert policy_of(tova, "--text_pruning_rate 0.3 --text_pruning_flag no").budget.share == 0.5


def test_the_lines_of_the_registry(tova):
    """The guide's line for its own policy, and that for a preset of a shipped one."""
    _, tova_line = python_blocks()
    (defined,) = policy_flags.load_policy_file(tova).values()
    presets = eval("{" + tova_line + "}", {"Preset": shipped.Preset, "TovaSettings": defined.settings})
    assert shipped.preset("tova", presets=presets, kv_budget=0.25).build(2).budget.share == 0.25
    (small_line,) = re.findall(r'`("avl-small": .*?)`', GUIDE.read_text())
    presets = eval("{" + small_line + "}", {"Preset": shipped.Preset, "AVLSettings": AVLSettings})
    assert shipped.preset("avl-small", presets=presets).build(2).vision.rate == 0.9


HEAD = "from dataclasses import dataclass\nfrom minivlm.cache import CacheSettings, setting\n"
CLASS = (
    HEAD + "@dataclass(frozen=True, kw_only=True)\nclass Mine(CacheSettings):\n    def build(self, num_layers): ...\n"
)
NAMED = CLASS + "    policy: str = 'm'\n"
# The text of a file, and what is said about it.
REFUSED = {
    "no policy": ("x = 1\n", "defines 0 subclasses of CacheSettings"),
    "no dataclass": (
        CLASS + "    policy: str = 'a'\n" + HEAD.replace("CacheSettings, ", "") + "class B(Mine): ...\ndel Mine\n",
        "B is no dataclass of its own",
    ),
    "a flag of the scripts": (
        CLASS + "    policy: str = 'm'\n    help: int = setting(1, 'x')\n",
        "--help of --policy_file",
    ),
    "no build": (CLASS.replace("def build", "def bild") + "    policy: str = 'm'\n", "Mine has no method `build`"),
    "two policies": (CLASS + "    policy: str = 'a'\nclass B(Mine): ...\n", "defines 2 subclasses of CacheSettings"),
    "a name that is taken": (CLASS + "    policy: str = 'avl'\n", "the policy is called 'avl', which is taken"),
    "no name": (
        CLASS + "    share: float = setting(0.5, 'share')\n",
        "the policy has no name (expected a field like `policy: str =",
    ),
    "no Python": ("def:\n", "SyntaxError"),
    "an exit": ("import sys\nsys.exit(0)\n", "SystemExit: 0"),
    "no end": ("def f(): f()\nf()\n", "RecursionError"),
    "an error of its own": ("class E(BaseException): ...\nraise E\n", "E: "),
    "a zero byte": ("x = '\0'\n", "null bytes"),
    "no text": ("x = '\udcff'\n", "SyntaxError"),
    "deep": ("(" * 10_000, "Error"),
    "a name that is no text": (CLASS + "    policy: int = 3\n", "the policy has no name"),
    "an error": ("1 / 0\n", "ZeroDivisionError: division by zero"),
    "another type": (NAMED + "    kv_budget: int = setting(1, 'x')\n", "--kv_budget has another type"),
    "no type of a flag": (NAMED + "    x: tuple = setting((), 'x')\n", "no type of a flag"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_refused(case, tmp_path):
    text, complaint = REFUSED[case]
    (tmp_path / "mine.py").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError) as error:
        policy_of(tmp_path / "mine.py")
    assert complaint in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]  # and no compiled file


def test_places_where_no_policy_is(tmp_path):
    os.mkfifo(tmp_path / "fifo.py")
    for path, said in (
        (tmp_path, "is a folder"),
        (tmp_path / "none.py", "no such file"),
        (tmp_path / "fifo.py", "is a FIFO"),
        (tmp_path / ("x" * 300), "name too long"),
    ):
        with pytest.raises(UserError, match=said):
            policy_of(path)
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match="not a Python file"):
        policy_of(tmp_path / "mine.txt")
