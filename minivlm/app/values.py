"""The values of flags: booleans, and numbers that are numbers.

Each function is a `type` of argparse.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable
from math import isfinite
from typing import Any

_LARGEST = 2**63 - 1


def boolean(text: str) -> bool:
    """Read true/false, yes/no or 1/0. Anything else is an error, where `bool(text)` would make it true."""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise ArgumentTypeError(f"{text!r} is neither true nor false")


def integer(text: str) -> int:
    """Read an integer of 64 bits: torch's seeds and sizes hold no more."""
    try:
        value = int(text)  # also refuses thousands of digits
    except ValueError:
        value = _LARGEST + 1
    if abs(value) > _LARGEST:
        raise ArgumentTypeError(f"{text!r} is not an integer of at most 64 bits")
    return value


def finite(text: str) -> float:
    """Read a number that is neither infinite nor NaN."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not isfinite(value):
        raise ArgumentTypeError(f"{text!r} is not a finite number")
    return value


# By the type that a flag or a policy's setting is declared with.
READERS: dict[type, Callable[[str], Any]] = {bool: boolean, int: integer, float: finite, str: str}
