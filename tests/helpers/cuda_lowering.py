"""What inductor makes of a decode step on CUDA, found out without a GPU.

    python tests/helpers/cuda_lowering.py --shape 7b --kind core --batch 8 --show

A cache on a pretended card (cuda_card.py) is planned as for a real prompt, and its step is compiled as the library
compiles it, up to inductor's code; nothing runs. For each combination of shape, batch and kind it prints a JSON object
on a line, or with `--show` something to read.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._inductor import compile_fx
from torch._inductor import config as inductor_config
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cuda_code
from cuda_card import CARDS, pretended
from cuda_code import Buffer, Launch, Source
from cuda_kernels import Kernel, kernel
from eval.speed.shapes import SHAPES
from minivlm.app import policy_flags
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.settings import CacheSettings
from minivlm.generation.compile import compiled_decode_step
from minivlm.generation.steps import prefill_logits
from minivlm.model.config import VisionConfig, VLMConfig
from minivlm.model.llava import Llava

MODELS = {"7b": "llava-v1.6-vicuna-7b", "mistral": "llava-v1.6-mistral-7b"}
DTYPE = torch.float16
KINDS = ("core", "refresh", "full", "choose")
_TOWER = VisionConfig(64, 64, 2, 1, 28, 14, 1e-5, "quick_gelu")


@dataclass(frozen=True)
class Task:
    """What to lower: a step of some kind, or the choice of cores after a refresh."""

    shape: str  # of `MODELS`
    kind: str  # of `KINDS`
    batch: int
    settings: CacheSettings
    layers: int = 1
    text: tuple[int, int] = (36, 64)  # tokens of the prompt before and after the image
    vision: int = 2880  # tokens of the image
    new_tokens: int = 128


@dataclass(frozen=True)
class Lowering:
    """A step's way to the card. Inputs are named after what they are in the library's objects."""

    refusal: str | None  # why it would not become a CUDA graph
    inputs: dict[str, Buffer]
    moving: list[str]  # inputs without a fixed address: a CUDA graph copies them each step
    moving_written: list[str]  # those among them that the step writes to: the graph would be refused
    launches: list[Launch]  # in order
    stored: list[Buffer]  # what the step makes for itself
    code: str  # inductor's

    @property
    def sorts(self) -> Counter[str]:
        return Counter(launch.sort for launch in self.launches)


class _RealHost(TorchDispatchMode):
    """Tensors on the CPU are real, those on CUDA fake: so the host can plan for a device that is not there."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.ops.aten.pin_memory.default, torch.ops.aten._pin_memory.default):
            return args[0]
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == "cuda") for x in leaves):
            with self.fake:
                return func(*args, **kwargs)
        return func(*args, **kwargs)


@torch.no_grad()
def prefilled(task: Task, fake: FakeTensorMode) -> tuple[Llava, KVCache]:
    """A model on the card, and a cache right after the prefill of `task`'s prompt."""
    config = VLMConfig.from_dict(SHAPES[MODELS[task.shape]])
    text = replace(config.text, num_hidden_layers=task.layers)
    config = replace(config, text=text, vision=_TOWER, vision_feature_layers=(1,))
    with fake, torch.device("cuda"), _default_dtype(DTYPE):
        model = Llava(config).eval().requires_grad_(False)
    is_vision = torch.zeros(sum(task.text) + task.vision, dtype=torch.bool)
    is_vision[task.text[0] : task.text[0] + task.vision] = True
    with _RealHost(fake):
        cache = KVCache(text, task.settings.build(task.layers), range(task.batch), device="cuda", static=True)
        (prefill,) = cache.prefill([is_vision] * task.batch, task.new_tokens)
        embeds = torch.empty(task.batch, len(is_vision), text.hidden_size, dtype=DTYPE, device="cuda")
        prefill_logits(model, prefill, embeds)
    return model, cache


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Lowered(Exception):
    """Raised once the code is there: it cannot be run."""


def lower(task: Task, options: Mapping[str, Any] | None = None) -> Lowering:
    """Compile a step as the library does, with further `options` of inductor. To be called within `pretended`."""
    torch._dynamo.reset()
    found: list[Lowering] = []
    names: list[str] = []
    compile_graph, codegen = compile_fx.compile_fx, compile_fx._InProcessFxCompile.codegen_and_compile

    def named_compile(graph, *args, **kwargs):
        names[:] = [_readable(node.name) for node in graph.graph.nodes if node.op == "placeholder"]
        return compile_graph(graph, *args, **kwargs)

    def stopped_codegen(self, graph_module, inputs, to_check, graph_kwargs):
        made: list[tuple[GraphLowering, str]] = []

        def to_module(graph, code):
            made.append((graph, code.value))
            return SimpleNamespace(call=None, __file__="")

        with mock.patch.object(GraphLowering, "_compile_to_module_lines", to_module):
            compiled = codegen(self, graph_module, inputs, to_check, graph_kwargs)
        found.append(_read(compiled, *made[0], names, set(graph_kwargs["static_input_idxs"])))
        raise _Lowered

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model, cache = prefilled(task, fake)
    step = compiled_decode_step(torch.device("cuda")).keywords
    # In one piece: else inductor would record what it can and run the rest in between, without a word.
    settings = {"graph_partition": False, "fx_graph_cache": False, **(options or {})}
    with (
        fake,
        torch.no_grad(),
        inductor_config.patch(settings),
        mock.patch.object(compile_fx, "compile_fx", named_compile),
        mock.patch.object(compile_fx._InProcessFxCompile, "codegen_and_compile", stopped_codegen),
    ):
        token, stop = torch.zeros(task.batch, dtype=torch.int64, device="cuda"), torch.tensor([2], device="cuda")
        try:
            if task.kind == "choose":
                with torch.compiler.set_stance("force_eager"):  # a step has run before: it marks the buffers
                    step["forward"](model, cache, "refresh", token, stop)
                step["choose"](cache)
            else:
                step["forward"](model, cache, task.kind, token, stop)
        except InductorError as error:
            if not isinstance(error.inner_exception, _Lowered):
                raise
    (lowering,) = found
    return lowering


def _readable(name: str) -> str:
    """A shorter name of one of dynamo's inputs, `L_cache_layers_0_k` and the like."""
    name = re.sub(r"^[lL]_(self_)?", "", name).rstrip("_")
    return re.sub("modules_|parameters_|language_model_|buffers_", "", name)


def _read(compiled: Any, graph: GraphLowering, code: str, names: Sequence[str], static: set[int]) -> Lowering:
    info = compiled.cudagraph_info
    reasons = [compiled.disabled_cudagraphs_reason, *(info.cudagraph_fail_reasons if info else ())]
    readable = dict(zip(graph.graph_input_names, names, strict=True))
    inputs = [(i, readable[name], graph.graph_inputs[name]) for i, name in enumerate(graph.graph_input_names)]
    return Lowering(
        refusal="; ".join(filter(None, reasons)) or None,
        inputs={
            name: Buffer(tensor.get_device().type, [int(size) for size in tensor.get_size()], str(tensor.get_dtype()))
            for _, name, tensor in inputs
        },
        moving=[name for i, name, _ in inputs if i not in static],
        moving_written=[name for i, name, _ in inputs if i in compiled.mutated_input_idxs and i not in static],
        launches=cuda_code.launches(code, readable),
        stored=cuda_code.stored(code),
        code=code,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=MODELS, nargs="+", default=["7b"])
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=["core"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--layers", type=int, default=1, help="of 2, those of 1 are subtracted: launches per layer")
    parser.add_argument("--card", choices=CARDS, default="H100")
    parser.add_argument("--config", action="append", default=[], metavar="NAME=VALUE", help="an option of inductor")
    parser.add_argument(
        "--cubins", choices=("first", "all"), help="compile these configurations (of our own kernels all)"
    )
    parser.add_argument("--code", type=Path, help="write inductor's code of the last one here")
    parser.add_argument("--show", action="store_true", help="something to read instead of JSON")
    policy_flags.add_arguments(parser)
    args = parser.parse_args(arguments)
    options = {name: ast.literal_eval(value) for name, value in (item.split("=", 1) for item in args.config)}
    for shape, batch, kind in itertools.product(args.shape, args.batch, args.kind):
        task = Task(shape, kind, batch, policy_flags.from_args(args), args.layers)
        with pretended(CARDS[args.card]):
            lowering = lower(task, options)
            fewer = lower(replace(task, layers=task.layers - 1), options) if task.layers > 1 else None
            sources = cuda_code.kernel_sources(lowering.code)
            kernels = [kernel(name, source, _configs(source, args.cubins)) for name, source in sources.items()]
        per_layer = len(lowering.launches) - len(fewer.launches) if fewer else None
        if args.code:
            args.code.write_text(lowering.code)
        if args.show:
            print(f"{shape}, {kind}, batch {batch}, {task.layers} layers", shown(lowering, per_layer), sep="\n")
            print(*map(shown_kernel, kernels), "", sep="\n")
        else:
            more = {"per_layer": per_layer, "kernels": list(map(asdict, kernels))}
            print(json.dumps(asdict(task) | asdict(lowering) | more), flush=True)


def _configs(source: Source, cubins: str | None) -> int | None:
    """How many of a kernel's configurations are compiled; None: all."""
    if cubins is None:
        return 0
    return None if cubins == "all" or source.is_custom else 1


def shown(lowering: Lowering, per_layer: int | None) -> str:
    """A lowering to read; the launches of the last layer are marked."""
    end = len(lowering.launches) - 2  # before the last norm and the head
    lines = [
        f"reason against a CUDA graph: {lowering.refusal}",
        f"inputs that move: {lowering.moving}, written to: {lowering.moving_written}",
        f"launches: {len(lowering.launches)} {dict(lowering.sorts)}, {per_layer} of them for another layer",
    ]
    for i, launch in enumerate(lowering.launches):
        mark = "*" if end - (per_layer or 0) <= i < end else " "
        lines.append(f"  {mark} {launch.sort:6} {launch.name}  ({', '.join(launch.arguments)})")
    lines += [f"    {each.device} {each.shape} {each.dtype}" for each in lowering.stored]
    return "\n".join(lines)


def shown_kernel(each: Kernel) -> str:
    lines = [f"    {each.name}: {each.heuristic} {each.size_hints}"]
    for config, build in itertools.zip_longest(each.configs, each.builds):
        lines.append(f"        {config}")
        if build is not None:
            lines[-1] += f": {build.registers} registers, {build.spilled} bytes spilled, {build.shared} bytes shared"
    return "\n".join(lines)


if __name__ == "__main__":
    main()
