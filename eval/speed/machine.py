"""The machine: its bandwidth, the memory that is in use, waiting for the device."""

from __future__ import annotations

import contextlib
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def describe_machine(device: torch.device) -> dict[str, object]:
    """The name of the device, and its memory in bytes or its number of threads."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "device": properties.name,
            "memory": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return {"device": _cpu_name(), "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    """The processor's model, and the instruction set that torch uses on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor()
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bandwidth(device: torch.device, nbytes: int | None = None, repeats: int = 10) -> dict[str, float]:
    """Bytes per second that the device copies (read and written ones added) and reads, medians of `repeats`."""
    count = (nbytes or (4 << 30 if device.type == "cuda" else 512 << 20)) // 4
    source, target = torch.rand(count, device=device), torch.empty(count, device=device)
    return {
        "copy": 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, repeats),
        "read": source.nbytes / median_seconds(source.sum, device, repeats),
    }


def median_seconds(run: Callable[[], Tensor], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


class PeakMemory:
    """How much more than before was in use at most between `begin` and `end`; on the CPU by pages of the process."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._before = device, 0

    def begin(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return
        with contextlib.suppress(OSError):  # then the peak is the highest since the process began
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak, on Linux
        self._before = self._status("VmRSS")

    def end(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._before
        return self._status("VmHWM") - self._before

    @staticmethod
    def _status(field: str) -> int:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:  # not Linux
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
