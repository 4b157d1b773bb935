"""All families of cases, and which of them has which numbers."""

from __future__ import annotations

from fuzzer import caches, checkpoints, data, flags, paths, pictures, runs, texts
from fuzzer.case import Family

# In every round of numbers, a family has as many cases as it stands here.
_ROUND: list[tuple[str, Family, int]] = [
    ("flags", flags.make_flags, 8),
    ("json", checkpoints.make_json, 8),
    ("weights", checkpoints.make_weights, 4),
    ("tensors", checkpoints.make_tensors, 3),
    ("images", pictures.make_image, 6),
    ("paths", paths.make_path, 5),
    ("prompts", texts.make_prompt, 3),
    ("chats", texts.make_chat, 3),
    ("templates", texts.make_template, 4),
    ("caches", caches.make_cache, 3),
    ("data", data.make_json_data, 3),
    ("parquet", data.make_parquet, 2),
    ("runs", runs.make_run, 3),
]
FAMILIES = {name: make for name, make, _ in _ROUND}
_ORDER = [name for name, _, count in _ROUND for _ in range(count)]


def family_of(number: int) -> str:
    """The family of a case."""
    return _ORDER[number % len(_ORDER)]
