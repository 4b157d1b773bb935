"""A CUDA card for a torch without CUDA, as far as tracing, inductor's code and Triton's compiler need one.

Within `pretended` torch and Triton believe in a card; tensors of `FakeTensorMode` may be on "cuda" and be compiled for
it. Nothing can run. Torch remembers some of what it was told, so this belongs in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.constant_folding import ConstantFolder
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from cuda_guard import cuda_guard


@dataclass(frozen=True)
class Card:
    """What `torch.cuda.get_device_properties` says of a card, as far as inductor asks."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    total_memory: int  # bytes, as all of these
    L2_cache_size: int
    shared_memory_per_multiprocessor: int
    shared_memory_per_block_optin: int
    shared_memory_per_block: int = 48 << 10
    regs_per_multiprocessor: int = 1 << 16
    max_threads_per_multi_processor: int = 2048
    max_threads_per_block: int = 1024
    warp_size: int = 32
    is_integrated: bool = False
    gcnArchName: str = ""  # asked for by a torch that was not built for CUDA


CARDS = {
    "A100": Card("NVIDIA A100-SXM4-80GB", 8, 0, 108, 80 << 30, 40 << 20, 164 << 10, 163 << 10),
    "H100": Card("NVIDIA H100 80GB HBM3", 9, 0, 132, 80 << 30, 50 << 20, 228 << 10, 227 << 10),
    "B200": Card("NVIDIA B200", 10, 0, 148, 180 << 30, 126 << 20, 228 << 10, 227 << 10),
}


@contextmanager
def pretended(card: Card) -> Iterator[None]:
    """Within it this process believes that it has one card, device 0."""
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": SimpleNamespace(**asdict(card)),
        "get_device_capability": (card.major, card.minor),
        "get_device_name": card.name,
        "is_bf16_supported": True,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "_lazy_init": None,
        "set_device": None,
        "synchronize": None,
    }
    with ExitStack() as stack:
        stack.enter_context(cuda_guard())
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, _always(answer)))
            interface = staticmethod(_always(answer))
            stack.enter_context(mock.patch.object(CudaInterface, name.removeprefix("_"), interface, create=True))
        random = {"get_rng_state": _always(torch.zeros(16, dtype=torch.uint8)), "set_rng_state": _always(None)}
        stack.enter_context(mock.patch.multiple(torch.cuda, **random, manual_seed_all=_always(None)))
        stack.enter_context(mock.patch.multiple(torch.cuda.random, **random))
        stack.enter_context(mock.patch.object(CudaInterface, "get_raw_stream", staticmethod(_always(0))))
        for name, answer in {"_cuda_getCurrentRawStream": 0, "_cuda_cudaCachingAllocator_is_enabled": True}.items():
            stack.enter_context(mock.patch.object(torch._C, name, _always(answer), create=True))
        # A tensor made from numbers would else be copied to the card before it is a fake one.
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(_constants_on_the_host())
        DeviceProperties.create.cache_clear()  # of the card before
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", _driver(card)()))
        yield


def _always(answer: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: answer


def _driver(card: Card) -> type[DriverBase]:
    """Triton's driver of a card, for compiling alone."""

    class Driver(DriverBase):
        is_active = staticmethod(_always(True))
        get_current_target = _always(GPUTarget("cuda", 10 * card.major + card.minor, card.warp_size))
        get_current_device = _always(0)
        get_current_stream = _always(0)
        get_active_torch_device = _always(torch.device("cuda", 0))
        get_benchmarker = _always(None)
        map_python_to_cpp_type = staticmethod(lambda name: name)
        utils = SimpleNamespace(
            get_device_properties=_always(
                {
                    "max_shared_mem": card.shared_memory_per_block_optin,
                    "multiprocessor_count": card.multi_processor_count,
                }
            )
        )

    return Driver


class _OnTheHost(TorchDispatchMode):
    """Whatever would be created on a device is created on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


@contextmanager
def _constants_on_the_host() -> Iterator[None]:
    """Inductor computes constants on the device they are for; within it, on the CPU."""
    with ExitStack() as stack:
        for folder in (UniformValueConstantFolder, ConstantFolder):

            def run(self: ConstantFolder, *args: Any, original: Callable = folder.run, **kwargs: Any) -> Any:
                with _OnTheHost():
                    return original(self, *args, **kwargs)

            stack.enter_context(mock.patch.object(folder, "run", run))
        yield
