"""Safetensors files from outside: every dtype is read as it was written, and nothing damaged is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minivlm.errors import UserError
from minivlm.tensor_files import TensorFile

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]


def refusal(path: Path, *names: str) -> str:
    with pytest.raises(UserError) as error, TensorFile(path) as file:
        for name in names:
            file.read(name)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (1,), begin: object = 0, end: object = 4) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, torch.bool, torch.complex64])
def test_every_dtype(dtype, tmp_path):
    tensors = {
        "a": (torch.arange(6).reshape(2, 3) % 2).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
        "empty": torch.zeros((0, 7), dtype=dtype),
    }
    save_file(tensors, tmp_path / "x", {"key": "é"})
    with TensorFile(tmp_path / "x") as file:
        assert file.metadata == {"key": "é"} and file.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            read = file.read(name)
            assert (read.dtype, read.shape) == (dtype, tensor.shape)
            assert read.view(-1).view(torch.uint8).tolist() == tensor.view(-1).view(torch.uint8).tolist()


DAMAGED = {
    "not JSON": (b"{", b""),
    "not an object": ([], b""),
    "not UTF-8": (b'{"\xff": 1}', b""),
    "deep": (b"[" * 100_000, b""),
    "no entry": ({"x": 5}, b""),
    "no shape": ({"x": {"dtype": "F32", "data_offsets": [0, 4]}}, b"1234"),
    "dtype of another type": ({"x": entry(["F32"])}, b"1234"),
    "negative": ({"x": entry(shape=[-1])}, b"1234"),
    "infinite": (b'{"x": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}', b"1234"),
    "real": ({"x": entry(shape=[1.5])}, b"1234"),
    "huge": ({"x": entry(shape=[2**47, 2**47])}, b"1234"),
    "deeper than a tensor": ({"x": entry(shape=[1] * 9)}, b"1234"),
    "other size": ({"x": entry(shape=[2])}, b"1234"),
    "gap": ({"x": entry(begin=4, end=8)}, b"12345678"),
    "overlap": ({"x": entry(), "y": entry()}, b"1234"),
    "backwards": ({"x": entry(begin=4, end=0)}, b"1234"),
    "too short": ({"x": entry()}, b"123"),
    "too long": ({"x": entry()}, b"12345"),
    "metadata of numbers": ({"__metadata__": {"x": 1}}, b""),
    "metadata in a list": ({"__metadata__": []}, b""),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_headers(name, tmp_path):
    assert "not a readable safetensors file" in refusal(write(tmp_path / "x", *DAMAGED[name]))


@pytest.mark.parametrize("length", [1, 10**6, 2**63, 2**64 - 1])
def test_wrong_lengths_of_the_header(length, tmp_path):
    assert "not a readable safetensors file" in refusal(write(tmp_path / "x", {"x": entry()}, b"1234", length))


@pytest.mark.parametrize("content", [b"", b"1234567", bytes(8), b"text, and long enough to look like a header"])
def test_other_files(content, tmp_path):
    (tmp_path / "x").write_bytes(content)
    assert "not a readable safetensors file" in refusal(tmp_path / "x")


def test_a_dtype_that_torch_does_not_have(tmp_path):
    """It may stand in a file, of which it is then not read."""
    path = write(tmp_path / "x", {"x": entry("F31"), "y": entry("F32", [1], 4, 8)}, bytes(8))
    with TensorFile(path) as file:
        assert file.read("y").tolist() == [0]
    assert "no known dtype" in refusal(path, "x")


def test_a_truth_that_is_neither(tmp_path):
    path = write(tmp_path / "x", {"x": entry("BOOL", [4])}, b"\0\1\2\0")
    assert "neither true nor false" in refusal(path, "x")


def test_a_file_that_is_cut_short_meanwhile(tmp_path):
    path = write(tmp_path / "x", {"x": entry(shape=[100_000], end=400_000)}, bytes(400_000))
    with TensorFile(path) as file:
        os.truncate(path, 1000)
        with pytest.raises(UserError, match="ended while x was read"):
            file.read("x")
