"""How fast KV policies prefill and decode on a shape, and how far from the device's limit.

    python scripts/benchmark.py --shape cpu-268m --policy full avl --batch 1 8 --dtype bfloat16
    python scripts/benchmark.py --shape llava-v1.6-vicuna-7b --dtype bfloat16 --vision_tokens 2880 --batch 1 8 32 \\
        --policy full avl --peers transformers:static --json OUT.json --plot OUT.png

For every batch size and number of vision tokens, all policies and peers run in one process and take
turns. The bandwidth of the device is measured first, so that every decode time can be compared to
the time that only reading the step's bytes would take.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

from eval.json_files import write_json
from eval.speed.benchmark_flags import Candidate, parse_benchmark, parse_candidate
from eval.speed.contenders import Contender, PolicyContender, decoder_bytes
from eval.speed.machine import PeakMemory, bandwidth, describe_machine
from eval.speed.report import case_table, draw_decode_times
from eval.speed.shapes import Prompts, make_model, synthetic_prompts
from eval.speed.timing import batch_that_fits, steps_needed, take_turns
from minivlm.app.cli import note
from minivlm.errors import UserError
from minivlm.generation.compile import compiled_blocks, missing_compiler
from minivlm.model.llava import Llava

PeerMaker = Callable[[str, Llava], Contender]


def run_benchmark(arguments: Sequence[str]) -> None:
    """Measure what the flags ask for."""
    args, cache_flags = parse_benchmark(arguments, __doc__)
    candidates = [parse_candidate(text, cache_flags, args.seed, args.compile) for text in args.policy]
    _refuse_repeated_labels([candidate.label for candidate in candidates] + args.peers)
    peers = {name: find_peer(name) for name in args.peers}
    if not candidates and not any(peers.values()):
        raise UserError("there is nothing to time (expected a policy, or a peer that is installed)")
    model = make_model(args.shape, args.device, args.dtype, args.seed, args.random_weights)
    device = model.lm_head.weight.device
    if args.largest_batch and device.type != "cuda":
        raise UserError("--largest_batch needs a GPU: a CPU starts swapping long before it runs out of memory")
    if any(candidate.compiled for candidate in candidates) and (missing := missing_compiler(device)):
        note(f"everything runs eagerly: {missing}")
        candidates = [replace(candidate, compiled=False) for candidate in candidates]
    models = {False: model}
    if any(candidate.compiled for candidate in candidates):
        models[True] = compiled_blocks(model)
        torch._inductor.config.cpp.enable_kernel_profile = args.profile
    result = _describe_run(args, arguments, model)
    for batch in args.batch:
        for vision_tokens in args.vision_tokens:
            contenders: list[Contender] = [
                PolicyContender(c.label, models[c.compiled], c.settings, c.compiled) for c in candidates
            ]
            contenders += [make_peer(name, model) for name, make_peer in peers.items() if make_peer is not None]
            case = measure_case(args, model, contenders, batch, vision_tokens, result["bandwidth"]["copy"])
            result["cases"].append(case)
            if args.json:
                write_json(args.json, result)
            print(case_table(case), flush=True)
            for name, tables in case.get("profile", {}).items():
                print("\n".join(f"{name}, {part}\n{text}" for part, text in tables.items()))
    if args.largest_batch:
        result["largest_batch"] = largest_batches(args, model, candidates)
        counts = ", ".join(f"{name} {count}" for name, count in result["largest_batch"].items())
        print(f"largest batch that fits: {counts}")
        if args.json:
            write_json(args.json, result)
    if args.plot:
        draw_decode_times(result, args.plot)


def _refuse_repeated_labels(labels: Sequence[str]) -> None:
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(
                f"{label!r} is there twice (expected one name each; `LABEL: POLICY FLAG...` gives a policy another)"
            )


def find_peer(name: str) -> PeerMaker | None:
    """Return what makes the peer `NAME[:VARIANT]` for a model, from peer_NAME.py.

    Returns None, with a note, if a package that it needs is not installed. Raises `UserError` for
    an unknown name.
    """
    base, _, variant = name.partition(":")
    file = Path(__file__).parent / f"peer_{base}.py"
    if not base.isidentifier() or not file.is_file():
        raise UserError(f"--peers {name!r}: there is no eval/speed/peer_{base}.py")
    try:
        module = importlib.import_module(f"eval.speed.{file.stem}")
    except ImportError as error:
        note(f"peer {name} is left out: {error}")
        return None
    if variant not in module.VARIANTS:
        variants = ", ".join(map(repr, module.VARIANTS))
        raise UserError(f"--peers {name!r}: {base} has no variant {variant!r} (expected one of {variants})")
    return lambda label, model: module.Peer(label, model, variant)


def _describe_run(args: argparse.Namespace, arguments: Sequence[str], model: Llava) -> dict[str, Any]:
    """What holds for all cases."""
    weight = model.lm_head.weight
    return {
        "command": shlex.join(["python", "scripts/benchmark.py", *arguments]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": describe_machine(weight.device),
        "bandwidth": bandwidth(weight.device),
        "shape": args.shape,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "decoder_bytes": decoder_bytes(model),
        "cases": [],
    }


def measure_case(
    args: argparse.Namespace,
    model: Llava,
    contenders: Sequence[Contender],
    batch: int,
    vision_tokens: int,
    copy_bandwidth: float,
) -> dict[str, Any]:
    """Time all contenders at one batch size and number of vision tokens.

    `copy_bandwidth` is in bytes per second.
    """
    prompt, context = vision_tokens + args.text_tokens, model.config.text.context_length
    steps = max(steps_needed(contender, args.repeats, args.new_tokens) for contender in contenders)
    if prompt + steps > context:
        raise UserError(f"{prompt} prompt tokens and {steps} steps exceed the model's context of {context}")
    prompts = synthetic_prompts(model, batch, vision_tokens, args.text_tokens, args.seed)
    policies = [contender for contender in contenders if isinstance(contender, PolicyContender)]
    # The graphs of a prefill tell one sequence from several, and know nothing else of the batch.
    short_prompts = [
        synthetic_prompts(model, sequences, min(vision_tokens, 64), args.text_tokens, args.seed)
        for sequences in {1, min(batch, 2)}
    ]
    warm_up_s = _compile_prefills(policies, short_prompts)
    measured = take_turns(
        contenders,
        prompts,
        prefills=args.prefills,
        rounds=args.repeats,
        steps=args.new_tokens,
        peak=PeakMemory(model.lm_head.weight.device),
    )
    summaries = [contender_summary(name, facts, batch, copy_bandwidth) for name, facts in measured.items()]
    first = summaries[0]
    for summary in summaries:
        summary["speedup"] = first["step_ms"] / summary["step_ms"]
        summary["bytes_allow"] = first["limit_ms"] / summary["limit_ms"]
        summary["prefill_speedup"] = first["prefill_ms"] / summary["prefill_ms"]
    case = {
        "batch": batch,
        "vision_tokens": vision_tokens,
        "text_tokens": args.text_tokens,
        "prefill_warm_up_s": warm_up_s,
        "rows": summaries,
    }
    if args.profile:
        case["profile"] = {contender.name: profile_tables(contender, prompts) for contender in policies}
    return case


def _compile_prefills(contenders: Sequence[PolicyContender], short_prompts: Sequence[Prompts]) -> float:
    """Warm up the prefills of the compiled contenders; returns the seconds that it took."""
    started = time.perf_counter()
    for contender in contenders:
        if contender.compiled:
            for prompts in short_prompts:
                contender.warm_up(prompts)
    return time.perf_counter() - started


def contender_summary(name: str, measured: Mapping[str, Any], batch: int, copy_bandwidth: float) -> dict[str, Any]:
    """Summarise what `take_turns` measured of one contender.

    Times are in milliseconds: medians and spread by kind of step, their mean over steps, and the
    limit, which is the time that reading the step's bytes takes at `copy_bandwidth` bytes per
    second.
    """
    steps: Mapping[str, Sequence[float]] = measured["steps"]
    count = sum(map(len, steps.values()))

    def mean_over_steps(by_kind: Mapping[str, float]) -> float:
        return sum(by_kind[step_kind] * len(seconds) for step_kind, seconds in steps.items()) / count

    decode_ms = {step_kind: spread_ms(seconds) for step_kind, seconds in steps.items()}
    step_ms = mean_over_steps({step_kind: spread["median"] for step_kind, spread in decode_ms.items()})
    step_bytes = mean_over_steps(measured["step_bytes"])
    limit_ms = 1e3 * step_bytes / copy_bandwidth
    return {
        "name": name,
        "prefill_ms": 1e3 * statistics.median(measured["prefill_s"]),
        "decode_ms": decode_ms,
        "step_ms": step_ms,
        "tokens_per_s": 1e3 * batch / step_ms,
        "limit_ms": limit_ms,
        "share_of_limit": limit_ms / step_ms,
        "bytes_per_s": step_bytes / step_ms * 1e3,
        **{key: value for key, value in measured.items() if key != "steps"},
    }


def spread_ms(seconds: Sequence[float]) -> dict[str, float]:
    """The median and the outer quartiles in milliseconds, and the number of measurements."""
    ordered = sorted(1e3 * s for s in seconds)
    median = statistics.median(ordered)
    low, high = median, median
    if len(ordered) > 1:
        low, _, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return {"median": median, "q1": low, "q3": high, "n": len(ordered)}


def largest_batches(args: argparse.Namespace, model: Llava, candidates: Sequence[Candidate]) -> dict[str, int]:
    """Each policy's largest batch that fits the GPU, at the largest number of vision tokens."""

    def prompts_of(batch: int) -> Prompts:
        return synthetic_prompts(model, batch, max(args.vision_tokens), args.text_tokens, args.seed)

    return {c.label: batch_that_fits(model, c.settings, prompts_of, new_tokens=64) for c in candidates}


def profile_tables(contender: PolicyContender, prompts: Prompts) -> dict[str, str]:
    """The profiler's tables for one more prefill, and one more decode step of each kind."""
    with profile() as prefill:
        contender.prefill(prompts, 2 * contender.period)
    tables = {"prefill": _table_of(prefill)}
    for _ in range(contender.period):
        contender.step()
    for _ in range(contender.period):
        with profile() as step:
            step_kind = contender.step()
        tables[f"{step_kind} step"] = _table_of(step)
    return tables


def _table_of(measured: profile) -> str:
    by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return measured.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=70)
