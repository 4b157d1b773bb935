"""Metrics of one prediction: exact match, TextVQA's accuracy, and OCRBench's contains-match.

TextVQA is scored by the accuracy of VQA v2 (Goyal et al., CVPR 2017) after the answer normalisation
of the EvalAI server; lmms-eval takes both from Pythia/MMF. OCRBench (Liu et al., 2023) counts an
answer as right if it contains a reference. A quirk of lmms-eval that changes scores is kept and
named here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from eval.accuracy.anls import mean, normalise

_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'

# These words are recognised with any one of their apostrophes missing. Some contractions (she'd,
# we'd, i'm, ...) are not in the list because the server does not restore them: without the
# apostrophe they are other words, or its table spells them with capitals.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905 -- as a list it would take a line per word
_RESTORED = {word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS for i, c in enumerate(word) if c == "'"}
_RESTORED["somebody'd"] = "somebodyd"  # the server's table has this one entry the wrong way round


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction equals a reference up to case and white space, else 0.0.

    NaN without references.
    """
    if not answers:
        return math.nan
    return float(normalise(prediction) in map(normalise, answers))


def normalise_vqa(text: str) -> str:
    """Normalise case, punctuation, numbers, articles and contractions as the EvalAI server does."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.strip().replace("\n", " ").replace("\t", " ").strip()
    before = text
    for mark in _PUNCTUATION:  # a mark next to a space is removed; one inside a word splits the word
        apart = mark + " " in before or " " + mark in before
        text = text.replace(mark, "" if apart else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """min(matches / 3, 1), where each annotator is left out in turn and the results are averaged.

    NaN without annotators.
    """
    prediction = normalise_vqa(prediction)
    agrees = [normalise_vqa(answer) == prediction for answer in answers]
    return mean(min(1.0, (sum(agrees) - agree) / 3) for agree in agrees)


def contains_match(prediction: str, answers: Sequence[str], source: str = "") -> float:
    """OCRBench: 1.0 if the prediction contains a reference, else 0.0; NaN without references.

    `source` is the data set from which the question was taken. For handwritten formulae ("HME100k")
    all spaces are removed first. As in lmms-eval, the reference then keeps its case, although the
    prediction does not.
    """
    prediction = prediction.lower().strip().replace("\n", " ")
    references = [answer.strip().replace("\n", " ") for answer in answers]
    if source == "HME100k":
        prediction = prediction.replace(" ", "")
        references = [answer.replace(" ", "") for answer in references]
    else:
        references = [answer.lower() for answer in references]
    return float(any(answer in prediction for answer in references)) if references else math.nan
