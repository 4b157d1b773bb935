"""The list of named cases."""

from __future__ import annotations

from collections.abc import Callable

from fuzzer.case import Case, Family

NAMED: dict[str, Family] = {}


def named(name: str, *values: object) -> Callable[[Callable[..., Case]], Callable[..., Case]]:
    """Add a case to `NAMED`; with `values`, one for each of them, which the function gets."""

    def add(make: Callable[..., Case]) -> Callable[..., Case]:
        for value in values:
            _add(f"{name}: {_short(value)}", lambda box, value=value: make(box, value))
        if not values:
            _add(name, make)
        return make

    return add


def _add(name: str, make: Family) -> None:
    assert name not in NAMED, f"two cases are called {name}"
    NAMED[name] = make


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_short, value))
    text = value.__name__ if callable(value) else ascii(str(value))[1:-1]
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)})"
