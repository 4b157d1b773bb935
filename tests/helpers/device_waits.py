"""Where the host waits for a CUDA device: which operations make it wait, and the line of this repository that waits.

The operations are those that this repository uses; what they do was read in torch's CUDA kernels (2.13). Copies depend
on more than their arguments, and are not looked at here.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

from paths import ROOT

aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
_SHAPED_BY_VALUES = (
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
)
_CODE = tuple(f"{ROOT / folder}/" for folder in ("minivlm", "weights", "eval", "scripts", "tests"))
EVENT = "event"  # the reason of a sync that waits for an event


class Sync(NamedTuple):
    """The host waited for the device: for an event, or for everything that it had launched."""

    reason: str
    line: str  # FILE:LINE

    @property
    def is_event(self) -> bool:
        """Whether the host waited for an event alone, and not for what was launched after it."""
        return self.reason == EVENT


def listed(syncs: Iterable[Sync]) -> str:
    """One line for each place and reason, with how often: what a failing test says."""
    counts = sorted(Counter(syncs).items(), key=lambda item: (item[0].line, item[0].reason))
    return "\n".join(f"{count} x {sync.line}: {sync.reason}" for sync, count in counts)


def by_minivlm(syncs: Iterable[Sync]) -> list[Sync]:
    """Those that the package itself causes, and not a test or a test's policy."""
    return [sync for sync in syncs if sync.line.startswith("minivlm/")]


def waits_for(func: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
    """Why the host waits in an operation on tensors of the device, or None."""
    if func in (aten._local_scalar_dense.default, aten.equal.default):
        return "a value for the host"
    if func in _SHAPED_BY_VALUES and kwargs.get("output_size") is None:
        return f"{func._schema.name}, whose shape depends on values"
    if func is aten.isin.Tensor_Tensor and args[1].numel() >= 10 * max(args[0].numel(), 1) ** 0.145:
        return "isin by sorting"  # fewer are compared each with each
    if func in INDEXING:
        indices = [index for index in args[1] if index is not None]
        sets_number = len(args) > 2 and args[2].numel() == 1 and args[2].device.type == "cpu"
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            return None if sets_number else "a mask as an index"
        if sets_number or any(index.device.type == "cpu" for index in indices):
            return "copy to the device, of an index or a number to be set"
    return None


def running_line() -> str:
    """The line of this repository, these helpers aside, that runs now."""
    own = (__file__, str(Path(__file__).with_name("emulated_cuda.py")))
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_CODE) and file not in own:
            return f"{Path(file).relative_to(ROOT).as_posix()}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
