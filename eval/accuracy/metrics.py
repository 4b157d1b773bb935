"""Exact match, the VQA accuracy of TextVQA, and OCRBench's contains-match; each scores one prediction.

Sources: TextVQA is scored by the accuracy of VQA v2 (Goyal et al., CVPR 2017) after the answer normalisation of the
EvalAI server; lmms-eval takes both from Pythia/MMF. OCRBench (Liu et al., 2023) counts an answer as right when it
contains a reference. Where lmms-eval has a quirk that changes scores, it is kept and named here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from eval.accuracy.anls import mean, normalise

_NUMBERS = dict(
    zip(
        ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
        ["0", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"],
    )
)
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'

# A word of this list is recognised with any one of its apostrophes missing. The gaps (she'd, we'd, i'm …) are the
# server's: those spellings are words of their own, or its table misses them by its capitals.
_CONTRACTIONS = [
    "ain't",
    "aren't",
    "can't",
    "could've",
    "couldn't",
    "couldn't've",
    "didn't",
    "doesn't",
    "don't",
    "hadn't",
    "hadn't've",
    "hasn't",
    "haven't",
    "he'd",
    "he'd've",
    "he's",
    "how'd",
    "how'll",
    "how's",
    "isn't",
    "it'd",
    "it'd've",
    "it'll",
    "ma'am",
    "mightn't",
    "mightn't've",
    "might've",
    "mustn't",
    "must've",
    "needn't",
    "not've",
    "o'clock",
    "oughtn't",
    "'ow's'at",
    "shan't",
    "she'd've",
    "should've",
    "shouldn't",
    "shouldn't've",
    "somebody'd've",
    "somebody'll",
    "somebody's",
    "someone'd",
    "someone'd've",
    "someone'll",
    "someone's",
    "something'd",
    "something'd've",
    "something'll",
    "that's",
    "there'd",
    "there'd've",
    "there're",
    "there's",
    "they'd",
    "they'd've",
    "they'll",
    "they're",
    "they've",
    "'twas",
    "wasn't",
    "we'd've",
    "we've",
    "weren't",
    "what'll",
    "what're",
    "what's",
    "what've",
    "when's",
    "where'd",
    "where's",
    "where've",
    "who'd",
    "who'd've",
    "who'll",
    "who's",
    "who've",
    "why'll",
    "why're",
    "why's",
    "won't",
    "would've",
    "wouldn't",
    "wouldn't've",
    "y'all",
    "y'all'll",
    "y'all'd've",
    "you'd",
    "you'd've",
    "you'll",
    "you're",
    "you've",
]
_RESTORED = {word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS for i, c in enumerate(word) if c == "'"}
_RESTORED["somebody'd"] = "somebodyd"  # the server's table has this one entry the wrong way round


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where the prediction equals a reference up to case and white space, else 0.0; NaN without references."""
    if not answers:
        return math.nan
    return float(normalise(prediction) in map(normalise, answers))


def normalise_vqa(text: str) -> str:
    """The answer normalisation of the EvalAI server: case, punctuation, number words, articles, contractions."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.strip().replace("\n", " ").replace("\t", " ").strip()
    before = text
    for mark in _PUNCTUATION:  # next to a space it vanishes, inside a word it parts the word
        apart = mark + " " in before or " " + mark in before
        text = text.replace(mark, "" if apart else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """min(matches / 3, 1) over the other annotators, averaged over leaving out each one; NaN without annotators."""
    prediction = normalise_vqa(prediction)
    agrees = [normalise_vqa(answer) == prediction for answer in answers]
    return mean(min(1.0, (sum(agrees) - agree) / 3) for agree in agrees)


def contains_match(prediction: str, answers: Sequence[str], source: str = "") -> float:
    """OCRBench: 1.0 where the lower-cased prediction contains a reference; NaN without references.

    `source` is the data set the question was taken from. For handwritten formulae ("HME100k") all spaces are dropped
    first and, as in lmms-eval, the reference keeps its case while the prediction does not.
    """
    prediction = prediction.lower().strip().replace("\n", " ")
    references = [answer.strip().replace("\n", " ") for answer in answers]
    if source == "HME100k":
        prediction, references = prediction.replace(" ", ""), [answer.replace(" ", "") for answer in references]
    else:
        references = [answer.lower() for answer in references]
    return float(any(answer in prediction for answer in references)) if references else math.nan
