"""Run folders: damage, other code, other limits, links and refusals, with a model that needs no weights."""

import json
import os
import shutil

import pytest

import eval_helpers
import weights
from eval.accuracy import run_spec
from eval.accuracy.run_names import policy_label, run_label
from eval_helpers import read_run, stub_run, truth
from minivlm.app.policy_flags import load_policy_file
from minivlm.cache.policies import preset
from minivlm.errors import UserError


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Ten questions, a checkpoint folder, and a reader that is loaded from it; the code is always the same."""
    model = stub_run(tmp_path, monkeypatch)
    monkeypatch.setattr(run_spec, "code_hash", lambda settings: "0" * 12)
    return tmp_path, model


def evaluate(place, *more, out="out"):
    flags = ["--model", place[0] / "model", "--data", place[0] / "data", "--tasks", "docvqa_val"]
    return eval_helpers.evaluate([*flags, "--output_path", place[0] / out, *more])


def run_in(place, out="out"):
    (path,) = (place[0] / out).glob("*/samples.jsonl")
    return path.parent


def edited(line, **changes):
    """A row with other fields; None removes one."""
    row = {**json.loads(line), **changes}
    return json.dumps({name: value for name, value in row.items() if value is not None}).encode() + b"\n"


def edited_cost(line, **changes):
    return edited(line, cost={**json.loads(line)["cost"], **changes})


DAMAGE = {
    "half a line": lambda line: line[:40] + b"\n",
    "no JSON": lambda line: b"{\n",
    "empty": lambda line: b"\n",
    "zero bytes": lambda line: bytes(100) + b"\n",
    "no UTF-8": lambda line: line.replace(b"bravo", b"\xff\xfe"),
    "a lone surrogate": lambda line: line.replace(b"bravo", rb"\ud800"),
    "a byte order mark": lambda line: b"\xef\xbb\xbf" + line,
    "a list": lambda line: b"[" + line.strip() + b"]\n",
    "deep": lambda line: b"[" * 100_000 + b"\n",
    "no task": lambda line: edited(line, task=None),
    "no id": lambda line: edited(line, id=None),
    "no index": lambda line: edited(line, index=None),
    "no types": lambda line: edited(line, types=None),
    "no code": lambda line: edited(line, code=None),
    "no prediction": lambda line: edited(line, prediction=None),
    "no finish": lambda line: edited(line, finish=None),
    "no scores": lambda line: edited(line, scores=None),
    "no cost": lambda line: edited(line, cost=None),
    "an unknown task": lambda line: edited(line, task="docvqa_test"),
    "another id": lambda line: edited(line, id=7),
    "an id of another type": lambda line: edited(line, id="101"),
    "an id that is a list": lambda line: edited(line, id=[101]),
    "an index out of range": lambda line: edited(line, index=10),
    "a negative index": lambda line: edited(line, index=-1),
    "an enormous index": lambda line: edited(line, index=10**30),
    "an index of another type": lambda line: edited(line, index="1"),
    "an index that is a fraction": lambda line: edited(line, index=1.5),
    "types that are a text": lambda line: edited(line, types="kind1"),
    "types that are numbers": lambda line: edited(line, types=[1]),
    "code that is a path": lambda line: edited(line, code="../../../x"),
    "a prediction that is a number": lambda line: edited(line, prediction=5),
    "an unknown finish": lambda line: edited(line, finish="later"),
    "an error beside the answer": lambda line: edited(line, error="no"),
    "an error that is a number": lambda line: edited(line, error=5),
    "scores that are a list": lambda line: edited(line, scores=[1]),
    "an unknown metric": lambda line: edited(line, scores={"accuracy": 1.0}),
    "a score above 1": lambda line: edited(line, scores={"anls": 1.5}),
    "a negative score": lambda line: edited(line, scores={"anls": -0.5}),
    "a score that is NaN": lambda line: edited(line, scores={"anls": float("nan")}),
    "a score that is a text": lambda line: edited(line, scores={"anls": "1"}),
    "a missing cost": lambda line: edited(line, cost={"prefill_s": 1.0}),
    "a negative cost": lambda line: edited_cost(line, prefill_s=-1.0),
    "an infinite cost": lambda line: edited_cost(line, prefill_s=float("inf")),
    "an enormous cost": lambda line: edited_cost(line, kv_bytes=1e300),
    "a cost that is a text": lambda line: edited_cost(line, kv_bytes="many"),
    "bytes that are a fraction": lambda line: edited_cost(line, kv_batch_bytes=0.5),
    "a number of 5,000 digits": lambda line: line.replace(b'"index":1', b'"index":' + b"1" * 5000),
    "token ids that are texts": lambda line: edited(line, token_ids=["1"]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_row_is_named_and_its_sample_asked_again(place, capsys, kind):
    assert evaluate(place, out="whole") == evaluate(place) == 0
    path = run_in(place) / "samples.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = DAMAGE[kind](lines[1])
    assert damaged != lines[1]
    path.write_bytes(lines[0] + damaged + b"".join(lines[2:]))
    capsys.readouterr()
    if kind not in ("another id", "an id of another type"):  # which only the data can tell
        assert eval_helpers.evaluate(["compare", path.parent]) == 2
        assert capsys.readouterr().err.startswith(f"error: {path}: ")
    place[1].asked.clear()
    assert evaluate(place) == 0
    notes = capsys.readouterr().err.splitlines()[:2]
    assert notes[0].startswith(f"note: {path}: line 2 is damaged (") and notes[0].isprintable() and len(notes[0]) < 500
    assert notes[1] == f"note: 9 of 10 already answered in {path.parent}"
    assert place[1].asked == ["What is 1?\nAnswer the question using a single word or phrase."]
    assert read_run(place[0] / "out") == read_run(place[0] / "whole")
    assert b"".join(lines[2:]) in path.read_bytes()  # what is good stays as it is
    assert evaluate(place) == 0
    assert "is damaged" not in capsys.readouterr().err


def test_a_repeated_row_is_left_out(place, capsys):
    assert evaluate(place) == 0
    path = run_in(place) / "samples.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(whole + edited(lines[3], finish="length"))
    assert evaluate(place) == 0
    error = capsys.readouterr().err
    assert "line 11 is damaged (its sample is answered in line 4)" in error and "10 of 10 already answered" in error
    assert read_run(place[0] / "out")[1][3]["prediction"] == "x" + truth(3)[1:]
    assert evaluate(place) == 0 and len(place[1].asked) == 10


def test_rows_of_windows_and_failed_rows_before_the_answer_are_good(place, capsys):
    assert evaluate(place) == 0
    path = run_in(place) / "samples.jsonl"
    lines = path.read_bytes().splitlines()
    failed = {name: json.loads(lines[3])[name] for name in ("task", "id", "index", "types", "code")}
    path.write_bytes(b"\r\n".join([json.dumps({**failed, "error": "no image"}).encode(), *lines, b""]))
    assert evaluate(place) == 0
    assert len(place[1].asked) == 10 and "damaged" not in capsys.readouterr().err


def test_a_file_of_nothing_but_damage_is_named_in_a_few_lines(place, capsys):
    assert evaluate(place) == 0
    path = run_in(place) / "samples.jsonl"
    path.write_bytes(b"\x00\x1b[31m\n" * 5000 + b"tail")
    capsys.readouterr()
    assert evaluate(place) == 0
    error = capsys.readouterr().err
    assert error.count("note: ") == 6 and "so are 4995 more lines" in error and "\x1b" not in error
    assert len(path.read_bytes().splitlines()) == 10


UNTRUE = {"results": {"docvqa_val": {"anls": 1.0, "anls_stderr": 0.0, "n": 10}}}  # well-formed


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"settings": 5}',
        b'{"settings": {"format": 3}}',
        bytes(1000),
        {"results": {"docvqa_val": {"anls": "high"}}},
        {"cost": {"docvqa_val": {}}},
        {"code": "../../x"},
        UNTRUE,
    ],
)
def test_damaged_results_are_computed_again(place, capsys, content):
    assert evaluate(place) == 0
    path = run_in(place) / "results.json"
    before = json.loads(path.read_text())
    path.write_bytes(content if isinstance(content, bytes) else json.dumps({**before, **content}).encode())
    capsys.readouterr()
    assert evaluate(place) == 0
    after = json.loads(path.read_text())
    assert {**after, "seconds": 0} == {**before, "seconds": 0} and len(place[1].asked) == 10
    assert evaluate(place) == 0
    assert capsys.readouterr().err.count("it is computed again") == (content != UNTRUE)


def test_damaged_settings(place, capsys):
    assert evaluate(place) == 0
    run = run_in(place)
    good = (run / "settings.json").read_text()
    for content in ("", "{", "[]", '{"format": 3}', good.replace('"batch_size": 1', '"batch_size": 0')):
        (run / "settings.json").write_text(content)
        assert evaluate(place) == 0  # the folder's name stands for the settings
        assert (run / "settings.json").read_text() == good
        assert "it is written again" in capsys.readouterr().err
    run = run.rename(place[0] / "mine")
    (run / "settings.json").write_text("{")
    assert evaluate(place, out="mine") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {run}/settings.json: not readable JSON") and error.count("\n") == 1
    (run / "settings.json").write_text(good.replace('"format": 3', '"format": 2'))
    assert evaluate(place, out="mine") == 2
    assert capsys.readouterr().err == f"error: {run}/settings.json: is not a run in format 3 (run it again)\n"
    assert len(place[1].asked) == 10


@pytest.mark.parametrize("name", ["samples.jsonl", "results.json", "settings.json"])
@pytest.mark.parametrize("kind", ["folder", "fifo", "link", "dangling link", "loop"])
def test_files_of_a_run_that_are_no_files(place, capsys, name, kind):
    assert evaluate(place) == 0
    path, outside = run_in(place) / name, place[0] / "outside"
    path.rename(outside)
    before = outside.read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to({"link": outside, "dangling link": place[0] / "nothing", "loop": path}[kind])
    capsys.readouterr()
    assert evaluate(place, "--limit", 5, "--force") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {path}: is ") and outside.read_bytes() == before
    assert not (place[0] / "nothing").exists() and len(place[1].asked) == 10
    assert eval_helpers.evaluate(["compare", path.parent]) == (0 if kind == "link" or name == "settings.json" else 2)


def test_a_run_folder_that_is_a_link_is_refused(place, capsys):
    assert evaluate(place) == 0
    run = run_in(place)
    outside = run.rename(place[0] / "outside")
    run.symlink_to(outside)
    assert evaluate(place) == 2
    assert capsys.readouterr().err.endswith(f"error: {run}: is a link (expected what belongs to the run itself)\n")
    assert evaluate(place, out="outside") == 0 and len(place[1].asked) == 10


def test_a_refusal_makes_no_folder(place, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise UserError("the checkpoint is damaged")

    monkeypatch.setattr(weights, "load", refuse)
    assert evaluate(place, out="new/out") == 2
    assert capsys.readouterr().err == "error: the checkpoint is damaged\n" and not (place[0] / "new").exists()


def test_a_refusal_changes_no_folder_and_says_one_line(place, capsys, monkeypatch):
    assert evaluate(place) == 0
    run = run_in(place)
    lines = (run / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (run / "samples.jsonl").write_bytes(b"{\n" + b"".join(lines[:5]) + lines[5][:20])
    before = {path.name: path.read_bytes() for path in run.iterdir()}

    def refuse(*args, **kwargs):
        raise UserError("the checkpoint is damaged")

    monkeypatch.setattr(weights, "load", refuse)
    capsys.readouterr()
    for more in ((), ("--force",), ("--verbosity", "high")):
        assert evaluate(place, *more) == 2
        assert capsys.readouterr().err == "error: the checkpoint is damaged\n"
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize("out", ["file", "fifo", "loop", "nowhere/x", "x" * 5000, "x/" * 2500, "a/" + "x" * 300])
def test_output_paths_that_cannot_be(place, capsys, out):
    (place[0] / "file").touch()
    os.mkfifo(place[0] / "fifo")
    (place[0] / "loop").symlink_to("loop")
    (place[0] / "nowhere").symlink_to("nothing")
    before = sorted(place[0].iterdir())
    assert evaluate(place, out=out) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "cannot write there" in error
    assert sorted(place[0].iterdir()) == before and not place[1].asked


def test_bad_records_fail_alone_and_are_named(place, capsys):
    path = place[0] / "data" / "val_v1.0.json"
    content = json.loads(path.read_text())
    data = content["data"]
    data[0]["image"] = "x" * 5000
    data[1]["question"] = "What \ud800?"
    data[2] = 7
    data[3]["image"] = "../secret.png"
    data[4]["questionId"] = int("9" * 4000)
    data[5]["question_types"] = ["kind\x1b[31m\n1"]
    path.write_text(json.dumps(content))
    assert evaluate(place, "--batch_size", 4, "--log_samples") == 0
    results, rows = read_run(place[0] / "out")
    assert results["results"]["docvqa_val"]["n"] == 5 and len(results["failed"]) == 5
    for index, words in enumerate(
        ["File name too long", "lone surrogate", "got int", "leaves the folder", "4000 char"]
    ):
        assert words in rows[index]["error"] and words in results["failed"][index]
    captured = capsys.readouterr()
    assert "5 samples failed" in captured.out and "\x1b" not in captured.out + captured.err
    assert all(len(line) < 1200 for line in captured.out.splitlines())


def test_names_that_are_not_text(place, capsys):
    data = os.fsencode(place[0] / "data")
    shutil.move(data, data + b"\xff")
    shutil.move(os.fsencode(place[0] / "model"), os.fsencode(place[0] / "model") + b"\xff")
    (place[0] / "data\udcff" / "documents" / "page_3.png").unlink()
    flags = ["--model", f"{place[0]}/model\udcff", "--data", f"{place[0]}/data\udcff", "--tasks", "docvqa_val"]
    for _ in range(2):
        assert eval_helpers.evaluate([*flags, "--output_path", f"{place[0]}/out\udcff"]) == 0
    (path,) = (place[0] / "out\udcff").glob("*/results.json")
    results = json.loads(path.read_bytes().decode())
    assert results["settings"]["model"] == r"model\udcff" and r"data\udcff" in results["failed"][0]
    assert path.with_name("samples.jsonl").read_bytes().decode()
    assert "9 of 10 already answered" in capsys.readouterr().err


def test_answers_of_other_code_are_put_aside(place, capsys, monkeypatch):
    assert evaluate(place) == 0
    run = run_in(place)
    rows, results = (run / "samples.jsonl").read_bytes(), (run / "results.json").read_bytes()
    shutil.copytree(run, place[0] / "before")
    monkeypatch.setattr(run_spec, "code_hash", lambda settings: "1" * 12)
    capsys.readouterr()
    assert evaluate(place) == 0
    error = capsys.readouterr().err
    assert f"note: {run}: 10 rows do not count (the code is now 111111111111)" in error
    assert "already answered" not in error and len(place[1].asked) == 20
    assert (run / "samples.000000000000.jsonl").read_bytes() == rows
    assert (run / "results.000000000000.json").read_bytes() == results
    assert json.loads((run / "results.json").read_text())["code"] == "1" * 12
    assert evaluate(place) == 0 and len(place[1].asked) == 20
    assert "10 of 10 already answered" in capsys.readouterr().err
    assert eval_helpers.evaluate(["compare", place[0] / "before", run]) == 0
    assert "answered by other code: 000000000000 → 111111111111" in capsys.readouterr().out


def test_force_asks_anew_and_loses_nothing(place, capsys):
    assert evaluate(place) == 0
    run = run_in(place)
    for name in ("samples.000000000000.jsonl", "samples.000000000000-2.jsonl"):
        assert evaluate(place, "--force") == 0
        assert f"10 rows do not count (--force) and are kept in {name}" in capsys.readouterr().err
        assert len((run / name).read_bytes().splitlines()) == 10
    assert len(place[1].asked) == 30 and len((run / "samples.jsonl").read_bytes().splitlines()) == 10


def test_the_code_covers_a_policy_file_and_the_sources(tmp_path):
    from eval.accuracy import identity

    source = (
        "from dataclasses import dataclass\nfrom minivlm.cache.settings import CacheSettings\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(CacheSettings):\n    policy: str = 'mine'\n"
        "    def build(self, num_layers): ...\n"
    )
    file = tmp_path / "mine.py"
    hashes = {identity.code_hash(type(preset("full"))), identity.code_hash(type(preset("avl")))}
    assert len(hashes) == 1  # one code for all that is in this tree
    for text in (source, source + "# edited\n", source):
        file.write_text(text)
        hashes.add(identity.code_hash(load_policy_file(file)["mine"].settings))
    assert len(hashes) == 3
    files = {path for pattern in identity._ANSWERING for path in identity._ROOT.glob(pattern)}
    names = {path.relative_to(identity._ROOT).as_posix() for path in files}
    assert {"minivlm/cache/policies/avl.py", "weights/read.py", "eval/accuracy/metrics.py"} <= names
    assert not any(name.startswith("minivlm/app") for name in names)


def test_a_limit_extends_a_run_and_shortens_its_report(place, capsys):
    assert evaluate(place, "--limit", 3, "--batch_size", 2) == 0
    assert evaluate(place, "--limit", 7, "--batch_size", 2) == 0
    assert "note: 3 of 7 already answered" in capsys.readouterr().err
    # 2 is asked once more in a whole batch, since its batch was cut; its first answer stays
    assert place[1].batches == [2, 1, 2, 2, 1]
    results, rows = read_run(place[0] / "out")
    assert results["samples"] == {"docvqa_val": 7} and results["results"]["docvqa_val"]["n"] == 7 == len(rows)
    asked = len(place[1].asked)
    assert evaluate(place, "--limit", 0.5, "--batch_size", 2) == 0
    assert "note: 5 of 5 already answered" in capsys.readouterr().err
    results, rows = read_run(place[0] / "out")
    assert results["samples"] == {"docvqa_val": 5} and results["results"]["docvqa_val"]["n"] == 5 and len(rows) == 7
    assert eval_helpers.evaluate(["compare", place[0] / "out"]) == 0
    assert "| 5 | 0 | 0.6000" in capsys.readouterr().out
    assert evaluate(place, "--limit", 7, "--batch_size", 2) == 0 and len(place[1].asked) == asked
    assert evaluate(place, "--batch_size", 2) == evaluate(place, "--batch_size", 2, out="whole") == 0
    extended, whole = (read_run(place[0] / out) for out in ("out", "whole"))
    assert extended[0]["results"] == whole[0]["results"]
    assert [extended[1][i]["prediction"] for i in range(10)] == [whole[1][i]["prediction"] for i in range(10)]


def test_compare_needs_the_rows_that_the_results_are_about(place, capsys):
    assert evaluate(place) == 0
    path = run_in(place) / "samples.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for content in (b"", b"".join(lines[:9]), b"".join(lines[:9]) + lines[9][:30]):
        path.write_bytes(content)
        capsys.readouterr()
        assert eval_helpers.evaluate(["compare", path.parent]) == 2
        assert f"error: {path}: holds {content.count(b'}}')} of the 10 samples" in capsys.readouterr().err
    path.write_bytes(b"".join(edited(line, code="1" * 12) for line in lines))
    assert eval_helpers.evaluate(["compare", path.parent]) == 2
    assert "line 1 is damaged (answered by code 111111111111, not 000000000000)" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [(), ("--policy", "avl"), ("--policy", "full")])
def test_flags_of_avl_are_filed_as_avl(place, flags):
    assert evaluate(place, *flags, "--vision_adaptive_attention", "true") == 0
    (path,) = (place[0] / "out").iterdir()
    assert path.name.startswith("docvqa_val_avl-v0.5")
    assert read_run(place[0] / "out")[0]["settings"]["cache"]["policy"] == "avl"


@pytest.mark.parametrize(
    "policy, changes, label",
    [
        ("full", {}, "full"),
        ("full", {"seed": 5}, "full"),
        ("avl", {}, "avl-v0.5-c0.7-i3"),
        ("avl", {"kv_budget": 0.25}, "avl-b0.25-c0.7-i3"),
        ("avl", {"vision_rate": 0.75, "score_window": 4}, "avl-v0.75-c0.7-i3-w4"),
        (
            "avl",
            {"text": True, "text_init_cache": 4, "text_h2o": False},
            "avl-v0.5-c0.7-i3-t0.5-text_init_cache4-no_text_h2o",
        ),
        ("h2o", {"kv_budget": 0.5}, "h2o-b0.5"),
        ("fastv", {}, "fastv-l2-f0.5"),
        ("streaming", {"kv_budget": 0.1}, "streaming-b0.1"),
        ("random", {}, "random-v0.5"),
    ],
)
def test_labels_of_policies(policy, changes, label):
    assert policy_label(preset(policy, **changes)) == label


def test_labels_are_safe_and_bounded(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom minivlm.cache.settings import CacheSettings, setting\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(CacheSettings):\n"
        "    policy: str = '../é/mine'\n    stride: int = setting(1, '')\n    words: str = setting('a', '')\n"
        "    def build(self, num_layers): ...\n"
    )
    settings = load_policy_file(file)["../é/mine"].settings
    assert policy_label(settings(stride=4, words="x/\n y")) == ".._mine-stride4-wordsx_y"
    label = run_label(["demo"] * 50, settings(words="x" * 500), "ä" * 32)
    assert len(label.encode()) < 240 and label.endswith("ä" * 32) and "/" not in label
    for suffix in ("../x", "a\0b", "a\nb", "\udcff", "x" * 65):
        with pytest.raises(UserError, match="--log_samples_suffix"):
            run_label(["demo"], preset("full"), suffix)
