"""JSON from outside, checked against a schema: the types of a `msgspec.Struct` and their bounds.

A schema says what is read of a file; other keys are ignored. JSON has no NaN and no infinity, and
numbers outside the range of a float are refused.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from math import isinf
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from minivlm.errors import UserError
from minivlm.files import exists, read_bytes

T = TypeVar("T")

# Numbers, as fields of a schema. The bounds make infinity and NaN impossible also where a value did not come as JSON.
_LARGEST = sys.float_info.max
Positive = Annotated[float, Meta(gt=0, le=_LARGEST)]
Finite = Annotated[float, Meta(ge=-_LARGEST, le=_LARGEST)]


def read_json(path: Path, schema: type[T]) -> T:
    """The content of a JSON file. Raises `UserError` if it cannot be read or does not have the schema's form."""
    return decode(read_bytes(path), schema, str(path))


def read_optional_json(path: Path, schema: type[T]) -> T:
    """As `read_json`; of a file that does not exist, the schema's defaults."""
    return read_json(path, schema) if exists(path) else decode(b"{}", schema, str(path))


def decode(data: bytes | str, schema: type[T], name: str) -> T:
    """JSON as an object of the schema. Raises `UserError`, beginning with `name`, if it does not have its form."""
    try:
        return _refusing(lambda: msgspec.json.decode(data, type=schema), name)
    except UserError as error:
        if not re.search(r"\[\.{3}\].*: (integer value|number) out of range$", str(error)):
            raise
    # A number out of range, in content without a type, where msgspec does not say the place.
    raise UserError(f"{name}: {_place_of_infinity(data)}: number out of range")


def convert(content: Any, schema: type[T], name: str, section: str = "") -> T:
    """JSON that was read before, as dictionaries, lists and numbers, as an object of the schema; raises as `decode`.

    A message names the place of what is wrong; `section` is the place of `content` itself.
    """
    return _refusing(lambda: msgspec.convert(content, schema, str_keys=True), name, section)


def _place_of_infinity(data: bytes | str) -> str:
    """Where the first number of a JSON text stands that no float can hold."""

    def places(content: Any, place: str) -> Iterator[str]:
        if isinstance(content, float) and isinf(content):
            yield place.strip(".")
        elif isinstance(content, dict):
            for key, value in content.items():
                yield from places(value, f"{place}.{key}")
        elif isinstance(content, list):
            for i, value in enumerate(content):
                yield from places(value, f"{place}[{i}]")

    try:
        return next(places(json.loads(data, parse_int=float), ""), "somewhere")
    except RecursionError:
        return "deep inside"


def _refusing(read: Callable[[], T], name: str, section: str = "") -> T:
    try:
        return read()
    except msgspec.ValidationError as error:
        raise UserError(f"{name}: {_in_words(error, section)}") from None
    except RecursionError:
        raise UserError(f"{name}: not readable JSON (brackets are nested too deeply)") from None
    except ValueError as error:  # malformed JSON, and text that is not UTF-8
        raise UserError(f"{name}: not readable JSON ({error})") from None


def _in_words(error: msgspec.ValidationError, section: str) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.text_config.vocab_size`", the place first and in plain words."""
    what, _, place = str(error).replace("`", "").partition(" - at ")
    key, _, path = place.rpartition("$")  # "key in $.vocab" is a place too
    path = f"{section}{path}".strip(".")
    if missing := re.fullmatch(r"Object missing required field (.*)", what):
        return f"{path}.{missing[1]}".strip(".") + " is missing"
    what = what[:1].lower() + what[1:]
    return f"{key}{path}: {what}" if path or key else what
