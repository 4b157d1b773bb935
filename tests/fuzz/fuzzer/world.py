"""The good inputs that all cases start from, made once by the real commands: checkpoints, images, data, results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
from fuzzer.caches import save_one
from fuzzer.child import Ran

NEXT, LLAVA = "next", "llava"  # LLaVA-NeXT as transformers 4 writes it; LLaVA-1.5 as transformers 5 does, in two shards
QUESTION = "What is it?"
ASKED = ("--image", "wide.png", "--prompt", QUESTION)  # with `--model`; a case's folder is not its shared folder
RECORDS = 4  # of the data set
EVAL_FLAGS = ("--tasks", "docvqa_val", "--batch_size", 2)
_CONTEXT = 320


def build(shared: Path, clean: Callable[..., Ran]) -> None:
    """Write everything into the folder `shared`. `clean` runs a command that has to succeed."""
    shared.mkdir()
    _write_checkpoint(shared / NEXT, "next-vicuna", generation="old")
    _write_checkpoint(shared / LLAVA, "llava-1.5", generation="new", shards=2)
    _write_images(shared)
    _write_data(shared / "data")
    ask = ("--model", shared / NEXT, "--image", shared / "wide.png", "--prompt", QUESTION)
    clean("trace.py", *ask, "--steps", 4, "--out", shared / "trace.safetensors", keeps=True)
    trace = load_file(shared / "trace.safetensors")
    inputs = {name: trace[name] for name in ("input_ids", "pixel_values", "image_sizes")}
    save_file(inputs, shared / "inputs.safetensors")
    save_one(shared / NEXT, shared / "cache.safetensors")
    for policy in ("full", "streaming"):
        clean("eval", *eval_flags(shared), "--policy", policy, "--output_path", shared / "runs", keeps=True)


def eval_flags(shared: Path, model: str = NEXT) -> tuple[object, ...]:
    """The flags of the clean evaluation, without its output folder."""
    return ("--model", shared / model, "--data", shared / "data", *EVAL_FLAGS)


def run_folder(shared: Path, policy: str = "full") -> Path:
    """The folder of a clean, finished evaluation."""
    (folder,) = (path for path in (shared / "runs").iterdir() if policy in path.name)
    return folder


def _write_checkpoint(folder: Path, family: str, **options: object) -> None:
    """A tiny checkpoint whose answers never end by themselves: its end-of-sequence id is outside the vocabulary."""
    text = {"max_position_embeddings": _CONTEXT, "eos_token_id": tiny.VOCAB}
    tiny.write(folder, family, text_config=text, **options)
    tiny.dump(folder / "generation_config.json", {"bos_token_id": 1, "do_sample": False})
    tiny.dump(folder / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})


def _write_images(shared: Path) -> None:
    """Two pages, and one of them in each format."""
    gradient = Image.radial_gradient("L").resize((90, 70))
    page = Image.merge("RGB", (gradient, gradient.rotate(180), Image.linear_gradient("L").resize((90, 70))))
    page.save(shared / "wide.png")
    page.rotate(90, expand=True).save(shared / "tall.png")
    for suffix in ("jpg", "tiff", "gif", "webp", "bmp", "ppm"):
        page.save(shared / f"page.{suffix}")


def _write_data(folder: Path) -> None:
    """DocVQA's official layout, with one image in three questions, and the same in a parquet file."""
    (folder / "documents").mkdir(parents=True)
    records = []
    for index in range(RECORDS):
        name = f"documents/page_{index % 2}.png"
        shade = 60 * index + 20
        Image.new("RGB", (40 + 8 * index, 30), (shade, 255 - shade, 90)).save(folder / name)
        records.append(
            {
                "questionId": 100 + index,
                "question": f"What is number {index}?",
                "question_types": [f"kind{index % 2}"],
                "image": name,
                "answers": [f"answer {index}", "page"],
                "data_split": "val",
            }
        )
    content = {"dataset_name": "fuzz", "dataset_version": "1.0", "dataset_split": "val", "data": records}
    (folder / "val_v1.0.json").write_text(json.dumps(content))
    write_parquet(folder.parent / "parquet" / "validation-0.parquet", folder, records)


def write_parquet(path: Path, images: Path, records: list[dict]) -> None:
    """The records as the hub has them: ids are texts, images are the bytes of their files."""
    path.parent.mkdir(exist_ok=True)
    rows = [
        {**record, "questionId": str(record["questionId"]), "image": {"bytes": (images / record["image"]).read_bytes()}}
        for record in records
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file as its reference implementation reads it. Raises whatever that raises."""
    return load_file(path)
