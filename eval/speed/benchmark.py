"""`scripts/benchmark.py`: how fast policies are on a shape, side by side, and how far from what the device could do.

For every batch size and number of vision tokens all policies and peers run in one process, in turns. The bandwidth of
the device is measured first, and every decode time stands beside the time that reading its bytes alone would take.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.profiler import profile

from eval.accuracy.results import write_json
from eval.speed.report import draw, table
from eval.speed.shapes import SHAPES, Prompts, make_model, synthetic_prompts
from eval.speed.timing import Contender, Ours, PeakMemory, bandwidth, batch_that_fits, decoder_bytes, take_turns
from minivlm.app import policy_flags
from minivlm.app.cli import Parser, note
from minivlm.cache.settings import CacheSettings
from minivlm.errors import UserError
from minivlm.files import expect_writable
from minivlm.generation.compile import compiled_blocks, missing_compiler
from minivlm.model.llava import Llava


@dataclass(frozen=True)
class Candidate:
    """A policy to time: the label of its rows, and its settings."""

    label: str
    settings: CacheSettings
    compiled: bool


def main(arguments: Sequence[str], peers: Path) -> None:
    """Measure what the flags ask for; `peers` is the folder of the peer_NAME.py files."""
    args, flags = parse(arguments)
    candidates = [candidate(text, flags, args.seed, args.compile) for text in args.policy]
    labels = [c.label for c in candidates] + args.peers
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise UserError(
            f"{twice!r} is there twice (expected one name each; `LABEL: POLICY FLAG...` gives a policy another)"
        )
    makers = [(name, peer(name, peers)) for name in args.peers]
    model = make_model(args.shape, args.device, args.dtype, args.seed, args.random_weights)
    device = model.lm_head.weight.device
    if args.largest_batch and device.type != "cuda":
        raise UserError("--largest_batch needs a GPU: a CPU swaps long before it says that memory is out")
    if any(c.compiled for c in candidates) and (missing := missing_compiler(device)):
        note(f"all runs eagerly: {missing}")
        candidates = [replace(c, compiled=False) for c in candidates]
    models = {False: model}
    if any(c.compiled for c in candidates):
        models[True] = compiled_blocks(model)
        torch._inductor.config.cpp.enable_kernel_profile = args.profile
    result = {
        "command": shlex.join(["python", "scripts/benchmark.py", *arguments]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": machine(device),
        "bandwidth": bandwidth(device),
        "shape": args.shape,
        "dtype": str(model.lm_head.weight.dtype)[6:],
        "decoder_bytes": decoder_bytes(model),
        "cases": [],
    }
    for batch in args.batch:
        for vision in args.vision_tokens:
            contenders: list[Contender] = [
                Ours(c.label, models[c.compiled], c.settings, c.compiled) for c in candidates
            ]
            contenders += [maker(name, model) for name, maker in makers if maker]
            result["cases"].append(case(args, model, contenders, batch, vision, result["bandwidth"]["copy"]))
            print(table(result["cases"][-1]), flush=True)
            for name, tables in result["cases"][-1].get("profile", {}).items():
                print("\n".join(f"{name}, {what}\n{text}" for what, text in tables.items()))
            if args.json:
                write_json(args.json, result)
    if args.largest_batch:
        result["largest_batch"] = fitting(args, model, candidates)
        print(
            "largest batch that fits: "
            + ", ".join(f"{name} {count}" for name, count in result["largest_batch"].items())
        )
    if args.json:
        write_json(args.json, result)
    if args.plot:
        draw(result, args.plot)


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of the benchmark, and what is left: flags of the cache, for all policies."""
    parser = Parser(__doc__)
    on_off = dict(type=policy_flags.parse_bool, nargs="?", const=True, metavar="BOOL")
    parser.flag("shape", required=True, metavar="NAME|DIR", help=f"{', '.join(SHAPES)}, or a checkpoint folder")
    parser.flag(
        "random_weights",
        **on_off,
        default=False,
        help="of a folder use the shape alone (a named shape has no other weights)",
    )
    parser.flag("vision_tokens", type=int, nargs="+", default=[2880], metavar="N", help="(2880)")
    parser.flag("text_tokens", type=int, default=70, metavar="T", help="half of them before the image (70)")
    parser.flag("batch", type=int, nargs="+", default=[1], metavar="B", help="(1)")
    parser.flag(
        "policy",
        nargs="+",
        default=["full"],
        metavar="POLICY",
        help="one quoted argument each: NAME, or 'NAME FLAG...', or 'LABEL: NAME FLAG...'; the first is what the others are compared to. Flags of the cache, and --compile, outside hold for all",
    )
    parser.flag(
        "peers",
        nargs="+",
        default=[],
        metavar="NAME[:VARIANT]",
        help="others in the same run, by benchmarks/peer_NAME.py: transformers, transformers:static",
    )
    parser.flag("new_tokens", type=int, default=6, metavar="N", help="decode steps timed in each turn (6)")
    parser.flag("repeats", type=int, default=3, metavar="N", help="turns of each contender (3)")
    parser.flag(
        "prefills",
        type=int,
        default=1,
        metavar="N",
        help="of each contender, in turns; of several the first does not count (1)",
    )
    compile_flags(parser, True)
    parser.flag(
        "largest_batch", **on_off, default=False, help="also find the largest batch that fits the GPU, of each policy"
    )
    parser.flag("profile", **on_off, default=False, help="also where the time of a prefill and of a decode step goes")
    parser.flag("device", default="auto", choices=("auto", "cpu", "cuda"), help="(auto: CUDA where there is one)")
    parser.flag(
        "dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="(auto: the checkpoint's on CUDA, float32 on the CPU)",
    )
    parser.flag("seed", type=int, default=0, help="of weights and prompts (0)")
    parser.flag("json", type=Path, metavar="OUT.json", help="everything measured, with versions and the command")
    parser.flag("plot", type=Path, metavar="OUT.png", help="decode time against vision tokens, or batch size")
    args, flags = parser.parse_known_args(arguments)
    for name, least in (
        ("vision_tokens", 0),
        ("text_tokens", 1),
        ("batch", 1),
        ("new_tokens", 1),
        ("repeats", 1),
        ("prefills", 1),
    ):
        values = getattr(args, name)
        if (low := min(values if isinstance(values, list) else [values])) < least:
            raise UserError(f"--{name} is {low} (expected at least {least})")
    for path in filter(None, (args.json, args.plot)):
        expect_writable(path)
    return args, flags


def compile_flags(parser: Parser, default: bool) -> None:
    parser.flag(
        "compile",
        type=policy_flags.parse_bool,
        nargs="?",
        const=True,
        metavar="BOOL",
        default=default,
        help="torch.compile decode steps and the prefill's blocks (true)",
    )
    parser.flag("no_compile", dest="compile", action="store_false", help="run eagerly")


def candidate(text: str, flags: Sequence[str], seed: int, compiled: bool) -> Candidate:
    """A value of --policy: `NAME FLAG...`, maybe with `LABEL: ` in front."""
    label, colon, described = text.partition(": ")
    words = shlex.split(described if colon else text)
    parser = Parser("")
    policy_flags.add_arguments(parser)
    compile_flags(parser, compiled)
    own = parser.parse_args(["--policy", *words[:1], *flags, *words[1:]])
    return Candidate(label if colon else text, policy_flags.from_args(own, seed), own.compile)


def peer(name: str, folder: Path):
    """What makes the peer `NAME[:VARIANT]` for a model, from peer_NAME.py; None, with a note, if it is not installed."""
    base, _, variant = name.partition(":")
    file = folder / f"peer_{base}.py"
    if not file.is_file():
        raise UserError(f"--peers {name!r}: there is no {file}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        note(f"peer {name} is left out: {error}")
        return None
    if variant not in module.VARIANTS:
        raise UserError(
            f"--peers {name!r}: {base} has no variant {variant!r} (expected one of {', '.join(map(repr, module.VARIANTS))})"
        )
    return lambda label, model: module.Peer(label, model, variant)


def case(
    args: argparse.Namespace, model: Llava, contenders: Sequence[Contender], batch: int, vision: int, copy: float
) -> dict:
    """One batch size and number of vision tokens: what was measured, and what follows from it."""
    prompts = synthetic_prompts(model, batch, vision, args.text_tokens, args.seed)
    peak = PeakMemory(model.lm_head.weight.device)
    started = time.perf_counter()
    for c in contenders:
        if (
            isinstance(c, Ours) and c.compiled
        ):  # its graphs know one sequence a pass from several, and nothing else of the batch
            for rows in {1, min(batch, 2)}:
                c.warm_up(synthetic_prompts(model, rows, min(vision, 64), args.text_tokens, args.seed))
    prefill_warm_up_s = time.perf_counter() - started
    seen = take_turns(
        contenders, prompts, prefills=args.prefills, rounds=args.repeats, steps=args.new_tokens, peak=peak
    )
    rows = [summary(name, found, batch, copy) for name, found in seen.items()]
    for row in rows:
        row["speedup"] = rows[0]["step_ms"] / row["step_ms"]
        row["bytes_allow"] = rows[0]["limit_ms"] / row["limit_ms"]
        row["prefill_speedup"] = rows[0]["prefill_ms"] / row["prefill_ms"]
    found = {
        "batch": batch,
        "vision_tokens": vision,
        "text_tokens": args.text_tokens,
        "prefill_warm_up_s": prefill_warm_up_s,
        "rows": rows,
    }
    if args.profile:
        found["profile"] = {c.name: profiles(c, prompts) for c in contenders if isinstance(c, Ours)}
    return found


def summary(name: str, found: dict, batch: int, copy: float) -> dict:
    """Milliseconds of one contender: medians and spread by kind of step, their mean over steps, and the limit."""
    steps = found.pop("steps")
    decode = {kind: spread(times) for kind, times in steps.items()}
    count = sum(map(len, steps.values()))
    limit = {kind: 1e3 * found["step_bytes"][kind] / copy for kind in steps}

    def mean(by_kind: dict[str, float]) -> float:
        return sum(by_kind[kind] * len(steps[kind]) for kind in steps) / count

    step_ms, limit_ms = mean({kind: numbers["median"] for kind, numbers in decode.items()}), mean(limit)
    return {
        "name": name,
        "prefill_ms": 1e3 * statistics.median(found["prefill_s"]),
        "decode_ms": decode,
        "step_ms": step_ms,
        "tokens_per_s": 1e3 * batch / step_ms,
        "limit_ms": limit_ms,
        "share_of_limit": limit_ms / step_ms,
        "bytes_per_s": mean(found["step_bytes"]) / step_ms * 1e3,
        **found,
    }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds: the median, the first and last quartile, and how many there are."""
    ordered = sorted(1e3 * s for s in seconds)
    low, _, high = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return {"median": statistics.median(ordered), "q1": low, "q3": high, "n": len(ordered)}


def fitting(args: argparse.Namespace, model: Llava, candidates: Sequence[Candidate]) -> dict[str, int]:
    """The largest batch of each policy, at the largest number of vision tokens."""
    vision = max(args.vision_tokens)

    def prompts(batch: int):
        return synthetic_prompts(model, batch, vision, args.text_tokens, args.seed)

    return {c.label: batch_that_fits(model, c.settings, prompts, 64) for c in candidates}


def profiles(contender: Ours, prompts: Prompts) -> dict[str, str]:
    """Where the time of one more prefill, and of one more decode step of each kind, goes: the profiler's tables."""
    with profile() as prefill:
        contender.prefill(prompts, 2 * contender.period)
    tables = {"prefill": described(prefill)}
    for _ in range(contender.period):
        contender.step()
    for _ in range(contender.period):
        with profile() as step:
            kind = contender.step()
        tables[f"{kind} step"] = described(step)
    return tables


def described(measured: profile) -> str:
    by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return measured.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=70)


def machine(device: torch.device) -> dict[str, object]:
    """What it ran on."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return {"device": found.name, "memory": found.total_memory, "cuda": torch.version.cuda}
    return {"device": cpu_name(), "threads": torch.get_num_threads()}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    isa = torch.backends.cpu.get_cpu_capability()
    return f"{named} ({isa})"
