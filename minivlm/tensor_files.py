"""Tensors of a safetensors file from outside: nothing of it is believed before it is checked.

The file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and the bytes of
the tensors without gaps (https://github.com/huggingface/safetensors#format). It is read rather than memory-mapped,
because a file that is cut short while it is mapped kills the process.
"""

from __future__ import annotations

import os
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Annotated

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from minivlm.errors import UserError
from minivlm.files import open_file, reason
from minivlm.schema import decode

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
_MAX_HEADER = 1 << 26  # bytes
_METADATA = "__metadata__"

_Count = Annotated[int, Meta(ge=0, lt=1 << 48)]  # bytes, or elements along a dimension


class StoredTensor(msgspec.Struct):
    """A tensor in the header; the offsets are those of its first byte and of the byte after its last."""

    dtype: str
    shape: Annotated[list[_Count], Meta(max_length=8)]
    data_offsets: tuple[_Count, _Count]


class TensorFile:
    """An open safetensors file whose header is known to describe every byte of it; a context manager.

    Raises `UserError`, beginning with the path, if it cannot be read or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_file(path)
        try:
            self.metadata, self.tensors, self._start = self._header()
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
        begin, end = stored.data_offsets
        raw = torch.empty(end - begin, dtype=torch.uint8)
        try:
            self._file.seek(self._start + begin)
            if self._file.readinto(raw.numpy().data) != len(raw):
                raise self._damaged(f"ended while {name} was read")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({reason(error)})") from None
        if stored.dtype == "BOOL" and bool((raw > 1).any()):
            raise self._damaged(f"{name} holds bytes that are neither true nor false")
        return raw.view(_DTYPES[stored.dtype]).view(stored.shape)

    def _header(self) -> tuple[dict[str, str], dict[str, StoredTensor], int]:
        """The metadata, the tensors by name, and where their bytes begin."""
        try:
            size = os.fstat(self._file.fileno()).st_size
            length = int.from_bytes(self._file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise self._damaged(f"a header of {length} bytes in a file of {size}")
            text = self._file.read(length)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({reason(error)})") from None
        name = f"{self.path}: not a readable safetensors file"
        header = decode(text, dict[str, msgspec.Raw], name)
        metadata = decode(bytes(header.pop(_METADATA, b"{}")), dict[str, str], name)
        tensors = {key: decode(bytes(entry), StoredTensor, name) for key, entry in header.items()}
        end = 0
        for key, stored in sorted(tensors.items(), key=lambda pair: pair[1].data_offsets):
            begin, after = stored.data_offsets
            if stored.dtype not in _DTYPES:
                raise self._damaged(f"{key} is {stored.dtype!r}, which is no known dtype")
            if begin != end or after - begin != prod(stored.shape) * _DTYPES[stored.dtype].itemsize:
                raise self._damaged(f"{key} of {stored.dtype} {stored.shape} at bytes {begin} to {after}")
            end = after
        if 8 + length + end != size:
            raise self._damaged(f"{size} bytes, its header describes {8 + length + end}")
        return metadata, tensors, 8 + length

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.path}: not a readable safetensors file ({what})")
