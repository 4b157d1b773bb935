"""ANLS, the metric of DocVQA and InfographicVQA (Biten et al., ICCV 2019).

Against one reference, a prediction scores 1 - d / l. Here d is the edit distance after stripping,
lower-casing and collapsing white space, and l is the longer of the two lengths *before* that: stray
white space costs nothing but counts in the length. The best reference decides, and only then is a
score below 0.5 set to 0. Applying the threshold to each reference first, or averaging over
references, would give other numbers. This is the order of lmms-eval, with whose figures these
should be comparable; as there, the lengths are those of the upper-cased strings, which matters for
"ß" and "ﬁ".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

THRESHOLD = 0.5


def normalise(text: str) -> str:
    """Strip, lower-case and collapse white space, as before every comparison of strings."""
    return " ".join(text.lower().split())


def levenshtein(a: str, b: str) -> int:
    """Edit distance (insertions, deletions, substitutions) between two strings.

    This is Myers' bit-vector algorithm (J. ACM 46, 1999) in Hyyrö's form for the distance of whole
    strings. A column of the dynamic programme is stored as two bit sets, its steps of +1 and its
    steps of -1, in Python's unbounded integers. The loop makes one pass over the shorter string, so
    two pages of text take milliseconds.
    """
    if len(a) < len(b):
        a, b = b, a
    if not b:
        return len(a)
    occurs: dict[str, int] = {}
    for i, character in enumerate(a):
        occurs[character] = occurs.get(character, 0) | 1 << i
    every, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down = every, 0  # vertical steps of +1 and of -1
    distance = len(a)  # the column's last value
    for character in b:
        match = occurs.get(character, 0)
        diagonal = (((match & up) + up) ^ up) | match | down
        right_up = down | ~(diagonal | up) & every
        right_down = up & diagonal
        distance += bool(right_up & last) - bool(right_down & last)
        right_up, right_down = right_up << 1 | 1, right_down << 1
        up = (right_down | ~(diagonal | right_up)) & every
        down = right_up & diagonal & every
    return distance


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Similarity of a prediction to its best reference, 0 or in [0.5, 1].

    NaN (unscored) without references.
    """
    best = math.nan
    for answer in answers:
        length = max(len(prediction.upper()), len(answer.upper()))
        similarity = 1 - levenshtein(normalise(prediction), normalise(answer)) / length if length else 1.0
        best = similarity if math.isnan(best) else max(best, similarity)
    return 0.0 if best < THRESHOLD else best


def mean(scores: Iterable[float]) -> float:
    """Mean of the scores that are not NaN; NaN if there are none."""
    scored = [score for score in scores if not math.isnan(score)]
    return math.fsum(scored) / len(scored) if scored else math.nan


def corpus_anls(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Mean ANLS over the questions that have references.

    Raises ValueError if the two lengths differ.
    """
    return mean(anls(prediction, references) for prediction, references in zip(predictions, answers, strict=True))
