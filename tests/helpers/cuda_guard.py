"""A CUDA device guard that does nothing, so that a torch built without CUDA takes tensors which say they are on "cuda".

Torch looks a guard up, in C++, before it does anything with a tensor of a device. Where there is none it refuses.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

_SOURCE = Path(__file__).with_suffix(".cpp")


@contextmanager
def cuda_guard() -> Iterator[None]:
    """Within it there is a guard for "cuda"; afterwards torch is as it was. May be nested.

    Nothing else is pretended: `torch.cuda` still says that there is no device. Skips the test where that is impossible.
    """
    if torch.backends.cuda.is_built():
        pytest.skip("torch has a CUDA device guard of its own (expected a build without CUDA)")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("the device guard needs a C++ compiler")
    library = _library(compiler)
    before = library.set_guard(True)
    try:
        yield
    finally:
        library.set_guard(before)


@functools.cache
def _library(compiler: str) -> ctypes.CDLL:
    """The guard, compiled against this torch in about a second and loaded for good; the file is not needed any more."""
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "guard.so")
        torch_flags = [f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10", "-ltorch_python"]
        command = [compiler, "-std=c++20", "-shared", "-fPIC", str(_SOURCE), "-o", str(library), *torch_flags]
        subprocess.run(command, check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.set_guard.argtypes, loaded.set_guard.restype = [ctypes.c_bool], ctypes.c_bool
    return loaded
