"""The policy of docs/policies.md, run as it stands there."""

from __future__ import annotations

import re
import sys
from types import ModuleType

import pytest
import torch

from avl_cases import tiny_model
from cache_helpers import Player
from minivlm.app import policy_flags
from minivlm.app.cli import Parser
from minivlm.cache import settings
from minivlm.cache.policies import PRESETS
from minivlm.cache.prefill_pass import PrefillPass
from paths import ROOT
from policies import embed, prompt_ids

GUIDE = ROOT / "docs" / "policies.md"
MODEL = tiny_model(8, layers=2, heads=(4, 2))
IDS = [prompt_ids(MODEL, 3, 30, 9), prompt_ids(MODEL, 2, 12, 20)]


@pytest.fixture
def tova(monkeypatch) -> ModuleType:
    """The guide's file as a module, and its line in the registry."""
    file, line = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert file.count("\n") < 100 and line.count("\n") == 1
    module = ModuleType("minivlm.cache.tova")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(file, "docs/policies.md", "exec"), vars(module))
    for name, preset in eval("{" + line + "}", {"Preset": settings.Preset, "tova": module}).items():
        monkeypatch.setitem(PRESETS, name, preset)
    return module


def policy_of(line: str):
    parser = Parser("")
    policy_flags.add_arguments(parser)
    return policy_flags.from_args(parser.parse_args(line.split())).build(2)


def play(static: bool, poison: bool = False) -> Player:
    player = Player(MODEL, policy_of("--policy tova --kv_budget 0.25"), batch=2, static=static, poison=poison)
    player.turn(embed(MODEL, IDS), [ids == 47 for ids in IDS], 12)
    for step in range(11):
        player.step([10 + step, 30 + step])
    return player


def test_it_holds_what_the_last_row_attends_to_most(tova, monkeypatch):
    given, evicted, attend, score_step = [], [], PrefillPass.attend, tova.Tova.score_step

    def attended(self, layer, q, k, v):
        given.append((q, k))
        return attend(self, layer, q, k, v)

    def scored(self, scores, row, live, new):
        weights = row.mean(dim=1).masked_fill(~live[:, 0], torch.inf)  # [B, slots]
        evicted.append(weights.argmin(dim=1).tolist())
        return score_step(self, scores, row, live, new)

    monkeypatch.setattr(PrefillPass, "attend", attended)
    monkeypatch.setattr(tova.Tova, "score_step", scored)
    player = Player(MODEL, policy_of("--policy tova --kv_budget 0.25"), batch=2)
    player.turn(embed(MODEL, IDS), [ids == 47 for ids in IDS], 12)
    for (q, k), layer in zip(given, range(2)):
        for b, ids in enumerate(IDS):
            n = len(ids)
            keys = k[b, :, :n].repeat_interleave(2, dim=0)  # [H, n, D]
            row = (keys @ q[b, :, n - 1, :, None] / k.shape[-1] ** 0.5).softmax(dim=1).mean(dim=0)[:, 0]
            assert player.held[0][b][layer] == [set(row.topk(n // 4).indices.tolist())] * 2
    for step in range(11):
        evicts = player.cache.tables[1, :, step].tolist()
        player.step([10 + step, 30 + step])
        for i, layer in enumerate(player.cache.layers):
            for b in range(2):
                gone = int(layer.position[b, 0, layer.tail + evicted[i - 2][b]])
                held = player.held[-2][b][i][0] | {player.seen[-1][b] - 1}
                assert player.held[-1][b][i] == [held - {gone} if evicts[b] else held] * 2


def test_it_has_all_that_a_policy_has(tova):
    """Bytes within the share, the same from both decode implementations, and dead slots that do not matter."""
    plain, static, poisoned = play(False), play(True), play(False, poison=True)
    assert plain.held == static.held == poisoned.held
    for a, b, c in zip(plain.logits, static.logits, poisoned.logits):
        torch.testing.assert_close(b, a, atol=1e-4, rtol=0)
        assert torch.equal(a, c)
    assert 0 < plain.live_bytes(cache) <= 0.25 * plain.full_bytes(cache)
    assert policy_of("--policy tova").budget == tova.Tova(0.5)
    with pytest.raises(settings.UserError, match="--policy tova decides over text and vision alike"):
        policy_of("--policy tova --text_pruning_flag")
