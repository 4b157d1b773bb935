"""Checkpoints whose JSON or weights are damaged, and tensor files that `trace.py` reads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load, load_file

from fuzzer.case import Box, Case
from fuzzer.child import Ran
from fuzzer.mutate_json import Mutated, mutate_json
from fuzzer.mutate_tensors import mutate_tensors
from fuzzer.world import LLAVA, NEXT, QUESTION

Tensors = dict[str, torch.Tensor]
INDEX = "model.safetensors.index.json"
JSON_FILES = {  # of each checkpoint, with how often each is damaged
    NEXT: {
        "config.json": 6,
        "generation_config.json": 2,
        "preprocessor_config.json": 4,
        "processor_config.json": 1,
        "tokenizer_config.json": 2,
        "tokenizer.json": 3,
        "special_tokens_map.json": 1,
        "chat_template.json": 1,
    },
    LLAVA: {"config.json": 3, "processor_config.json": 3, "tokenizer.json": 1, INDEX: 3},
}
DEFAULTS: dict[str, dict[str, Any]] = {  # what a file means without saying so
    "config.json": {
        "text_config": {"hidden_act": "silu", "attention_bias": False, "rope_scaling": None, "use_cache": True},
        "vision_config": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_channels": 3},
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": False,
        "ignore_index": -100,
    },
    "generation_config.json": {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "max_length": 20},
    "preprocessor_config.json": {"do_resize": True, "do_rescale": True, "resample": 3, "rescale_factor": 1 / 255},
}
_NEW_TOKENS = 4
_STEPS = 4


def link_checkpoint(box: Box, name: str) -> Path:
    """A checkpoint among the inputs, of links to the shared files; `box.write` replaces one of them."""
    folder = box.inputs / name
    shutil.copytree(box.shared / name, folder, copy_function=os.link)
    return folder


def ask(box: Box, model: Path, *more: object) -> tuple[object, ...]:
    """The flags of a short answer about a clean image."""
    image = box.shared / "wide.png"
    return ("--model", model, "--image", image, "--prompt", QUESTION, "--max_new_tokens", _NEW_TOKENS, *more)


def same_answer(box: Box, model: str) -> Callable[[Ran], None]:
    """A check that the answer is that of the clean checkpoint."""

    def check(ran: Ran) -> None:
        assert ran.out == box.clean("generate.py", *ask(box, box.shared / model)).out, f"another answer: {ran.out!r}"

    return check


def some_answer(ran: Ran) -> None:
    """A check that there is one line or more."""
    assert ran.out.endswith("\n")


def make_json(box: Box) -> Case:
    """`generate.py` on a checkpoint with one damaged JSON file."""
    model = box.rng.choice((NEXT, NEXT, LLAVA))
    name = box.rng.choice([name for name, count in JSON_FILES[model].items() for _ in range(count)])
    content = json.loads((box.shared / model / name).read_bytes())
    if name in DEFAULTS and box.rng.random() < 0.1:
        written = _with_defaults(content, DEFAULTS[name], box.rng)
        return damaged_json(box, model, name, Mutated(json.dumps(written).encode(), same=True))
    return damaged_json(box, model, name, mutate_json(content, box.rng))


def _with_defaults(content: dict[str, Any], defaults: dict[str, Any], rng: Random) -> dict[str, Any]:
    """Some of the defaults written out, where the content does not say otherwise."""
    chosen = {key: value for key, value in defaults.items() if isinstance(value, dict) or rng.random() < 0.5}
    for key, value in chosen.items():
        if isinstance(value, dict):
            chosen[key] = _with_defaults(content[key], value, rng)
    return {**chosen, **{key: value for key, value in content.items() if not isinstance(chosen.get(key), dict)}}


def damaged_json(box: Box, model: str, name: str, changed: Mutated) -> Case:
    """`generate.py` on a clean checkpoint in which the file `name` has other content."""
    folder = link_checkpoint(box, model)
    box.write(f"{model}/{name}", changed.data)
    check = same_answer(box, model) if changed.same else some_answer
    return Case("generate.py", ask(box, folder), changed.expect, check=check)


def make_weights(box: Box) -> Case:
    """`generate.py` on a checkpoint with a damaged weights file."""
    model, name = box.rng.choice(((NEXT, "model.safetensors"), (LLAVA, "model-00001-of-00002.safetensors")))
    folder = link_checkpoint(box, model)
    clean = (box.shared / model / name).read_bytes()
    changed = mutate_tensors(clean, box.rng)
    path = box.write(f"{model}/{name}", changed.data)
    more = box.rng.choice(((), (), (), ("--dtype", "float16"), ("--dtype", "bfloat16")))
    is_same = same_tensors(path, clean)
    check = same_answer(box, model) if is_same is not False and not more else some_answer
    return Case("generate.py", ask(box, folder, *more), changed.expect, check=check)


def same_tensors(path: Path, clean: bytes) -> bool | None:
    """Whether safetensors' own reader finds the tensors of `clean` in a file; None if it refuses the file."""
    try:
        ours, theirs = load_file(path), load(clean)
    except Exception:
        return None
    return equal(ours, theirs)


def equal(ours: Tensors, theirs: Tensors) -> bool:
    """Whether all of `theirs` are there, to the bit."""
    return all(
        name in ours and ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor)
        for name, tensor in theirs.items()
    )


def make_tensors(box: Box) -> Case:
    """`trace.py` with damaged inputs or a damaged trace to follow."""
    flag, name = box.rng.choice((("--inputs", "inputs.safetensors"), ("--teacher_forcing", "trace.safetensors")))
    clean = (box.shared / name).read_bytes()
    changed = mutate_tensors(clean, box.rng)
    path = box.write(name, changed.data)
    files = {"--inputs": box.shared / "inputs.safetensors", flag: path}
    out = box.out / "trace.safetensors"
    flags = [word for pair in files.items() for word in pair]
    arguments = ("--model", box.shared / NEXT, *flags, "--steps", _STEPS, "--out", out)
    read = ("input_ids", "pixel_values", "image_sizes") if flag == "--inputs" else ("tokens",)
    check = lambda ran: _check_trace(box, path, clean, read, out)  # noqa: E731
    return Case("trace.py", arguments, changed.expect, outputs=[out], check=check)


def _check_trace(box: Box, path: Path, clean: bytes, read: tuple[str, ...], out: Path) -> None:
    """A trace is whole and finite; of inputs that say what they said before, it is the clean one."""
    trace = check_trace(out, _STEPS)
    try:
        ours = load_file(path)
    except Exception:  # damaged where nobody reads it, or else the trace is another one
        ours = load(clean)
    if equal(ours, {name: tensor for name, tensor in load(clean).items() if name in read}):
        expected = load_file(box.shared / "trace.safetensors")
        assert all(torch.equal(trace[name], expected[name]) for name in ("tokens", "logits", "fate")), "another trace"


def check_trace(path: Path, steps: int) -> Tensors:
    """Check that a trace is complete and that its tokens are those of its logits; returns its tensors."""
    trace = load_file(path)
    assert trace["tokens"].shape == (steps,) and trace["logits"].shape[0] == steps
    assert bool(trace["logits"].isfinite().all()), "logits that are no numbers"
    assert torch.equal(trace["logits"].argmax(dim=-1).int(), trace["tokens"])
    return trace
