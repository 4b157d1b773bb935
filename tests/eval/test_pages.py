"""The demo's pages: seeds, held-out values, and every type of question."""

import json
import random
import re
from collections import Counter

import pytest
from PIL import Image, ImageChops

from eval.accuracy.data import read_docvqa_json
from eval.demo import pages
from eval.demo.page_values import SPLITS, TYPES, draw_value, split_of
from minivlm.model import anyres

PINPOINTS = ((112, 224), (224, 112), (224, 224))


def sheets(split, count, seed=0):
    rng = random.Random(seed)
    return [pages.draw_page(rng, split) for _ in range(count)]


def test_pages_follow_from_the_seed():
    one, same, other = sheets("train", 20), sheets("train", 20), sheets("train", 20, seed=1)
    assert [(p.lines, p.fields, p.image.tobytes()) for p in one] == [
        (p.lines, p.fields, p.image.tobytes()) for p in same
    ]
    assert [p.lines for p in one] != [p.lines for p in other]


@pytest.mark.parametrize("kind", TYPES)
def test_values_of_the_two_splits_are_disjoint(kind):
    rng = random.Random(kind)
    drawn = {split: {draw_value(rng, kind, split, 18) for _ in range(1500)} for split in SPLITS}
    assert not drawn["train"] & drawn["heldout"]
    # words and names do not even share a word, initials and titles apart
    parts = {
        split: {word.lower() for value in values for word in re.findall(r"[A-Za-z]{2,}(?!\.)\b", value)}
        for split, values in drawn.items()
    }
    if kind in ("word", "name"):
        assert not parts["train"] & parts["heldout"]
    else:
        assert all(split_of(value) == split for split, values in drawn.items() for value in values)


def test_values_have_natural_lengths():
    rng = random.Random(0)
    for kind, (shortest, longest) in dict(
        number=(1, 11), date=(10, 17), amount=(4, 14), code=(5, 9), word=(3, 17), name=(6, 18)
    ).items():
        lengths = sorted(len(draw_value(rng, kind, "heldout", 18)) for _ in range(500))
        assert shortest <= lengths[5] and lengths[-6] <= longest, kind
        assert lengths[5] < lengths[-6], kind


def test_every_type_is_at_least_a_tenth_and_every_long_type_is_asked():
    kinds = Counter(question.type for _, question in pages.heldout_pairs(300, seed=3))
    assert all(kinds[kind] >= 30 for kind in TYPES)
    assert all(kinds[kind] > 0 for kind in pages.LONG_TYPES)
    assert 0.05 < sum(kinds[kind] for kind in pages.LONG_TYPES) / 300 < 0.15
    assert kinds == Counter(question.type for _, question in pages.heldout_pairs(300, seed=3))


def test_answers_stand_where_their_cells_say():
    rng = random.Random(5)
    for page in sheets("heldout", 40, seed=5):
        canvas = {(row, column + i): c for row, column, text in page.lines for i, c in enumerate(text)}
        questions = [pages.short_question(rng, field) for field in page.fields]
        questions += filter(None, [pages.long_question(rng, page, kind) for kind in pages.LONG_TYPES])
        for question in questions:
            assert len(question.cells) == len(question.answer)
            for cell, character in zip(question.cells, question.answer, strict=True):
                assert cell is None or canvas[cell] == character
            if question.type in pages.LONG_TYPES:
                assert 40 <= len(question.answer) <= pages.LONGEST_ANSWER
            else:
                assert any(f.value == question.answer and f.name.lower() in question.text.lower() for f in page.fields)


def test_text_is_on_the_page_and_nowhere_is_it_drawn_twice():
    rng = random.Random(6)
    for page in (pages.draw_page(rng, "train", size) for size in set(pages.SIZES) for _ in range(5)):
        width, height = page.image.size
        cells = [(row, column + i) for row, column, text in page.lines for i in range(len(text))]
        assert len(cells) == len(set(cells))
        assert all(0 <= row < height // pages.CELL_H and 0 <= column < width // pages.CELL_W for row, column in cells)
        assert len({field.name for field in page.fields}) == len(page.fields) >= 2
        grey = page.image.convert("L")
        for row, column, text in page.lines:  # ink differs from the paper wherever text should be
            for i, character in enumerate(text):
                if character.isalnum():
                    x, y = (column + i) * pages.CELL_W, row * pages.CELL_H
                    low, high = grey.crop((x, y, x + pages.CELL_W, y + pages.CELL_H)).getextrema()
                    assert high - low > 25


def test_sizes_use_every_pinpoint_and_unpadding_without_rescaling():
    used, cut = set(), 0
    for size in set(pages.SIZES):
        target = anyres.best_resolution(size, PINPOINTS)
        used.add(target)
        assert anyres.fitted_size(size, target) == size
        top, left = anyres.padding_before(size, target)
        assert top % pages.CELL_H == 0 and left % pages.CELL_W == 0
        grid = target[0] // 16, target[1] // 16
        cut += anyres.unpadded_box(size, grid) != (0, grid[0], 0, grid[1])
    assert used == set(PINPOINTS) and cut >= 5


def test_docvqa_layout(tmp_path):
    path = pages.write_docvqa(tmp_path / "set", 12, seed=2)
    content = json.loads(path.read_text())
    assert set(content) == {"dataset_name", "dataset_version", "dataset_split", "data"}
    assert content["dataset_split"] == "val" and len(content["data"]) == 12
    for record, (page, question) in zip(content["data"], pages.heldout_pairs(12, seed=2), strict=True):
        assert {"questionId", "question", "image", "docId", "answers"} <= set(record)
        assert record["question"] == question.text and record["answers"] == [question.answer]
        with Image.open(path.parent / record["image"]) as image:
            assert ImageChops.difference(image, page.image).getbbox() is None
    dataset = read_docvqa_json(path, "validation")
    assert [s.answers[0] for s in dataset.samples] == [r["answers"][0] for r in content["data"]]
    with Image.open(path.parent / content["data"][3]["image"]) as image:
        assert dataset.image(3).size == image.size
