"""The kernels of minivlm/cache/decode_split.py in Triton's interpreter: what they compute, and what they read.

    python tests/helpers/triton_interpreter.py

prints how many bytes of keys, values and index a decode step's attention loads, against those of its live entries. It
takes some minutes.

Triton decides when a kernel is defined whether it is interpreted, so this happens in a process of its own. What a
kernel asks for is seen, load by load; which lane of a warp asks is the compiler's choice and is not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import TensorHandle, interpreter_builder

from minivlm.cache.attention import decode_static
from minivlm.cache.decode_split import decode_split

SECTOR = 32  # bytes: what a GPU's memory hands out at a time


@dataclass(frozen=True)
class Step:
    """The attention of one layer in one decode step."""

    heads: int
    kv_heads: int
    dim: int
    slots: int
    tail_start: int
    spans: Sequence[tuple[int, int]]  # of each row: first and end of its live slots
    cores: Sequence[int] | None = None  # of each row: how many slots left of the tail take part; None: all live ones
    width: int = 0  # of the list of cores
    dtype: torch.dtype = torch.bfloat16
    want_weights: bool = False


@dataclass(frozen=True)
class Inputs:
    """Random queries, keys and values. The keys and values of slots that take no part are NaN."""

    q: Tensor  # [B, H, 1, D]
    k: Tensor  # [B, H_kv, slots, D]
    v: Tensor
    first: Tensor  # [B]
    end: Tensor  # [B]
    live: Tensor  # [B, slots], bool: the slots that take part
    core_slots: Tensor | None  # [B, width]
    core_count: Tensor | None  # [B]

    @classmethod
    def of(cls, step: Step) -> Inputs:
        random = torch.Generator().manual_seed(0)
        batch, slot = len(step.spans), torch.arange(step.slots)
        first, end = torch.tensor(step.spans).T.contiguous()
        live = (slot >= first[:, None]) & (slot < end[:, None])
        core_slots = core_count = None
        if step.cores is not None:
            core_count = torch.tensor(step.cores)
            core_slots = torch.zeros(batch, step.width, dtype=torch.int64)  # slot 0 pads the list
            for row, (count, (start, _)) in enumerate(zip(step.cores, step.spans, strict=True)):
                listed = start + torch.randperm(step.tail_start - start, generator=random)[:count].sort().values
                core_slots[row, :count] = listed
                live[row, : step.tail_start] = False
                live[row, listed] = True
        shapes = ((step.heads, 1), (step.kv_heads, step.slots), (step.kv_heads, step.slots))
        q, k, v = (torch.randn(batch, *shape, step.dim, generator=random).to(step.dtype) for shape in shapes)
        k, v = (torch.where(live[:, None, :, None], tensor, torch.nan) for tensor in (k, v))
        return cls(q, k, v, first, end, live, core_slots, core_count)

    def attend(self, step: Step) -> tuple[Tensor, Tensor | None]:
        index = (self.core_slots, self.core_count, step.tail_start)
        return decode_split(self.q, self.k, self.v, self.first, self.end, step.want_weights, *index)

    def columns(self, step: Step) -> Tensor:
        """The slot of each column, [B, columns]."""
        slot = torch.arange(step.slots).expand(len(self.q), -1)
        return slot if self.core_slots is None else torch.cat((self.core_slots, slot[:, step.tail_start :]), dim=1)


@contextmanager
def interpreter() -> Iterator[Callable[..., Any]]:
    """A process whose Triton interprets; what is yielded calls a function of this module in it, with arguments."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            pool.submit(_mend_bfloat16).result()  # the process starts with the first call
        yield lambda function, *args: pool.submit(function, *args).result()


def both_ways(step: Step) -> dict[str, np.ndarray | None]:
    """Output and weights of `decode_split`, and as "expected_" those of `decode_static`; in float32."""
    inputs = Inputs.of(step)
    out, weights = inputs.attend(step)
    columns = inputs.columns(step)
    k, v = (tensor.gather(2, columns[:, None, :, None].expand(-1, step.kv_heads, -1, step.dim)).float()
            for tensor in (inputs.k, inputs.v))  # fmt: skip
    live = inputs.live.gather(1, columns)
    if inputs.core_count is not None:  # a padded list repeats a slot
        live[:, : step.width] &= torch.arange(step.width) < inputs.core_count[:, None]
    expected = decode_static(inputs.q.float(), k, v, live, step.want_weights)
    found = {"out": out, "weights": weights, "expected_out": expected[0], "expected_weights": expected[1]}
    return {name: None if tensor is None else tensor.float().numpy() for name, tensor in found.items()}


def far_slots(slots: int, kv_heads: int, live: int) -> tuple[np.ndarray, np.ndarray]:
    """Outputs of `decode_split` and `decode_static` [1, H, 1, D] where only the last slots of huge buffers are live.

    The other slots are not even written, so that they take no memory.
    """
    random, dim = torch.Generator().manual_seed(0), 128
    first, end = torch.tensor([slots - live]), torch.tensor([slots])
    q = torch.randn(1, kv_heads, 1, dim, generator=random).half()
    k = torch.empty(1, kv_heads, slots, dim, dtype=torch.half)
    k[:, :, -live:] = torch.randn(1, kv_heads, live, dim, generator=random)
    out, _ = decode_split(q, k, k, first, end, False)
    part = k[:, :, -live:].float()
    return out.float().numpy(), decode_static(q.float(), part, part, torch.ones(1, live, dtype=torch.bool), False)[
        0
    ].numpy()


@dataclass(frozen=True)
class Reads:
    """Bytes that a step's loads fetch: of each load of each program, the sectors that it touches, however few bytes of
    them it takes."""

    sectors: int  # of keys, values and index
    live: int  # what there is of keys and values in the live entries
    dead: int  # what was asked for in other slots

    @property
    def ratio(self) -> float:
        return self.sectors / self.live


def sectors_read(step: Step) -> Reads:
    """Run a step, and count what it loads."""
    inputs = Inputs.of(step)
    entry = step.dim * inputs.k.element_size()  # bytes
    live = inputs.live[:, None].expand(-1, step.kv_heads, -1).flatten().numpy()  # [B x H_kv x slots]
    read = [tensor for tensor in (inputs.k, inputs.v, inputs.core_slots) if tensor is not None]
    sectors = dead = 0
    load = interpreter_builder.create_masked_load

    def counted(ptrs: TensorHandle, mask: TensorHandle, *args: Any) -> TensorHandle:
        nonlocal sectors, dead
        addresses = ptrs.data[mask.data].astype(np.int64)
        for tensor in read:
            if not addresses.size or not 0 <= addresses[0] - tensor.data_ptr() < tensor.nbytes:
                continue  # a load is of one tensor
            sectors += len(np.unique(addresses // SECTOR))
            if tensor is not inputs.core_slots:
                dead += inputs.k.element_size() * int((~live[(addresses - tensor.data_ptr()) // entry]).sum())
        return load(ptrs, mask, *args)

    with mock.patch.object(interpreter_builder, "create_masked_load", counted):
        inputs.attend(step)
    return Reads(SECTOR * sectors, 2 * entry * int(live.sum()), dead)


def _mend_bfloat16() -> None:
    """Triton 3.7's interpreter holds bfloat16 as bits: its dot multiplies those, and its casts do not round."""
    cast, dot = interpreter_builder.cast_impl, interpreter_builder.create_dot

    def mended_cast(source: TensorHandle, target: Any) -> TensorHandle:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return cast(source, target)

    def mended_dot(a: TensorHandle, b: TensorHandle, *args: Any) -> TensorHandle:
        return dot(*(widened(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *args)

    def widened(x: TensorHandle) -> TensorHandle:
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    interpreter_builder.cast_impl, interpreter_builder.create_dot = mended_cast, mended_dot


def _image_steps(heads: int, kv_heads: int, batch: int) -> Iterator[tuple[str, Step]]:
    """Steps with 2950 tokens, of which 2880 are of the image, in larger buffers; a core step takes 30 % of those."""
    tail_start, image, core = 3072, 2880, 864
    spans = [(tail_start - image, tail_start + 70)] * batch
    full = Step(heads, kv_heads, 128, tail_start + 256, tail_start, spans)
    yield "full", full
    yield "core", Step(heads, kv_heads, 128, full.slots, tail_start, spans, cores=[core] * batch, width=1024)


def _main() -> None:
    print("heads     batch  step   live MiB   loaded MiB   ratio")
    with interpreter() as run:
        for name, heads, kv_heads in (("7b", 32, 32), ("mistral", 32, 8)):
            for batch in (1, 8):
                for kind, step in _image_steps(heads, kv_heads, batch):
                    reads = run(sectors_read, step)
                    mib = f"{reads.live / 2**20:>8.1f} {reads.sectors / 2**20:>12.1f}"
                    print(f"{name:<9} {batch:>5}  {kind}  {mib} {reads.ratio:>9.3f}", flush=True)


if __name__ == "__main__":
    _main()
