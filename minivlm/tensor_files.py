"""Safetensors files from outside: nothing of one is believed before it is checked.

The file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and the bytes of
the tensors without gaps (https://github.com/huggingface/safetensors#format). The header is parsed here so that a
message can name the file and the tensor at fault. The data is read rather than memory-mapped: a file that is cut short
while it is mapped kills the process, and mapped pages count as resident memory beside the tensors made from them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, BinaryIO

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from minivlm.errors import UserError
from minivlm.files import open_file, reason
from minivlm.schema import convert

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
_MAX_HEADER = 1 << 24  # bytes; large models have a hundredth of that
_METADATA = "__metadata__"

_Count = Annotated[int, Meta(ge=0, lt=1 << 48)]  # bytes, or elements along a dimension


class _Entry(msgspec.Struct):
    """A tensor in the header."""

    dtype: str
    shape: Annotated[tuple[_Count, ...], Meta(max_length=8)]
    data_offsets: tuple[_Count, _Count]  # of its first byte, and of that after its last


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored: `nbytes` bytes of `file`, beginning at byte `start`."""

    file: Path
    name: str
    dtype: str  # the file's spelling, such as "BF16"; perhaps one that torch does not have
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def fits(self, shape: Sequence[int | None]) -> bool:
        """Whether it has this shape, in which None stands for any size."""
        return len(self.shape) == len(shape) and all(
            want in (None, have) for want, have in zip(shape, self.shape, strict=True)
        )


def read_header(file: BinaryIO, path: Path) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """The metadata and the tensors of an open safetensors file, which messages call `path`.

    Raises `UserError` unless the header describes every byte of the file once.
    """
    # 1) The text of the header.
    try:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise _unreadable(path, f"a header of {length} bytes in a file of {size}: truncated, or another format")
        if length > _MAX_HEADER:
            raise _unreadable(path, f"a header of {length} bytes, expected at most {_MAX_HEADER}")
        text = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None
    # 2) Its entries. msgspec's decoder would silently keep the last of equal keys.
    try:
        content = json.loads(text.decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, str(error)) from None
    words = f"{path}: not a readable safetensors file"
    header = convert(content, dict[str, Any], words)
    metadata = convert(header.pop(_METADATA, {}), dict[str, str], words, _METADATA)
    tensors = [_stored(path, name, convert(entry, _Entry, words, name), 8 + length) for name, entry in header.items()]
    # 3) Sorted by their place, the tensors follow one another without gaps up to the end of the file.
    end = 8 + length
    for tensor in sorted(tensors, key=lambda t: (t.start, t.nbytes)):
        if tensor.start != end:
            raise _unreadable(path, f"{tensor.name} starts at byte {tensor.start}, expected {end}")
        end += tensor.nbytes
    if end != size:
        what = "truncated" if size < end else "trailing data"
        raise _unreadable(path, f"{size} bytes, its header describes {end}: {what}")
    return metadata, {tensor.name: tensor for tensor in tensors}


class TensorFile:
    """An open safetensors file whose header is known to describe every byte of it; a context manager.

    Raises `UserError`, beginning with the path, if it cannot be read or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_file(path)
        try:
            self.metadata, self.tensors = read_header(self._file, path)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def read(self, name: str) -> Tensor:
        """One of `tensors`, on the CPU. Check its size before: all of it is allocated."""
        stored = self.tensors[name]
        if stored.dtype not in _DTYPES:
            raise _unreadable(self.path, f"{name} is {stored.dtype!r}, which is no known dtype")
        raw = torch.empty(stored.nbytes, dtype=torch.uint8)
        try:
            self._file.seek(stored.start)
            if self._file.readinto(raw.numpy().data) != len(raw):
                raise _unreadable(self.path, f"ended while {name} was read")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({reason(error)})") from None
        if stored.dtype == "BOOL" and bool((raw > 1).any()):
            raise _unreadable(self.path, f"{name} holds bytes that are neither true nor false")
        return raw.view(_DTYPES[stored.dtype]).view(stored.shape)


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object as a dictionary; raises `ValueError` for a key that is there twice."""
    entries: dict[str, object] = {}
    for name, value in pairs:
        if name in entries:
            raise ValueError(f"{name} is there twice")
        entries[name] = value
    return entries


def _stored(path: Path, name: str, entry: _Entry, data_start: int) -> StoredTensor:
    """One tensor of a header. Raises `UserError` if its bytes are not those of its shape."""
    begin, end = entry.data_offsets
    if end < begin:
        raise _unreadable(path, f"{name} has data_offsets {list(entry.data_offsets)}")
    if entry.dtype in _DTYPES and prod(entry.shape) * _DTYPES[entry.dtype].itemsize != end - begin:
        raise _unreadable(path, f"{name} of {entry.dtype} {list(entry.shape)} does not fill its {end - begin} bytes")
    return StoredTensor(path, name, entry.dtype, entry.shape, data_start + begin, end - begin)


def _unreadable(path: Path, what: str) -> UserError:
    return UserError(f"{path}: not a readable safetensors file ({what})")
