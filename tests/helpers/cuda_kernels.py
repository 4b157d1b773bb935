"""Triton kernels that inductor generated, compiled for a card: registers, spills, shared memory of each configuration.

Triton and its ptxas compile down to machine code without a card.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import triton
from torch._inductor import config as inductor_config
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from triton.backends.nvidia.compiler import get_ptxas

from cuda_code import Source


@dataclass(frozen=True)
class Build:
    """One configuration of a kernel, compiled."""

    config: str  # block sizes, warps, stages
    registers: int  # of a thread
    spilled: int  # bytes of a thread that did not fit the registers
    stack: int  # bytes of a thread in local memory for any reason; sin and cos of large angles have a small array there
    shared: int  # bytes of a block


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel and the configurations among which inductor would choose by timing them."""

    name: str
    is_custom: bool  # written by hand
    heuristic: str  # pointwise, reduction, persistent_reduction, user_autotune
    size_hints: dict[str, int] | None
    configs: list[str]
    builds: list[Build]  # of the first configurations, as many as were asked for


def kernel(name: str, source: Source, compiled: int | None = 0) -> Kernel:
    """Read a generated kernel, and compile the first `compiled` of its configurations; None: all of them.

    To be called within `pretended`, on a card like that for which the source was generated.
    """
    with _loaded(source) as tuner:
        return Kernel(
            name,
            source.is_custom,
            tuner.heuristic_type.name.lower(),
            tuner.size_hints,
            [_name(config) for config in tuner.configs],
            [_build(tuner, config) for config in tuner.configs[:compiled]],
        )


@contextmanager
def _loaded(source: Source) -> Iterator[CachingAutotuner]:
    with (
        mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None),
        inductor_config.patch(use_static_triton_launcher=False),
        tempfile.TemporaryDirectory() as folder,
    ):
        file = Path(folder, "kernel.py")  # Triton reads a kernel's source from its file
        file.write_text(source.text)
        spec = importlib.util.spec_from_file_location(source.function, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield getattr(module, source.function)


def _name(config: triton.Config) -> str:
    blocks = [f"{name} {size}" for name, size in config.kwargs.items()]
    return ", ".join([*blocks, f"{config.num_warps} warps", f"{config.num_stages} stages"])


def _build(tuner: CachingAutotuner, config: triton.Config) -> Build:
    compiled = tuner._precompile_config(config).kernel
    with tempfile.TemporaryDirectory() as folder:  # once more, for what ptxas says
        file = Path(folder, "kernel.ptx")
        file.write_text(compiled.asm["ptx"])
        target = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
        ptxas = get_ptxas(tuner.device_props.cc).path
        command = [ptxas, "-v", f"--gpu-name={target}", file, "-o", file.with_suffix(".cubin")]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    patterns = (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes stack frame")
    registers, spilled, stack = (int(re.search(pattern, said)[1]) for pattern in patterns)
    return Build(_name(config), registers, spilled, stack, compiled.metadata.shared)
