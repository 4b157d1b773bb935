"""Data sets in parquet files: as their JSON, one row group at a time, and what damage costs."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from PIL import Image

from eval.accuracy.data import read_docvqa_json
from eval.accuracy.parquet import read_parquet_files
from eval.accuracy.records import Sample
from eval.accuracy.tasks import TASKS
from eval_helpers import write_docvqa
from hub_helpers import Handler, Hub
from minivlm.errors import UserError
from paths import ROOT


def write_parquet(path, folder, records, columns=(), **options):
    """The hub's columns, images as {bytes, path}."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = []
    for record in records:
        row = {
            **record,
            "questionId": str(record["questionId"]),
            "data_split": "val",
            "image": {"bytes": (folder / record["image"]).read_bytes(), "path": None},
        }
        rows.append({name: value for name, value in row.items() if not columns or name in columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)


@pytest.fixture
def both(tmp_path):
    """The same ten questions as JSON and as two parquet shards of small row groups."""
    records = json.loads(write_docvqa(tmp_path / "json", 10).read_text())["data"]
    for shard, part in enumerate((records[:7], records[7:])):
        write_parquet(
            tmp_path / "hub" / "DocVQA" / f"validation-0000{shard}-of-00002.parquet",
            tmp_path / "json",
            part,
            row_group_size=3,
        )
    return tmp_path


def test_parquet_equals_json(both):
    for folder in ("hub", "hub/DocVQA"):
        parquet, plain = (TASKS["docvqa_val"].open(str(both / name), 0, None) for name in (folder, "json"))
        assert parquet.samples == tuple(replace(sample, image="") for sample in plain.samples)
        assert parquet.identity == plain.identity
        for index in (0, 9, 4, 3, 6, 7):
            assert parquet.image(index).tobytes() == plain.image(index).tobytes()
    assert len(TASKS["docvqa_val"].open(str(both / "hub"), 0, 4).samples) == 4


def test_parquet_holds_one_row_group(both, monkeypatch):
    import pyarrow.parquet as pq

    reads, real = [], pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda table, group, columns: reads.append((group, "image" in columns)) or real(table, group, columns),
    )
    dataset = TASKS["docvqa_val"].open(str(both / "hub"), 0, None)
    assert reads == [(0, False), (1, False), (2, False), (0, False)]
    reads.clear()
    assert [dataset.image(i).width for i in range(10)] == list(range(1, 11))
    assert reads == [(0, True), (1, True), (2, True), (0, True)]


def test_bad_parquet(both, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = both / "bad" / "validation-0.parquet"
    file.parent.mkdir()
    file.write_bytes(b"PAR1 but no more")
    with pytest.raises(UserError, match="validation-0.parquet: not a readable parquet file"):
        TASKS["docvqa_val"].open(str(file.parent), 0, None)
    pq.write_table(pa.table({"questionId": ["1"], "question": ["a"]}), file)
    with pytest.raises(UserError, match="no column 'image'"):
        TASKS["docvqa_val"].open(str(file.parent), 0, None)
    pq.write_table(
        pa.table(
            {
                "questionId": ["1", "2"],
                "question": ["a", "b"],
                "image": [{"bytes": b"no image", "path": None}, {"bytes": None, "path": "x"}],
            }
        ),
        file,
    )
    dataset = TASKS["docvqa_val"].open(str(file.parent), 0, None)
    for index in (0, 1):
        with pytest.raises(UserError, match=f"validation-0.parquet: row {index} of row group 0: "):
            dataset.image(index)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"reading parquet needs pyarrow \(pip install 'minivlm\[parquet\]'\)"):
        read_parquet_files([file], "validation")


def write_columns(path, **columns):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), path, row_group_size=2)


PICTURE = {"bytes": b"no image", "path": None}


def test_bad_rows_are_samples_with_a_problem(tmp_path):
    import pyarrow as pa

    file = tmp_path / "validation-0.parquet"
    questions = pa.array([b"a", b"\xff", b"c", None, b"e"]).cast(pa.binary())
    questions = pa.StringArray.from_buffers(5, *questions.buffers()[1:], questions.buffers()[0])
    write_columns(file, questionId=["1", "2", "x", "4", "1"], question=questions, image=[PICTURE] * 5)
    problems = [sample.problem for sample in read_parquet_files([file], "validation").samples]
    assert problems[0] == problems[2] == ""
    assert "row 1 cannot be read" in problems[1] and "utf-8" in problems[1]
    assert "row[3]: question: expected str, got null" in problems[3]
    assert "row[4] repeats questionId 1 of [0]" in problems[4]


def test_a_damaged_row_group_costs_its_own_samples(both):
    import pyarrow.parquet as pq

    file = both / "hub" / "DocVQA" / "validation-00000-of-00002.parquet"
    metadata = pq.ParquetFile(file).metadata
    names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    data = bytearray(file.read_bytes())
    for name in ("question", "image.bytes"):
        column = metadata.row_group(1).column(names.index(name))
        start = column.dictionary_page_offset or column.data_page_offset
        data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    file.write_bytes(data)
    dataset = TASKS["docvqa_val"].open(str(both / "hub"), 0, None)
    assert ["row group 1 cannot be read" in sample.problem for sample in dataset.samples] == [
        3 <= i < 6 for i in range(10)
    ]
    with pytest.raises(UserError, match="row 1 of row group 1"):
        dataset.image(4)
    assert [dataset.image(i).width for i in (0, 6, 9)] == [1, 7, 10]


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"question": [], "image": []}, r"row\[\] is empty"),
        ({"question": [1, 2], "image": [PICTURE] * 2}, "question: expected str, got int; none of the 2 records"),
        ({"question": [b"a"], "image": [PICTURE]}, "question: expected str, got bytes"),
        ({"question": [["a"]], "image": [PICTURE]}, "question: expected str, got array"),
        ({"question": ["a"], "image": [PICTURE]}, 'has no "questionId"'),
    ],
)
def test_parquet_without_a_usable_row(tmp_path, columns, message):
    file = tmp_path / "validation-0.parquet"
    write_columns(file, **columns)
    with pytest.raises(UserError, match=message):
        read_parquet_files([file], "validation")


@pytest.mark.parametrize("images", [[1, 2], ["a", "b"], [{"path": "x"}] * 2, [[b"x"]] * 2])
def test_an_image_column_without_images(tmp_path, images):
    file = tmp_path / "validation-0.parquet"
    write_columns(file, questionId=["1", "2"], question=["a", "b"], image=images)
    with pytest.raises(UserError, match="row 1 of row group 0: no image"):
        read_parquet_files([file], "validation").image(1)


@pytest.mark.parametrize("kind", ["folder", "fifo", "link"])
def test_parquet_files_that_are_no_files(tmp_path, kind):
    pytest.importorskip("pyarrow")
    file = tmp_path / "validation-0.parquet"
    {"folder": file.mkdir, "fifo": lambda: os.mkfifo(file), "link": lambda: file.symlink_to(file)}[kind]()
    with pytest.raises(UserError, match="validation-0.parquet: "):
        TASKS["docvqa_val"].open(str(tmp_path), 0, None)


def test_columns_of_the_other_data_sets(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write_docvqa(tmp_path, 1)
    picture = {"bytes": (tmp_path / "documents" / "page_0.png").read_bytes(), "path": None}
    (tmp_path / "data").mkdir()
    pq.write_table(
        pa.Table.from_pylist(
            [{"question_id": 34602, "question": "what?", "answers": ["a"] * 10, "image": picture, "set_name": "val"}]
        ),
        tmp_path / "data" / "validation-0.parquet",
    )
    pq.write_table(
        pa.Table.from_pylist(
            [
                {
                    "dataset": "HME100k",
                    "question": "what?",
                    "question_type": "Handwritten",
                    "answer": ["a"],
                    "image": picture,
                }
            ]
            * 2
        ),
        tmp_path / "data" / "test-0.parquet",
    )
    text, ocr = (TASKS[name].open(str(tmp_path), 0, None) for name in ("textvqa_val", "ocrbench"))
    assert text.samples == (Sample(0, 34602, "what?", ("a",) * 10),)
    assert ocr.samples[1] == Sample(1, 1, "what?", ("a",), ("Handwritten",), "HME100k")
    assert ocr.image(1).size == (1, 1)


class DataHandler(Handler):
    """The hub's paths for data sets are those for models with another prefix."""

    def do_GET(self):
        self.path = self.path.replace("/api/datasets/", "/api/models/").replace("/datasets/", "/")
        super().do_GET()

    do_HEAD = do_GET


CLIENT = """
import sys
from eval.accuracy.tasks import open_tasks
from minivlm.errors import UserError
for name in sys.argv[1:]:
    try:
        (task, dataset), = open_tasks("docvqa_val", name)[0]
        print(len(dataset.samples), dataset.image(9).width)
    except UserError as error:
        print(error)
"""


def test_hub_data_are_fetched_once(both):
    (both / "hub" / "DocVQA" / "test-00000-of-00001.parquet").write_text("another split")
    (both / "repositories" / "me").mkdir(parents=True)
    (both / "hub").rename(both / "repositories" / "me" / "DocVQA")
    hub = Hub(both / "repositories", {}, DataHandler)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_HOME": str(both / "home"),
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")]),
    }

    def ask(*names):
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, *names], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    first, again, nothing = ask("me/DocVQA", "me/DocVQA", "me/Nothing")
    assert first == again == "10 10"
    assert sorted(hub.fetched) == [f"me/DocVQA/validation-0000{i}-of-00002.parquet" for i in range(2)]
    assert nothing.startswith("me/Nothing: no such folder, and downloading it from the hub failed (")
    hub.shutdown()
    hub.server_close()
    cached, other = ask("me/DocVQA", "me/Other")  # the server is gone, the cache is not
    assert cached == "10 10"
    assert other.startswith("me/Other: no such folder, and downloading it from the hub failed (")


def test_exif_turns_images_alike_in_both_layouts(tmp_path):
    path = write_docvqa(tmp_path, 1)
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "documents" / "page_0.png", exif=exif)
    write_parquet(tmp_path / "validation-0.parquet", tmp_path, json.loads(path.read_text())["data"])
    assert read_docvqa_json(path, "validation").image(0).size == (2, 4)
    assert read_parquet_files([tmp_path / "validation-0.parquet"], "validation").image(0).size == (2, 4)
