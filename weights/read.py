"""Reads safetensors files: headers are checked strictly, tensors are streamed into place.

A safetensors file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape,
data_offsets}}, and the bytes of the tensors without gaps
(https://github.com/huggingface/safetensors#format). The header is parsed here so that a message can
name the file and the tensor at fault. The data is read rather than memory-mapped for two reasons:
the pages of a mapped file count as resident memory beside the tensors made from them, and a file
that is cut short while it is mapped kills the process.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta, Struct
from torch import Tensor

from minivlm.errors import UserError
from minivlm.files import exists, open_file, reason
from minivlm.schema import convert, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_HEADER = 1 << 24  # bytes; large models have a hundredth of that
_STAGE = 16 << 20  # bytes read at once: all the memory that loading needs besides the tensors


_Count = Annotated[int, Meta(ge=0, lt=1 << 48)]  # bytes, or elements along a dimension


class _Index(Struct):
    weight_map: dict[str, str]


class _Entry(Struct):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: Annotated[tuple[_Count, ...], Meta(max_length=16)]
    data_offsets: tuple[_Count, _Count]  # of its first byte, and of that after its last


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored: `nbytes` bytes of `file`, beginning at byte `start`."""

    file: Path
    name: str
    dtype: str  # the file's spelling, such as "BF16"
    shape: tuple[int, ...]
    start: int
    nbytes: int


def shard_names(index: Path) -> dict[str, str]:
    """The file name of each tensor, as an index states it.

    Raises `UserError` if a shard is not a plain file name. An index that names `../x` or an
    absolute path could make us read, or download, something that does not belong to the checkpoint.
    """
    names = read_json(index, _Index).weight_map
    if not names:
        raise UserError(f"{index}: weight_map is empty (expected tensor name: file name)")
    for name, file in names.items():
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file, re.ASCII):
            raise UserError(f"{index}: {name} is in {file!r} (expected a .safetensors file name inside the folder)")
    return names


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint folder, by their names on disk.

    An index is preferred to a single file. Raises `UserError` if there are no safetensors, a shard
    is missing, a file is damaged, or the index and the shards disagree.
    """
    index = folder / INDEX
    if not exists(index):
        if not exists(folder / WEIGHTS):
            pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
            hint = ""
            if pickles:
                hint = "; pickle checkpoints (.bin, .pt, .pth) are not read, convert them to safetensors"
            raise UserError(f"{folder}: no {WEIGHTS} or {INDEX}{hint}")
        return read_header(folder / WEIGHTS)
    names = shard_names(index)
    tensors: dict[str, StoredTensor] = {}
    for file in dict.fromkeys(names.values()):
        if not exists(folder / file):
            raise UserError(f"{folder / file}: shard is missing ({INDEX} names it)")
        for name, tensor in read_header(folder / file).items():
            if name in tensors:
                raise UserError(f"{tensor.file}: {name} is also in {tensors[name].file.name}")
            tensors[name] = tensor
    for name, file in names.items():
        if name not in tensors or tensors[name].file.name != file:
            raise UserError(f"{folder / file}: no tensor {name} ({INDEX} says it is there)")
    return tensors


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Raises `UserError` unless the header describes every byte of the file.
    """
    with open_file(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise UserError(
                    f"{path}: header of {length} bytes in a file of {size} (truncated, or not a safetensors file)"
                )
            if length > _MAX_HEADER:
                raise UserError(f"{path}: header of {length} bytes (expected at most {_MAX_HEADER})")
            text = file.read(length)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({reason(error)})") from None
    try:
        # msgspec would silently keep the last of equal keys.
        header = json.loads(text.decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged safetensors header ({error})") from None
    header = convert(header, dict[str, Any], f"{path}: damaged safetensors header")
    header.pop("__metadata__", None)
    tensors = [_stored(path, name, entry, 8 + length) for name, entry in header.items()]
    # Sorted by their place, the tensors have to follow one another without gaps up to the end of
    # the file.
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
    """Read each stored tensor into a contiguous target tensor with the same number of elements.

    Files are read in order. The target may have another dtype and device: tensors are converted on
    the way, `_STAGE` bytes at a time. `progress` is called with the number of bytes read. Raises
    `UserError` if a file turns out to be shorter than it was.
    """
    stage = bytearray(_STAGE)
    window = memoryview(stage)  # what the file is read into,
    staged = torch.frombuffer(stage, dtype=torch.uint8)  # and the same bytes as a tensor
    in_order = sorted(tensors, key=lambda pair: (pair[0].file, pair[0].start))
    for path, pairs in groupby(in_order, key=lambda pair: pair[0].file):
        try:
            with open_file(path) as file:
                for stored, target in pairs:
                    file.seek(stored.start)
                    source = staged.view(DTYPES[stored.dtype])
                    for piece in target.view(-1).split(source.numel()):
                        wanted = piece.numel() * source.element_size()
                        if file.readinto(window[:wanted]) != wanted:
                            raise UserError(f"{path}: ended while {stored.name} was read")
                        piece.copy_(source[: piece.numel()])
                        progress(wanted)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({reason(error)})") from None


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object as a dictionary; raises `ValueError` for a key that is there twice."""
    entries: dict[str, object] = {}
    for name, value in pairs:
        if name in entries:
            raise ValueError(f"{name} is there twice")
        entries[name] = value
    return entries


def _stored(path: Path, name: str, content: object, data_start: int) -> StoredTensor:
    """One tensor of a header, checked."""
    damaged = f"{path}: damaged safetensors header"
    entry = convert(content, _Entry, damaged, name)
    begin, end = entry.data_offsets
    if end < begin:
        raise UserError(f"{damaged} ({name} has data_offsets {list(entry.data_offsets)})")
    if entry.dtype in DTYPES and prod(entry.shape) * DTYPES[entry.dtype].itemsize != end - begin:
        raise UserError(
            f"{damaged} ({name} of {entry.dtype} {list(entry.shape)} does not fill its {end - begin} bytes)"
        )
    return StoredTensor(path, name, entry.dtype, entry.shape, data_start + begin, end - begin)
