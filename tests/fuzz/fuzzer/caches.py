"""Saved caches, read through `minivlm.cache.storage`: refused, or the answer goes on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

import weights
from fuzzer.case import Box, Case
from fuzzer.child import Ran
from fuzzer.mutate_tensors import mutate_tensors
from minivlm import VLM, preset
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.storage import load_cache, save_cache
from minivlm.generation.steps import decode_step, prefill_step

_SETTINGS = preset("avl", text=True, text_init_cache=4)
_STEPS = 4  # before the cache is saved, and after it is loaded
_NO_STOP = torch.zeros(0, dtype=torch.int64)


def save_one(checkpoint: Path, path: Path) -> None:
    """Save the cache of an answer after four steps."""
    vlm = weights.load(checkpoint, device="cpu")
    image = Image.linear_gradient("L").convert("RGB").resize((90, 60))
    inputs = vlm.processor([vlm.processor.question("What is it?", 1)], [[image]])
    features = vlm.image_features(inputs.pixel_values, inputs.image_sizes)
    cache = vlm.new_cache(_SETTINGS)
    with torch.no_grad():
        prefill_step(vlm.model, cache, [inputs.input_ids[0]], features, 2 * _STEPS + 1)
        _decode(vlm, cache)
    save_cache(cache, path)


def go_on(arguments: Sequence[str]) -> None:
    """A command: load the cache FILE for the checkpoint FOLDER, and print the tokens of four more steps."""
    folder, file = arguments
    vlm = weights.load(folder, device="cpu")
    cache = vlm.new_cache(_SETTINGS)
    load_cache(cache, Path(file), torch.float32)
    with torch.no_grad():
        print(_decode(vlm, cache))


def _decode(vlm: VLM, cache: KVCache) -> list[float]:
    """Decode fixed tokens; the largest logit of each step stands for all of them."""
    return [float(decode_step(vlm.model, cache, torch.tensor([10 + step]), _NO_STOP).max()) for step in range(_STEPS)]


def make_cache(box: Box) -> Case:
    """A saved cache that is damaged: what is loaded goes on with the same numbers."""
    clean = (box.shared / "cache.safetensors").read_bytes()
    changed = mutate_tensors(clean, box.rng)
    path = box.write("cache.safetensors", changed.data)
    checkpoint = box.shared / "next"
    return Case("load_cache", (checkpoint, path), changed.expect, check=lambda ran: _check(box, ran, checkpoint))


def _check(box: Box, ran: Ran, checkpoint: Path) -> None:
    expected = box.clean("load_cache", checkpoint, box.shared / "cache.safetensors").out
    assert ran.out == expected, f"the answer goes on otherwise: {ran.out!r} instead of {expected!r}"
