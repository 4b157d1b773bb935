"""Held-out exact match and ANLS of a checkpoint by type of answer, through the public API."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from eval.accuracy.anls import anls, mean
from eval.accuracy.metrics import exact_match
from eval.demo.pages import LONG_KINDS, LONGEST_ANSWER, SUFFIX, TYPES, heldout_pairs
from minivlm.generation.generate import Sampling
from minivlm.generation.vlm import VLM, Request

Scores = dict[str, tuple[int, float, float]]


def evaluate(vlm: VLM, pages: int, seed: int, batch_size: int, wrong: Callable[[str], None] | None = None) -> Scores:
    """One question per held-out page -> {type: (questions, exact match, ANLS)}, with "short", "long" and "all".

    Short questions carry the suffix of the DocVQA task, as the evaluator's task `demo` has them: the figures are the
    same. `wrong` is told of every answer that is not exact.
    """
    scores: dict[str, list[tuple[float, float]]] = defaultdict(list)
    pairs = list(heldout_pairs(pages, seed))
    for start in range(0, pages, batch_size):
        part = pairs[start : start + batch_size]
        requests = [Request(q.text + ("" if q.kind in LONG_KINDS else SUFFIX), [page.image]) for page, q in part]
        answers = vlm.ask_batch(requests, sampling=Sampling(max_new_tokens=LONGEST_ANSWER + 1))
        for (_, question), answer in zip(part, answers):
            score = exact_match(answer.text, [question.answer]), anls(answer.text, [question.answer])
            for kind in (question.kind, "long" if question.kind in LONG_KINDS else "short", "all"):
                scores[kind].append(score)
            if wrong and not score[0]:
                wrong(f"{question.kind}: {question.text!r}: {answer.text!r}, right is {question.answer!r}")
    order = (*TYPES, *LONG_KINDS, "short", "long", "all")
    return {
        kind: (len(scores[kind]), mean(s[0] for s in scores[kind]), mean(s[1] for s in scores[kind]))
        for kind in order
        if kind in scores
    }


def table(scores: Scores) -> str:
    """The scores as a Markdown table."""
    rows = [f"| {kind} | {count} | {exact:.3f} | {similar:.3f} |" for kind, (count, exact, similar) in scores.items()]
    return "\n".join(["| answers | questions | exact match | ANLS |", "|---|---|---|---|", *rows])
