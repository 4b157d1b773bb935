"""torch.compile: the decode step, one graph for each kind, reused for every token and prompt; the prefill's blocks.

Everything that changes from step to step is a tensor, and a policy's kinds of steps are told apart by one string. So a
graph is built for each kind, and one more chooses the cores after a refresh.

On a CPU a graph serves every size: shapes are symbols in it, and inductor fuses the single-query attention into one
pass over keys and values. On CUDA shapes are fixed, because graphs are recorded with their addresses (CUDA graphs).
There buffers never shrink, so that few sizes occur, and what a step reads depends on the live entries alone (see
`KVCache`). A recording holds the step's intermediate results, in memory that all recordings share.
"""

from __future__ import annotations

import copy
import functools
import os
import shutil
import weakref
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from minivlm.cache.buffers import LayerBuffers
from minivlm.cache.cores import choose_cores
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.state import CacheState, StepKind
from minivlm.generation.steps import DecodeStep, decode_step, forward_step
from minivlm.model.llama import DecoderLayer
from minivlm.model.llava import Llava

# Graphs of one process: kinds of steps x policies x batch sizes x sizes. Past it torch would refuse to compile more.
MAX_GRAPHS = 256


def missing_compiler(device: torch.device) -> str | None:
    """Why `torch.compile` cannot work for this device here, or None if it can."""
    if device.type == "cuda":
        if not has_triton():
            return "Triton is not installed"
        language, compilers = "C", [os.environ.get("CC"), "gcc", "clang", "cc"]  # Triton builds its launcher with it
    else:
        language, compilers = "C++", [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return None if any(name and shutil.which(name) for name in compilers) else f"there is no {language} compiler"


def graph_limit() -> AbstractContextManager[None]:
    """Within it torch.compile may build `MAX_GRAPHS` graphs of one function."""
    return torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS, accumulated_recompile_limit=MAX_GRAPHS)


def compiled_blocks(model: Llava) -> Llava:
    """The model, on the same parameters, with compiled blocks: the vision tower's layers, and what comes before and
    after attention in the decoder's.

    All layers share a block's graph, which serves every length; what the cache does in between stays eager. To be run
    under `graph_limit`, and not to be copied: a copy would run this one's blocks.
    """
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    for layer in twin.vision_tower.encoder.layers:
        layer.compile(dynamic=True, fullgraph=True)
    for decoder_layer in twin.language_model.layers:
        assert isinstance(decoder_layer, DecoderLayer)
        for name in ("before", "after"):
            compiled = torch.compile(getattr(decoder_layer, name), dynamic=True, fullgraph=True)
            object.__setattr__(decoder_layer, name, compiled)
    return twin


def compiled_decode_step(device: torch.device) -> DecodeStep:
    """`decode_step` with its two parts compiled, each at its first call; for caches made with `static=True`."""
    cuda = device.type == "cuda"
    mode = "reduce-overhead" if cuda else None
    step_graph = torch.compile(forward_step, fullgraph=True, dynamic=not cuda, mode=mode)
    cores_graph = torch.compile(choose_cores, fullgraph=True, dynamic=not cuda, mode=mode)
    marked: weakref.ref[LayerBuffers] | None = None  # the first layer whose buffers are marked

    def forward(model: Llava, cache: KVCache, kind: StepKind, token: Tensor, stop: Tensor) -> Tensor:
        nonlocal marked
        if cuda:
            # Buffers move only between turns, or where a cache is loaded: graphs may read and write them in place.
            if cache.steps == 0 or marked is None or marked() is not cache.layers[0]:
                for tensor in cache.tensors():
                    torch._dynamo.mark_static_address(tensor, guard=False)
                marked = weakref.ref(cache.layers[0])
            torch.compiler.cudagraph_mark_step_begin()
        with graph_limit():
            return step_graph(model, cache, kind, token, stop)

    def choose(state: CacheState) -> None:
        with graph_limit():
            cores_graph(state)

    return functools.partial(decode_step, forward=forward, choose=choose)
