"""The Triton kernels of a decode step's attention, without a GPU: interpreted, and compiled for three cards."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from minivlm.cache import decode_split as module  # noqa: E402
from triton_interpreter import Step, both_ways, far_slots, interpreter, sectors_read, shared_elements  # noqa: E402

# The token goes into the middle of one head's tail, where an entry was evicted, and to the end of the other's.
SPANS = [(0, 320), (70, 201), (191, 260)]
RAGGED = Step(2, 2, 64, slots=320, tail_start=192, spans=SPANS, places=(0.5, 1.0), want_weights=True)
CORES = {"cores": [50, 1, 0], "width": 96}
ONE = Step(4, 4, 64, slots=128, tail_start=64, spans=[(64, 65)], want_weights=True)
STEPS = {
    "ragged": RAGGED,
    "by index": replace(RAGGED, **CORES),
    "grouped by 4": replace(RAGGED, heads=8),
    "grouped by 7, by index": replace(RAGGED, heads=7, kv_heads=1, **CORES),
    "grouped by 8, by index": replace(RAGGED, heads=8, kv_heads=1, dim=128, **CORES),
    "96 channels": replace(RAGGED, dim=96),
    "96 channels, grouped, by index": replace(RAGGED, heads=4, dim=96, **CORES),
    "no weights": replace(RAGGED, want_weights=False),
    "no weights, by index": replace(RAGGED, want_weights=False, **CORES),
    "a large buffer": replace(RAGGED, heads=2, kv_heads=1, slots=16384, tail_start=8192, spans=[(8100, 8200)] * 2),
    "one live slot": ONE,
    "one live slot, by index": replace(ONE, cores=[0], width=32),
    "more shares than live slots": replace(ONE, slots=1024, spans=[(64, 70)]),
    "the token alone in a share": replace(ONE, slots=1024, spans=[(64, 97)]),
    "the token alone in a share, by index": replace(ONE, slots=1024, spans=[(0, 65)], cores=[32], width=32),
    "the token in the first share and in the last": replace(RAGGED, tail_start=4, spans=[(0, 260)], places=(0.0, 1.0)),
    "a core without padding": replace(ONE, spans=[(0, 90)], cores=[32], width=32),
}
QUICK = ("ragged", "by index", "grouped by 7, by index", "no weights")
# A batch of different lengths, in buffers of which a third is live.
SPANS = [(3072 - 2880, 3072 + 70), (3072 - 576, 3072 + 9)]
IMAGES = Step(2, 1, 128, slots=4096, tail_start=3072, spans=SPANS, places=(0.5,), want_weights=True)
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 2e-6}, torch.bfloat16: {"rtol": 0.01, "atol": 0.005}}
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., Any]]:
    with interpreter() as call:
        yield call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "step",
    [step if name in QUICK else pytest.param(step, marks=pytest.mark.slow) for name, step in STEPS.items()],
    ids=STEPS,
)
def test_agrees_with_the_readable_reference(run, step, dtype):
    """Slots that take no part hold NaN throughout, and so does the token's place before; in the buffers the token is
    all that changes."""
    found, expected = run(both_ways, replace(step, dtype=dtype))
    for buffer in ("keys", "values", "positions"):
        np.testing.assert_array_equal(found[buffer], expected[buffer])
    np.testing.assert_allclose(found["out"], expected["out"], **TOLERANCE[dtype])
    assert (found["weights"] is not None) == step.want_weights
    if step.want_weights:
        np.testing.assert_allclose(found["weights"], expected["weights"], rtol=2e-5, atol=1e-7)
        assert not found["weights"][expected["weights"] == 0].any()


@pytest.mark.parametrize("name", ["by index", "no weights", "the token in the first share and in the last"])
def test_no_program_touches_what_another_writes(run, name):
    """They run in any order, and at the same time."""
    stored, shared = run(shared_elements, STEPS[name])
    assert stored > 0
    assert shared == 0


@pytest.mark.parametrize("spans", [IMAGES.spans[:1], IMAGES.spans], ids=["batch 1", "ragged"])
@pytest.mark.parametrize("core", [False, True], ids=["full", "core"])
def test_loads_little_more_than_the_live_entries(run, spans, core):
    """For a core of 30 % of the image as for all of it; counted are keys, values and the index. The token's place is
    not loaded."""
    step = replace(IMAGES, spans=spans)
    if core:
        step = replace(step, cores=[3 * (step.tail_start - first) // 10 for first, _ in spans], width=1024)
    reads = run(sectors_read, step)
    assert reads.dead == 0
    assert reads.ratio <= 1.02 if core else reads.ratio == 1


@pytest.mark.slow
def test_heads_may_begin_past_the_reach_of_32_bits(run):
    """The third head's first number is that of 2^31. Its token is written there, too."""
    found, expected = run(far_slots, 2**23, 3, 40)
    np.testing.assert_allclose(found, expected, rtol=0.002, atol=0.001)


@pytest.mark.parametrize(
    ("pairs", "columns", "splits"),
    [
        (32, 3000, 16),  # batch 1 with 32 heads: as many programs as fit on a card at once
        (8, 3000, 47),  # with 8: 64 columns each
        (1024, 3000, 6),  # batch 32: 512 columns each
        (1024, 100, 1),
        (1, 100, 2),
        (1, 1 << 20, 64),
    ],
)
def test_shares_are_small_only_where_programs_are_few(pairs, columns, splits):
    assert module.split_count(pairs, columns) == splits


def test_refuses_buffers_that_it_would_write_wrongly():
    tensor, v = torch.zeros(1, 2, 1, 64), torch.zeros(1, 8, 2, 64).transpose(1, 2)
    numbers, positions = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 2, 8, dtype=torch.int32)
    token, buffers = (tensor, tensor, tensor, numbers.int()), (v.contiguous(), v, positions)
    with pytest.raises(ValueError, match=r"not contiguous: strides \(1024, 64, 128, 1\) of \(1, 2, 8, 64\)"):
        module.decode_split(token, buffers, numbers.expand(1, 2), numbers + 1, numbers, 4, False)


class Recorder:
    """In the place of `wrap_triton`: notes each launch, its kernel with the arguments by name, and runs nothing."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, dict[str, Any]]] = []

    def __call__(self, kernel: Any) -> Recorder:
        self.kernel = kernel
        return self

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            self.launches.append((self.kernel, dict(zip(self.kernel.arg_names, args, strict=False)) | constants))

        return launch


def launched(groups: int, dim: int, dtype: torch.dtype, indexed: bool, want_weights: bool) -> list[tuple[Any, dict]]:
    """What a step at batch 8 launches, with 8 key heads and an image of 2880 tokens."""
    shapes = ((8 * groups, 1, dim), (8, 1, dim), (8, 1, dim), (8, 3328, dim), (8, 3328, dim))
    q, new_k, new_v, k, v = (torch.empty(8, *shape, dtype=dtype, device="meta") for shape in shapes)
    position, positions = (torch.empty(8, *shape, dtype=torch.int32, device="meta") for shape in ((1,), (8, 3328)))
    place, used, left, core_slots = (torch.empty(8, n, dtype=torch.int64, device="meta") for n in (8, 1, 1, 1024))
    index = (core_slots,) if indexed else ()
    recorder = Recorder()
    with mock.patch.object(module, "wrap_triton", recorder):
        token, buffers = (q, new_k, new_v, position), (k, v, positions)
        module.decode_split(token, buffers, place, used, left, 3072, want_weights, *index)
    return recorder.launches


def compiled(kernel: Any, args: dict[str, Any], architecture: int) -> Any:
    """What Triton makes of a launch with its defaults."""
    signature, constants, aligned = {}, {}, {}
    for place, (name, value) in enumerate(args.items()):
        if name.isupper():
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        else:
            signature[name] = "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and not name.isupper() and value % 16 == 0):
            aligned[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32))


def resources(binary: Any, folder: Path) -> tuple[int, int, int]:
    """Registers of a thread, bytes of its stack and local memory, and bytes of shared memory."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said).groups())
    return registers, stack + local, binary.metadata.shared


@pytest.mark.parametrize("want_weights", [False, True])
def test_two_launches_without_floats(want_weights):
    """A float among the arguments would be of 64 bits in inductor's code, and so would be all that it is put into."""
    found = launched(4, 128, torch.bfloat16, True, want_weights)
    assert [kernel.__name__ for kernel, _ in found] == ["_parts_kernel", "_whole_kernel"]
    assert all(isinstance(value, (torch.Tensor, int)) for _, args in found for value in args.values())


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "dim"), [(1, 128), (4, 128), (7, 96)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_compiles_without_spills(architecture, dtype, groups, dim, tmp_path):
    """Registers hold all that a thread works on, and four programs fit on a multiprocessor of an A100."""
    for indexed, want_weights in product((False, True), repeat=2):
        for kernel, args in launched(groups, dim, dtype, indexed, want_weights):
            registers, spilled, shared = resources(compiled(kernel, args, architecture), tmp_path)
            assert spilled == 0
            assert 4 * 128 * registers <= 65536
            assert 4 * (shared + 1024) <= 164 << 10  # the card itself takes 1 KiB a program


@pytest.mark.slow
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_neighbouring_lanes_read_neighbouring_bytes(architecture, dtype, indexed):
    """A lane takes 16 bytes of a key or value, the next lane the next 16; so is every sector fetched by one request."""
    code = compiled(*launched(1, 128, dtype, indexed, True)[0], architecture).asm["ttgir"]
    layouts = dict(re.findall(r"^(#blocked\d*) = (.*)$", code, re.MULTILINE))
    used = re.findall(r"async_copy_global_to_local .*: tensor<\d+x128x!tt\.ptr<\w+>, (#blocked\d*)>", code)
    assert len(used) >= 2  # keys and values
    lanes = 128 * dtype.itemsize // 16  # of an entry
    threads = f"threadsPerWarp = [{max(1, 32 // lanes)}, {min(lanes, 32)}]"
    for layout in used:
        assert f"sizePerThread = [1, {16 // dtype.itemsize}], {threads}" in layouts[layout]
        assert "order = [1, 0]" in layouts[layout]
