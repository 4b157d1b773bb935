"""What a GPU run has to show: targets, and what decides whether measurements meet them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, Mapping[str, Any]]  # by piece: its JSON
WANTED = {
    "batch 1": 0.80,
    "batch 32": 0.70,
    "avl": 0.90,
    "core": 1.15,
    "largest batch": 1.8,
    "transformers": 1.3,
    "transformers, batch 32": 1.0,
}


class NotMeasured(Exception):
    """A piece, or a contender of it, that a target needs is missing."""


@dataclass(frozen=True)
class Judged:
    """Measurements against a target, as the page shows them."""

    measured: str
    limit: str  # what arithmetic allows
    met: bool


@dataclass(frozen=True)
class Target:
    name: str
    wanted: str
    pieces: Sequence[str]  # whose commands made the numbers
    judge: Callable[[Results], Judged]


def share_of_bandwidth(piece: str, least: float) -> Callable[[Results], Judged]:
    """A step of `full` against the time in which the device copies as many bytes."""

    def judge(results: Results) -> Judged:
        row = row_of(results, piece, "full")
        return Judged(f"{row['share_of_limit']:.0%}: {_ms(row)}", _limit(row), row["share_of_limit"] >= least)

    return judge


def allowed_speedup(results: Results) -> Judged:
    """How much of the speedup over `full` that its bytes allow `avl` reaches at batch 32."""
    full, avl = row_of(results, "batch-32", "full"), row_of(results, "batch-32-avl", "avl")
    allowed = _mean_bytes(full) / _mean_bytes(avl)
    reached = full["step_ms"] / avl["step_ms"]
    share = reached / allowed
    return Judged(
        f"{share:.0%}: {reached:.2f} x, {_ms(avl)}", f"{allowed:.2f} x, {_limit(avl)}", share >= WANTED["avl"]
    )


def core_in_proportion(results: Results) -> Judged:
    """What a core step takes beyond one without an image, against the same of `full`: as many times the entries."""
    none, full = row_of(results, "batch-32", "full", case=0), row_of(results, "batch-32", "full")
    avl = row_of(results, "batch-32-avl", "avl")
    if "core" not in avl["decode_ms"]:
        raise NotMeasured
    core_ms, none_ms = avl["decode_ms"]["core"]["median"], none["step_ms"]
    entries = (avl["step_bytes"]["core"] - _mean_bytes(none)) / (_mean_bytes(full) - _mean_bytes(none))
    time = (core_ms - none_ms) / (full["step_ms"] - none_ms)
    limit_ms = avl["limit_ms"] * avl["step_bytes"]["core"] / _mean_bytes(avl)
    return Judged(
        f"{time:.3f} of the time, {time / entries:.2f} x the share of entries; {core_ms:.2f} ms",
        f"{entries:.3f} of the entries; {limit_ms:.2f} ms",
        0 < time <= WANTED["core"] * entries,
    )


def larger_batch(results: Results) -> Judged:
    """The largest batch of `avl` against that of `full`."""
    batches = _of(results, "largest-batch").get("largest_batch")
    if not batches or not batches["full"]:
        raise NotMeasured
    full, avl = (row_of(results, "largest-batch", name) for name in ("full", "avl"))
    ratio, allowed = batches["avl"] / batches["full"], full["live_bytes"] / avl["live_bytes"]
    return Judged(
        f"{ratio:.2f} x: {batches['avl']} and {batches['full']} prompts",
        f"{allowed:.2f} x, by KV held",
        ratio >= WANTED["largest batch"],
    )


def faster_than(piece: str, peer: str, own_piece: str, least: float) -> Callable[[Results], Judged]:
    """A step of `full` against one of a peer."""

    def judge(results: Results) -> Judged:
        ours, theirs = row_of(results, own_piece, "full"), row_of(results, piece, peer)
        ratio = theirs["step_ms"] / ours["step_ms"]
        return Judged(f"{ratio:.2f} x: {_ms(ours)} and {theirs['step_ms']:.2f}", _limit(ours), ratio >= least)

    return judge


def nothing_compiled_again(results: Results) -> Judged:
    """What was compiled or recorded while policies were timed, over all pieces."""
    rows = [
        row
        for result in results.values()
        for case in result.get("cases", [])
        for row in case["rows"]
        if "compiled" in row
    ]
    if not any(row["compiled"] for row in rows):
        raise NotMeasured
    counts: dict[str, int] = {}
    for row in rows:
        for event, count in row["after_warm_up"].items():
            counts[event] = counts.get(event, 0) + count
    again = {event.replace("_", " "): count for event, count in counts.items() if count}
    return Judged(", ".join(f"{event} {count}" for event, count in again.items()) or "none", "none", not again)


def tests_pass(results: Results) -> Judged:
    """The tests on the device; a piece whose tests failed has no JSON."""
    said = _of(results, "tests")["said"]
    return Judged(said, "", "passed" in said and "skipped" not in said)


TARGETS = (
    Target("tests on the device", "all pass", ("tests",), tests_pass),
    Target(
        "batch 1: share of the copy bandwidth",
        f"≥ {WANTED['batch 1']:.0%}",
        ("batch-1",),
        share_of_bandwidth("batch-1", WANTED["batch 1"]),
    ),
    Target(
        "batch 1: against transformers, static and compiled",
        f"≥ {WANTED['transformers']} x",
        ("batch-1-peers",),
        faster_than("batch-1-peers", "transformers:static", "batch-1-peers", WANTED["transformers"]),
    ),
    Target(
        "batch 32: share of the copy bandwidth",
        f"≥ {WANTED['batch 32']:.0%}",
        ("batch-32",),
        share_of_bandwidth("batch-32", WANTED["batch 32"]),
    ),
    Target(
        "batch 32: against transformers",
        f"≥ {WANTED['transformers, batch 32']} x",
        ("batch-32", "batch-32-peers"),
        faster_than("batch-32-peers", "transformers", "batch-32", WANTED["transformers, batch 32"]),
    ),
    Target(
        "batch 32: `avl`, of the speedup that its bytes allow",
        f"≥ {WANTED['avl']:.0%}",
        ("batch-32", "batch-32-avl"),
        allowed_speedup,
    ),
    Target(
        "batch 32: core steps in proportion to entries",
        f"≤ {WANTED['core']} x their share",
        ("batch-32", "batch-32-avl"),
        core_in_proportion,
    ),
    Target("largest batch, `avl` to `full`", f"≥ {WANTED['largest batch']} x", ("largest-batch",), larger_batch),
    Target("compiled or recorded after the warm-up", "none", (), nothing_compiled_again),
)


def row_of(results: Results, piece: str, name: str, case: int = -1) -> Mapping[str, Any]:
    """A contender's row in one of a piece's cases. Raises `NotMeasured` if it is not there."""
    for row in _of(results, piece)["cases"][case]["rows"]:
        if row["name"] == name:
            return row
    raise NotMeasured


def _of(results: Results, piece: str) -> Mapping[str, Any]:
    if piece not in results:
        raise NotMeasured
    return results[piece]


def _mean_bytes(row: Mapping[str, Any]) -> float:
    return row["bytes_per_s"] * row["step_ms"] / 1e3


def _ms(row: Mapping[str, Any]) -> str:
    return f"{row['step_ms']:.2f} ms"


def _limit(row: Mapping[str, Any]) -> str:
    return f"{row['limit_ms']:.2f} ms for {_mean_bytes(row) / 1e9:.1f} GB"
