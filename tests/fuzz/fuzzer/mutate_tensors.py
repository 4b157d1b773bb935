"""Damages safetensors files: the header's length and JSON, dtypes, shapes and offsets, and the bytes of tensors."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

from fuzzer.mutate_json import Mutated, flip_bytes, junk, mutate_json

_DTYPES = ("F32", "F16", "BF16", "F64", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "C64", "f32", "", "X9", 5)
_LENGTHS = (0, 1, 7, 8, 100_000_001, 2**31, 2**32 + 5, 2**63 - 1, 2**64 - 1)
Header = dict[str, Any]


def mutate_tensors(data: bytes, rng: Random) -> Mutated:
    """A safetensors file that is changed in one of many ways."""
    length = int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = rng.random()
    if kind < 0.1:
        items = rng.sample(list(header.items()), len(header))
        text = json.dumps(dict(items), indent=rng.choice((None, 1))) + " " * rng.randrange(20)
        return Mutated(_with_length(text.encode()) + tensors, same=True)
    if kind < 0.25:
        return Mutated(rng.choice((_cut, _flip, _append, flip_bytes, _other_length))(data, rng))
    if kind < 0.45:
        return Mutated(_joined(header, rng.choice(_DATA_CHANGES)(tensors, rng)))
    if kind < 0.6:
        return Mutated(_with_length(mutate_json(header, rng).data) + tensors)
    for _ in range(rng.choice((1, 1, 2))):
        # The second change may not find what the first one has taken away.
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError):
            header = rng.choice(_HEADER_CHANGES)(header, rng)
    return Mutated(_joined(header, tensors))


def _joined(header: Header, tensors: bytes) -> bytes:
    return _with_length(json.dumps(header).encode()) + tensors


def _with_length(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


# Changes of the whole file


def _cut(data: bytes, rng: Random) -> bytes:
    return data[: rng.choice((0, 4, 8, 9, 100, len(data) // 2, len(data) - 1, rng.randrange(len(data))))]


def _flip(data: bytes, rng: Random) -> bytes:
    """Bytes of the header, where each one counts."""
    end = 8 + int.from_bytes(data[:8], "little")
    return flip_bytes(data[:end], rng) + data[end:]


def _append(data: bytes, rng: Random) -> bytes:
    return data + rng.choice((b"\x00", b"\x00" * 1000, data))


def _other_length(data: bytes, rng: Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    return struct.pack("<Q", rng.choice((*_LENGTHS, length + 1, length - 1, length - 8))) + data[8:]


# Changes of the tensors' bytes


def _numbers(pattern: bytes) -> Callable[[bytes, Random], bytes]:
    """Some, or all, of the numbers are replaced by the one that is `pattern`."""

    def change(tensors: bytes, rng: Random) -> bytes:
        if not tensors:
            return tensors
        start = rng.randrange(len(tensors)) // 8 * 8
        count = rng.choice((1, 4, 1000, len(tensors)))
        end = min(len(tensors), start + count * len(pattern))
        return tensors[:start] + (pattern * count)[: end - start] + tensors[end:]

    return change


_DATA_CHANGES = (
    flip_bytes,
    _numbers(struct.pack("<f", float("nan"))),
    _numbers(struct.pack("<f", float("inf"))),
    _numbers(struct.pack("<f", -3e38)),
    _numbers(struct.pack("<q", 2**62)),
    _numbers(struct.pack("<q", -1)),
    _numbers(bytes(8)),
    lambda tensors, rng: bytes(len(tensors)),
    lambda tensors, rng: tensors[::-1],
)


# Changes of the header


def _entry(header: Header, rng: Random) -> Header:
    """One tensor's entry, to be changed."""
    return header[rng.choice([name for name in header if name != "__metadata__"])]


def _dtype(header: Header, rng: Random) -> Header:
    _entry(header, rng)["dtype"] = rng.choice(_DTYPES)
    return header


def _shape(header: Header, rng: Random) -> Header:
    """Dimensions that are reversed, merged, split, lost, negative, huge or none."""
    entry = _entry(header, rng)
    shape = entry["shape"]
    count = 1
    for size in shape:
        count *= size
    entry["shape"] = rng.choice(
        (
            *(shape[::-1], [count], [1, *shape], [*shape, 1], shape[1:], [-size for size in shape], [count, 0]),
            *([2**40] * 3, [2**63, 2], [1.5], ["1"], None, [], "x", [[1]], [True]),
        )
    )
    return header


def _offsets(header: Header, rng: Random) -> Header:
    entry = _entry(header, rng)
    begin, end = entry["data_offsets"]
    entry["data_offsets"] = rng.choice(
        (
            *(
                [begin + 4, end + 4],
                [begin, end + 4],
                [end, begin],
                [-begin - 4, end],
                [0, end],
                [begin, 2**62],
                [begin],
            ),
            *([begin, end, end], [2**64, 2**64 + end], [begin + 0.5, end], None, [str(begin), end], [begin, begin]),
        )
    )
    return header


def _missing(header: Header, rng: Random) -> Header:
    names = [name for name in header if name != "__metadata__"]
    if rng.random() < 0.5:
        del header[rng.choice(names)]
    else:
        entry = header[rng.choice(names)]
        del entry[rng.choice(list(entry))]
    return header


def _another_name(header: Header, rng: Random) -> Header:
    """A tensor under a name that nobody expects, or two that exchanged their names."""
    one, other = rng.choice(list(header)), rng.choice(list(header))
    if rng.random() < 0.5:
        header[one], header[other] = header[other], header[one]
    else:
        header[f"{one}{rng.choice(('x', '.weight', chr(0), '🙂'))}"] = header.pop(one)
    return header


def _metadata(header: Header, rng: Random) -> Header:
    """Metadata of another kind; in a saved cache, a number of its description that is changed."""
    metadata = header.get("__metadata__", {})
    described = next((name for name in metadata if metadata[name].startswith("{")), None)
    if described is not None and rng.random() < 0.8:
        metadata[described] = mutate_json(json.loads(metadata[described]), rng).data.decode(errors="replace")
    else:
        header["__metadata__"] = rng.choice((junk(rng), {"format": "pt", "more": "x" * 1000}))
    return header


_HEADER_CHANGES = (_dtype, _dtype, _shape, _shape, _offsets, _offsets, _missing, _another_name, _metadata, _metadata)
