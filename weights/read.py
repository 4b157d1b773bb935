"""Safetensors on disk: headers are checked strictly, tensors are streamed into place.

The format is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}
and the bytes of the tensors without gaps (https://github.com/huggingface/safetensors#format).  The header
is parsed here because a user needs to be told which file and which tensor is wrong, and the data is read
rather than mapped: pages of a mapped file count as resident memory beside the tensors made from them, and
a file cut short under a mapping kills the process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from minivlm.errors import UserError
from minivlm.files import read_json_object

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
_STAGE = 16 << 20  # bytes read at once: all the memory that loading needs beside the tensors themselves


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `nbytes` bytes of `file`, from byte `start` on."""

    file: Path
    name: str
    dtype: str  # the file's spelling, such as "BF16"
    shape: tuple[int, ...]
    start: int
    nbytes: int


def shard_names(index: Path) -> dict[str, str]:
    """tensor name -> file name, as an index says.

    Raises `UserError` where a shard is not a plain file name: an index that names `../x` or an absolute
    path would make the loader read, or the hub client fetch, what does not belong to the checkpoint.
    """
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: no weight_map (expected an object of tensor name: file name)")
    for name, file in names.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file, re.ASCII):
            raise UserError(f"{index}: {name} is in {file!r} (expected a .safetensors file name inside the folder)")
    return names


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder, by its name on disk; an index wins over a single file.

    Raises `UserError` for no safetensors at all, a missing shard, a damaged file, and an index and shards
    that disagree.
    """
    index = folder / INDEX
    if not index.is_file():
        if not (folder / WEIGHTS).is_file():
            pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
            hint = "; pickle checkpoints (.bin, .pt, .pth) are not read, convert them to safetensors" if pickles else ""
            raise UserError(f"{folder}: no {WEIGHTS} or {INDEX}{hint}")
        return read_header(folder / WEIGHTS)
    names = shard_names(index)
    found: dict[str, StoredTensor] = {}
    for file in dict.fromkeys(names.values()):
        if not (folder / file).is_file():
            raise UserError(f"{folder / file}: shard is missing ({INDEX} names it)")
        for name, tensor in read_header(folder / file).items():
            if name in found:
                raise UserError(f"{tensor.file}: {name} is also in {found[name].file.name}")
            found[name] = tensor
    for name, file in names.items():
        if name not in found or found[name].file.name != file:
            raise UserError(f"{folder / file}: no tensor {name} ({INDEX} says it is there)")
    return found


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file; raises `UserError` unless header and file size agree exactly."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, _MAX_HEADER):
                raise UserError(
                    f"{path}: header of {length} bytes in a file of {size} (truncated, or not a safetensors file)"
                )
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    try:
        header = json.loads(text.decode(), object_pairs_hook=_no_duplicates)
        header.pop("__metadata__", None)
        tensors = [_entry(path, name, entry, 8 + length) for name, entry in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged safetensors header ({error})") from None
    end = 8 + length
    for tensor in sorted(tensors, key=lambda t: (t.start, t.nbytes)):
        if tensor.start != end:
            raise UserError(
                f"{path}: damaged safetensors header ({tensor.name} starts at byte {tensor.start}, expected {end})"
            )
        end += tensor.nbytes
    if end != size:
        raise UserError(
            f"{path}: {size} bytes, its header describes {end} ({'truncated' if size < end else 'trailing data'})"
        )
    return {tensor.name: tensor for tensor in tensors}


def fill(tensors: Iterable[tuple[StoredTensor, Tensor]], progress: Callable[[int], object]) -> None:
    """Read each stored tensor into a contiguous one of the same number of elements, in file order.

    The target's dtype and device are its own: conversion happens on the way, `_STAGE` bytes at a time.
    `progress` is told how many bytes were read.  Raises `UserError` when a file ends early after all.
    """
    stage = bytearray(_STAGE)
    window, staged = memoryview(stage), torch.frombuffer(stage, dtype=torch.uint8)
    in_order = sorted(tensors, key=lambda pair: (pair[0].file, pair[0].start))
    for path, pairs in groupby(in_order, key=lambda pair: pair[0].file):
        try:
            with open(path, "rb") as file:
                for stored, target in pairs:
                    file.seek(stored.start)
                    source, flat = staged.view(DTYPES[stored.dtype]), target.view(-1)
                    for piece in flat.split(source.numel()):
                        wanted = piece.numel() * source.element_size()
                        if file.readinto(window[:wanted]) != wanted:
                            raise UserError(f"{path}: ended while {stored.name} was read")
                        piece.copy_(source[: piece.numel()])
                        progress(wanted)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from None


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is there twice")
    return found


def _entry(path: Path, name: str, entry: dict, data: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)) or end < begin:
        raise ValueError(f"{name} has shape {entry['shape']} and data_offsets {entry['data_offsets']}")
    if dtype in DTYPES and prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"{name} of {dtype} {list(shape)} does not fill its {end - begin} bytes")
    return StoredTensor(path, name, dtype, shape, data + begin, end - begin)
