"""torch.compile: a graph for each kind of decode step, reused for every token, prompt and turn; and the prefill's blocks.

Everything that changes from step to step is a tensor, buffers come in buckets of slots, and a policy's kinds of steps
are told apart by one string; so a graph is built once per kind, batch and bucket, and one that chooses the cores behind a refresh.  On CUDA the graphs are recorded
(CUDA graphs), on a CPU inductor fuses the single-query attention into one pass over keys and values.
"""

from __future__ import annotations

import copy
import os
import shutil
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from minivlm.cache.buffers import reselect
from minivlm.cache.kv_cache import KVCache
from minivlm.generation.generate import decode_step, forward_step
from minivlm.model.llava import Llava

# Graphs of one process: kinds of steps x policies x batch sizes x buckets. Past it torch would refuse to compile more.
MAX_GRAPHS = 256


def missing_compiler(device: torch.device) -> str | None:
    """Why `torch.compile` cannot work for this device here, or None if it can."""
    if device.type == "cuda":
        return None if has_triton() else "Triton is not installed"
    compilers = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return None if any(name and shutil.which(name) for name in compilers) else "there is no C++ compiler"


def graph_limit() -> AbstractContextManager[None]:
    """Within it torch.compile may build `MAX_GRAPHS` graphs of one function."""
    return torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS, accumulated_recompile_limit=MAX_GRAPHS)


def compiled_blocks(model: Llava) -> Llava:
    """The model, on the same parameters, with the vision tower's layers and what surrounds a prefill's attention compiled.

    All layers share a block's graph, which serves every length; what the cache does in between stays eager.  To be run
    under `graph_limit`, and not to be copied: a copy would run this one's blocks.
    """
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    for layer in twin.vision_tower.encoder.layers:
        layer.compile(dynamic=True, fullgraph=True)
    for layer in twin.language_model.layers:
        layer.before = torch.compile(layer.before, dynamic=True, fullgraph=True)
        layer.after = torch.compile(layer.after, dynamic=True, fullgraph=True)
    return twin


def compiled_decode_step(device: torch.device) -> Callable[[Llava, KVCache, str, Tensor, Tensor], Tensor]:
    """`decode_step`, compiled at its first call; for caches made with `static=True`."""
    cuda, marked = device.type == "cuda", None
    how = dict(fullgraph=True, dynamic=False, mode="reduce-overhead" if cuda else None)
    # Apart: with the choice in the same graph, torch 2.11 writes wrong values into the last layer's buffer on a CPU.
    forward, choose = torch.compile(forward_step, **how), torch.compile(reselect, **how)

    def run(model: Llava, cache: KVCache, kind: str, token: Tensor, stop: Tensor) -> Tensor:
        nonlocal marked
        if cuda:
            # Buffers move only between turns, or where a cache is loaded: the graphs may read and write them where they are.
            if cache.steps == 0 or marked is None or marked() is not cache.layers[0]:
                for buffer in cache.buffers():
                    torch._dynamo.mark_static_address(buffer, guard=False)
                marked = weakref.ref(cache.layers[0])
            torch.compiler.cudagraph_mark_step_begin()
        with graph_limit():
            return decode_step(model, cache, kind, token, stop, forward, choose)

    return run
