"""A data set whose images carry their own answers, and a model that reads them.

As a script it is `python -m eval` with that model in place of the loaded one.
"""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

import weights
from eval.__main__ import main
from minivlm.app import cli
from minivlm.errors import UserError

WORDS = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett"]


def truth(index):
    return f"{WORDS[index % 10]} {index}"


def write_docvqa(folder, count, split="val", **changes):
    """The official layout; image i is a PNG of i + 1 pixels in a row whose red is i."""
    (folder / "documents").mkdir(parents=True, exist_ok=True)
    data = []
    for index in range(count):
        name = f"documents/page_{index}.png"
        Image.new("RGB", (index + 1, 1), (index % 256, 0, 0)).save(folder / name)
        data.append(
            {
                "questionId": 100 + index,
                "question": f"What is {index}?",
                "question_types": [f"kind{index % 2}"],
                "image": name,
                "docId": index,
                "ucsf_document_id": "x",
                "ucsf_document_page_no": "1",
                "answers": [truth(index), "never"],
                "data_split": split,
            }
        )
        if split == "test":
            del data[-1]["answers"]
    content = {"dataset_name": "fake", "dataset_version": "1.0", "dataset_split": split, "data": data, **changes}
    path = folder / f"{split}_v1.0.json"
    path.write_text(json.dumps(content))
    return path


class Reader:
    """Answers with what the image says, every third with a wrong letter; remembers what it was asked.

    Under a KV budget it holds that share of the bytes and knows only that share of ten pages; 5 %
    is too little for it.
    """

    processor = None

    def __init__(self, delay=0.0):
        self.delay, self.asked, self.batches = delay, [], []

    def ask_batch(self, requests, *, sampling, settings):
        self.batches.append(len(requests))
        if any("refuse" in request.prompt for request in requests):
            raise UserError("the prompt takes 99 tokens, the model's context is 9")
        budget = settings.kv_budget or 1
        if budget < 0.06:
            raise UserError("--kv_budget 0.05 cannot be met")
        stats = SimpleNamespace(
            prefill_s=0.5 * len(requests),
            decode_s=0.25 * len(requests),
            prompt_tokens=30 * len(requests),
            vision_tokens=20 * len(requests),
            new_tokens=5 * len(requests),
            decoded_tokens=4 * len(requests),
            live_bytes=1000 * budget * len(requests),
            nbytes=1500 * len(requests),
            full_bytes=2000 * len(requests),
            entries_attended_per_step={"text": 6, "vision": 10},
        )
        answers = []
        for request in requests:
            time.sleep(self.delay)
            self.asked.append(request.prompt)
            (image,) = request.images
            index = image.width - 1
            assert image.getpixel((0, 0))[0] == index % 256
            text = truth(index) if index % 3 else "x" + truth(index)[1:]
            text = text if index < 10 * budget else "?"
            answers.append(SimpleNamespace(text=f" {text}\n", token_ids=[index, 2], finish="stop", stats=stats))
        return answers


def write_checkpoint(folder):
    """Files that the evaluator fingerprints; nothing loads them here."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(100))
    return folder


def stub_run(folder, monkeypatch):
    """Ten questions in `data`, a checkpoint folder `model`, and the reader that is loaded from it."""
    write_docvqa(folder / "data", 10)
    write_checkpoint(folder / "model")
    model = Reader()
    monkeypatch.setattr(weights, "load", lambda *args, **kwargs: model)
    return model


def read_run(output):
    """The only run under an output folder: its results without times, and its outcomes by index."""
    (path,) = Path(output).glob("*/results.json")
    results = json.loads(path.read_text())
    rows = {row["index"]: row for row in map(json.loads, (path.parent / "samples.jsonl").read_text().splitlines())}
    for name in ("seconds", "processes", "versions"):
        del results[name]
    return results, rows


def evaluate(arguments):
    """`python -m eval` in this process -> its exit status."""
    try:
        cli.run(main, list(map(str, arguments)))
    except SystemExit as status:
        return status.code
    return 0


if __name__ == "__main__":
    model = Reader(float(os.environ.get("READER_DELAY", 0)))
    weights.load = lambda *args, **kwargs: model
    cli.run(main)
