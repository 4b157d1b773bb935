"""The runner with a model that needs no weights: batches, resuming, failures, folders, results."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

import eval_helpers
import weights
from eval.accuracy import run_folder, runner
from eval.accuracy.data import read_docvqa_json
from eval.accuracy.run_spec import ModelIdentity, RunSpec
from eval.accuracy.tasks import TASKS
from eval_helpers import Reader, read_run, truth, write_checkpoint, write_docvqa
from minivlm.errors import UserError
from paths import ROOT


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A data set of ten questions, a checkpoint folder, and a reader that is loaded from it."""
    write_docvqa(tmp_path / "data", 10)
    write_checkpoint(tmp_path / "model")
    model = Reader()
    model.loads = 0

    def load(*args, **kwargs):
        model.loads += 1
        return model

    monkeypatch.setattr(weights, "load", load)
    return tmp_path, model


def evaluate(place, *more, out="out", tasks="docvqa_val"):
    return eval_helpers.evaluate(
        [
            "--model",
            place[0] / "model",
            "--data",
            place[0] / "data",
            "--tasks",
            tasks,
            "--output_path",
            place[0] / out,
            *more,
        ]
    )


def test_scores_and_cost_of_a_run(place, capsys):
    assert evaluate(place) == 0
    results, rows = read_run(place[0] / "out")
    numbers = results["results"]["docvqa_val"]
    near = [len(truth(i)) for i in range(0, 10, 3)]  # one letter off
    assert numbers["exact_match"] == pytest.approx(0.6)
    assert numbers["anls"] == pytest.approx((6 + sum(1 - 1 / n for n in near)) / 10)
    assert numbers["exact_match_stderr"] == pytest.approx((0.6 * 0.4 / 9) ** 0.5)
    assert (numbers["n"], numbers["failed"], numbers["unscored"]) == (10, 0, 0)
    assert all(isinstance(number, (int, float)) for number in numbers.values())
    assert results["by_type"]["docvqa_val"]["kind1"]["exact_match"] == pytest.approx(3 / 5)
    assert results["cost"]["docvqa_val"] == {
        "prefill_ms": 500.0,
        "decode_ms_per_token": 62.5,
        "prompt_tokens": 30.0,
        "vision_tokens": 20.0,
        "new_tokens": 5.0,
        "kv_bytes_mean": 1000.0,
        "kv_full_bytes_mean": 2000.0,
        "kv_share": 0.5,
        "kv_bytes_peak": 1500,
        "kv_full_bytes_peak": 2000,
        "entries_attended_per_step": 16.0,
    }
    assert results["settings"]["tasks"]["docvqa_val"]["max_new_tokens"] == 32
    assert rows[4]["prediction"] == truth(4) and rows[4]["id"] == 104 and "prompt" not in rows[4]
    assert place[1].asked[0] == "What is 0?\nAnswer the question using a single word or phrase."
    printed = capsys.readouterr().out
    assert "exact_match 0.6000 ± 0.1633" in printed and "50.0% of the full cache" in printed


@pytest.mark.parametrize("size, shapes", [(1, [1] * 10), (7, [7, 3]), (16, [10])])
def test_batches_are_fixed_by_index(place, size, shapes):
    assert evaluate(place, "--batch-size", size) == 0
    assert place[1].batches == shapes
    results, rows = read_run(place[0] / "out")
    assert [rows[i]["prediction"] for i in range(10)] == [truth(i) if i % 3 else "x" + truth(i)[1:] for i in range(10)]
    assert results["cost"]["docvqa_val"]["prefill_ms"] == pytest.approx(500)


def test_a_finished_run_is_not_run_again(place, capsys):
    assert evaluate(place) == 0
    first = capsys.readouterr().out
    assert evaluate(place) == 0
    assert capsys.readouterr().out == first and place[1].loads == 1


def test_settings_never_mix(place):
    for more in (
        (),
        ("--seed", 1),
        ("--batch_size", 2),
        ("--policy", "avl"),
        ("--predict_only",),
        ("--dtype", "bfloat16"),
        ("--dtype", "float32"),
        ("--log_samples_suffix", "mine"),
    ):
        assert evaluate(place, *more) == 0
    (place[0] / "model" / "model.safetensors").write_bytes(b"\1" + bytes(99))
    assert evaluate(place) == 0
    counts = [
        json.loads(path.read_text())["results"]["docvqa_val"]["n"] for path in (place[0] / "out").glob("*/results.json")
    ]
    assert sorted(counts) == [0] + [10] * 7
    assert len(list((place[0] / "out").glob("docvqa_val_avl-v0.5-c0.7-i3_*"))) == 1
    assert len(list((place[0] / "out").glob("docvqa_val_full_mine_*"))) == 1


def test_a_torn_line_is_cut_and_half_a_batch_completed(place):
    assert evaluate(place, "--batch_size", 4, out="whole") == 0
    assert evaluate(place, "--batch_size", 4) == 0
    (path,) = (place[0] / "out").glob("*/samples.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][:-7])
    (path.parent / "results.json").unlink()
    place[1].batches.clear()
    assert evaluate(place, "--batch_size", 4) == 0
    assert place[1].batches == [4, 2]  # the batches that were not whole, in their own composition
    assert path.read_bytes().splitlines(keepends=True)[:5] == lines[:5]
    assert len(path.read_bytes().splitlines()) == 10
    assert read_run(place[0] / "out") == read_run(place[0] / "whole")


def test_failed_samples_are_named_counted_and_tried_again(place, capsys):
    data = place[0] / "data" / "documents"
    whole = (data / "page_3.png").read_bytes()
    (data / "page_3.png").unlink()
    (data / "page_7.png").write_bytes(b"not an image")
    assert evaluate(place, "--batch_size", 4) == 0
    captured = capsys.readouterr()
    assert "2 samples failed and are not in the scores" in captured.out and "failed 2" in captured.out
    assert "docvqa_val 103" in captured.err and "page_3.png: no such file" in captured.err
    assert "docvqa_val 107" in captured.err and "page_7.png" in captured.err
    results, _ = read_run(place[0] / "out")
    assert (results["results"]["docvqa_val"]["n"], results["results"]["docvqa_val"]["failed"]) == (8, 2)
    (data / "page_3.png").write_bytes(whole)
    assert evaluate(place, "--batch_size", 4) == 0
    results, rows = read_run(place[0] / "out")
    assert (results["results"]["docvqa_val"]["n"], results["results"]["docvqa_val"]["failed"]) == (9, 1)
    assert rows[3]["prediction"] == "x" + truth(3)[1:]


def test_a_refused_prompt_fails_alone(place, capsys):
    path = place[0] / "data" / "val_v1.0.json"
    content = json.loads(path.read_text())
    content["data"][2]["question"] = "Please refuse."
    path.write_text(json.dumps(content))
    assert evaluate(place, "--batch_size", 5) == 0
    results, rows = read_run(place[0] / "out")
    assert results["results"]["docvqa_val"]["n"] == 9
    assert rows[2]["error"] == "the prompt takes 99 tokens, the model's context is 9"
    assert results["cost"]["docvqa_val"]["prefill_ms"] == pytest.approx(500)


def test_no_sample_answered_is_an_error(place, capsys):
    for image in (place[0] / "data" / "documents").iterdir():
        image.unlink()
    assert evaluate(place) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: task docvqa_val: none of its 10 samples could be answered") and error.count("\n") == 1
    )
    assert not (place[0] / "out").exists()


def test_samples_can_be_logged_in_full_and_left_unscored(place, capsys):
    assert evaluate(place, "--log_samples", "--predict_only", "true") == 0
    results, rows = read_run(place[0] / "out")
    assert results["results"]["docvqa_val"] == {"n": 0, "failed": 0, "unscored": 10}
    assert rows[1]["answers"] == [truth(1), "never"] and rows[1]["token_ids"] == [1, 2]
    assert rows[1]["prompt"].startswith("What is 1?\n") and "scores" not in rows[1]


def test_test_split_writes_the_official_submission(place):
    write_docvqa(place[0] / "data", 6, split="test")
    (place[0] / "data" / "documents" / "page_4.png").unlink()
    assert evaluate(place, tasks="docvqa") == 0
    (path,) = (place[0] / "out").glob("*/docvqa_test_for_submission.json")
    submission = json.loads(path.read_text())
    assert submission == [
        {"questionId": 100 + i, "answer": "" if i == 4 else ("x" + truth(i)[1:] if i % 3 == 0 else truth(i))}
        for i in range(6)
    ]
    numbers = json.loads((path.parent / "results.json").read_text())["results"]
    assert numbers["docvqa_test"] == {"n": 0, "failed": 1, "unscored": 5}
    assert numbers["docvqa"]["exact_match"] == numbers["docvqa_val"]["exact_match"]
    assert numbers["docvqa"]["n"] == 9 and numbers["docvqa"]["failed"] == 2


def test_a_group_takes_the_splits_that_are_there(place, capsys):
    assert evaluate(place, tasks="docvqa") == 0
    assert "left out: " in capsys.readouterr().err
    results, _ = read_run(place[0] / "out")
    assert set(results["results"]) == {"docvqa", "docvqa_val"}


@pytest.mark.parametrize("target", ["samples.jsonl", "results.json"])
def test_a_full_disk_loses_nothing(place, monkeypatch, capsys, target):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    real, real_bytes = os.write, Path.write_bytes
    with monkeypatch.context() as patch:
        if target == "samples.jsonl":
            patch.setattr(
                run_folder.os, "write", lambda file, data: full() if len(place[1].asked) > 4 else real(file, data)
            )
        else:
            patch.setattr(
                Path, "write_bytes", lambda path, data: full() if b'"seconds"' in data else real_bytes(path, data)
            )
        assert evaluate(place) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and f"{target}: cannot be written (No space left on device)" in error
    assert not list((place[0] / "out").glob("*/results.json")) and not list((place[0] / "out").glob("*/.*"))
    asked = len(place[1].asked)
    assert evaluate(place) == 0
    assert len(place[1].asked) == (asked + 6 if target == "samples.jsonl" else 10)


def test_unwritable_and_occupied_folders(place, capsys):
    (place[0] / "file").touch()
    assert evaluate(place, out="file/out") == 2
    assert "cannot write there" in capsys.readouterr().err
    assert evaluate(place) == 0
    (run,) = (place[0] / "out").iterdir()
    capsys.readouterr()
    assert evaluate(place, "--batch_size", 3, out=f"out/{run.name}") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        error
        == f"error: {run}: holds a run with other settings (batch_size 1 there, 3 now); name another --output_path"
    )
    assert evaluate(place, out=f"out/{run.name}") == 0  # the run's own folder is the run


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks", "docvqa_vall"], "unknown task 'docvqa_vall' (known: docvqa, docvqa_val, docvqa_test, infovqa_val"),
        (["--tasks", "vqav2_val"], "task vqav2_val: VQAv2 is not supported"),
        (["--tasks", "nocaps"], "task nocaps: Nocaps is not supported"),
        (["--tasks", "flickr30k_test"], "task flickr30k_test: Flickr30k is not supported"),
        (["--tasks", ","], "no task named"),
        (
            ["--tasks", "docvqa_test"],
            "no test data for task docvqa_test (expected test_v*.json or DocVQA/test-*.parquet)",
        ),
        (["--limit", "0"], "--limit 0: expected a count of at least 1, or a share between 0 and 1"),
        (["--limit", "2.5"], "--limit 2.5: expected"),
        (["--limit", "-1"], "--limit -1: expected"),
        (["--limit", "nan"], "--limit: 'nan' is not a finite number"),
        (["--limit", "inf"], "--limit: 'inf' is not a finite number"),
        (["--limit", "1e999"], "--limit: '1e999' is not a finite number"),
        (["--limit", "many"], "argument --limit: 'many' is not a finite number"),
        (["--batch_size", "0"], "--batch_size 0: expected at least 1"),
        (["--log_samples_suffix", "../../x"], "--log_samples_suffix cannot be part of a folder's name"),
        (["--log_samples_suffix", "a\nb"], "--log_samples_suffix cannot be part of a folder's name"),
        (["--log_samples_suffix", "x" * 5000], "--log_samples_suffix cannot be part of a folder's name"),
        (["--tasks", "x" * 5000], "unknown task 'xxx"),
        (["--data", "/dev/zero"], "/dev/zero: is a device (expected a file)"),
        (["--data", "~nobody/data"], "~nobody/data: "),
        (["--model_args", "batch_size=" + "9" * 5000], "--model_args: batch_size"),
        (["--model_args", "pretrained"], "--model_args: 'pretrained' is not of the form name=value"),
        (["--model", "llava_hf"], "--model llava_hf names no checkpoint"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--policy", "magic"], "--policy 'magic' is unknown"),
    ],
)
def test_bad_arguments_are_one_line(place, capsys, arguments, message):
    assert evaluate(place, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and message in captured.err
    assert captured.err.count("\n") == 1
    assert not (place[0] / "out").exists()


def test_the_original_command_line(place, capsys):
    arguments = f"""--model llava_hf
        --model_args pretrained={place[0] / "model"},device_map=auto,attn_implementation=eager
        --tasks docvqa --batch_size 1 --log_samples --output_path {place[0] / "out"} --log_samples_suffix llava_1_5_7b
        --vision_adaptive_attention true --vision_adaptive_attention_rate 0.5
        --vision_adaptive_attention_compute_rate 0.7 --vision_adaptive_attention_update_interval 3
        --data {place[0] / "data"}"""
    assert eval_helpers.evaluate(arguments.split()) == 0
    captured = capsys.readouterr()
    assert "note: --model_args device_map=auto has no meaning here" in captured.err
    (path,) = (place[0] / "out").glob("docvqa_avl-v0.5-c0.7-i3_llava_1_5_7b_*/results.json")
    results = json.loads(path.read_text())
    assert results["settings"]["cache"]["vision"] is True and results["settings"]["cache"]["vision_interval"] == 3
    assert {"exact_match", "anls", "n"} <= set(results["results"]["docvqa"])


def subprocess_arguments(place, out):
    return [
        str(ROOT / "tests" / "helpers" / "eval_helpers.py"),
        "--model",
        str(place / "model"),
        "--data",
        str(place / "data"),
        "--tasks",
        "docvqa_val",
        "--output_path",
        str(place / out),
        "--batch_size",
        "3",
    ]


def environment(delay=0.0):
    return {**os.environ, "READER_DELAY": str(delay), "OMP_NUM_THREADS": "1"}


def test_killed_at_random_moments_and_resumed(tmp_path):
    write_docvqa(tmp_path / "data", 40)
    write_checkpoint(tmp_path / "model")
    command = [sys.executable, *subprocess_arguments(tmp_path, "killed")]
    rng = random.Random(0)
    for part in range(3):
        running = subprocess.Popen(command, env=environment(0.02), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        goal = rng.randrange(part * 13 + 1, part * 13 + 13)  # killed once so many samples are on disk
        while running.poll() is None:
            found = list((tmp_path / "killed").glob("*/samples.jsonl"))
            if found and found[0].read_bytes().count(b"\n") >= goal:
                break
            time.sleep(0.005)
        assert running.poll() is None
        running.send_signal(signal.SIGKILL)
        running.wait()
        assert not list((tmp_path / "killed").glob("*/results.json"))
    for arguments in (command, [sys.executable, *subprocess_arguments(tmp_path, "whole")]):
        finished = subprocess.run(arguments, env=environment(), capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
    assert read_run(tmp_path / "killed") == read_run(tmp_path / "whole")


def test_two_processes_equal_one(tmp_path):
    write_docvqa(tmp_path / "data", 11)
    (tmp_path / "data" / "documents" / "page_5.png").unlink()
    write_checkpoint(tmp_path / "model")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for prefix, out in (([sys.executable], "one"), (torchrun, "two")):
        finished = subprocess.run(
            [*prefix, *subprocess_arguments(tmp_path, out)], env=environment(), capture_output=True, text=True
        )
        assert finished.returncode == 0, finished.stderr
    assert read_run(tmp_path / "one") == read_run(tmp_path / "two")
    (samples,) = (tmp_path / "two").glob("*/samples.jsonl")
    assert sorted(json.loads(line)["index"] for line in samples.read_text().splitlines()) == list(range(11))


def test_decoding_does_not_wait_for_the_model(place):
    """The images of the next two batches are decoded while a batch is being answered."""
    dataset = read_docvqa_json(place[0] / "data" / "val_v1.0.json", "validation")
    decoded = []
    spied = replace(dataset, image=lambda index: decoded.append(index) or dataset.image(index))
    stream = runner.decoded_ahead(spied, [dataset.samples[i : i + 2] for i in range(0, 10, 2)])
    next(stream)
    deadline = time.monotonic() + 20
    while len(decoded) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert decoded == [0, 1, 2, 3, 4, 5]
    assert [sample.index for batch in stream for sample, _ in batch] == list(range(2, 10))


def test_no_thread_outlives_a_run_that_breaks_off(place, monkeypatch):
    """A decoding thread that the garbage collector ended could wait for itself, and the next run with it."""

    def refuse(folder, outcomes):
        raise UserError("the disk is full")

    monkeypatch.setattr(run_folder.RunFolder, "append", refuse)
    task, dataset = TASKS["docvqa_val"], read_docvqa_json(place[0] / "data" / "val_v1.0.json", "validation")
    spec = RunSpec([(task, dataset)], ModelIdentity("m", "w", "cpu", "float32"))
    with pytest.raises(UserError) as kept:  # its traceback keeps the frames, and with them the generator
        runner.evaluate(spec, place[0] / "out", lambda: place[1])
    assert kept.tb is not None and not [t for t in threading.enumerate() if "ThreadPool" in t.name]
