"""Held-out exact match and ANLS of a checkpoint by type of answer, through the public API."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from eval.accuracy.anls import anls, mean
from eval.accuracy.metrics import exact_match
from eval.demo.pages import LONG_TYPES, LONGEST_ANSWER, SUFFIX, TYPES, heldout_pairs
from minivlm.generation.answers import Request
from minivlm.generation.sampling import Sampling
from minivlm.generation.vlm import VLM

Scores = dict[str, tuple[int, float, float]]  # by type: number of questions, exact match, ANLS


def score_by_type(
    vlm: VLM,
    pages: int,
    seed: int,
    batch_size: int,
    report_wrong: Callable[[str], None] | None = None,
) -> Scores:
    """Ask one question about each held-out page.

    Besides its type, a question counts as "short" or "long", and "all".

    Short questions have the suffix of the DocVQA task, as in the evaluator's task `demo`, so that
    the figures are the same. `report_wrong` receives a line for every answer that is not exact.
    """
    scores: dict[str, list[tuple[float, float]]] = defaultdict(list)
    pairs = list(heldout_pairs(pages, seed))
    for start in range(0, pages, batch_size):
        batch = pairs[start : start + batch_size]
        requests = [Request(q.text + ("" if q.type in LONG_TYPES else SUFFIX), [page.image]) for page, q in batch]
        answers = vlm.ask_batch(requests, sampling=Sampling(max_new_tokens=LONGEST_ANSWER + 1))
        for (_, question), answer in zip(batch, answers, strict=True):
            score = (
                exact_match(answer.text, [question.answer]),
                anls(answer.text, [question.answer]),
            )
            for name in (question.type, "long" if question.type in LONG_TYPES else "short", "all"):
                scores[name].append(score)
            if report_wrong and not score[0]:
                report_wrong(f"{question.type}: {question.text!r}: {answer.text!r}, right is {question.answer!r}")
    order = (*TYPES, *LONG_TYPES, "short", "long", "all")
    return {
        name: (
            len(scores[name]),
            mean(exact for exact, _ in scores[name]),
            mean(near for _, near in scores[name]),
        )
        for name in order
        if name in scores
    }


def score_table(scores: Scores) -> str:
    """The scores as a Markdown table."""
    lines = [f"| {name} | {count} | {exact:.3f} | {near:.3f} |" for name, (count, exact, near) in scores.items()]
    return "\n".join(["| answers | questions | exact match | ANLS |", "|---|---|---|---|", *lines])
