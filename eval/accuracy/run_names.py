"""Names of run folders: readable, safe for any file system, and of bounded length."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from minivlm.cache.settings import CacheSettings
from minivlm.errors import UserError

_LONGEST = 150  # bytes of a label; a file system takes 255 with the hash
_LONGEST_SUFFIX = 64
# Settings are called by these letters, others by their own names. Not all_h2o: the policy's name says it.
_SHORT = {
    "kv_budget": "b",
    "vision_rate": "v",
    "vision_compute_rate": "c",
    "vision_interval": "i",
    "filter_layer": "l",
    "filter_rate": "f",
    "text_rate": "t",
    "score_window": "w",
    "all_h2o": "",
}


def run_label(tasks: Sequence[str], settings: CacheSettings, suffix: str) -> str:
    """The name of a run's folder without its hash: `docvqa_avl-b0.5-c0.7-i3_mine`.

    `suffix` is from the user. Raises `UserError` if it could not be part of a folder's name.
    """
    if not suffix.isprintable() or "/" in suffix or len(suffix.encode()) > _LONGEST_SUFFIX:
        raise UserError(
            f"--log_samples_suffix cannot be part of a folder's name "
            f"(expected at most {_LONGEST_SUFFIX} bytes of printable text without '/')"
        )
    parts = ["_".join(tasks), policy_label(settings)]
    space = _LONGEST - len(suffix.encode())
    return "_".join([_bounded("_".join(parts), space), *([suffix] if suffix else [])])


def policy_label(settings: CacheSettings) -> str:
    """The policy's name and what is set about it: `avl-v0.5-c0.7-i3`, `h2o-b0.5`.

    A switch `x` is represented by its rate `x_rate`, and as long as it is off, no `x_...` is named.
    The first rate gives way to a budget, which replaces it. Everything else is named where it is
    not the default.
    """
    values = {field.name: (getattr(settings, field.name), field.default) for field in fields(settings)}
    switches = {name for name, (value, _) in values.items() if isinstance(value, bool)}
    rates = [f"{name}_rate" for name in values if name in switches and values[name][0] and f"{name}_rate" in values]
    shown = rates[1:] if settings.kv_budget is not None else rates
    words = [settings.policy]
    for name, (value, default) in values.items():
        governing = [switch for switch in switches if name.startswith(f"{switch}_")]
        if name in ("policy", "seed") or f"{name}_rate" in rates or not all(values[each][0] for each in governing):
            continue
        if name in shown or (value != default and name not in rates):
            words.append(_word(name, value))
    return "-".join(filter(None, (re.sub(r"[^\w.]+", "_", word, flags=re.ASCII) for word in words)))


def _word(name: str, value: Any) -> str:
    """One setting: its name or letter, with its value unless it is a switch that is on."""
    called = _SHORT.get(name, name)
    if isinstance(value, bool):
        return called if value or not called else f"no_{called}"
    return f"{called}{value:g}" if isinstance(value, float) else f"{called}{value}"


def _bounded(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}~"
