"""Outcomes: what is recorded about one sample, answered or failed, and the summary of many."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import TypedDict

from eval.accuracy.anls import mean
from minivlm.generation.answers import Stats


class _Identified(TypedDict):
    task: str
    id: int | str
    index: int  # the sample's place in the whole data set
    types: Sequence[str]  # the question's types


class Outcome(_Identified, total=False):
    """What became of one sample: one line of samples.jsonl.

    A failed sample has `error` and none of the fields after it. `scores` leaves out metrics that
    need references the sample does not have; it is missing altogether if nothing was to be scored.
    `prompt`, `answers` and `token_ids` are recorded on request.
    """

    error: str
    prediction: str
    finish: str  # why the answer ended: "stop" or "length"
    scores: dict[str, float]
    prompt: str
    answers: Sequence[str]
    token_ids: list[int]
    cost: dict[str, float]  # see `cost_share`


def cost_share(stats: Stats, samples: int) -> dict[str, float]:
    """Return one sample's share of the cost of a batch of `samples`.

    Shares add up to the cost of the run, whichever batches the samples were in. The three
    exceptions are figures of the whole batch: the two `..._batch_bytes`, and the entries that take
    part in a step of one sequence.
    """
    return {
        "prefill_s": stats.prefill_s / samples,
        "decode_s": stats.decode_s / samples,
        "decoded_tokens": stats.decoded_tokens / samples,
        "prompt_tokens": stats.prompt_tokens / samples,
        "vision_tokens": stats.vision_tokens / samples,
        "new_tokens": stats.new_tokens / samples,
        "kv_bytes": stats.live_bytes / samples,
        "kv_full_bytes": stats.full_bytes / samples,
        "kv_batch_bytes": stats.nbytes,
        "kv_full_batch_bytes": stats.full_bytes,
        "entries_attended": sum(stats.entries_attended_per_step.values()),
    }


def summarise(outcomes: Iterable[Outcome]) -> dict[str, float]:
    """Return means and standard errors, and the numbers of scored, failed and unscored samples.

    A sample is unscored if it was answered but has no references, or if nothing was to be scored.
    """
    outcomes = list(outcomes)
    summary: dict[str, float] = {}
    for metric in dict.fromkeys(name for outcome in outcomes for name in outcome.get("scores", ())):
        scores = [outcome["scores"][metric] for outcome in outcomes if metric in outcome.get("scores", ())]
        summary[metric] = mean(scores)
        summary[f"{metric}_stderr"] = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
    summary["n"] = sum(bool(outcome.get("scores")) for outcome in outcomes)
    summary["failed"] = sum("error" in outcome for outcome in outcomes)
    summary["unscored"] = len(outcomes) - summary["n"] - summary["failed"]
    return summary


def summarise_by_type(outcomes: Iterable[Outcome]) -> dict[str, dict[str, float]]:
    """Return `summarise` for each question type, by name. A question may have several types."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        for question_type in outcome["types"]:
            groups.setdefault(question_type, []).append(outcome)
    return {question_type: summarise(groups[question_type]) for question_type in sorted(groups)}


def metrics_in(summary: dict[str, float]) -> list[str]:
    """The names of the metrics in a summary: those that have a standard error."""
    return [name for name in summary if f"{name}_stderr" in summary]
