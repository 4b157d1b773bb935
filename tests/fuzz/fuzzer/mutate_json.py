"""Damages JSON: its values, its structure, its text."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from fuzzer.case import Expect

_DEEP = "[" * 100_000 + "]" * 100_000
_RAW = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "0.1e", "+1", "01", "'x'", "None", "\x00")
_MARK = "\ue000"  # stands where raw text goes
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31, 2**53, 2**63, -(2**63), 10**25, 10**6, 10**9),
    *(0.5, -0.5, 1e-320, 1e308, -1e308, 1e300, 3.0),
    *("", "x", "nan", "default", "../../etc/passwd", "/dev/zero", "<image>", "</s>", "\ud800", "\x00", "\u202e🙂", "1"),
    *("9" * 5000, "long " * 20_000),
    *([], [[]], {}, [None], [0], [1, 2, 3], [[1e999, 56]], [[56, 112]], ["x"], [[[[[[]]]]]], {"": 0}, {"default": []}),
)


def junk(rng: Random) -> Any:
    """One of `JUNK`, as a copy of its own: further changes must not reach the next case."""
    return copy.deepcopy(rng.choice(JUNK))


@dataclass(frozen=True)
class Mutated:
    """Changed content. `same`: it means what it meant before. `broken`: it is not JSON any more."""

    data: bytes
    same: bool = False
    broken: bool = False

    @property
    def expect(self) -> Expect:
        """What the rule lets a command do that has to read this."""
        return Expect.ANSWER if self.same else Expect.REFUSAL if self.broken else Expect.EITHER


def mutate_json(content: Any, rng: Random) -> Mutated:
    """`content` as JSON that is changed in one of many ways; a copy is changed, not `content` itself."""
    content = json.loads(json.dumps(content))
    kind = rng.random()
    if kind < 0.15:
        return Mutated(_another_spelling(content, rng), same=True)
    if kind < 0.75:
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            content = rng.choice(_VALUE_CHANGES)(content, rng)
        return _judged(json.dumps(content).encode())
    if kind < 0.85:
        return _judged(_with_raw_text(content, rng))
    return _judged(rng.choice(_TEXT_CHANGES)(json.dumps(content).encode(), rng))


def _judged(data: bytes) -> Mutated:
    """Whether it is still JSON for Python's own parser, which would let NaN pass.

    Bytes that are no text are no reason to refuse a file if they stand in a name or text that nobody reads.
    """

    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        text = data.decode(json.detect_encoding(data), errors="replace")
        json.loads(text, parse_constant=refuse, parse_int=float)  # float: Python reads no integer of 5,000 digits
    except (ValueError, RecursionError):
        return Mutated(data, broken=True)
    return Mutated(data)


def _another_spelling(content: Any, rng: Random) -> bytes:
    """The same content: keys in another order, other white space, escapes, keys that nobody knows."""
    if isinstance(content, dict):
        items = [*content.items()]
        if rng.random() < 0.5:
            items.append(("zz_unknown", rng.choice((None, 5, "x", [1, {"a": []}], {"zz": 1e300}))))
        rng.shuffle(items)
        content = dict(items)
    indent = rng.choice((None, 0, 1, "\t"))
    separators = rng.choice((None, (",", ":"), (" , ", " : ")))
    text = json.dumps(content, indent=indent, separators=separators, ensure_ascii=rng.random() < 0.5)
    return (rng.choice(("", "\n", " \t")) + text + rng.choice(("", "\n\n"))).encode()


# Changes of values: each takes the content and returns it, changed in one place.

_Place = tuple[Any, Any]  # a container, and a key or index in it


def _places(content: Any) -> list[_Place]:
    """All places in nested objects and lists; of long lists, the first hundred."""
    found: list[_Place] = []
    if isinstance(content, (dict, list)):
        keys = list(content) if isinstance(content, dict) else range(len(content))
        for key in list(keys)[:100]:
            found += [(content, key), *_places(content[key])]
    return found


def _somewhere(content: Any, rng: Random, change: Callable[[Any, Any], object]) -> Any:
    if places := _places(content):
        change(*rng.choice(places))
    return content


def _replace(content: Any, rng: Random) -> Any:
    return _somewhere(content, rng, lambda where, key: where.__setitem__(key, junk(rng)))


def _delete(content: Any, rng: Random) -> Any:
    return _somewhere(content, rng, lambda where, key: where.__delitem__(key))


def _scale(content: Any, rng: Random) -> Any:
    """A number that is a little or a lot too large, negative, broken, or a text."""
    numbers = [(where, key) for where, key in _places(content) if type(where[key]) in (int, float)]
    if numbers:
        where, key = rng.choice(numbers)
        n = where[key]
        where[key] = rng.choice((n + 1, n - 1, -n, n * 2, n * 1000, n * 10**9, n / 7, n + 0.5, str(n), [n], float(n)))
    return content


def _rename(content: Any, rng: Random) -> Any:
    """A key that nobody knows instead of one that is expected."""

    def change(where: Any, key: Any) -> None:
        if isinstance(where, dict):
            where[f"{key}_"] = where.pop(key)

    return _somewhere(content, rng, change)


def _swap(content: Any, rng: Random) -> Any:
    """Two values that change places."""
    if places := _places(content):
        (one, key), (other, place) = rng.choice(places), rng.choice(places)
        a, b = json.dumps(one[key]), json.dumps(other[place])
        one[key], other[place] = json.loads(b), json.loads(a)
    return content


def _grow(content: Any, rng: Random) -> Any:
    """A value many times in a list, or in lists in lists."""
    count = rng.choice((0, 1, 2, 1000))
    return _somewhere(content, rng, lambda where, key: where.__setitem__(key, [where[key]] * count))


def _other_top(content: Any, rng: Random) -> Any:
    return rng.choice(([content], "text", 5, None, [], {}, {"data": content}))


_VALUE_CHANGES = (_replace, _replace, _replace, _replace, _scale, _scale, _delete, _rename, _swap, _grow, _other_top)


def _with_raw_text(content: Any, rng: Random) -> bytes:
    """A value that no JSON library would write."""
    content = _somewhere(content, rng, lambda where, key: where.__setitem__(key, _MARK))
    raw = rng.choice((*_RAW, _DEEP))
    return json.dumps(content, ensure_ascii=False).replace(f'"{_MARK}"', raw).encode()


# Changes of text


def _truncate(data: bytes, rng: Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flip_bytes(data: bytes, rng: Random) -> bytes:
    """A few bytes replaced by others."""
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if flipped:
            flipped[rng.randrange(len(flipped))] = rng.randrange(256)
    return bytes(flipped)


def _twice(data: bytes, rng: Random) -> bytes:
    """A key that is there twice, with another value."""
    return data.replace(b'{"', b'{"zz": 1, "zz": {}, "', 1) if rng.random() < 0.5 else data + data


def _garbage_around(data: bytes, rng: Random) -> bytes:
    before = rng.choice((b"", b"\xef\xbb\xbf", b"\xff", b"\n" * 10**6))
    return before + data + rng.choice((b"", b"\x00", b"}", b"//"))


def _other_encoding(data: bytes, rng: Random) -> bytes:
    return data.decode().encode(rng.choice(("utf-16", "utf-32", "utf-16-le")))


def _nothing(data: bytes, rng: Random) -> bytes:
    return rng.choice((b"", b" ", b"{", b"\x00" * 100, _DEEP.encode(), b'{"a":' * 50_000))


_TEXT_CHANGES = (_truncate, flip_bytes, flip_bytes, _twice, _garbage_around, _other_encoding, _nothing)
