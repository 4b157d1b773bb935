"""Runs side by side, and sweeps over policies and budgets, with a model that needs no weights."""

import importlib.util
import json
import random
import statistics
from pathlib import Path

import pytest
from PIL import Image

from eval.accuracy.compare import paired_bootstrap
from eval.accuracy.results_page import write_results
from eval_helpers import evaluate, stub_run
from minivlm.app import cli


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Flags of a run on ten questions, in a fresh folder, and the reader that answers."""
    model = stub_run(tmp_path, monkeypatch)
    flags = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--tasks", "docvqa_val"]
    return tmp_path, model, flags


def only(folder):
    (path,) = folder.glob("*/results.json")
    return str(path.parent)


def test_compare(place, capsys):
    tmp_path, _, flags = place
    assert evaluate([*flags, "--output_path", str(tmp_path / "a")]) == 0
    assert (
        evaluate(
            [*flags, "--output_path", str(tmp_path / "b"), "--policy", "avl", "--kv_budget", "0.5", "--limit", "8"]
        )
        == 0
    )
    capsys.readouterr()
    assert evaluate(["compare", only(tmp_path / "a"), str(tmp_path / "b"), only(tmp_path / "a") + "/results.json"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == (
        "| docvqa_val | n | failed | exact_match | anls | KV MiB a page | of full | prefill ms | decode ms/token |"
    )
    assert [line.split(" | ")[1] for line in lines[2:5]] == ["10", "8", "10"] and "| 25.0% |" in lines[3]
    text = "\n".join(lines[5:])
    assert "policy: full → avl" in text and "kv_budget: None → 0.5" in text and "the same settings" in text
    assert "docvqa_val: 8 samples in both, 3 answers differ (37.5%)" in text
    # of the first eight, 0, 3 and 6 are one letter off; with half the budget 5, 6 and 7 are unknown
    assert "exact_match -0.2500, 95 % interval -0.6250 … +0.0000; better on 0, worse on 2, equal on 6" in text
    assert "docvqa_val: 10 samples in both, 0 answers differ (0.0%)" in text
    assert "exact_match +0.0000, 95 % interval +0.0000 … +0.0000; better on 0, worse on 0, equal on 10" in text


def test_compare_refuses_what_is_no_run(place, capsys):
    tmp_path, _, flags = place
    assert evaluate(["compare", str(tmp_path / "nothing")]) == 2
    assert "nothing: no results.json (expected the folder of a finished run)" in capsys.readouterr().err
    for size in "12":
        assert evaluate([*flags, "--output_path", str(tmp_path / "a"), "--batch_size", size]) == 0
    capsys.readouterr()
    assert evaluate(["compare", str(tmp_path / "a")]) == 2
    assert capsys.readouterr().err.endswith("a: 2 runs; name one of them (expected the folder of a finished run)\n")
    assert evaluate(["compare"]) == 2


def test_compare_refuses_runs_of_another_format(place, capsys):
    tmp_path, _, flags = place
    assert evaluate([*flags, "--output_path", str(tmp_path / "a")]) == 0
    path = Path(only(tmp_path / "a")) / "results.json"
    results = json.loads(path.read_text())
    results["settings"]["format"] = 1
    path.write_text(json.dumps(results))
    capsys.readouterr()
    assert evaluate(["compare", str(tmp_path / "a")]) == 2
    assert capsys.readouterr().err == f"error: {path}: is not a run in format 3 (run it again)\n"


def test_bootstrap_against_a_plain_one():
    rng = random.Random(1)
    differences = [rng.choice([-1, 0, 0, 0, 1, 1]) for _ in range(150)]
    low, high = paired_bootstrap(differences)
    means = sorted(statistics.fmean(rng.choices(differences, k=150)) for _ in range(4000))
    assert low == pytest.approx(means[100], abs=0.02) and high == pytest.approx(means[3900], abs=0.02)
    assert paired_bootstrap(differences) == (low, high)
    narrow = paired_bootstrap(differences, level=0.5)
    assert low < narrow[0] < statistics.fmean(differences) < narrow[1] < high
    assert paired_bootstrap([0.25]) == (0.25, 0.25)
    with pytest.raises(ValueError):
        paired_bootstrap([])


def test_sweep(place, capsys):
    tmp_path, model, flags = place
    output = tmp_path / "sweep"
    sweep = ["sweep", *flags, "--output-path", str(output), "--policies", "full", "avl", "h2o", "--budgets"]
    assert evaluate([*sweep, "0.5", "0.2"]) == 0
    asked = len(model.asked)
    assert asked == 50
    assert evaluate([*sweep, "0.5", "0.2", "0.05"]) == 0
    assert len(model.asked) == asked  # what is done is not asked again
    captured = capsys.readouterr()
    cells = json.loads((output / "sweep.json").read_text())["cells"]
    assert [cell["name"] for cell in cells] == ["full", "avl 50%", "avl 20%", "avl 5%", "h2o 50%", "h2o 20%", "h2o 5%"]
    assert [cell.get("results", {}).get("docvqa_val", {}).get("exact_match") for cell in cells] == [
        0.6,
        0.3,
        0.1,
        None,
        0.3,
        0.1,
        None,
    ]
    assert cells[3]["refused"].endswith("none of its 10 samples could be answered; --kv_budget 0.05 cannot be met")
    assert [cell["cost"]["docvqa_val"]["kv_bytes_mean"] for cell in cells[:3]] == [1000, 500, 200]
    assert "| avl 20% | 10 | 0 | 0.1000 ± 0.1000 |" in (output / "sweep.md").read_text()
    assert "h2o 5% was refused" in captured.out
    if importlib.util.find_spec("matplotlib") is None:
        assert "note: no picture without matplotlib (pip install 'minivlm[plots]')" in captured.err
    else:
        with Image.open(output / "sweep.png") as image:
            assert image.width > image.height > 500


def test_a_sweep_without_scores_has_no_picture(place, capsys):
    assert (
        evaluate(["sweep", *place[2], "--output_path", str(place[0] / "out"), "--policies", "full", "--predict_only"])
        == 0
    )
    assert "note: no picture, since nothing was scored" in capsys.readouterr().err
    assert "| full | 0 | 0 |" in (place[0] / "out" / "sweep.md").read_text()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--policies", "magic", "--budgets", "0.5"], "no cell of the sweep could be run; --policy 'magic' is unknown"),
        (["--budgets", "half"], "argument --budgets: 'half' is not a finite number"),
    ],
)
def test_sweep_refuses_what_cannot_run(place, capsys, flags, message):
    assert evaluate(["sweep", *place[2], "--output_path", str(place[0] / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_the_page_of_results(place, tmp_path):
    cli.run(write_results, [*place[2], "--output_path", str(tmp_path / "out"), "--docs", str(tmp_path / "docs")])
    text = (tmp_path / "docs" / "results.md").read_text()
    assert "10 questions, batch size 8, " in " ".join(text.split())
    assert "| full | 10 | 0 | 0.6000 ± 0.1633 |" in text and "| avl, window 16 50% | 10 | 0 | 0.3000" in text
    assert "- random 5% was refused: task docvqa_val: none of its 10 samples" in text
    assert "Against `full`: exact match -0.3000, 95 % interval" in text and "`avl` minus `h2o` at half: +0.0000" in text
    sections = json.loads((tmp_path / "docs" / "results.json").read_text())
    assert [len(sections[name]) for name in ("policies", "windows", "parts")] == [26, 15, 10]
    assert all("refused" not in cell for cell in sections["parts"])
    assert (
        ("![policies:" in text)
        == (tmp_path / "docs" / "policies.png").exists()
        == (importlib.util.find_spec("matplotlib") is not None)
    )
