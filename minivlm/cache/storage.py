"""A KV cache on disk: saved in the middle of an answer, it goes on elsewhere exactly as it would have gone on here.

One safetensors file. Its tensors are the layers' buffers as they are, dead slots included, and what the host knows of
each sequence; its metadata are the policy with all its numbers, the decoder's configuration, and counters. Step tables
and bounds follow from these and are made anew. A file is not trusted: whatever a step would index with is checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minivlm.cache.buffers import LayerBuffers
from minivlm.cache.counts import EntryCounts, SequenceState
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.slots import SlotLayout
from minivlm.errors import UserError
from minivlm.files import write_whole

_VERSION = 3
_KEY = "minivlm.kv_cache"  # of the metadata
_BUFFERS = ("k", "v", "position", "score", "vision_attn", "in_core_step", "write_slot")
_COUNTS = ("vision", "core", "system", "tail", "tail_capacity")  # the fields of `EntryCounts`


def save_cache(cache: KVCache, path: Path) -> None:
    """Write all of a prefilled cache to one file; raises `UserError` where that is impossible."""
    if not cache.num_turns:
        raise UserError(f"{path}: an empty cache is not saved (expected one after a prefill)")
    tensors = {"stored": cache.stored, "active": cache.active}
    for layer_idx, buffers in enumerate(cache.layers):
        by_name = {name: getattr(buffers, name) for name in _BUFFERS}
        tensors |= {f"layers.{layer_idx}.{name}": tensor for name, tensor in by_name.items() if tensor is not None}
        counts = [[getattr(each, name) for name in _COUNTS] for each in buffers.counts]
        tensors[f"layers.{layer_idx}.counts"] = torch.tensor(counts)
    for row, sequence in enumerate(cache.sequences):
        for name in ("evictable_positions", "vision_positions", "tail_lengths"):
            tensors[f"sequences.{row}.{name}"] = torch.tensor(getattr(sequence, name), dtype=torch.int64)
    metadata = {
        **_identity(cache, cache.layers[0].k.dtype),
        "samples": [sequence.sample for sequence in cache.sequences],
        "lengths": [sequence.length for sequence in cache.sequences],
        "turns": cache.num_turns,
        "step_kinds": cache.step_kinds,
    }

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, {_KEY: json.dumps(metadata)})
        except SafetensorError as error:
            raise OSError(str(error)) from None

    write_whole(path, write)


def load_cache(cache: KVCache, path: Path, dtype: torch.dtype) -> None:
    """Go on where `save_cache` was called, with a model of `dtype`: the next step or turn is the same as there.

    Raises `UserError`, and changes nothing, for a damaged file and for one of another policy, configuration, dtype or
    number of sequences.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = _read_metadata(file.metadata() or {})
            _refuse_mismatch(metadata, json.loads(json.dumps(_identity(cache, dtype))))
            stored = _Stored(file, metadata, cache, dtype)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({' '.join(str(error).split())})") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    cache.sequences = stored.sequences
    cache.layers[:] = stored.layers
    cache.num_turns, cache.step_kinds = metadata["turns"], metadata["step_kinds"]
    cache.max_steps = stored.max_steps
    cache.fill_tables()
    cache.stored.copy_(stored.stored)
    cache.active.copy_(stored.active)


def _identity(cache: KVCache, dtype: torch.dtype) -> dict[str, Any]:
    """What has to be equal for a cache to go on."""
    parts = {name: getattr(cache.policy, name) for name in ("vision", "budget", "filters", "inputs")}
    return {
        "version": _VERSION,
        "policy": {
            "name": cache.policy.name,
            "window": cache.policy.window,
            **{name: _described(part) for name, part in parts.items()},
        },
        "config": asdict(cache.config),
        "dtype": str(dtype).removeprefix("torch."),
        "sequences": len(cache.sequences),
    }


def _described(part: object) -> dict[str, Any]:
    """A policy's part, or a tuple of them, as JSON: its class and its numbers."""
    if isinstance(part, tuple):
        return {"parts": len(part), **{str(i): _described(each) for i, each in enumerate(part)}}
    if is_dataclass(part) and not isinstance(part, type):
        return {"rule": type(part).__name__, **asdict(part)}
    return {"rule": None if part is None else type(part).__name__}


def _refuse_mismatch(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    saved = dict(_flat(theirs))
    for name, value in _flat(ours):
        if saved.get(name) != value:
            raise UserError(f"saved with {name} {json.dumps(saved.get(name))}, to be loaded with {json.dumps(value)}")


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _read_metadata(metadata: dict[str, str]) -> dict[str, Any]:
    if _KEY not in metadata:
        raise UserError(f"not a saved cache (expected metadata under {_KEY})")
    try:
        content = json.loads(metadata[_KEY])
    except (ValueError, RecursionError) as error:
        raise UserError(f"damaged metadata ({error})") from None
    if not isinstance(content, dict):
        raise UserError("damaged metadata (expected an object)")
    return content


class _Stored:
    """A file's tensors, each one checked, in new layers on the cache's device."""

    def __init__(self, file: Any, metadata: dict[str, Any], cache: KVCache, dtype: torch.dtype) -> None:
        self.file, self.cache, self.dtype = file, cache, dtype
        self.names = set(file.keys())
        batch, context = len(cache.sequences), cache.config.context_length
        _check_integers("samples", metadata.get("samples"), batch, -(2**62), 2**62)
        _check_integers("lengths", metadata.get("lengths"), batch, 1, context)
        _check_integers("turns", [metadata.get("turns")], 1, 1, 2**62)
        kinds = metadata.get("step_kinds")
        if not isinstance(kinds, list) or not all(kind in ("core", "refresh", "full") for kind in kinds):
            raise UserError("damaged metadata (step_kinds)")
        samples, sequence_lengths = metadata["samples"], metadata["lengths"]
        self.sequences = [self._read_sequence(row, samples[row], sequence_lengths[row]) for row in range(batch)]
        self.max_steps = len(self.sequences[0].tail_lengths[0]) - 1
        agreeing = all(
            len(lengths) == self.max_steps + 1 for sequence in self.sequences for lengths in sequence.tail_lengths
        )
        if len(kinds) > self.max_steps or not agreeing:
            raise UserError("damaged (steps that do not agree)")
        self.stored = self._read("stored", (batch,), torch.int64, (0, len(kinds)))
        self.active = self._read("active", (batch,), torch.bool)
        self.layers = [self._read_layer(layer_idx) for layer_idx in range(cache.config.num_hidden_layers)]
        if self.names:
            raise UserError(f"damaged (unexpected tensor {min(self.names)!r})")

    def _read_sequence(self, row: int, sample: int, length: int) -> SequenceState:
        prefix, groups = f"sequences.{row}", len(self.cache.budgets)
        evictable = self._read(f"{prefix}.evictable_positions", (None,), torch.int64, (0, length - 1)).tolist()
        vision = self._read(f"{prefix}.vision_positions", (None,), torch.int64, (0, length - 1)).tolist()
        most = self.cache.config.context_length
        tails = self._read(f"{prefix}.tail_lengths", (groups, None), torch.int64, (0, most)).tolist()
        ascending = all(first < second for positions in (evictable, vision) for first, second in pairwise(positions))
        growing = all(
            lengths
            and lengths[0] <= len(evictable)
            and all(after - before in (0, 1) for before, after in pairwise(lengths))
            for lengths in tails
        )
        if not ascending or not growing:
            raise UserError(f"damaged (the lists of sequence {row})")
        return SequenceState(sample, length, vision, evictable, tails)

    def _read_layer(self, layer_idx: int) -> LayerBuffers:
        cache, prefix = self.cache, f"layers.{layer_idx}"
        batch, heads, dim = len(cache.sequences), cache.config.num_key_value_heads, cache.config.head_dim
        context, scored = cache.config.context_length, cache.policy.budget is not None
        counts = self._read_counts(layer_idx)
        layout = SlotLayout.of(counts)
        left, slots = layout.tail_start, layout.slots

        # Everything is read and checked before anything is allocated by the counts.
        tensors = {
            "k": self._read(f"{prefix}.k", (batch, heads, slots, dim), self.dtype),
            "v": self._read(f"{prefix}.v", (batch, heads, slots, dim), self.dtype),
            "position": self._read(f"{prefix}.position", (batch, heads, slots), torch.int32, (0, context - 1)),
            "in_core_step": self._read(f"{prefix}.in_core_step", (batch, slots), torch.float32),
            "write_slot": self._read(f"{prefix}.write_slot", (batch, heads), torch.int64, (left, slots - 1)),
            "vision_attn": self._read(f"{prefix}.vision_attn", (batch, left), torch.float32),
        }
        if scored:
            tensors["score"] = self._read(f"{prefix}.score", (batch, heads, slots - left), torch.float32)
        buffers = LayerBuffers(
            counts, heads, dim, scored=scored, indexed=cache.indexed, dtype=self.dtype, device=cache.device
        )
        for row, row_counts in enumerate(counts):
            core = tensors["in_core_step"][row, layout.vision(row_counts)] == 1
            buffers.mark_core(row, core.to(cache.device))
            same = torch.equal(buffers.in_core_step[row].cpu(), tensors["in_core_step"][row])
            if int(core.sum()) != row_counts.core or not same:
                raise UserError(f"damaged ({prefix}.in_core_step)")
        for name, tensor in tensors.items():
            getattr(buffers, name).copy_(tensor)
        buffers.list_core()
        return buffers

    def _read_counts(self, layer_idx: int) -> list[EntryCounts]:
        name, most = f"layers.{layer_idx}.counts", self.cache.config.context_length + 1
        table = self._read(name, (len(self.cache.sequences), len(_COUNTS)), torch.int64, (0, most))
        counts = [EntryCounts(*numbers) for numbers in table.tolist()]
        for row_counts, sequence in zip(counts, self.sequences, strict=True):
            lengths = sequence.tail_lengths[self.cache.budget_group[layer_idx]]
            capacity = max([lengths[0], *(length + 1 for length in lengths[:-1])])
            if row_counts.core > row_counts.vision or (row_counts.tail, row_counts.tail_capacity) != (
                lengths[0],
                capacity,
            ):
                raise UserError(f"damaged ({name})")
        return counts

    def _read(
        self,
        name: str,
        shape: tuple[int | None, ...],
        dtype: torch.dtype,
        values: tuple[int, int] | None = None,
    ) -> Tensor:
        """A tensor of the file, its `values` within these bounds; None in its shape stands for any size."""
        if name not in self.names:
            raise UserError(f"damaged (no tensor {name!r})")
        self.names.remove(name)
        actual = self.file.get_slice(name).get_shape()
        fits = len(actual) == len(shape) and all(want in (None, have) for want, have in zip(shape, actual, strict=True))
        if not fits:
            expected = ["any" if size is None else size for size in shape]
            raise UserError(f"damaged ({name} has shape {actual}, expected {expected})")
        tensor: Tensor = self.file.get_tensor(name)
        if tensor.dtype != dtype:
            raise UserError(f"damaged ({name} is {tensor.dtype}, expected {dtype})")
        if (
            values is not None
            and tensor.numel()
            and not values[0] <= int(tensor.min()) <= int(tensor.max()) <= values[1]
        ):
            raise UserError(f"damaged ({name} leaves {values[0]}..{values[1]})")
        return tensor


def _check_integers(name: str, values: Any, count: int, least: int, most: int) -> None:
    integers = isinstance(values, list) and len(values) == count and all(type(n) is int for n in values)
    if not integers or not all(least <= n <= most for n in values):
        raise UserError(f"damaged metadata ({name})")
