"""The kernels of minivlm/cache/decode_split.py in Triton's interpreter: what they compute, read and write.

    python tests/helpers/triton_interpreter.py

prints how many bytes of keys, values and index a decode step's attention loads, against those of its live entries. It
takes some minutes.

Triton decides when a kernel is defined whether it is interpreted, so this happens in a process of its own. What a
kernel asks for is seen, load by load and store by store; which lane of a warp asks is the compiler's choice and is not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
    spans: Sequence[tuple[int, int]]  # of each row: first and end of its live slots, the token's place among them
    places: Sequence[float] = (1.0,)  # where in the live tail the token goes, from 0 to 1; key heads take turns
    cores: Sequence[int] | None = None  # of each row: how many slots left of the tail take part; None: all live ones
    width: int = 0  # of the list of cores
    dtype: torch.dtype = torch.bfloat16
    want_weights: bool = False


@dataclass(frozen=True)
class Inputs:
    """A random token and random buffers. Keys and values are NaN in slots that take no part, and where the token will
    be written."""

    q: Tensor  # [B, H, 1, D]
    new_k: Tensor  # [B, H_kv, 1, D]
    new_v: Tensor
    position: Tensor  # [B, 1], int32
    k: Tensor  # [B, H_kv, slots, D]
    v: Tensor
    positions: Tensor  # [B, H_kv, slots], int32
    place: Tensor  # [B, H_kv]
    used: Tensor  # [B, 1]
    left: Tensor  # [B, 1]
    core_slots: Tensor | None  # [B, width]
    live: Tensor  # [B, slots], bool: the slots that take part
    is_old: Tensor  # [B, H_kv, slots], bool: those but the token's

    @classmethod
    def of(cls, step: Step) -> Inputs:
        random = torch.Generator().manual_seed(0)
        batch, slot = len(step.spans), torch.arange(step.slots)
        first, end = torch.tensor(step.spans).T[..., None]  # [B, 1]
        used, left = end - step.tail_start, step.tail_start - first
        fraction = torch.tensor(step.places).repeat(step.kv_heads)[: step.kv_heads]
        place = (fraction * (used - 1)).long()
        live = (slot >= first) & (slot < end)
        core_slots = None
        if step.cores is not None:
            left = torch.tensor(step.cores)[:, None]
            core_slots = torch.zeros(batch, step.width, dtype=torch.int64)  # slot 0 pads the list
            for row, (count, (start, _)) in enumerate(zip(step.cores, step.spans, strict=True)):
                core = start + torch.randperm(step.tail_start - start, generator=random)[:count].sort().values
                core_slots[row, :count] = core
                live[row, : step.tail_start] = False
                live[row, core] = True
        is_old = live[:, None] & (slot != step.tail_start + place[..., None])

        def normal(heads: int, entries: int) -> Tensor:
            return torch.randn(batch, heads, entries, step.dim, generator=random).to(step.dtype)

        def numbers(*shape: int) -> Tensor:
            return torch.randint(2**31, shape, generator=random, dtype=torch.int32)

        return cls(
            q=normal(step.heads, 1),
            new_k=normal(step.kv_heads, 1),
            new_v=normal(step.kv_heads, 1),
            position=numbers(batch, 1),
            k=torch.where(is_old[..., None], normal(step.kv_heads, step.slots), torch.nan),
            v=torch.where(is_old[..., None], normal(step.kv_heads, step.slots), torch.nan),
            positions=numbers(batch, step.kv_heads, step.slots),
            place=place,
            used=used.contiguous(),
            left=left.contiguous(),
            core_slots=core_slots,
            live=live,
            is_old=is_old,
        )

    def step(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """`decode_split`, which writes into the buffers."""
        token, buffers = (self.q, self.new_k, self.new_v, self.position), (self.k, self.v, self.positions)
        numbers = (self.place, self.used, self.left, step.tail_start)
        return decode_split(token, buffers, *numbers, step.want_weights, self.core_slots)

    def expected(self, step: Step) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]:
        """The buffers with the token in its place, and what `decode_static` makes of them, in float32."""
        k, v, positions = self.k.clone(), self.v.clone(), self.positions.clone()
        where = (torch.arange(len(k))[:, None], torch.arange(step.kv_heads), step.tail_start + self.place)  # [B, H_kv]
        k[where], v[where], positions[where] = self.new_k[:, :, 0], self.new_v[:, :, 0], self.position

        columns = torch.arange(step.slots).expand(len(k), -1)  # [B, columns]: the slot of each
        if self.core_slots is not None:
            columns = torch.cat((self.core_slots, columns[:, step.tail_start :]), dim=1)
        live = self.live.gather(1, columns)
        if self.core_slots is not None:  # a padded list repeats a slot
            live[:, : step.width] &= torch.arange(step.width) < self.left
        at = columns[:, None, :, None].expand(-1, step.kv_heads, -1, step.dim)
        read = (tensor.gather(2, at).float() for tensor in (k, v))
        return (k, v, positions), decode_static(self.q.float(), *read, live, step.want_weights)


@contextmanager
def interpreter() -> Iterator[Callable[..., Any]]:
    """A process whose Triton interprets; what is yielded calls a function of this module in it, with arguments."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            pool.submit(_mend_bfloat16).result()  # the process starts with the first call
        yield lambda function, *args: pool.submit(function, *args).result()


def both_ways(step: Step) -> tuple[dict[str, np.ndarray | None], dict[str, np.ndarray | None]]:
    """Output, weights, and the buffers' bytes after the step: as `decode_split` leaves them, and as expected."""
    inputs = Inputs.of(step)
    buffers, attended = inputs.expected(step)
    ours = inputs.step(step)
    return _arrays((inputs.k, inputs.v, inputs.positions), ours), _arrays(buffers, attended)


def _arrays(buffers: Sequence[Tensor], attended: tuple[Tensor, Tensor | None]) -> dict[str, np.ndarray | None]:
    out, weights = attended
    arrays = {"out": out.float().numpy(), "weights": None if weights is None else weights.numpy()}
    names = ("keys", "values", "positions")
    return arrays | {name: buffer.view(torch.uint8).numpy() for name, buffer in zip(names, buffers, strict=True)}


def far_slots(slots: int, kv_heads: int, live: int) -> tuple[np.ndarray, np.ndarray]:
    """A step where only the last slots of huge buffers are live, of which the last is the token's: its output and the
    written key and value, as they are and as expected, each [3, 1, H_kv, 1, D].

    The other slots are not even written, so that they take no memory.
    """
    random, dim = torch.Generator().manual_seed(0), 128
    q, new_k, new_v = torch.randn(3, 1, kv_heads, 1, dim, generator=random).half()
    k, v = (torch.empty(1, kv_heads, slots, dim, dtype=torch.half) for _ in range(2))
    positions = torch.empty(1, kv_heads, slots, dtype=torch.int32)
    for buffer in (k, v):
        buffer[:, :, -live:-1] = torch.randn(1, kv_heads, live - 1, dim, generator=random)
    none, last = torch.zeros(1, 1).long(), torch.tensor([[live - 1]])
    token, buffers = (q, new_k, new_v, none.int()), (k, v, positions)
    out, _ = decode_split(token, buffers, last.expand(1, kv_heads), last + 1, none, slots - live, False)
    read = (torch.cat((buffer[:, :, -live:-1], new), dim=2).float() for buffer, new in ((k, new_k), (v, new_v)))
    expected, _ = decode_static(q.float(), *read, torch.ones(1, live, dtype=torch.bool), False)
    found = torch.stack((out, k[:, :, -1:], v[:, :, -1:]))
    return found.float().numpy(), torch.stack((expected, new_k.float(), new_v.float())).numpy()


@dataclass(frozen=True)
class Access:
    """One load or store of a program."""

    launch: int
    program: tuple[int, int, int]
    stores: bool
    addresses: np.ndarray  # of the elements [n]


@contextmanager
def _watched(note: Callable[[Access], None]) -> Iterator[None]:
    """Tell `note` of each load and store that touches memory."""
    builder = interpreter_builder
    begin, load, store = builder.set_grid_dim, builder.create_masked_load, builder.create_masked_store
    launch = -1

    def begun(*grid: int) -> None:
        nonlocal launch
        launch += 1
        begin(*grid)

    def seen(stores: bool, ptrs: TensorHandle, mask: TensorHandle) -> None:
        addresses = ptrs.data[mask.data].astype(np.int64)
        if addresses.size:
            note(Access(launch, builder.grid_idx, stores, addresses))

    def loaded(ptrs: TensorHandle, mask: TensorHandle, *args: Any) -> TensorHandle:
        seen(False, ptrs, mask)
        return load(ptrs, mask, *args)

    def stored(ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *args: Any) -> None:
        seen(True, ptrs, mask)
        store(ptrs, value, mask, *args)

    watching = {"set_grid_dim": begun, "create_masked_load": loaded, "create_masked_store": stored}
    with mock.patch.multiple(builder, **watching):
        yield


@dataclass(frozen=True)
class Reads:
    """Bytes that a step's loads fetch: of each load of each program, the sectors that it touches, however few bytes of
    them it takes."""

    sectors: int  # of keys, values and index
    live: int  # what there is of keys and values in the live entries but the token
    dead: int  # what was asked for in other slots

    @property
    def ratio(self) -> float:
        return self.sectors / self.live


def sectors_read(step: Step) -> Reads:
    """Run a step, and count what it loads."""
    inputs = Inputs.of(step)
    entry = step.dim * inputs.k.element_size()  # bytes
    is_old = inputs.is_old.flatten().numpy()  # [B x H_kv x slots]
    read = [tensor for tensor in (inputs.k, inputs.v, inputs.core_slots) if tensor is not None]
    sectors = dead = 0

    def count(access: Access) -> None:
        nonlocal sectors, dead
        for tensor in read:
            offsets = access.addresses - tensor.data_ptr()
            if access.stores or not 0 <= offsets[0] < tensor.nbytes:
                continue  # a load is of one tensor
            sectors += len(np.unique(access.addresses // SECTOR))
            if tensor is not inputs.core_slots:
                dead += inputs.k.element_size() * int((~is_old[offsets // entry]).sum())

    with _watched(count):
        inputs.step(step)
    return Reads(SECTOR * sectors, 2 * entry * int(is_old.sum()), dead)


def shared_elements(step: Step) -> tuple[int, int]:
    """Run a step, and count the elements that some program stores, and those of them that another program of the same
    launch loads or stores."""
    touched: dict[tuple[int, int], set[tuple[int, int, int]]] = {}  # by launch and address: the programs
    stored: set[tuple[int, int]] = set()

    def note(access: Access) -> None:
        for address in access.addresses.tolist():
            touched.setdefault((access.launch, address), set()).add(access.program)
            if access.stores:
                stored.add((access.launch, address))

    inputs = Inputs.of(step)
    with _watched(note):
        inputs.step(step)
    return len(stored), sum(len(touched[element]) > 1 for element in stored)


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


def _image_steps(heads: int, kv_heads: int, images: Sequence[int]) -> Iterator[tuple[str, Step]]:
    """Steps of rows with so many image tokens and 70 more, in larger buffers; a core step takes 30 % of the former."""
    tail_start = 3072
    spans = [(tail_start - image, tail_start + 70) for image in images]
    full = Step(heads, kv_heads, 128, tail_start + 256, tail_start, spans, places=(0.5, 1.0))
    yield "full", full
    yield "core", replace(full, cores=[3 * image // 10 for image in images], width=1024)


def _main() -> None:
    print("heads    image tokens   step   live MiB   loaded MiB   ratio")
    with interpreter() as run:
        for name, kv_heads, images in (("7b", 32, [2880]), ("mistral", 8, [2880]), ("mistral", 8, [2880, 576])):
            for kind, step in _image_steps(32, kv_heads, images):
                reads = run(sectors_read, step)
                rows, mib = ", ".join(map(str, images)), f"{reads.live / 2**20:>8.1f} {reads.sectors / 2**20:>12.1f}"
                print(f"{name:<8} {rows:<14} {kind}   {mib} {reads.ratio:>7.3f}", flush=True)


if __name__ == "__main__":
    _main()
