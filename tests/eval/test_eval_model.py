"""The evaluator on a tiny random checkpoint: answers depend on nothing but the settings."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters

import tiny
from eval.demo.pages import write_docvqa
from eval_helpers import evaluate, read_run
from paths import ROOT
from policies import needs_compiler


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, nine drawn pages, and the command that evaluates one on the other."""
    folder = tmp_path_factory.mktemp("eval")
    tiny.write(folder / "model", "next-vicuna", text_config={"num_hidden_layers": 3})
    write_docvqa(folder / "data", 9, seed=0)
    return folder, [
        "--model",
        str(folder / "model"),
        "--data",
        str(folder / "data"),
        "--tasks",
        "docvqa_val",
        "--device",
        "cpu",
    ]


def answers(output):
    """Predictions and scores by index."""
    return {index: (row["prediction"], row["scores"], row["finish"]) for index, row in read_run(output)[1].items()}


POLICIES = {
    "full": (),
    "everything": (
        "--policy",
        "avl",
        "--text_pruning_flag",
        "--text_init_cache",
        "4",
        "--prefill_filter_flag",
        "--prefill_filter_layer",
        "1",
    ),
    "random": ("--policy", "random", "--kv_budget", "0.8"),
    "h2o": ("--policy", "h2o", "--kv_budget", "0.4"),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_batch_size_changes_no_float32_answer(place, tmp_path, policy):
    for size in ("1", "7"):
        arguments = [
            *place[1],
            *POLICIES[policy],
            "--batch_size",
            size,
            "--output_path",
            str(tmp_path / size),
            "--dtype",
            "float32",
        ]
        assert evaluate(arguments) == 0
    assert answers(tmp_path / "1") == answers(tmp_path / "7")
    assert len({prediction for prediction, *_ in answers(tmp_path / "1").values()}) > 1
    single, batch = (read_run(tmp_path / size)[0]["cost"]["docvqa_val"] for size in ("1", "7"))
    for name in ("prompt_tokens", "vision_tokens", "new_tokens", "kv_bytes_mean", "kv_share"):
        assert single[name] == pytest.approx(batch[name])
    assert (single["kv_share"] == 1) == (policy == "full")
    assert single["kv_full_bytes_mean"] == pytest.approx(
        single["prompt_tokens"] * 3 * 2 * 2 * 16 * 4
    )  # layers, k and v, heads, size, bytes
    assert single["entries_attended_per_step"] > 0 and single["kv_bytes_peak"] < batch["kv_bytes_peak"]


def test_results_record_the_prompt(place, tmp_path):
    assert evaluate([*place[1], "--limit", "2", "--output_path", str(tmp_path)]) == 0
    results, _ = read_run(tmp_path)
    assert results["template"] == "USER: <image>\n{question} ASSISTANT:"
    assert results["prompts"]["docvqa_val"].endswith("\nAnswer the question using a single word or phrase. ASSISTANT:")
    assert results["settings"]["device"] == "cpu" and results["settings"]["model"] == "model"


def test_half_precision_flips_are_counted(place, tmp_path, capsys):
    for size in ("1", "4"):
        assert (
            evaluate([*place[1], "--batch_size", size, "--dtype", "bfloat16", "--output_path", str(tmp_path / size)])
            == 0
        )
    assert evaluate(["compare", str(tmp_path / "1"), str(tmp_path / "4")]) == 0
    single, batch = (answers(tmp_path / size) for size in ("1", "4"))
    assert single.keys() == batch.keys()
    flips = sum(single[index][0] != batch[index][0] for index in single)
    assert f"9 samples in both, {flips} answers differ ({flips / 9:.1%})" in capsys.readouterr().out


def test_two_processes_answer_as_one(place, tmp_path):
    """With the same number of threads: others round differently, and near-ties are many here."""
    more = ["--batch_size", "2", "--policy", "avl", "--output_path"]
    starts = {
        "one": ["-m", "eval"],
        "two": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "eval"],
    }
    for name, start in starts.items():
        done = subprocess.run(
            [sys.executable, *start, *place[1], *more, str(tmp_path / name)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert answers(tmp_path / "one") == answers(tmp_path / "two")
    one, two = (read_run(tmp_path / out)[0] for out in ("one", "two"))
    assert one["results"] == two["results"] and one["settings"] == two["settings"]


@needs_compiler
@pytest.mark.slow
def test_compiled_runs_answer_as_eager_ones(place, tmp_path):
    """Each block and kind of step is compiled for batches, and once more for the last page, which is alone."""
    torch._dynamo.reset()
    counters.clear()
    for name, flags in {"eager": (), "compiled": ("--compile",)}.items():
        arguments = [*place[1], "--policy", "avl", "--batch_size", "4", "--dtype", "float32", *flags]
        assert evaluate([*arguments, "--output_path", str(tmp_path / name)]) == 0
    assert answers(tmp_path / "compiled") == answers(tmp_path / "eager")
    for name in ("eager", "compiled"):
        (settings,) = (tmp_path / name).glob("*/settings.json")
        assert json.loads(settings.read_text())["compiled"] == (name == "compiled")
    assert 0 < counters["stats"]["unique_graphs"] <= 16
    torch._dynamo.reset()
