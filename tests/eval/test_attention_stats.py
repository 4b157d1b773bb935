"""The analysis of attention, against dense attention and plain loops, and its command."""

import json
import math
import random

import pytest
import torch

import tiny
import weights
from eval.attention import command as attention_command
from eval.attention.statistics import answer_statistics, concordance, mean_statistics
from eval.attention.watch import AnswerAttention, watch_answer
from eval.demo.pages import heldout_pairs
from minivlm.app.cli import run
from minivlm.errors import UserError
from minivlm.generation.sampling import Sampling


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny"), "next-vicuna", text_config={"num_hidden_layers": 3})


class Dense:
    """A pass over the whole sequence that keeps attention: per layer [S, S], mean over heads."""

    def __init__(self):
        self.weights = []

    def survivors(self, layer):
        return None

    def attend(self, layer, q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = q @ k.mT / math.sqrt(q.shape[3])
        weights = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf).softmax(-1)
        self.weights.append(weights[0].mean(dim=0))
        return weights @ v


def test_rows_are_those_of_dense_attention(folder):
    vlm = weights.load(folder, device="cpu")
    page, question = next(heldout_pairs(1, 3))
    found = watch_answer(vlm, question.text, page.image, 5)
    inputs = vlm.processor([vlm.processor.question(question.text, 1)], [[page.image]])
    tokens = vlm.ask(question.text, [page.image], sampling=Sampling(5)).token_ids[: len(found.attn) - 1]
    ids, dense = torch.cat((inputs.input_ids, torch.tensor([tokens])), dim=1), Dense()
    embeds = vlm.model.embed(ids, vlm.image_features(inputs.pixel_values, inputs.image_sizes))
    vlm.model(embeds, torch.arange(ids.shape[1])[None], dense)
    length = inputs.input_ids.shape[1]
    assert (
        len(found.attn) > 2
        and found.is_vision.tolist() == (inputs.input_ids[0] == vlm.config.image_token_index).tolist()
    )
    for step, rows in enumerate(found.attn):
        columns = length + step
        expected = torch.stack([weights[columns - 1, :columns] for weights in dense.weights])
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-6)


def test_concordance_by_hand():
    rows = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4], [4, 1, 3, 2], [0, 0, 0, 0]])
    assert concordance(rows, 0.5).tolist() == [
        [1, 0, 0.5, 1],
        [0, 1, 0.5, 0],
        [0.5, 0.5, 1, 0.5],
        [1, 0, 0.5, 1],
    ]  # a tie: the first
    assert concordance(rows, 0.3).tolist() == [[1, 0, 1, 1], [0, 1, 0, 0], [1, 0, 1, 1], [1, 0, 1, 1]]
    assert concordance(rows, 1.0).eq(1).all()
    with pytest.raises(UserError, match="the top 0.2 of 4 vision tokens is not a single one"):
        concordance(rows, 0.2)


def by_sets(a, b, share: float) -> float:
    count = int(share * len(a))
    first, second = (set(sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]) for row in (a, b))
    return len(first & second) / count


def mean(values) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def close(found, expected) -> bool:
    """Equal nested lists, to five decimals; NaN is None."""
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    if expected is None:
        return found is None or math.isnan(found)
    return abs(found - expected) < 1e-5


def page(rng: random.Random, steps: int, layers: int = 3) -> AnswerAttention:
    """Random rows over a prompt with text between vision; values in tenths, so that ties occur."""
    kinds = (
        [False] * rng.randint(1, 3)
        + [True] * 9
        + [False] * rng.randint(0, 2)
        + [True] * 2
        + [False] * rng.randint(1, 4)
    )
    rows = [
        torch.tensor([[rng.randint(0, 10) / 10 for _ in range(len(kinds) + step)] for _ in range(layers)])
        for step in range(steps)
    ]
    return AnswerAttention(rows, torch.tensor(kinds), "")


@pytest.mark.parametrize("seed, steps", [(0, 1), (1, 2), (2, 7), (3, 12)])
def test_page_statistics_against_loops(seed, steps):
    given, shares, distances = page(random.Random(seed), steps), (0.2, 0.5), 4
    found = answer_statistics(given, shares, distances)
    kinds = given.is_vision.tolist()
    system = kinds.index(True)
    rows = [row.tolist() for row in given.attn]  # [steps][L][columns]
    vision = [i for i, is_vision in enumerate(kinds) if is_vision]
    text = [[i for i in range(system, len(kinds) + t) if i not in vision] for t in range(steps)]

    def seen(t, layer):
        return [rows[t][layer][i] for i in vision]

    layers = range(3)
    assert close(
        found["layers"].tolist(),
        [
            [[mean(by_sets(seen(t, i), seen(t, j), share) for t in range(steps)) for j in layers] for i in layers]
            for share in shares
        ],
    )
    assert close(
        found["steps"].tolist(),
        [
            [
                [
                    mean(by_sets(seen(t, i), seen(t + d, i), share) for t in range(steps - d))
                    for d in range(1, distances + 1)
                ]
                for i in layers
            ]
            for share in shares
        ],
    )
    assert close(
        found["decay"].tolist(),
        [
            [
                mean(rows[t][i][text[t][-1 - age]] for t in range(steps) if age < len(text[t]))
                for age in range(len(text[-1]))
            ]
            for i in layers
        ],
    )
    assert close(
        found["mass"].tolist(),
        [
            [
                [sum(row[i][:system]), sum(row[i][j] for j in vision), sum(row[i][j] for j in text[t])]
                for t, row in enumerate(rows)
            ]
            for i in layers
        ],
    )


def test_statistics_count_every_page_the_same():
    rng = random.Random(5)
    pages, shares = [page(rng, steps) for steps in (1, 6, 3)], (0.3,)
    found, each = mean_statistics(pages, shares, 4), [answer_statistics(one, shares, 4) for one in pages]
    (index,) = found["concordance"]
    assert found["pages"] == 3 and found["steps"] == [1, 6, 3] and found["vision_tokens"] == [11, 11, 11]
    between = sum(one["layers"][0] for one in each) / 3
    assert close(index["between_layers"], between.tolist())
    assert close(index["between_layers_mean"], mean(float(between[i, j]) for i in range(3) for j in range(3) if i != j))
    # One page has four steps or more; two have two or more.
    assert close(
        index["between_steps"],
        [
            [
                *((each[1]["steps"][0, i] + each[2]["steps"][0, i]) / 2).tolist()[:2],
                *each[1]["steps"][0, i].tolist()[2:],
            ]
            for i in range(3)
        ],
    )
    assert close(found["mass"]["vision"]["by_step"][3], float(each[1]["mass"][:, 3, 1].mean()))
    assert close(found["mass"]["text"]["by_step"][0], mean(float(one["mass"][:, 0, 2].mean()) for one in each))
    assert close(found["text_decay"]["mean"][0], mean(float(one["decay"][:, 0].mean()) for one in each))
    assert mean_statistics(pages[:1], shares, 4)["concordance"][0]["between_steps_mean"] == [None] * 4
    for share in (0, 1.5):
        with pytest.raises(UserError, match=f"the shares of top tokens are {share:g} .expected above 0, up to 1"):
            mean_statistics(pages, (share,), 4)
    with pytest.raises(UserError, match="no pages"):
        mean_statistics([], shares, 4)


def script(*arguments) -> None:
    run(attention_command.measure_attention, [str(argument) for argument in arguments])


def test_script_on_the_demos_pages(folder, tmp_path, capsys):
    flags = (
        "--model",
        folder,
        "--pages",
        2,
        "--max-new-tokens",
        4,
        "--top",
        0.2,
        0.4,
        "--distances",
        2,
        "--device",
        "cpu",
    )
    script(*flags, "--json", tmp_path / "stats.json")
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert stats["pages"] == 2 and stats["layers"] == 3 and all(1 <= steps <= 4 for steps in stats["steps"])
    assert [each["share"] for each in stats["concordance"]] == [0.2, 0.4]
    assert all(each["between_layers"][i][i] == 1 for each in stats["concordance"] for i in range(3))
    for step in range(max(stats["steps"])):
        assert sum(stats["mass"][name]["by_step"][step] for name in stats["mass"]) == pytest.approx(1, abs=1e-5)
    out = capsys.readouterr().out
    assert out.startswith(
        f"2 pages, {sum(stats['steps'])} steps, 3 layers\nconcordance of the top 20% (by chance 0.200): "
    )


def test_script_draws(folder, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    pages = [tmp_path / f"{i}.png" for i in range(2)]
    for path, (drawn, _) in zip(pages, heldout_pairs(2, 1), strict=True):
        drawn.image.save(path)
    script(
        "--model",
        folder,
        "--image",
        *pages,
        "--prompt",
        "What?",
        "--max_new_tokens",
        3,
        "--device",
        "cpu",
        "--json",
        tmp_path / "stats.json",
        "--plot",
        tmp_path / "stats.png",
    )
    assert json.loads((tmp_path / "stats.json").read_text())["pages"] == 2
    with Image.open(tmp_path / "stats.png") as picture:
        assert picture.size == (1950, 1200)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt", "What?"], "expected both --image and --prompt, or neither for the demo's pages"),
        (["--pages", "0"], "--pages is 0 (expected 1 to 65536)"),
        (["--distances", "0"], "--distances is 0 (expected 1 to 65536)"),
        (["--max_new_tokens", "0"], "--max_new_tokens is 0 (expected 1 to 65536)"),
        (["--pages", "1" + "0" * 12], f"--pages is 1{'0' * 12} (expected 1 to 65536)"),
        (["--top", "0.5", "1.5"], "--top has shares outside of the range above 0, up to 1"),
        (["--top", "nan"], "argument --top: 'nan' is not a finite number"),
        (["--json", "."], ".: is a folder (expected the name of a file to write)"),
        (["--plot", "out.png"], "--plot needs matplotlib (pip install 'minivlm[plots]')"),
        (["--image", "missing.png", "--prompt", "What?"], "missing.png: no such file"),
    ],
)
def test_script_refuses(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(attention_command, "find_spec", lambda name: None)  # as if matplotlib were missing
    with pytest.raises(SystemExit) as ended:
        script("--json", tmp_path / "out.json", *flags)
    assert ended.value.code == 2 and capsys.readouterr().err == f"error: {message}\n"
