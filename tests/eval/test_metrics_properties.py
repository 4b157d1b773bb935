"""What holds for the metrics of any two texts."""

from __future__ import annotations

import math
from random import Random

from hypothesis import example, given
from hypothesis import strategies as st

from eval.accuracy.anls import THRESHOLD, anls, levenshtein, mean, normalise
from eval.accuracy.metrics import contains_match, exact_match, normalise_vqa, vqa_accuracy
from plain_metrics import plain_levenshtein

texts = st.text(max_size=30) | st.text("ab ", max_size=12)  # of few characters, much is equal
references = st.lists(texts, min_size=1, max_size=5)


@given(texts, texts)
def test_the_edit_distance_is_that_of_the_plain_table(a, b):
    assert levenshtein(a, b) == plain_levenshtein(a, b)


@given(texts, texts, texts)
def test_the_edit_distance_is_a_metric(a, b, c):
    assert levenshtein(a, b) == levenshtein(b, a)
    assert (levenshtein(a, b) == 0) == (a == b)
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)
    assert abs(len(a) - len(b)) <= levenshtein(a, b) <= max(len(a), len(b))


@given(texts, references, st.randoms())
@example("ab", ["abcd"], None)  # a half still counts
def test_anls_is_the_best_reference_s(prediction, answers, random):
    score = anls(prediction, answers)
    similar = []
    for answer in answers:
        length = max(len(prediction.upper()), len(answer.upper()))
        distance = plain_levenshtein(normalise(prediction), normalise(answer))
        similar.append(1 - distance / length if length else 1.0)
    assert score == (max(similar) if max(similar) >= THRESHOLD else 0)
    assert score == max(anls(prediction, [answer]) for answer in answers)
    assert score == anls(prediction, (random or Random(0)).sample(answers, len(answers)))
    assert math.isnan(anls(prediction, []))


@given(texts, references)
def test_another_reference_never_lowers_a_score(prediction, answers):
    for score in (anls, exact_match, contains_match):
        assert score(prediction, answers[:1]) <= score(prediction, answers)


@given(texts, references)
def test_an_exact_match_has_the_full_score(prediction, answers):
    if exact_match(prediction, answers):
        assert anls(prediction, answers) == 1
    assert exact_match(answers[0], answers) == contains_match(answers[0], answers) == 1
    assert vqa_accuracy(answers[0], [answers[0]] * 10) == 1
    assert 0 <= vqa_accuracy(prediction, answers) <= 1


@given(texts)
def test_normal_forms_are_stable(text):
    assert normalise(normalise(text)) == normalise(text)
    assert normalise(f" {text}\n\t") == normalise(text)
    assert normalise_vqa(text) == " ".join(normalise_vqa(text).split())


@given(st.lists(st.floats(0, 1) | st.just(math.nan)))
def test_a_mean_leaves_out_what_is_not_scored(scores):
    scored = [score for score in scores if not math.isnan(score)]
    if scored:
        assert min(scored) - 1e-12 <= mean(scores) <= max(scored) + 1e-12
        assert math.isclose(mean(scores), sum(scored) / len(scored), abs_tol=1e-12)
    else:
        assert math.isnan(mean(scores))
