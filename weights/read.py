"""Reads a checkpoint's safetensors files: one or several shards, whose tensors are streamed into place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path

import torch
from msgspec import Struct
from torch import Tensor

from minivlm import tensor_files
from minivlm.errors import UserError
from minivlm.files import exists, open_file, reason
from minivlm.schema import read_json
from minivlm.tensor_files import StoredTensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_STAGE = 16 << 20  # bytes read at once: all the memory that loading needs besides the tensors


class _Index(Struct):
    weight_map: dict[str, str]


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
    """The tensors of one safetensors file. Raises `UserError` if it is damaged."""
    with open_file(path) as file:
        return tensor_files.read_header(file, path)[1]


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
