"""A KV cache on disk: saved in the middle of an answer, it goes on elsewhere exactly as it would have gone on here.

One safetensors file. Its tensors are the layers' buffers in the smallest layout that holds them, dead slots included,
and what the host knows of each sequence; its metadata are the policy with all its numbers, the decoder's configuration,
and counters. Step tables and counts on the device follow from these and are made anew.

A file is not trusted. Whatever a step would index with is checked, and a tensor's shape before it is allocated. A
checksum (SHA-256) of the metadata and of every byte refuses values that have changed; it costs one pass over the bytes
on the host, and it does not show who wrote the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minivlm.cache.buffers import LayerBuffers
from minivlm.cache.cores import begin_cores
from minivlm.cache.counts import EntryCounts, SequenceState
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.slots import SlotLayout
from minivlm.cache.state import StepKind
from minivlm.errors import UserError
from minivlm.files import write_whole
from minivlm.schema import convert, decode
from minivlm.tensor_files import TensorFile

_VERSION = 4
_KEY, _CHECKSUM = "minivlm.kv_cache", "minivlm.sha256"  # of the metadata
_COUNTS = ("vision", "core", "system", "tail", "tail_capacity")  # the fields of `EntryCounts`


class _Counters(msgspec.Struct):
    """What the metadata say beside the policy and the configuration."""

    samples: list[Annotated[int, Meta(ge=-(2**62), le=2**62)]]
    lengths: list[Annotated[int, Meta(ge=1)]]
    turns: Annotated[int, Meta(ge=1, le=2**62)]
    step_kinds: list[StepKind]


def save_cache(cache: KVCache, path: Path) -> None:
    """Write all of a prefilled cache to one file; raises `UserError` where that is impossible."""
    if not cache.num_turns:
        raise UserError(f"{path}: an empty cache is not saved (expected one after a prefill)")
    tensors = {"stored": cache.stored, "active": cache.active}
    for layer_idx, buffers in enumerate(cache.layers):
        layout = SlotLayout.of(buffers.counts)
        by_name = buffers.within(layout)
        tensors |= {f"layers.{layer_idx}.{name}": tensor for name, tensor in by_name.items()}
        tensors[f"layers.{layer_idx}.write_slot"] = cache.next_place[layer_idx] + layout.tail_start
        counts = [[getattr(each, name) for name in _COUNTS] for each in buffers.counts]
        tensors[f"layers.{layer_idx}.counts"] = torch.tensor(counts)
    for row, sequence in enumerate(cache.sequences):
        for name in ("evictable_positions", "vision_positions", "tail_lengths"):
            tensors[f"sequences.{row}.{name}"] = torch.tensor(getattr(sequence, name), dtype=torch.int64)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        **_identity(cache, cache.layers[0].k.dtype),
        "samples": [sequence.sample for sequence in cache.sequences],
        "lengths": [sequence.length for sequence in cache.sequences],
        "turns": cache.num_turns,
        "step_kinds": cache.step_kinds,
    }
    text = json.dumps(metadata)
    checksum = checksum_of(text, {name: checksum_of_tensor(tensor) for name, tensor in tensors.items()})

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, {_KEY: text, _CHECKSUM: checksum})
        except SafetensorError as error:
            raise OSError(str(error)) from None

    write_whole(path, write)


def load_cache(cache: KVCache, path: Path, dtype: torch.dtype) -> None:
    """Go on where `save_cache` was called, with a model of `dtype`: the next step or turn is the same as there.

    Raises `UserError`, and changes nothing, for a damaged file and for one of another policy, configuration, dtype or
    number of sequences.
    """
    with TensorFile(path) as file:
        if not {_KEY, _CHECKSUM} <= file.metadata.keys():
            raise UserError(f"{path}: not a saved cache (expected metadata under {_KEY} and {_CHECKSUM})")
        text = file.metadata[_KEY]
        name = f"{path}: damaged metadata"
        metadata = decode(text, dict[str, Any], name)
        _refuse_mismatch(f"{path}: saved with ", metadata, json.loads(json.dumps(_identity(cache, dtype))))
        stored = _Stored(file, convert(metadata, _Counters, name), cache, dtype)
        if file.metadata[_CHECKSUM] != checksum_of(text, stored.checksums):
            raise UserError(f"{path}: damaged (its checksum is that of other content)")
    cache.sequences = stored.sequences
    cache.layers[:] = stored.layers
    cache.num_turns, cache.step_kinds = stored.counters.turns, stored.counters.step_kinds
    cache.max_steps = stored.max_steps
    cache.begin_answer([buffers.counts for buffers in cache.layers])
    cache.next_place.copy_(stored.next_place)
    begin_cores(cache)
    cache.stored.copy_(stored.stored)
    cache.active.copy_(stored.active)


def checksum_of(metadata: str, tensors: Mapping[str, str]) -> str:
    """The checksum of a saved cache, from the text of its metadata and the checksums of its tensors by name."""
    return hashlib.sha256(json.dumps([metadata, sorted(tensors.items())]).encode()).hexdigest()


def checksum_of_tensor(tensor: Tensor) -> str:
    """SHA-256 of a contiguous tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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


def _refuse_mismatch(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise `UserError`, beginning with `name`, unless all of `ours` is among `theirs`."""
    for key, value in ours.items():
        given = theirs.get(key)
        if isinstance(value, dict):
            _refuse_mismatch(f"{name}{key}.", given if isinstance(given, dict) else {}, value)
        elif given != value:
            said = "more than a value" if isinstance(given, (dict, list)) else json.dumps(given)
            raise UserError(f"{name}{key} {said}, to be loaded with {json.dumps(value)}")


class _Stored:
    """A file's tensors, each one checked, in new layers on the cache's device."""

    def __init__(self, file: TensorFile, counters: _Counters, cache: KVCache, dtype: torch.dtype) -> None:
        self.file, self.counters, self.cache, self.dtype = file, counters, cache, dtype
        self.checksums: dict[str, str] = {}  # of the tensors that were read
        batch, context = len(cache.sequences), cache.config.context_length
        samples, sequence_lengths, kinds = counters.samples, counters.lengths, counters.step_kinds
        if len(samples) != batch or len(sequence_lengths) != batch or max(sequence_lengths) > context:
            raise self._damaged(f"expected samples and lengths up to {context} of {batch} sequences")
        self.sequences = [self._read_sequence(row, samples[row], sequence_lengths[row]) for row in range(batch)]
        self.max_steps = len(self.sequences[0].tail_lengths[0]) - 1
        agreeing = all(
            len(lengths) == self.max_steps + 1 for sequence in self.sequences for lengths in sequence.tail_lengths
        )
        if len(kinds) > self.max_steps or not agreeing:
            raise self._damaged("steps that do not agree")
        self.stored = self._read("stored", (batch,), torch.int64, (0, len(kinds)))
        self.active = self._read("active", (batch,), torch.bool)
        self.next_place = torch.zeros(cache.next_place.shape, dtype=torch.int64)
        self.layers = [self._read_layer(layer_idx) for layer_idx in range(cache.config.num_hidden_layers)]
        if more := file.tensors.keys() - self.checksums:
            raise self._damaged(f"unexpected tensor {min(more)!r}")

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
            raise self._damaged(f"the lists of sequence {row}")
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
            "vision_attn": self._read(f"{prefix}.vision_attn", (batch, left), torch.float32),
        }
        if scored:
            tensors["score"] = self._read(f"{prefix}.score", (batch, heads, slots - left), torch.float32)
        # A hole among the tail's entries, or the slot after them, which need not exist once the answer is complete.
        place = self._read(f"{prefix}.write_slot", (batch, heads), torch.int64, (left, slots)) - left
        group = cache.budget_group[layer_idx]
        lengths = [
            sequence.tail_lengths[group][stored]
            for sequence, stored in zip(self.sequences, self.stored.tolist(), strict=True)
        ]
        if (place > torch.tensor(lengths)[:, None]).any():
            raise self._damaged(f"{prefix}.write_slot")
        self.next_place[layer_idx] = place
        buffers = LayerBuffers(
            SlotLayout.of(counts, cache.bucket_size),
            batch,
            heads,
            dim,
            scored=scored,
            dtype=self.dtype,
            device=cache.device,
        )
        buffers.counts = counts
        buffers.mark_kept(slice(None), torch.tensor([[row.fixed] for row in counts], device=cache.device))
        for row, row_counts in enumerate(counts):
            core = tensors["in_core_step"][row, layout.vision(row_counts)] == 1
            if int(core.sum()) != row_counts.core:
                raise self._damaged(f"{prefix}.in_core_step")
            buffers.mark_core(row, core.to(cache.device))
        held = buffers.within(layout)
        if not torch.equal(held["in_core_step"].cpu(), tensors["in_core_step"]):
            raise self._damaged(f"{prefix}.in_core_step")
        for name, tensor in tensors.items():
            held[name].copy_(tensor)
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
                raise self._damaged(name)
        return counts

    def _read(
        self,
        name: str,
        shape: tuple[int | None, ...],
        dtype: torch.dtype,
        values: tuple[int, int] | None = None,
    ) -> Tensor:
        """A tensor of the file, its `values` within these bounds; None in its shape stands for any size."""
        if name not in self.file.tensors:
            raise self._damaged(f"no tensor {name!r}")
        stored = self.file.tensors[name]
        most = max(self.cache.config.context_length, *(size or 0 for size in shape))  # None: positions or steps
        if not stored.fits(shape) or max(stored.shape) > most:
            expected = ["any" if size is None else size for size in shape]
            raise self._damaged(f"{name} has shape {list(stored.shape)}, expected {expected}")
        tensor = self.file.read(name)
        self.checksums[name] = checksum_of_tensor(tensor)
        if tensor.dtype != dtype:
            raise self._damaged(f"{name} is {tensor.dtype}, expected {dtype}")
        if (
            values is not None
            and tensor.numel()
            and not values[0] <= int(tensor.min()) <= int(tensor.max()) <= values[1]
        ):
            raise self._damaged(f"{name} leaves {values[0]}..{values[1]}")
        return tensor

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.file.path}: damaged ({what})")
