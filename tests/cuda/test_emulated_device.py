"""The emulated device itself: what makes the host wait, what is refused, when copies arrive, what it leaves behind."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

import tiny
import weights
from device_waits import Sync, by_minivlm, listed
from emulated_cuda import EmulatedCuda, MixedDevices, OverwrittenWhileCopied, numbers
from emulated_kernels import KERNELS
from minivlm.cache.attention import decode_plain
from minivlm.errors import UserError


def on_device(*values: float) -> Tensor:
    return torch.tensor(values).to("cuda")


# What makes the host wait: an operation, and whether it does.
WAITS = {
    "item": (lambda x: x.sum().item(), True),
    "a condition": (lambda x: bool((x > 1).any()), True),
    "tolist": (lambda x: x.tolist(), True),
    "equal": (lambda x: torch.equal(x, x), True),
    "to the host": (lambda x: x.cpu(), True),
    "to the host's memory": (lambda x: torch.zeros(3).copy_(x), True),
    "to pageable memory, without blocking": (lambda x: torch.zeros(3).copy_(x, non_blocking=True), True),
    "from the host": (lambda x: torch.ones(3).to("cuda"), True),
    "from a list": (lambda x: torch.tensor([1, 2], device="cuda"), True),
    "from a list, like a tensor": (lambda x: x.new_tensor([1, 2]), True),
    "from pageable memory, without blocking": (lambda x: torch.ones(3).to("cuda", non_blocking=True), True),
    "from pinned memory, blocking": (lambda x: torch.ones(3).pin_memory().to("cuda"), True),
    "from pinned columns": (lambda x: x[:2].copy_(torch.ones(2, 2).pin_memory()[:, 0], non_blocking=True), True),
    "from a pinned number, expanded": (lambda x: x.copy_(torch.ones(1).pin_memory(), non_blocking=True), True),
    "nonzero": (lambda x: x.nonzero(), True),
    "a mask as an index": (lambda x: x[x > 1], True),
    "a mask as an index of what is set": (lambda x: x.index_put_((x > 1,), x[:2] + 1), True),
    "an index on the host": (lambda x: x[torch.tensor([0, 1])], True),
    "a number set by index": (lambda x: x.index_put_((x.long() - 1,), torch.tensor(4.0)), True),
    "isin of many": (lambda x: torch.isin(x, torch.arange(50.0, device="cuda")), True),
    "repeats on the device": (lambda x: x.repeat_interleave(x.long()), True),
    "waiting for everything": (lambda x: torch.cuda.synchronize(), True),
    "arithmetic": (lambda x: (x + 1) * x.sum(), False),
    "a number of the host": (lambda x: x * torch.tensor(2.0), False),
    "made there": (lambda x: torch.arange(3, device=x.device) + torch.zeros_like(x), False),
    "from pinned memory": (lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True), False),
    "from new pinned memory": (lambda x: x.copy_(torch.ones(3, pin_memory=True), non_blocking=True), False),
    "to pinned memory": (lambda x: torch.ones(3, pin_memory=True).copy_(x, non_blocking=True), False),
    "to the host, without blocking": (lambda x: x.to("cpu", non_blocking=True), False),
    "a mask that fills": (lambda x: x.masked_fill(x > 1, 0.0), False),
    "a number set by a mask": (lambda x: x.__setitem__(x > 1, 0.0), False),
    "an index on the device": (lambda x: x[x.long() - 1], False),
    "isin of few": (lambda x: torch.isin(x, torch.arange(3.0, device="cuda")), False),
    "repeats, with the size": (lambda x: x.repeat_interleave(x.long(), output_size=6), False),
    "sorting": (lambda x: x.argsort(), False),
}


@pytest.mark.parametrize("operation, waits", WAITS.values(), ids=WAITS)
def test_where_the_host_waits(operation, waits):
    with EmulatedCuda() as cuda:
        x = on_device(1.0, 2.0, 3.0)
        cuda.syncs.clear()
        operation(x)
        assert len(cuda.syncs) == waits, listed(cuda.syncs)


def test_the_line_that_waits_is_named():
    with EmulatedCuda() as cuda:
        x = on_device(1.0)
        cuda.syncs.clear()
        line = inspect.currentframe().f_lineno + 1
        x.item(), x.item()
        place = f"tests/cuda/test_emulated_device.py:{line}"
        assert {sync.line for sync in cuda.syncs} == {place}
        assert listed(cuda.syncs) == f"2 x {place}: a value for the host"


MIXED = {
    "arithmetic": lambda x: x + torch.ones(3),
    "arithmetic on the host": lambda x: torch.ones(3).add_(x),
    "joining": lambda x: torch.cat((x, torch.ones(3))),
    "joining numbers": lambda x: torch.stack((x[0], torch.tensor(1.0))),
    "a table": lambda x: torch.nn.functional.embedding(torch.tensor([0]), x[:, None]),
    "gathering": lambda x: x.gather(0, torch.tensor([0])),
    "values set by index": lambda x: x.index_put_((x.long() - 1,), torch.ones(3)),
    "random numbers": lambda x: x.exponential_(generator=torch.Generator()),
}


@pytest.mark.parametrize("operation", MIXED.values(), ids=MIXED)
def test_mixed_devices_are_refused(operation):
    with EmulatedCuda(), pytest.raises(MixedDevices, match=r"test_emulated_device.py:\d+: aten"):
        operation(on_device(1.0, 2.0, 3.0))


def test_numbers_are_those_of_the_cpu():
    def computed(device: str) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(3)
        noise = torch.empty(2, 4, 5, 8, device=device).exponential_(generator=generator)
        linear = torch.nn.Linear(8, 3).requires_grad_(False)
        torch.nn.init.constant_(linear.weight, 0.5)
        rows = linear.to(device)(noise[:, 0, 0]) - linear.bias.to(device)
        attended = torch.nn.functional.scaled_dot_product_attention(noise, noise[:, :2], noise[:, 2:], enable_gqa=True)
        noise[0].copy_(noise[1])
        torch.gather(noise[1], 0, torch.zeros(1, 5, 8, dtype=torch.int64, device=device), out=noise[0, 2:3])
        return [noise, rows, attended, noise.view(-1)[3:7].sort().values]

    expected = computed("cpu")
    with EmulatedCuda():
        results = computed("cuda")
        assert all(tensor.is_cuda and str(tensor.device) == "cuda:0" for tensor in results)
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(numbers(result), wanted)


def test_a_copy_to_the_host_arrives_when_it_is_waited_for():
    with EmulatedCuda() as cuda:
        first, second = (torch.empty(2, dtype=torch.int64, pin_memory=True) for _ in range(2))
        x = torch.arange(2, device="cuda")
        first.copy_(x, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        second.copy_(x, non_blocking=True)
        x.add_(5)  # too late for both
        assert first.tolist() != [0, 1]
        event.synchronize()
        assert first.tolist() == [0, 1] and second.tolist() != [0, 1]
        assert [sync.is_event for sync in cuda.syncs] == [True]
        assert x.sum().item() == 11  # everything has run now
        assert second.tolist() == [0, 1]
        assert [sync.is_event for sync in cuda.syncs] == [True, False]


@pytest.mark.parametrize("waited", [True, False])
def test_pinned_memory_stays_as_it_is_until_its_copy_has_run(waited):
    def reuse() -> None:
        with EmulatedCuda():
            pinned = torch.ones(2).pin_memory()
            copied = pinned.to("cuda", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            if waited:
                event.synchronize()
            pinned.numpy()[1] = 2.0
            assert numbers(copied).tolist() == [1.0, 1.0]

    if waited:
        reuse()
    else:
        with pytest.raises(OverwrittenWhileCopied, match=r"pinned memory \[2\] torch.float32"):
            reuse()


def test_a_custom_operator_is_answered_by_a_function():
    @torch.library.custom_op("minivlm_tests::twice", mutates_args=(), device_types="cuda")
    def twice(x: Tensor, times: int) -> Tensor:
        raise AssertionError("the kernel is for a GPU")

    asked = []

    def answer(x: Tensor, times: int) -> Tensor:
        asked.append((x.device.type, times))
        return 2 * x * times

    with EmulatedCuda({"minivlm_tests::twice": answer}):
        assert twice(on_device(1.0, 2.0), 3).tolist() == [6.0, 12.0]
    assert asked == [("cpu", 3)]


@pytest.mark.parametrize("listed", [None, [3, 0]], ids=["all that is live", "by index"])
@pytest.mark.parametrize("want_weights", [True, False])
def test_the_packages_kernel_is_answered_as_it_is_meant(listed, want_weights):
    pytest.importorskip("triton", reason="Triton is not installed")
    from minivlm.cache.decode_split import decode_split

    random, slots, tail_start = torch.Generator().manual_seed(0), 12, 6
    shapes = ((4, 1), (2, 1), (2, 1), (2, slots), (2, slots))
    q, new_k, new_v, k, v = (torch.randn(2, heads, n, 8, generator=random) for heads, n in shapes)
    position, positions = torch.tensor([[20], [30]]).int(), torch.zeros(2, 2, slots).int()
    place, used = torch.tensor([[1, 2], [0, 0]]), torch.tensor([[3], [1]])
    left = torch.tensor([[5], [1]] if listed is None else listed).view(2, 1)
    core_slots, core = torch.tensor([[4, 1, 2, 0], [0, 0, 0, 0]]), None
    with EmulatedCuda(KERNELS) as cuda:
        on_device = {name: tensor.to("cuda") for name, tensor in locals().items() if isinstance(tensor, Tensor)}
        token = [on_device[name] for name in ("q", "new_k", "new_v", "position")]
        buffers = [on_device[name] for name in ("k", "v", "positions")]
        counts = [on_device[name] for name in ("place", "used", "left")]
        index = () if listed is None else (on_device["core_slots"],)
        cuda.syncs.clear()
        ours = decode_split(token, buffers, *counts, tail_start, want_weights, *index)
        assert by_minivlm(cuda.syncs) == []

    where = (torch.arange(2)[:, None], torch.arange(2), tail_start + place)
    k[where], v[where], positions[where] = new_k[:, :, 0], new_v[:, :, 0], position.expand(2, 2)
    for buffer, expected in zip(buffers, (k, v, positions), strict=True):
        assert torch.equal(numbers(buffer), expected)
    columns = torch.arange(slots).expand(2, -1)
    if listed is not None:
        core = columns >= tail_start
        core[0, core_slots[0, :3]] = True
    spans = [(tail_start - before, tail_start + after) for before, after in ((5, 3), (1, 1))]
    out, weights = decode_plain(q, k, v, spans, core, want_weights=True)
    torch.testing.assert_close(numbers(ours[0]), out)
    if not want_weights:
        assert ours[1] is None
        return
    if listed is not None:
        columns = torch.cat((core_slots, columns[:, tail_start:]), dim=1)
        weights[:, :, 0] = 0  # what pads the list
    torch.testing.assert_close(numbers(ours[1]), weights.gather(2, columns[:, None].expand(-1, 2, -1)))


@pytest.mark.parametrize("ends", ["well", "with an error"])
def test_nothing_is_left_behind(tmp_path, ends):
    def state() -> list[object]:
        said = []
        for use in (lambda: torch.zeros(1, device="cuda"), lambda: torch.zeros(1).to("cuda"), torch.cuda.synchronize):
            with pytest.raises(AssertionError) as error:
                use()
            said.append(str(error.value))
        with pytest.raises(UserError) as refused:
            weights.load(tmp_path, device="cuda")
        with pytest.raises(RuntimeError, match="accelerator"):
            torch.zeros(1, pin_memory=True)
        parts = [torch.cuda.is_available(), torch.cuda.device_count(), torch.Generator, torch.cuda.Event]
        flags = [torch._C._only_lift_cpu_tensors(), torch.__future__.get_overwrite_module_params_on_conversion()]
        return [*said, str(refused.value), *parts, *flags, weights.load(tmp_path, device="auto").device]

    tiny.write(tmp_path, "llava-1.5")
    before = state()
    if ends == "well":
        with EmulatedCuda():
            on_device(1.0)
    else:
        with pytest.raises(MixedDevices), EmulatedCuda():
            on_device(1.0).add_(torch.ones(1))
    assert state() == before


def test_outside_the_emulation_a_tensor_of_the_device_is_of_no_use():
    with EmulatedCuda():
        x = on_device(1.0)
    with pytest.raises(RuntimeError, match="expected to be within `EmulatedCuda`"):
        x + x


def test_syncs_are_listed_by_line():
    syncs = [Sync("b", "x.py:2"), Sync("a", "x.py:2"), Sync("b", "x.py:1"), Sync("a", "x.py:2")]
    assert listed(syncs).splitlines() == ["1 x x.py:1: b", "2 x x.py:2: a", "1 x x.py:2: b"]
