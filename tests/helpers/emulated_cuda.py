"""An emulated CUDA device: tensors that say "cuda:0" and hold CPU numbers, so that whole answers run without a GPU.

Within `EmulatedCuda` every tensor that is made on "cuda" or moved there is a `DeviceTensor`, and an operation on it
runs on the CPU tensor inside. Three things of a real GPU are kept:

- Where the host waits for the device, a `Sync` is noted, with the line of this repository that waits.
- Operands on two devices are refused.
- A copy between pinned memory and the device runs late: what arrives on the host is garbage until the host has waited
  for it, and what goes to the device must not be changed before.

There is one stream, nothing is compiled, and random numbers are the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cuda_guard import cuda_guard
from device_waits import EVENT, INDEXING, Sync, running_line, waits_for

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
aten = torch.ops.aten
_COPIES = (aten.copy_.default, aten._to_copy.default)


class MixedDevices(AssertionError):
    """An operation had operands on two devices."""


class OverwrittenWhileCopied(AssertionError):
    """Pinned memory was changed although its copy to the device may not have run yet."""


class DeviceTensor(Tensor):
    """A tensor on the emulated device; `inner` holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> DeviceTensor:
        out = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CUDA,
        )
        out.inner = inner
        return out

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.inner!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()  # as torch does; it refuses subclasses

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a tensor of the emulated device (expected to be within `EmulatedCuda`)")


def numbers(tensor: Tensor) -> Tensor:
    """A tensor's numbers, on the CPU, for a test: no sync."""
    return tensor.inner if isinstance(tensor, DeviceTensor) else tensor


class _Copy(NamedTuple):
    """A copy from or to pinned memory that may not have run yet."""

    pinned: Tensor
    values: Tensor  # what is copied
    to_device: bool


class EmulatedCuda(TorchDispatchMode):
    """`with EmulatedCuda() as cuda:` there is one CUDA device. Afterwards torch is as it was.

    `answers` maps names of custom operators, such as "minivlm::decode_split", to functions that take the same arguments
    with CPU tensors in the place of the device's. Skips the test where torch cannot be made to take such tensors.
    """

    def __init__(self, answers: dict[str, Callable[..., Any]] | None = None) -> None:
        super().__init__()
        pinning = {"aten::_pin_memory": self._pinned_copy, "aten::is_pinned": self._is_pinned}
        self.answers: dict[str, Callable[..., Any]] = pinning | (answers or {})
        self.syncs: list[Sync] = []
        self._pinned: dict[int, Tensor] = {}  # by address; kept, so that no address is given away again
        self._under_way: list[_Copy] = []
        self._finished = 0  # copies that are under way no longer
        self._undo = ExitStack()

    def __enter__(self) -> EmulatedCuda:
        set_overwrite = torch.__future__.set_overwrite_module_params_on_conversion
        with ExitStack() as undo:
            undo.enter_context(cuda_guard())
            undo.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
            torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda"): on the CPU, then copied
            undo.callback(set_overwrite, torch.__future__.get_overwrite_module_params_on_conversion())
            set_overwrite(True)  # `module.to("cuda")` makes new parameters; the old ones cannot become `DeviceTensor`
            undo.enter_context(mock.patch.object(torch, "Generator", _Generator))
            for name, stub in self._stubs().items():
                undo.enter_context(mock.patch.object(torch.cuda, name, stub))
            super().__enter__()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        with self._undo:
            if exception[0] is None:
                self._finish(len(self._under_way))

    def _stubs(self) -> dict[str, Any]:
        """What takes the place of functions and classes of `torch.cuda`."""
        cuda = self

        class Event:
            """An event of the one stream there is."""

            def __init__(self, **_: Any) -> None:
                self.copies = 0  # that were launched before it

            def record(self, stream: None = None) -> None:
                self.copies = cuda._finished + len(cuda._under_way)

            def synchronize(self) -> None:
                cuda._wait(EVENT, max(self.copies - cuda._finished, 0))

        return {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "mem_get_info": lambda device=None: (80 << 30, 80 << 30),
            "synchronize": lambda device=None: self._wait("synchronize"),
            "Event": Event,
        }

    # --- operations --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = list(_leaves((args, kwargs)))
        operands = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        on_device = any(isinstance(operand, DeviceTensor) for operand in operands)
        device = kwargs.get("device")
        to_device = on_device if device is None else torch.device(device).type == "cuda"
        if to_device and func not in _COPIES:
            _refuse_mixed(func, args, operands, [leaf for leaf in leaves if isinstance(leaf, torch.Generator)])
        if on_device and (reason := waits_for(func, args, kwargs)) is not None:
            self._wait(reason)

        run = self.answers.get(func._schema.name, func)
        pinned = kwargs.pop("pin_memory", False)
        results = run(*_mapped(_inner, args), **_mapped(_inner, kwargs))
        if func in _COPIES and (on_device or to_device):
            self._copied(func, args, kwargs, results)
        if pinned:
            self._pin(results)

        known = {id(numbers(operand)): operand for operand in operands}  # an operation may return what it was given

        def outer(result: Any) -> Any:
            if id(result) in known:
                return known[id(result)]
            return DeviceTensor(result) if to_device and isinstance(result, Tensor) else result

        return _mapped(outer, results)

    # --- copies ------------------------------------------------------------------------------------------------------

    def _copied(self, func: Any, args: Any, kwargs: dict[str, Any], result: Tensor) -> None:
        """A copy has run here: did the host wait for it, or is it under way from now on?"""
        if func is aten.copy_.default:
            target, source = args[:2]
            non_blocking = kwargs.get("non_blocking", False) or args[2:] == (True,)
            to_device = isinstance(target, DeviceTensor)
        else:
            target, source = result, args[0]
            non_blocking = kwargs.get("non_blocking", False)
            to_device = torch.device(kwargs.get("device") or source.device).type == "cuda"
            if non_blocking and not to_device:
                self._pin(target)  # torch takes pinned memory for such a copy
        if to_device == isinstance(source, DeviceTensor):
            return
        on_host = source if to_device else target
        if not non_blocking:
            self._wait("copy to the device" if to_device else "copy to the host")
        elif not self._is_pinned(on_host):
            self._wait("copy that does not block, but from or to memory that is not pinned")
        elif not on_host.is_contiguous() or (to_device and source.shape != target.shape):
            self._wait("copy that does not block, but of pinned memory that is not contiguous or has another shape")
        else:
            self._under_way.append(_Copy(on_host, on_host.clone(), to_device))
            if not to_device:
                _fill_with_garbage(on_host)

    def _pin(self, tensor: Tensor) -> Tensor:
        """Take a CPU tensor's memory for pinned."""
        return self._pinned.setdefault(tensor.untyped_storage().data_ptr(), tensor)

    def _pinned_copy(self, tensor: Tensor, device: torch.device | None = None) -> Tensor:
        return self._pin(tensor.clone())

    def _is_pinned(self, tensor: Tensor, device: torch.device | None = None) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def _wait(self, reason: str, copies: int | None = None) -> None:
        """Note that the host waits, for the first `copies` of those under way; None: for everything."""
        self.syncs.append(Sync(reason, running_line()))
        self._finish(len(self._under_way) if copies is None else copies)

    def _finish(self, copies: int) -> None:
        for copy in self._under_way[:copies]:
            if not copy.to_device:
                copy.pinned.copy_(copy.values)
            elif not torch.equal(copy.pinned, copy.values):
                raise OverwrittenWhileCopied(f"pinned memory {list(copy.pinned.shape)} {copy.pinned.dtype}")
        del self._under_way[:copies]
        self._finished += copies


class _Generator(torch.Generator):
    """A generator that says it is on the device, and draws what one on the CPU draws."""

    says: torch.device

    def __new__(cls, device: torch.device | str = "cpu") -> _Generator:
        out = super().__new__(cls, "cpu")
        out.says = torch.device(device)
        return out

    def __init__(self, device: torch.device | str = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:
        return self.says


def _refuse_mixed(func: Any, args: Any, operands: list[Tensor], generators: list[torch.Generator]) -> None:
    """Raise `MixedDevices` if an operation of the device has operands on the host that CUDA does not take."""
    taken: list[Tensor] = []  # what CUDA copies to the device: indices, and a number to be set
    if func in INDEXING:
        taken = [*args[1], *(value for value in args[2:3] if value.dim() == 0)]
    on_host = [
        operand
        for operand in operands
        if operand.device.type == "cpu"
        and not any(operand is each for each in taken)
        and not (operand.dim() == 0 and torch.Tag.pointwise in func.tags)
    ]
    if on_host or any(generator.device.type == "cpu" for generator in generators):
        given = [f"{operand.device.type} {list(operand.shape)}" for operand in operands]
        given += [f"a generator on {generator.device.type}" for generator in generators]
        raise MixedDevices(f"{running_line()}: {func} of {', '.join(given)}")


def _leaves(value: Any) -> Iterator[Any]:
    """Everything in an operation's arguments or results, out of its lists, tuples and dictionaries."""
    if isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _leaves(each)
    else:
        yield value


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """The same with each leaf changed. (Torch's own tree functions take most of a test's time.)"""
    if isinstance(value, list | tuple):
        return type(value)(_mapped(change, each) for each in value)
    if isinstance(value, dict):
        return {key: _mapped(change, each) for key, each in value.items()}
    return change(value)


def _inner(leaf: Any) -> Any:
    """An argument as the CPU takes it."""
    if isinstance(leaf, torch.device):
        return CPU if leaf.type == "cuda" else leaf
    return leaf.inner if isinstance(leaf, DeviceTensor) else leaf


def _fill_with_garbage(tensor: Tensor) -> None:
    """What pinned memory holds before a copy arrives in it."""
    if tensor.dtype == torch.bool:
        tensor.logical_not_()
    else:
        tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)
