"""The settings of a run: everything that changes its answers, apart from the code. settings.json holds them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from minivlm.errors import UserError
from minivlm.schema import decode

FORMAT = 3  # of a run's folder; a run in another format is not continued or compared


class TaskSettings(msgspec.Struct, frozen=True):
    """How a task asks, and of which data; how many of its questions is not part of it."""

    prompt: str  # what follows the question
    max_new_tokens: int
    split: str
    data: str  # the data set's identity


class RunSettings(msgspec.Struct, frozen=True):
    """What the name of a run's folder stands for."""

    model: str
    weights: str  # the checkpoint's fingerprint
    device: str
    dtype: str
    tasks: dict[str, TaskSettings]
    cache: dict[str, Any]  # the policy's settings
    batch_size: Annotated[int, Meta(ge=1)]
    seed: int
    predict_only: bool
    compiled: bool = False  # rounding differs
    format: int = FORMAT

    def hash(self) -> str:
        """Twelve hexadecimal digits that stand for the settings."""
        return hashlib.sha256(json.dumps(msgspec.to_builtins(self), sort_keys=True).encode()).hexdigest()[:12]


class _Versioned(msgspec.Struct):
    format: int | None = None


def decode_settings(data: bytes, name: str) -> RunSettings:
    """The content of settings.json. Raises `UserError`, beginning with `name`, for damage and for another format."""
    expect_format(decode(data, _Versioned, name).format, name)
    return decode(data, RunSettings, name)


def expect_format(number: int | None, name: str | Path) -> None:
    """Raise `UserError` if a file is of another format than this version's."""
    if number != FORMAT:
        raise UserError(f"{name}: is not a run in format {FORMAT} (run it again)")


def first_difference(stored: RunSettings, now: RunSettings) -> str:
    """Describe the first place where two settings differ; empty if they are equal."""
    return _first_difference(msgspec.to_builtins(stored), msgspec.to_builtins(now), "")


def _first_difference(stored: Any, now: Any, name: str) -> str:
    if isinstance(stored, dict) and isinstance(now, dict):
        for key in sorted({*stored, *now}):
            if difference := _first_difference(stored.get(key), now.get(key), f"{name}.{key}" if name else key):
                return difference
        return ""
    return "" if stored == now else f"{name} {stored!r} there, {now!r} now"
