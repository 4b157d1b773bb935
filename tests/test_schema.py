"""JSON from outside: an object of the schema, or one line that says where it is not."""

from __future__ import annotations

import json
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivlm.errors import UserError
from minivlm.schema import Finite, Positive, convert, decode


class Inner(msgspec.Struct):
    share: Positive = 1.0
    shift: Finite = 0.0
    pairs: list[tuple[int, int]] = []


class Outer(msgspec.Struct):
    inner: Inner
    count: Annotated[int, msgspec.Meta(ge=1, le=9)] = 1


def refusal(read, *arguments) -> str:
    with pytest.raises(UserError) as error:
        read(*arguments)
    message = str(error.value)
    assert message.startswith("file: ") and "\n" not in message
    return message.removeprefix("file: ")


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"inner": {"share": 0}}', "inner.share: expected float > 0.0"),
        ('{"inner": {"share": "1"}}', "inner.share: expected float, got str"),
        ('{"inner": {"share": 1e999}}', "inner.share: number out of range"),
        ('{"inner": {"pairs": [[1, 2], [3]]}}', "inner.pairs[1]: expected array of length 2"),
        ('{"inner": {}, "count": 10}', "count: expected int <= 9"),
        ("{}", "inner is missing"),
        ("[]", "expected object, got array"),
        ('{"inner": {"share": NaN}}', "not readable JSON"),
        ("", "not readable JSON"),
        ("[" * 100_000, "expected object"),
        ('{"other": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_the_place_is_named(text, said):
    assert said in refusal(decode, text, Outer, "file")


@pytest.mark.parametrize("number", ["1e999", "-1e999", "9" * 5000])
def test_the_place_of_a_number_out_of_range(number):
    text = '{"text": [0, {"eps": ' + number + "}]}"
    assert refusal(decode, text, dict[str, Any], "file") == "text[1].eps: number out of range"
    deep = '{"a": ' + "[" * 900 + number + "]" * 900 + "}"
    assert "number out of range" in refusal(decode, deep, dict[str, Any], "file")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["share", "shift"])
def test_what_is_no_number_is_none_in_python_either(key, value):
    assert f"inner.{key}: expected float" in refusal(convert, {"inner": {key: value}}, Outer, "file")


@given(st.binary(max_size=60) | st.recursive(st.none() | st.floats() | st.text(), st.lists).map(json.dumps))
def test_any_bytes_are_an_object_or_one_line(data):
    for schema in (Outer, dict[str, Any], Any):
        try:
            decode(data, schema, "file")
        except UserError as error:
            assert str(error).startswith("file: ") and "\n" not in str(error)
