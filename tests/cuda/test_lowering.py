"""What the compiled decode step becomes on CUDA: one graph, no copy of the cache, few launches, no spilled registers.

Inductor generates its code for a card that is not there, and Triton compiles that (tests/helpers/cuda_lowering.py).
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from paths import ROOT

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.__version__.startswith("2.13."), reason="the lowering reaches into torch 2.13, and no other"
    ),
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="for a torch without CUDA"),
    pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler"),
]

SHAPES = ("7b", "mistral")  # 32 key/value heads, and 8 for 32 query heads
KINDS = ("core", "refresh", "full", "choose")
CARDS = {1: "B200", 8: "H100", 32: "A100"}  # by batch: not every batch on every card
LAUNCHES = {"core": 10, "refresh": 11, "full": 10, "choose": 4}


@functools.cache
def run(policy: str, batch: int) -> subprocess.CompletedProcess[str]:
    """All shapes and kinds of steps under a policy, lowered in one process."""
    kinds = ("full",) if policy == "full" else ("core", "refresh", "choose")
    options = ["--policy", policy, "--batch", str(batch), "--card", CARDS[batch]]
    # Launches are counted and kernels compiled for the batch in the middle.
    options += ["--layers", "2", "--cubins", "first"] if batch == 8 else []
    command = [sys.executable, "tests/helpers/cuda_lowering.py", "--shape", *SHAPES, "--kind", *kinds, *options]
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "helpers")))
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path})


def lowering(shape: str, kind: str, batch: int) -> SimpleNamespace:
    done = run("full" if kind == "full" else "avl", batch)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line, object_hook=lambda value: SimpleNamespace(**value)) for line in done.stdout.splitlines()]
    (found,) = (line for line in lines if (line.shape, line.kind) == (shape, kind))
    return found


@pytest.mark.parametrize("batch", CARDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_one_cuda_graph(shape, kind, batch):
    step = lowering(shape, kind, batch)
    assert step.refusal is None
    assert step.moving_written == []
    assert set(step.moving) <= {"token", "stop"}  # copied at each step; everything else stays where it is
    assert {launch.sort for launch in step.launches} <= {"triton", "custom", "extern"}
    assert {tensor.device for tensor in step.stored} == {"cuda"}


@pytest.mark.parametrize("batch", CARDS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "choose"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_cache_is_not_copied(shape, kind, batch):
    """Neither a buffer as a whole nor the keys and values that a step reads: they are by far the largest tensors."""
    step = lowering(shape, kind, batch)
    buffers = {name: tensor for name, tensor in vars(step.inputs).items() if name.startswith("cache_layers_0_")}
    _, _, slots, _ = keys = buffers["cache_layers_0_k"].shape
    largest = max(step.stored, key=lambda tensor: math.prod(tensor.shape))
    assert 8 * math.prod(largest.shape) < math.prod(keys), largest
    by_slot = [tensor for tensor in buffers.values() if slots in tensor.shape]
    assert len(by_slot) > 2 and not [tensor for tensor in step.stored if tensor in by_slot]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_launches_of_a_layer(shape, kind):
    step = lowering(shape, kind, 8)
    assert 0 < step.per_layer <= LAUNCHES[kind], "\n".join(launch.name for launch in step.launches)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_register_is_spilled(shape, kind):
    """In no configuration of our own kernels, and not in inductor's first, which it takes where it does not time."""
    kernels = lowering(shape, kind, 8).kernels
    assert kernels and all(kernel.builds for kernel in kernels)
    spilled = {f"{kernel.name}, {build.config}": build.spilled for kernel in kernels for build in kernel.builds}
    assert not {name: size for name, size in spilled.items() if size}
