"""The run on a GPU, `python benchmarks/gpu.py`, without one: its pieces, its page, and what stops it.

No time is tested.
"""

from __future__ import annotations

import copy
import json
import os
import sys

import pytest
import torch

from cli_helpers import Ran, call, refused
from eval.speed.benchmark import run_benchmark
from eval.speed.benchmark_flags import parse_benchmark, parse_candidate
from eval.speed.gpu import command, limits
from eval.speed.gpu.page import page, target_table
from eval.speed.gpu.pieces import Piece, pieces
from eval.speed.gpu.targets import TARGETS
from eval.speed.shapes import shape_config
from eval.speed.step_bytes import weight_bytes
from minivlm.cache.policies import preset
from paths import ROOT

DEVICE = {
    "type": "cpu",
    "machine": {"device": "a card", "memory": 80 << 30, "cuda": "13.0"},
    "driver": "580.1",
    "versions": {"torch": "2.13.0"},
    "bandwidth": {"copy": 2e12, "read": 1.9e12},
    "command": "python device",
    "seconds": 1.0,
}


def made(name: str, code: str, **options) -> Piece:
    """A piece that runs a line of Python."""
    return Piece(name, f"about {name}", 0.1, ("-c", code), **options)


def writes(content: dict) -> str:
    """A line of Python that writes its JSON."""
    return f"import json, sys; json.dump({content}, open(sys.argv[-1], 'w')); print('wrote')"


def run(monkeypatch, out, *flags: object, made_up=()) -> Ran:
    """A rehearsal of a made-up device and other made-up pieces."""
    every = [made("device", writes(DEVICE)), *made_up]
    monkeypatch.setattr(command, "pieces", lambda rehearsal: every)
    return call(command.run_gpu, "--rehearse", "--out", out, *flags)


def test_an_interrupted_run_goes_on_where_it_was(monkeypatch, tmp_path):
    counts = tmp_path / "counts"
    counting = f"open({str(counts)!r}, 'a').write('x'); " + writes({})
    made_up = [made("one", counting), made("two", counting)]
    ran = run(monkeypatch, tmp_path / "out", "--pieces", "device", "one", made_up=made_up)
    assert ran.status == 0 and counts.read_text() == "x"
    assert "### two: about two\n\nNot measured: it has not run yet." in (tmp_path / "out" / "README.md").read_text()
    ran = run(monkeypatch, tmp_path / "out", made_up=made_up)
    assert ran.status == 0 and counts.read_text() == "xx"
    assert "one: has a result\n" in ran.out and "two: done in" in ran.out
    kept = json.loads((tmp_path / "out" / "two.json").read_text())
    assert kept["command"].startswith("python -c ") and kept["command"].endswith("/out/two.json")
    run(monkeypatch, tmp_path / "out", "--again", "--pieces", "two", made_up=made_up)
    assert counts.read_text() == "xxx"


@pytest.mark.parametrize(("code", "said"), [
    ("print('some'); raise ValueError('of the test')", "ValueError: of the test"),
    ("import os, signal; print('at work', flush=True); os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL: at work"),
    (writes({}) + "; sys.exit(3)", "wrote"),
    ("import sys; sys.exit(3)", "exit status 3"),
])  # fmt: skip
def test_a_piece_that_fails_ends_no_other(monkeypatch, tmp_path, code, said):
    after = made("after", "print('3 passed')", writes_json=False)
    ran = run(monkeypatch, tmp_path, made_up=[made("bad", code), after])
    assert ran.status == 2 and f"bad: failed, {said}\n" in ran.out
    assert ran.err.startswith("error: failed: bad (see README.md") and ran.err.count("\n") == 1
    assert not (tmp_path / "bad.json").exists()
    text = (tmp_path / "README.md").read_text()
    assert "### bad: about bad\n\nNot measured: it did not finish (" in text
    assert json.loads((tmp_path / "after.json").read_text())["said"] == "3 passed" and "3 passed" in text


def test_a_piece_that_takes_too_long_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "LONGEST", 1)
    ran = run(monkeypatch, tmp_path, "--pieces", "slow", made_up=[made("slow", "import time; time.sleep(100)")])
    assert ran.status == 2 and "slow: failed, ended after 1 s" in ran.out


def test_without_a_usable_device_nothing_else_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "pieces", lambda rehearsal: [made("device", "1 / 0"), made("one", writes({}))])
    ran = call(command.run_gpu, "--rehearse", "--out", tmp_path)
    assert ran.status == 2 and "device: failed, ZeroDivisionError" in ran.out and "one:" not in ran.out
    assert "The device was not looked at yet." in (tmp_path / "README.md").read_text()


def test_time_that_is_up(monkeypatch, tmp_path):
    long = Piece("long", "about long", 6.0, ("-c", writes({})))
    ran = run(monkeypatch, tmp_path, "--minutes", 5, made_up=[long])
    assert ran.status == 0 and "stopped before long, about 6 minutes; the same command goes on from here\n" in ran.out
    assert (tmp_path / "device.json").exists() and not (tmp_path / "long.json").exists()


def test_ctrl_c(monkeypatch, tmp_path):
    """The piece under way ends, too, and has no result."""
    code = (
        "import os, signal, time; print(os.getpid(), flush=True); os.kill(os.getppid(), signal.SIGINT); time.sleep(100)"
    )
    ran = run(monkeypatch, tmp_path, made_up=[made("one", code)])
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "logs" / "one.log").read_text()), 0)
    assert ran.status == 130 and "the same command again to continue" in ran.err
    assert (tmp_path / "device.json").exists() and not (tmp_path / "one.json").exists()


def test_what_cannot_run_here_is_left_out(monkeypatch, tmp_path):
    made_up = [made("gpu", "1 / 0", needs_gpu=True), made("peer", "1 / 0", needs_transformers=True)]
    monkeypatch.setattr("eval.speed.gpu.pieces.find_spec", lambda name: None)
    ran = run(monkeypatch, tmp_path, made_up=made_up)
    assert ran.status == 0
    assert "gpu: left out, it needs a GPU\npeer: left out, transformers is not installed\n" in ran.out
    assert "Not measured: transformers is not installed." in (tmp_path / "README.md").read_text()


def test_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(call(command.run_gpu, "--out", tmp_path / "out"), "no CUDA device that torch can use (expected an NVIDIA")
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_and_measurements_are_not_mixed(monkeypatch, tmp_path):
    (tmp_path / "device.json").write_text(json.dumps(DEVICE | {"type": "cuda"}))
    refused(run(monkeypatch, tmp_path), "holds the results of measurements (expected another --out)")


@pytest.mark.parametrize(("flags", "told"), [
    (["--pieces", "batch-2"], "--pieces 'batch-2' is unknown (expected some of device, tests, batch-1,"),
    (["--minutes", "0"], "--minutes is 0 (expected more than 0)"),
    (["--rehearse"], "--rehearse needs a folder of its own"),
    (["--stray"], "unrecognized arguments: --stray"),
])  # fmt: skip
def test_mistakes(flags, told):
    refused(call(command.run_gpu, *flags), told)


def test_a_result_that_is_no_json(monkeypatch, tmp_path):
    (tmp_path / "one.json").write_text("{")
    refused_at_the_end = run(monkeypatch, tmp_path, made_up=[made("one", writes({}))])
    assert refused_at_the_end.status == 2 and "one.json: no JSON" in refused_at_the_end.err


def test_a_benchmark_of_nothing(monkeypatch):
    """A piece has only a peer, which may not be installed."""
    monkeypatch.delitem(sys.modules, "eval.speed.peer_transformers", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    flags = ("--shape", "cpu-tiny", "--device", "cpu", "--policy", "--peers", "transformers")
    refused(call(run_benchmark, *flags), "there is nothing to time (expected a policy, or a peer that is installed)")


@pytest.mark.parametrize("rehearsal", [False, True])
def test_the_commands(rehearsal, tmp_path):
    """All are listed without a GPU, and have flags that the benchmark knows. The README names them all."""
    ran = call(command.run_gpu, "--dry_run", *["--rehearse"] * rehearsal)
    readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for piece in pieces(rehearsal):
        assert f"{piece.name}: {piece.about}, about " in ran.out and f"`{piece.name}`" in readme
        words = piece.words(tmp_path, tmp_path)
        if words[0] == "scripts/benchmark.py":
            args, rest = parse_benchmark(words[1:], None)
            assert rest == [] and (args.policy or args.peers)
            for text in args.policy:
                parse_candidate(text, [], 0, False)
    assert ran.status == 0 and len(ran.out.splitlines()) == 2 * len(pieces(rehearsal))
    assert all(60 * piece.minutes < command.LONGEST for piece in pieces(rehearsal))


# Made-up measurements that meet every target, just so. Without an image a step of batch 32 takes 6 ms for 14 GB; of
# 50 GB of images `full` reads all, a core step 10, and a refresh 25.


def row(name: str, step_ms: float, gigabytes: float, limit_ms: float, **more) -> dict:
    return {
        "name": name,
        "prefill_ms": 1.0,
        "prefill_speedup": 1.0,
        "speedup": 1.0,
        "bytes_allow": 1.0,
        "step_ms": step_ms,
        "tokens_per_s": 1.0,
        "limit_ms": limit_ms,
        "share_of_limit": limit_ms / step_ms,
        "bytes_per_s": gigabytes * 1e9 / step_ms * 1e3,
        "decode_ms": {"full": {"median": step_ms, "q1": step_ms, "q3": step_ms, "n": 9}},
        "live_bytes": 100,
        "full_bytes": 100,
        "nbytes": 100,
        "peak_bytes": 100,
        "after_warm_up": {"graphs": 0, "cuda_graphs_recorded_again": 0},
        **more,
    }


def result(*cases: list[dict], **more) -> dict:
    described = [{"batch": 32, "vision_tokens": 9, "text_tokens": 9, "rows": rows} for rows in cases]
    return {"command": "python made_up", "seconds": 1.0, "machine": DEVICE["machine"], "cases": described, **more}


def results() -> dict[str, dict]:
    full = row("full", 40.0, 64.0, 32.0, compiled=True)
    kinds = {"core": 13.6, "refresh": 22.0}
    decode = {kind: {"median": ms, "q1": ms, "q3": ms, "n": 9} for kind, ms in kinds.items()}
    avl = row(
        "avl",
        40 / 64 * 32 / 0.91,
        32.0,
        16.0,
        decode_ms=decode,
        step_bytes={"core": 24e9, "refresh": 39e9},
        compiled=True,
    )
    return {
        "device": DEVICE,
        "tests": {"said": "16 passed in 60 s", "command": "python -m pytest", "seconds": 60.0},
        "batch-1": result([row("full", 10.0, 15.0, 8.0, compiled=True)]),
        "batch-1-peers": result([row("full", 10.0, 15.0, 8.0), row("transformers:static", 13.0, 15.0, 8.0)]),
        "batch-32": result([row("full", 6.0, 14.0, 5.0)], [full]),
        "batch-32-avl": result([avl]),
        "batch-32-peers": result([row("transformers", 40.0, 64.0, 32.0)]),
        "largest-batch": result(
            [row("full", 9, 9, 9), row("avl", 9, 9, 9, live_bytes=50)], largest_batch={"full": 40, "avl": 72}
        ),
    }


def verdicts(measured: dict) -> dict[str, str]:
    """The verdict of each target, from the page's table."""
    lines = [line.split(" | ") for line in target_table(measured).splitlines()[2:]]
    assert [line[0].removeprefix("| ") for line in lines] == [target.name for target in TARGETS]
    return {line[0].removeprefix("| "): line[4].strip() if "not measured" not in line else "none" for line in lines}


def test_targets_that_are_met():
    assert set(verdicts(results()).values()) == {"met"}
    table = target_table(results())
    assert "80%: 10.00 ms | 8.00 ms for 15.0 GB | met | batch-1 |" in table
    assert "1.80 x: 72 and 40 prompts | 2.00 x, by KV held | met" in table


@pytest.mark.parametrize(("piece", "case", "name", "changes", "missed"), [
    ("batch-1", 0, 0, {"share_of_limit": 0.79}, ["batch 1: share"]),
    ("batch-1-peers", 0, 1, {"step_ms": 12.9}, ["batch 1: against"]),
    ("batch-32", 1, 0, {"share_of_limit": 0.69}, ["batch 32: share"]),
    ("batch-32-peers", 0, 0, {"step_ms": 39.0}, ["batch 32: against"]),
    ("batch-32-avl", 0, 0, {"step_ms": 23.0, "bytes_per_s": 32e12 / 23}, ["batch 32: `avl`"]),
    ("batch-32-avl", 0, 0, {"decode_ms": {"core": {"median": 13.9}}}, ["batch 32: core"]),
    ("batch-32-avl", 0, 0, {"after_warm_up": {"graphs": 1}}, ["compiled"]),
])  # fmt: skip
def test_targets_that_are_missed(piece, case, name, changes, missed):
    measured = copy.deepcopy(results())
    measured[piece]["cases"][case]["rows"][name] |= changes
    found = [target for target, verdict in verdicts(measured).items() if verdict != "met"]
    assert [target[: len(start)] for target, start in zip(found, missed, strict=True)] == missed
    assert verdicts(measured)[found[0]] == "**missed**"


def test_a_smaller_largest_batch_and_skipped_tests():
    measured = results()
    measured["largest-batch"]["largest_batch"]["avl"] = 71
    measured["tests"]["said"] = "15 passed, 1 skipped in 60 s"
    missed = [target for target, verdict in verdicts(measured).items() if verdict == "**missed**"]
    assert missed == ["tests on the device", "largest batch, `avl` to `full`"]


@pytest.mark.parametrize("piece", [name for target in TARGETS for name in target.pieces])
def test_a_missing_piece_is_said(piece):
    """In the targets that need it, and in no other."""
    measured = results()
    del measured[piece]
    found = verdicts(measured)
    for target in TARGETS:
        assert found[target.name] == ("none" if piece in target.pieces else "met")


def test_a_peer_that_was_left_out():
    measured = results()
    del measured["batch-1-peers"]["cases"][0]["rows"][1]
    assert [target for target, verdict in verdicts(measured).items() if verdict == "none"] == [TARGETS[2].name]


def test_the_page():
    measured = results()
    measured["profile-batch-1"] = result()
    measured["profile-batch-1"]["cases"] = [
        {**measured["batch-1"]["cases"][0], "profile": {"full": {"full step": "aten::mm  1 ms"}}}
    ]
    measured["sweep"] = result([row("full", 1.0, 1.0, 1.0)], machine={"device": "another card"})
    text = page(measured, pieces(False), {}, rehearsal=False)
    assert "a card, 80 GiB, driver 580.1, CUDA 13.0; torch 2.13.0." in text and "It copies 2000 GB/s" in text
    assert "**Measured on another device: sweep.**" in text and "![sweep](sweep.png)" in text
    assert "<details><summary>full, full step</summary>\n\n```\naten::mm  1 ms\n```" in text
    assert "Largest batch that fits: full 40, avl 72." in text and "rehearsal" not in text
    assert "### profile-batch-32: the same of A-VL at batch 32\n\nNot measured: it has not run yet." in text
    assert text.count("`python made_up` (1 s)") == 8


def test_an_empty_page():
    text = page({}, pieces(False), {}, rehearsal=False)
    assert text.count("Not measured: it has not run yet.") == len(pieces(False))
    assert set(verdicts({}).values()) == {"none"}


def test_the_limits_of_cards(capsys):
    """By hand: 32 layers, keys and values of 32 heads of 128 in 16 bit are 512 KiB a token."""
    weights = weight_bytes(shape_config("llava-v1.6-vicuna-7b"))
    settings = preset("avl").to_dict()
    core = int((1 - settings["vision_compute_rate"]) * 2880) + 70
    mean = (1440 + 70 + 3 * core) / 4
    expected = {
        "batch 1, full": 2950,
        "batch 32, full": 32 * 2950,
        "batch 32, avl": 32 * mean,
        "batch 32, core": 32 * core,
    }
    assert limits.step_limits() == {name: weights + entries * 2**19 for name, entries in expected.items()}
    limits.main()
    assert f"{1e3 * (weights + 2950 * 2**19) / 3.35e12:.2f} ms" in capsys.readouterr().out


@pytest.mark.slow
def test_a_rehearsal(tmp_path):
    """All pieces as they are, of a tiny model on the CPU."""
    ran = call(command.run_gpu, "--rehearse", "--out", tmp_path)
    assert ran.status == 0, ran
    every = {piece.name for piece in pieces(True) if piece.left_out(True) is None}
    assert {path.stem for path in tmp_path.glob("*.json")} == every
    text = (tmp_path / "README.md").read_text()
    assert "A rehearsal of a tiny model on the CPU" in text and "| avl | " in text
    assert "<summary>avl, refresh step</summary>" in text and "it did not finish" not in text
    assert (tmp_path / "sweep.png").exists()
