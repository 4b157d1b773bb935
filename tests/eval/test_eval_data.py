"""Data sets and tasks: the JSON layout, parquet files, prompts, and all that can be wrong."""

import json
import os
import subprocess
import sys

import pytest

from eval.accuracy.data import read_docvqa_json
from eval.accuracy.records import OtherSplit, Sample
from eval.accuracy.tasks import TASKS, open_tasks
from eval_helpers import truth, write_docvqa
from minivlm.errors import UserError
from paths import ROOT


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_json_layout(tmp_path):
    dataset = read_docvqa_json(write_docvqa(tmp_path, 3), "validation")
    assert dataset.samples[2] == Sample(
        2, 102, "What is 2?", (truth(2), "never"), ("kind0",), image="documents/page_2.png"
    )
    assert [dataset.image(i).size for i in range(3)] == [(1, 1), (2, 1), (3, 1)]


def test_json_with_question_types_is_preferred_and_images_are_found_beside_it(tmp_path):
    write_docvqa(tmp_path, 3)
    (tmp_path / "val_v1.0.json").rename(tmp_path / "val_v1.0_withQT.json")
    write_docvqa(tmp_path, 2)
    change(tmp_path / "val_v1.0_withQT.json", lambda content: content["data"][0].update(image="page_0.png"))
    dataset = TASKS["docvqa_val"].open(str(tmp_path), 0, None)
    assert len(dataset.samples) == 3 and dataset.image(0).size == (1, 1)
    assert len(TASKS["docvqa_val"].open(str(tmp_path / "val_v1.0.json"), 0, None).samples) == 2


def test_infographics_names(tmp_path):
    path = write_docvqa(tmp_path, 1).rename(tmp_path / "infographicsVQA_val_v1.0_withQT.json")

    def rename(content):
        content["data"][0]["image_local_name"] = content["data"][0].pop("image")
        content["data"][0]["answer_type"] = ["single span"]
        del content["data"][0]["question_types"]

    change(path, rename)
    dataset = TASKS["infovqa_val"].open(str(tmp_path), 0, None)
    assert dataset.samples[0].types == ("single span",) and dataset.image(0).size == (1, 1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not readable JSON"),
        ("[" * 100_000, "not readable JSON"),
        ("[1]", "expected object, got array"),
        ('{"data": {}}', "data: expected array, got object"),
        ('{"data": []}', "data[] is empty"),
        ('{"data": [{"questionId": 1}]}', "data[0]: question is missing"),
        ('{"data": [7]}', "data[0]: expected object, got int"),
        ('{"data": [{"question": "a", "image": "x"}]}', 'data[0] has no "questionId"'),
        ('{"data": [{"questionId": 1, "question": "a"}, 7]}', 'data[0] has no "image"; none of the 2 records can be'),
        (
            '{"data": [{"questionId": 1, "question": "a", "image": "x", "data_split": "train"}]}',
            "data[0] belongs to split 'train' (expected 'val')",
        ),
        ('{"dataset_split": "test", "data": []}', "holds split 'test' (expected 'val')"),
        ('{"dataset_split": ["val"], "data": []}', "dataset_split: expected str | null, got array"),
    ],
)
def test_bad_json_is_one_line(tmp_path, text, message):
    path = tmp_path / "val_v1.0.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        open_tasks("docvqa_val", str(tmp_path))
    assert str(caught.value).startswith(str(path)) and message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_data(tmp_path):
    with pytest.raises(
        OtherSplit, match=r"no validation data for task docvqa_val \(expected val_v\*_withQT.json or val_v"
    ):
        open_tasks("docvqa", str(tmp_path))
    dataset = read_docvqa_json(write_docvqa(tmp_path, 2), "validation")
    (tmp_path / "documents" / "page_1.png").unlink()
    with pytest.raises(UserError, match="documents/page_1.png: no such file"):
        dataset.image(1)


BAD_RECORDS = {
    "of another type": (7, "expected object, got int"),
    "a list": ([], "expected object, got array"),
    "question missing": ({"question": None}, "question: expected str, got null"),
    "question a number": ({"question": 5}, "question: expected str, got int"),
    "question enormous": ({"question": "x" * 200_000}, "question: expected str of length <= 100000"),
    "question no text": ({"question": "\ud800"}, "question holds a lone surrogate"),
    "id missing": ({"questionId": None}, 'has no "questionId"'),
    "id empty": ({"questionId": ""}, 'has no "questionId"'),
    "id a list": ({"questionId": [1]}, "questionId: expected int | float | str | null, got array"),
    "id repeated": ({"questionId": "101"}, "repeats questionId 101 of [1]"),
    "id no text": ({"questionId": "\udfff"}, "docvqa_id holds a lone surrogate"),
    "id long": ({"questionId": "9" * 5000}, "questionId has 5000 characters (expected at most 256)"),
    "id NaN": ({"questionId": float("nan")}, "questionId: expected float"),
    "answers no list": ({"answers": {}}, "answers: expected"),
    "answers no texts": ({"answers": [[]]}, "answers[0]: expected int | float | str"),
    "an answer that is no text": ({"answers": ["a", "\ud800"]}, "answers holds a lone surrogate"),
    "another split": ({"data_split": "train"}, "belongs to split 'train'"),
    "image missing": ({"image": None}, 'has no "image"'),
    "image no name": ({"image": {}}, "image: expected str | null, got object"),
    "image no text": ({"image": "\ud800.png"}, "image holds a lone surrogate"),
}


@pytest.mark.parametrize("kind", BAD_RECORDS)
def test_a_bad_record_is_a_sample_with_a_problem(tmp_path, kind):
    changes, message = BAD_RECORDS[kind]
    path = write_docvqa(tmp_path, 4)

    def damage(content):
        record = content["data"][2]
        content["data"][2] = {**record, **changes} if isinstance(changes, dict) else changes

    change(path, damage)
    dataset = read_docvqa_json(path, "validation")
    problem = dataset.samples[2].problem
    assert problem.startswith(f"{path}: data[2]") and message in problem
    assert problem.isprintable() and len(problem) <= 300
    assert [bool(sample.problem) for sample in dataset.samples] == [False, False, True, False]
    assert dataset.samples[3].id == 103 and dataset.image(3).size == (4, 1)


def test_numbers_of_any_length_are_read(tmp_path):
    path = write_docvqa(tmp_path, 3)
    path.write_text(
        path.read_text().replace('"questionId": 100', '"questionId": ' + "9" * 5000).replace("101", "9" * 20)
    )
    samples = read_docvqa_json(path, "validation").samples
    assert "questionId has 5000 characters" in samples[0].problem and samples[1].id == int("9" * 20)


@pytest.mark.parametrize("name", ["/etc/passwd", "../data/documents/page_0.png", "documents/../../x.png", ".."])
def test_image_names_cannot_leave_the_data(tmp_path, name):
    path = write_docvqa(tmp_path / "data", 2)
    change(path, lambda content: content["data"][0].update(image=name))
    dataset = read_docvqa_json(path, "validation")
    with pytest.raises(UserError, match="leaves the folder of the data"):
        dataset.image(0)
    assert dataset.image(1).size == (2, 1)


@pytest.mark.parametrize("name", ["x" * 5000, "x/" * 3000, "x\0.png", "documents", "fifo", "nothing"])
def test_image_names_that_are_no_files(tmp_path, name):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "nothing").symlink_to("nothing")
    path = write_docvqa(tmp_path, 1)
    change(path, lambda content: content["data"][0].update(image=name))
    with pytest.raises(UserError):
        read_docvqa_json(path, "validation").image(0)


def test_links_in_the_data_are_followed(tmp_path):
    """The hub's cache consists of links that leave the folder of the snapshot."""
    path = write_docvqa(tmp_path / "blobs", 2)
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    (snapshot / "documents").symlink_to("../../blobs/documents")
    assert read_docvqa_json(snapshot / path.name, "validation").image(1).size == (2, 1)


def test_limits(tmp_path):
    path = write_docvqa(tmp_path, 7)
    dataset = read_docvqa_json(path, "validation")
    assert [len(dataset.take(limit).samples) for limit in (None, 1, 3.0, 100, 0.5, 0.01)] == [7, 1, 3, 7, 4, 1]
    assert dataset.identity == dataset.take(6).identity and dataset.take(6).total == 7
    for limit in (0, -1, 2.5, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--limit .*: expected a count of at least 1"):
            dataset.take(limit)
    change(path, lambda content: content["data"][0].update(answers=["other"]))
    assert dataset.identity != read_docvqa_json(path, "validation").identity


def test_prompts_and_scores_of_the_tasks():
    sample = Sample(0, 1, "what Brand is THIS?", ("Coca Cola",) * 10)
    short = "\nAnswer the question using a single word or phrase."
    assert TASKS["docvqa_val"].prompt(sample) == TASKS["infovqa_val"].prompt(sample) == "what Brand is THIS?" + short
    assert TASKS["textvqa_val"].prompt(sample) == "What brand is this?" + short
    assert TASKS["ocrbench"].prompt(sample) == "what Brand is THIS?"
    assert {name: task.max_new_tokens for name, task in TASKS.items()} == {
        "docvqa_val": 32,
        "docvqa_test": 32,
        "infovqa_val": 32,
        "textvqa_val": 32,
        "ocrbench": 128,
        "demo": 151,
    }
    assert TASKS["textvqa_val"].scores("the coca-cola", sample) == {
        "exact_match": 0.0,
        "anls": pytest.approx(8 / 13),
        "vqa_accuracy": 1.0,
    }
    assert TASKS["ocrbench"].scores("It is Coca Cola.", sample)["ocrbench_accuracy"] == 1.0
    formula = Sample(0, 1, "", ("x^{2}",), source="HME100k")
    assert TASKS["ocrbench"].scores("x ^ { 2 }", formula)["ocrbench_accuracy"] == 1.0
    assert all(task.metric in task.scores("a", sample) for task in TASKS.values())


def test_demo_pages(tmp_path):
    task = TASKS["demo"]
    dataset = task.open(None, 3, 30)
    assert len(dataset.samples) == 30 and dataset.samples == task.open(None, 3, 0.06).samples
    assert dataset.identity == task.open(None, 3, 2).identity != task.open(None, 4, 30).identity
    assert dataset.image(0).mode == "RGB"
    for sample in dataset.samples:
        assert task.prompt(sample).endswith("single word or phrase.") == (sample.types[1] == "short")
    subprocess.run(
        [sys.executable, "-m", "eval.demo.pages", "--out", str(tmp_path), "--pages", "30", "--seed", "3"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    written = task.open(str(tmp_path), 0, None)
    assert [(s.question, s.answers) for s in written.samples] == [(s.question, s.answers) for s in dataset.samples]
    assert [task.prompt(s) for s in written.samples] == [task.prompt(s) for s in dataset.samples]
    assert all(written.image(i).tobytes() == dataset.image(i).tobytes() for i in range(30))
