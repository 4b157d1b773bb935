"""Flags of every command: numbers that are none, wrong words, what is repeated, unknown or contradicts itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from fuzzer.case import Box, Case, Expect
from fuzzer.checkpoints import check_trace, some_answer
from fuzzer.child import Ran
from fuzzer.world import NEXT, QUESTION, eval_flags, run_folder

# For each kind of value: good ones, odd ones (which may be refused), and such as cannot be meant.
_HUGE = ("1000000000000", str(10**25), "9" * 400, "9" * 5000, "-" + "9" * 5000)
_NO_NUMBERS = (
    *(
        "",
        " ",
        "x",
        "nan",
        "inf",
        "-inf",
        "1e999",
        "--",
        "0x10",
        "½",
        "1,5",
        "1 2",
        "None",
        "[1]",
        "²",
        "\udcff",
        "1\n2",
    ),
)
_ODD_TEXTS = (
    *("", " ", "\n", "a b", "'", '"', "a'b", "$(reboot)", "../..", "🙂", "\u202eabc", "\udcff", "%s%n", "{}", "a,b=c"),
    "x" * 100_000,
)
_POLICIES = ("full", "avl", "h2o", "fastv", "streaming", "random")
VALUES: dict[str, tuple[Sequence[str], Sequence[str], Sequence[str]]] = {
    "count": (("1", "2", "4"), ("0", "-1", "٣", "1_0", " 3 ", "+2", *_HUGE), (*_NO_NUMBERS, "1.5", "1e3", "true")),
    "seed": (("0", "1", "12345"), ("-1", *_HUGE), (*_NO_NUMBERS, "0.5")),
    "number": (("0", "0.5", "1"), ("-0.0", "-1", "2", "1e-320", "1e308", "1_0.5", *_HUGE), _NO_NUMBERS),
    "bool": (("true", "false", "1", "no", "YES"), (), ("", "maybe", "2", "ja", "None", "tru", "\udcff")),
    "device": (("auto", "cpu"), ("cuda",), ("", "CPU", "cpu:0", "cuda:7", "tpu", "meta", "\udcff")),
    "dtype": (("auto", "float32", "bfloat16", "float16"), (), ("", "float64", "int8", "Float32", "torch.float32")),
    "policy": (_POLICIES, (), ("", "avl ", "Full", "none", "\udcff", "x" * 5000)),
    "text": (("x",), _ODD_TEXTS, ()),
}
_POLICY_FLAGS = {
    "policy": "policy",
    "vision_adaptive_attention": "bool",
    "vision_adaptive_attention_rate": "number",
    "vision_adaptive_attention_compute_rate": "number",
    "vision_adaptive_attention_update_interval": "count",
    "prefill_filter_flag": "bool",
    "prefill_filter_layer": "count",
    "prefill_filter_rate": "number",
    "text_pruning_flag": "bool",
    "text_pruning_rate": "number",
    "text_init_cache": "count",
    "text_use_h2o": "bool",
    "text_h20_hh_rate_in_cache": "number",
    "compare_text_direct_pruning": "bool",
    "all_use_h2o": "bool",
    "kv_budget": "number",
    "vision_score_window": "count",
}
_MODEL_FLAGS = {"device": "device", "dtype": "dtype", "seed": "seed"}
_JUNK = (
    *(["--nonsense"], ["--"], ["-"], ["stray"], ["@/etc/passwd"], ["--model"], ["--help_"], ["--seed"], ["--policy"]),
    *(["-\udcff"], ["--se", "1"], ["--policy_file"], ["--seed", "1", "--seed", "x"]),
)


@dataclass(frozen=True)
class Command:
    """A command that succeeds with the flags of `base`, and its further flags by kind of value.

    `harmless` flags do not change what it prints.
    """

    name: str
    base: Callable[[Box], list[object]]
    kinds: dict[str, str]
    check: Callable[[Box, Ran], object]
    harmless: frozenset[str] = frozenset()
    first: Sequence[str] = ()  # words that stand before all flags
    weight: int = 1


def make_flags(box: Box) -> Case:
    """One of the commands, with one to four of its flags."""
    command = box.rng.choice([each for each in COMMANDS for _ in range(each.weight)])
    chosen = [_flag(command, box.rng) for _ in range(box.rng.choice((1, 1, 2, 3, 4)))]
    return flags_case(box, command, chosen, mixes=box.rng.random() < 0.1)


def flags_case(box: Box, command: Command, chosen: Sequence[tuple[str, list[str], bool]], mixes: bool = False) -> Case:
    """A command with flags: the name of each, its words, and whether they cannot be meant."""
    words = [word for _, flag_words, _ in chosen for word in flag_words]
    flags = [*command.base(box), *words]
    if mixes and not command.first:
        flags = [*words, *command.base(box)]
    last = {name: is_bad for name, _, is_bad in chosen}  # of a policy that is named twice, the last one counts
    hopeless = any(last.values()) and not mixes
    is_same = all(name in command.harmless for name, _, _ in chosen) and not hopeless

    def check(ran: Ran) -> None:
        command.check(box, ran)
        if is_same:
            assert ran.out == box.clean(command.name, *command.base(box)).out, f"another answer: {ran.out!r}"

    expect = Expect.REFUSAL if hopeless else Expect.EITHER
    return Case(command.name, [*command.first, *flags], expect, outputs=[box.out], check=check)


def with_words(box: Box, command: Command, *words: str, expect: Expect = Expect.EITHER) -> Case:
    """A command with further words at its end."""
    return replace(flags_case(box, command, [("", list(words), False)]), expect=expect)


def _flag(command: Command, rng: Random) -> tuple[str, list[str], bool]:
    """A random flag of a command."""
    if rng.random() < 0.08:
        return "", list(rng.choice(_JUNK)), False
    name = rng.choice(list(command.kinds))
    good, odd, bad = VALUES[command.kinds[name]]
    pool = rng.choice([values for values in (good, good, good, odd, odd, bad) if values])
    value = rng.choice(pool)
    spelled = "--" + (name if rng.random() < 0.7 else name.replace("_", "-"))
    return name, rng.choice(([f"{spelled}={value}"], [spelled, value])), pool is bad and not value.startswith("-")


# The commands


def _generate(box: Box) -> list[object]:
    image = box.shared / "wide.png"
    return ["--model", box.shared / NEXT, "--image", image, "--prompt", QUESTION, "--max_new_tokens", 3]


def _generate_overlay(box: Box) -> list[object]:
    return [*_generate(box), "--overlay", box.out / "overlay.png"]


def _check_overlay(box: Box, ran: Ran) -> None:
    some_answer(ran)
    with Image.open(box.out / "overlay.png") as drawn:
        drawn.load()
        assert drawn.width > 90 and drawn.height > 70


def _trace(box: Box) -> list[object]:
    flags = _generate(box)[:-2]
    return [*flags, "--steps", 3, "--out", box.out / "trace.safetensors"]


def _check_trace(box: Box, ran: Ran) -> None:
    (path,) = box.out.iterdir()
    trace = check_trace(path, 3)
    assert not ran.out and trace["fate"].ndim == 3


def _benchmark(box: Box) -> list[object]:
    flags = ["--shape", box.shared / NEXT, "--no_compile", "--vision_tokens", 20, "--text_tokens", 8]
    return [*flags, "--new_tokens", 1, "--repeats", 1, "--json", box.out / "times.json"]


def _check_benchmark(box: Box, ran: Ran) -> None:
    assert ran.out.count("|") > 20
    assert strict_json(box.out / "times.json")["cases"]


def _attention(box: Box) -> list[object]:
    flags = ["--model", box.shared / NEXT, "--image", box.shared / "wide.png", "--prompt", QUESTION]
    return [*flags, "--max_new_tokens", 3, "--json", box.out / "stats.json"]


def _check_attention(box: Box, ran: Ran) -> None:
    assert "share of attention" in ran.out and strict_json(box.out / "stats.json")["steps"]


def _eval(box: Box) -> list[object]:
    return [*eval_flags(box.shared), "--limit", 2, "--output_path", box.out / "runs"]


def _check_eval(box: Box, ran: Ran) -> None:
    if any(box.out.rglob("*")):  # `--tasks list` writes nothing
        check_runs(box.out / "runs")


def _sweep(box: Box) -> list[object]:
    return [*_eval(box), "--policies", "full", "streaming", "--budgets", "0.5"]


def _check_sweep(box: Box, ran: Ran) -> None:
    check_runs(box.out / "runs")
    assert strict_json(box.out / "runs" / "sweep.json")["cells"]


def _compare(box: Box) -> list[object]:
    return [run_folder(box.shared, "full"), run_folder(box.shared, "streaming")]


def check_runs(folder: Path) -> None:
    """Check that all runs in a folder are complete: every file can be read, and every sample is counted."""
    found = list(folder.glob("*/results.json"))
    assert found, "no results"
    for path in found:
        results = strict_json(path)
        rows = [json.loads(line) for line in path.with_name("samples.jsonl").read_text().splitlines()]
        for task in results["cost"]:
            summary = results["results"][task]
            asked = {row["index"] for row in rows if row["task"] == task}
            counted = summary["n"] + summary["failed"] + summary["unscored"]
            assert counted <= len(asked), f"{counted} samples counted, {len(asked)} in samples.jsonl"


def strict_json(path: Path) -> Any:
    """A JSON file in UTF-8, without NaN and infinity."""

    def refuse(name: str) -> None:
        raise ValueError(f"{path.name} has {name}")

    return json.loads(path.read_bytes().decode(), parse_constant=refuse)


_EVAL_FLAGS = {
    **_MODEL_FLAGS,
    **_POLICY_FLAGS,
    "limit": "number",
    "batch_size": "count",
    "log_samples": "bool",
    "predict_only": "bool",
    "log_samples_suffix": "text",
    "model_args": "text",
    "tasks": "text",
    "num_fewshot": "text",
}
GENERATE = Command(
    "generate.py",
    _generate,
    {**_MODEL_FLAGS, **_POLICY_FLAGS, "temperature": "number", "top_p": "number", "max_new_tokens": "count"}
    | {"stats": "bool", "pad_to_square": "bool", "prompt": "text"},
    lambda box, ran: some_answer(ran),
    frozenset({"device", "seed", "top_p", "stats"}),
    weight=5,
)
OVERLAY = Command(
    "generate.py",
    _generate_overlay,
    {**_POLICY_FLAGS, "overlay_layer": "count", "overlay_step": "count", "stats": "bool"},
    _check_overlay,
    weight=2,
)
TRACE = Command("trace.py", _trace, {**_MODEL_FLAGS, **_POLICY_FLAGS, "prompt": "text"}, _check_trace, weight=4)
BENCHMARK = Command(
    "benchmark.py",
    _benchmark,
    {**_MODEL_FLAGS, "batch": "count", "vision_tokens": "count", "text_tokens": "count", "new_tokens": "count"}
    | {"repeats": "count", "prefills": "count", "policy": "text", "peers": "text", "shape": "text"}
    | {"random_weights": "bool", "largest_batch": "bool", "kv_budget": "number"},
    _check_benchmark,
    weight=4,
)
ATTENTION = Command(
    "attention_stats.py",
    _attention,
    {**_MODEL_FLAGS, "max_new_tokens": "count", "top": "number", "distances": "count", "pages": "count"},
    _check_attention,
    weight=3,
)
EVAL = Command("eval", _eval, _EVAL_FLAGS, _check_eval, weight=5)
SWEEP = Command(
    "eval", _sweep, {**_EVAL_FLAGS, "policies": "policy", "budgets": "number"}, _check_sweep, first=["sweep"]
)
COMPARE = Command("eval", _compare, {"runs": "text"}, lambda box, ran: some_answer(ran), first=["compare"])
COMMANDS = (GENERATE, OVERLAY, TRACE, BENCHMARK, ATTENTION, EVAL, SWEEP, COMPARE)
