"""Hashes of what answers: the checkpoint and the code. Figures of others are never passed off as theirs."""

from __future__ import annotations

import functools
import hashlib
import inspect
from pathlib import Path

from minivlm.cache.settings import CacheSettings
from minivlm.errors import UserError
from minivlm.files import open_file, read_bytes, reason

_ROOT = Path(__file__).parents[2]
# What can change an answer or a score. Command lines, tables and pictures cannot.
_ANSWERING = (
    "minivlm/*.py",
    "minivlm/cache/**/*.py",
    "minivlm/generation/**/*.py",
    "minivlm/inputs/**/*.py",
    "minivlm/model/**/*.py",
    "weights/**/*.py",
    "eval/demo/*.py",
    "eval/accuracy/tasks/*.py",
    *(f"eval/accuracy/{name}.py" for name in ("anls", "data", "metrics", "parquet", "records", "runner")),
)
_BLOCKS = 64  # evenly spaced blocks of a large weights file that are hashed
_BLOCK_BYTES = 1 << 16


@functools.cache
def code_hash(settings: type[CacheSettings]) -> str:
    """Twelve hexadecimal digits that stand for the source of minivlm, of the tasks and of a policy.

    `settings` is the policy's class; one from a `--policy_file` adds that file, but not what the
    file imports. Raises `UserError` if a source cannot be read.
    """
    files = sorted({file for pattern in _ANSWERING for file in _ROOT.glob(pattern)})
    policy = Path(inspect.getfile(settings)).resolve()
    if policy not in files:
        files.append(policy)
    digest = hashlib.sha256()
    for file in files:
        source = read_bytes(file)
        name = file.relative_to(_ROOT).as_posix() if file.is_relative_to(_ROOT) else "policy file"
        digest.update(f"{name} {len(source)} ".encode() + source)
    return digest.hexdigest()[:12]


def fingerprint(folder: Path) -> str:
    """A hash of a checkpoint folder that is cheap to compute.

    Small files are hashed whole. Of a large weights file, its size and 4 MiB of its content are
    hashed. Raises `UserError` if a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".jinja", ".safetensors"))
        # What is no file is of no use to the loader either, which says so if it needs it.
        for file in filter(Path.is_file, files):
            size = file.stat().st_size
            digest.update(f"{file.name!a} {size} ".encode())
            if file.suffix != ".safetensors" or size <= _BLOCKS * _BLOCK_BYTES:
                digest.update(read_bytes(file))
                continue
            with open_file(file) as stream:
                for block in range(_BLOCKS):
                    stream.seek((size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
                    digest.update(stream.read(_BLOCK_BYTES))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({reason(error)})") from None
    return digest.hexdigest()[:16]
