"""The records of a data set: the schema of one question, and what is wrong with a question that cannot be asked.

The schema holds for both layouts, the official JSON and the hub's parquet files, which name some
fields differently. One bad record does not stop an evaluation: its sample carries the reason and
fails. Only data without a single usable record are refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from minivlm.errors import UserError, printable
from minivlm.schema import Finite, convert

_SPLIT_NAMES = {"validation": ("validation", "val"), "test": ("test",)}
_LONGEST_ID = 256  # characters

Value = TypeVar("Value")
Scalar = str | int | Finite
Texts = Annotated[list[Scalar], Meta(max_length=1000)] | Scalar | None


class OtherSplit(UserError):
    """The data are there, but belong to another split than the task's."""


class Record(msgspec.Struct, frozen=True):
    """A record as a data set writes it. Fields of one meaning follow each other; the first that is given counts."""

    question: Annotated[str, Meta(max_length=100_000)]
    docvqa_id: Scalar | None = msgspec.field(default=None, name="questionId")
    question_id: Scalar | None = None
    answers: Texts = None
    answer: Texts = None
    question_types: Texts = None
    question_type: Texts = None
    answer_type: Texts = None
    data_split: str | None = None
    set_name: str | None = None
    image: str | None = None
    image_local_name: str | None = None
    image_path: str | None = None
    dataset: str | None = None  # OCRBench: where the question was taken from


@dataclass(frozen=True)
class Sample:
    """One question.

    `index` is its place in the whole data set. Without `answers` it cannot be scored. A sample with
    a `problem` cannot be asked and fails with that reason.
    """

    index: int
    id: int | str
    question: str
    answers: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    source: str = ""  # OCRBench: the data set from which the question was taken
    image: str = ""  # the name of its file, in the JSON layout
    problem: str = ""


def read_samples(contents: Iterable[Any], split: str, where: str, *, named_images: bool) -> tuple[Sample, ...]:
    """The questions of a data set in order.

    `contents` are the records as Python's own objects, or a `UserError` in place of one that could
    not be read; `where`[index] names each. A record that does not have the schema's form, lacks an
    id or (with `named_images`) the name of its image, repeats an id, or belongs to another split
    than `split` becomes a sample with a problem. Raises the first problem if every record has one.
    """
    samples: list[Sample] = []
    problems: list[UserError] = []
    index_of: dict[int | str, int] = {}
    for index, content in enumerate(contents):
        place = f"{where}[{index}]"
        try:
            sample = _sample(content, index, split, place, named_images)
            if sample.id in index_of:
                raise UserError(f"{place} repeats questionId {sample.id} of [{index_of[sample.id]}]")
            index_of[sample.id] = index
        except UserError as problem:
            problems.append(problem)
            sample = Sample(index, f"[{index}]", "", problem=printable(str(problem), 300))
        samples.append(sample)
    if not samples:
        raise UserError(f"{where}[] is empty")
    if len(problems) == len(samples):
        others = f"; none of the {len(samples)} records can be used" if len(samples) > 1 else ""
        raise type(problems[0])(f"{problems[0]}{others}")
    return tuple(samples)


def expect_split(declared: str | None, split: str, where: str) -> None:
    """Raise `OtherSplit` if data declare another split than the task's; without a word they belong to it."""
    if declared is not None and declared not in _SPLIT_NAMES[split]:
        raise OtherSplit(f"{where} split {printable(declared, 60)!r} (expected {_SPLIT_NAMES[split][-1]!r})")


def _sample(content: Any, index: int, split: str, place: str, named_images: bool) -> Sample:
    if isinstance(content, UserError):
        raise content
    record = convert(content, Record, place)
    _expect_unicode(record, place)
    expect_split(_first_present(record.data_split, record.set_name), split, f"{place} belongs to")
    image = _first_present(record.image, record.image_local_name, record.image_path) or ""
    if named_images and not image:
        raise UserError(f'{place} has no "image"')
    return Sample(
        index,
        _question_id(record, index, place),
        record.question,
        _texts(record.answers, record.answer),
        tuple(printable(name, 60) for name in _texts(record.question_types, record.question_type, record.answer_type)),
        record.dataset or "",
        image,
    )


def _expect_unicode(record: Record, place: str) -> None:
    """Refuse text with a lone surrogate, which no tokenizer and no file of results can take."""
    for name in record.__struct_fields__:
        value = getattr(record, name)
        for text in value if isinstance(value, list) else [value]:
            try:
                str(text).encode()
            except UnicodeEncodeError:
                raise UserError(f"{place}: {name} holds a lone surrogate (expected Unicode text)") from None


def _question_id(record: Record, index: int, where: str) -> int | str:
    """A record's id, as a number if it consists of digits. OCRBench's ids are its indices."""
    given = _first_present(record.docvqa_id, record.question_id)
    if given is None and record.dataset is not None:
        return index
    text = "" if given is None else str(given)
    if not text:
        raise UserError(f'{where} has no "questionId"')
    if len(text) > _LONGEST_ID:
        raise UserError(f"{where}: questionId has {len(text)} characters (expected at most {_LONGEST_ID})")
    return int(text) if text.isdecimal() else text


def _first_present(*values: Value | None) -> Value | None:
    return next((value for value in values if value is not None), None)


def _texts(*values: list[Scalar] | Scalar | None) -> tuple[str, ...]:
    value = _first_present(*values)
    if value is None:
        return ()
    return tuple(map(str, value)) if isinstance(value, list) else (str(value),)
