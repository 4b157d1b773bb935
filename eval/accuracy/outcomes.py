"""Outcomes: what is recorded about one sample, answered or failed, and the summary of many."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Annotated

import msgspec
from msgspec import Meta

from eval.accuracy.anls import mean
from minivlm.generation.answers import Stats

Count = Annotated[int, Meta(ge=0, le=1 << 50)]
Amount = Annotated[float, Meta(ge=0, le=1e15)]  # of seconds, tokens, bytes or entries
Score = Annotated[float, Meta(ge=0, le=1)]
CodeHash = Annotated[str, Meta(pattern="^[0-9a-f]{12}$")]
Finish = Annotated[str, Meta(pattern="^(stop|length)$")]
Summary = dict[str, Count | Score]  # a metric's mean and standard error; the counts n, failed and unscored


class Cost(msgspec.Struct, frozen=True):
    """One sample's share of the cost of its batch.

    Shares add up to the cost of the run, whichever batches the samples were in. The three
    exceptions are figures of the whole batch: the two `..._batch_bytes`, and the entries that take
    part in a step of one sequence.
    """

    prefill_s: Amount
    decode_s: Amount
    decoded_tokens: Amount
    prompt_tokens: Amount
    vision_tokens: Amount
    new_tokens: Amount
    kv_bytes: Amount
    kv_full_bytes: Amount
    kv_batch_bytes: Count
    kv_full_batch_bytes: Count
    entries_attended: Amount

    @classmethod
    def share(cls, stats: Stats, samples: int) -> Cost:
        """One sample's share of a batch of `samples`."""
        return cls(
            prefill_s=stats.prefill_s / samples,
            decode_s=stats.decode_s / samples,
            decoded_tokens=stats.decoded_tokens / samples,
            prompt_tokens=stats.prompt_tokens / samples,
            vision_tokens=stats.vision_tokens / samples,
            new_tokens=stats.new_tokens / samples,
            kv_bytes=stats.live_bytes / samples,
            kv_full_bytes=stats.full_bytes / samples,
            kv_batch_bytes=stats.nbytes,
            kv_full_batch_bytes=stats.full_bytes,
            entries_attended=sum(stats.entries_attended_per_step.values()),
        )


class Outcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one sample: one line of samples.jsonl.

    A failed sample has `error` and none of the fields after it. `scores` leaves out metrics that
    need references the sample does not have; it is missing altogether if nothing was to be scored.
    `prompt`, `answers` and `token_ids` are recorded on request.
    """

    task: str
    id: int | str
    index: Count  # the sample's place in the whole data set
    types: list[str]  # the question's types
    code: CodeHash  # what answered it, see `eval.accuracy.run_code`
    error: str | None = None
    prediction: str | None = None
    finish: Finish | None = None  # why the answer ended
    scores: dict[str, Score] | None = None
    prompt: str | None = None
    answers: list[str] | None = None
    token_ids: list[Count] | None = None
    cost: Cost | None = None

    @property
    def key(self) -> tuple[str, int]:
        """The sample: its task and its index."""
        return self.task, self.index

    @property
    def answered(self) -> bool:
        return self.error is None


def summarise(outcomes: Iterable[Outcome]) -> Summary:
    """Return means and standard errors, and the numbers of scored, failed and unscored samples.

    A sample is unscored if it was answered but has no references, or if nothing was to be scored.
    """
    outcomes = list(outcomes)
    scored = [outcome.scores for outcome in outcomes if outcome.scores]
    summary: Summary = {}
    for metric in dict.fromkeys(name for scores in scored for name in scores):
        values = [scores[metric] for scores in scored if metric in scores]
        summary[metric] = mean(values)
        summary[f"{metric}_stderr"] = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    summary["n"] = len(scored)
    summary["failed"] = sum(not outcome.answered for outcome in outcomes)
    summary["unscored"] = len(outcomes) - summary["n"] - summary["failed"]
    return summary


def summarise_by_type(outcomes: Iterable[Outcome]) -> dict[str, Summary]:
    """Return `summarise` for each question type, by name. A question may have several types."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        for question_type in outcome.types:
            groups.setdefault(question_type, []).append(outcome)
    return {question_type: summarise(groups[question_type]) for question_type in sorted(groups)}


def metrics_in(summary: Summary) -> list[str]:
    """The names of the metrics in a summary: those that have a standard error."""
    return [name for name in summary if f"{name}_stderr" in summary]
