"""The demo's data set: small business pages drawn by code, with questions about them.

A page is typed like a receipt: each character fills a cell of 8 x 16 pixels, with glyphs of
Pillow's own font squeezed into the cell. Page sizes are chosen so that LLaVA-NeXT's scaling is
exactly 1 for the demo's pinpoints (112 x 224, 224 x 112, 224 x 224), and so that its centred
padding moves the text by whole cells. All randomness comes from one `random.Random`.

`python -m eval.demo.pages --out DIR --pages N --seed S` writes a held-out set in the official
DocVQA layout.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont

from eval.demo.page_values import TYPES, draw_value
from minivlm.files import write_whole

CELL_W, CELL_H = 8, 16
CHARACTERS = "".join(map(chr, range(33, 127)))

FIELDS = {
    "number": ("Quantity", "Weight", "Page count", "Age", "Seats", "Room", "Distance", "Score"),
    "date": ("Date", "Due date", "Birth date", "Issue date", "Expiry date", "Ship date", "Arrival", "Start date"),
    "amount": ("Total", "Tax", "Price", "Balance", "Discount", "Deposit", "Fee", "Subtotal"),
    "code": ("Invoice no", "Order no", "Serial no", "Batch", "Ticket", "Tracking", "Account", "Reference"),
    "word": ("Colour", "Product", "City", "Material", "Subject", "Project", "Street", "Brand"),
    "name": ("Name", "Customer", "Seller", "Author", "Manager", "Doctor", "Teacher", "Owner"),
}
FIELD_TYPES = {name: value_type for value_type in TYPES for name in FIELDS[value_type]}
FIELD_NAMES = tuple(FIELD_TYPES)
TITLES = (
    "INVOICE", "RECEIPT", "Delivery note", "Order form", "REPORT", "Record",
    "Work order", "Summary", "TICKET", "Statement", "MEMO", "Booking",
)  # fmt: skip

SHORT_PHRASINGS = (
    "What is the {}?",
    "What is the {}?",
    "what is the {}",
    "What is the value of {}?",
    "What does the {} field say?",
    "Read the {}.",
    "{}?",
    "Which {} is shown?",
    "Tell me the {}.",
    "please give the {}",
    "can you read the {}?",
    "What {} is on the page?",
    "Find the {}.",
)
LONG_PHRASINGS = {
    "transcribe": (
        "Transcribe the page.",
        "transcribe the page",
        "Read the whole page.",
        "What is written on the page?",
        "Write down all the text.",
    ),
    "fields": (
        "List all fields.",
        "list all fields",
        "Which fields are on the page?",
        "Name every field of the page.",
        "What fields does the page have?",
    ),
    "values": (
        "List all values.",
        "list all values",
        "Read every value on the page.",
        "What are all the values?",
        "Give the values of all fields.",
    ),
}
LONG_TYPES = tuple(LONG_PHRASINGS)
SUFFIX = "\nAnswer the question using a single word or phrase."  # appended by the DocVQA task too
LONGEST_ANSWER = 150  # characters; a long answer has at least 40

# Page sizes (height, width), some more likely than others. Each is scaled by 1 and padded by whole
# cells; together they use every pinpoint, with and without unpadding.
SIZES = (
    [(224, 224)] * 6
    + [(192, 224), (160, 224), (128, 224), (224, 208), (224, 192), (224, 176), (192, 224)]
    + [(112, 224)] * 3
    + [(112, 208), (112, 192), (80, 224)]
    + [(224, 112)] * 3
    + [(192, 112), (160, 112)]
)


@dataclass(frozen=True)
class Field:
    """A field of a page: its name, its value and the value's type and first cell."""

    name: str
    type: str
    value: str
    row: int
    column: int


@dataclass(frozen=True)
class Page:
    """A drawn page: `lines` are (row, column, text) in reading order, counted in cells."""

    image: Image.Image
    lines: tuple[tuple[int, int, str], ...]
    fields: tuple[Field, ...]


@dataclass(frozen=True)
class Question:
    """A question about a page, with its answer.

    `type` is a value type or one of LONG_TYPES. `cells` has the (row, column) of each character of
    the answer that is on the page, and None for separators.
    """

    text: str
    answer: str
    type: str
    cells: tuple[tuple[int, int] | None, ...] = field(repr=False)


@functools.cache
def _glyph(character: str, size: int, bold: bool) -> Image.Image:
    """An 8 x 16 mask ("L") of a character, drawn four times as large and squeezed."""
    font = ImageFont.load_default(size=4 * size)
    left, _, right, _ = font.getbbox(character)
    ink = max(right - left, 1)
    cell = Image.new("L", (int(max(ink, 4 * (CELL_W - 1))) + 4, 4 * CELL_H))
    ImageDraw.Draw(cell).text(
        ((cell.width - ink) / 2 - left, 4 * 12),
        character,
        fill=255,
        font=font,
        anchor="ls",
        stroke_width=1 if bold else 0,
    )
    return cell.resize((CELL_W, CELL_H), Image.Resampling.BOX)


def _draw_image(rng: random.Random, size: tuple[int, int], lines: Sequence[tuple[int, int, str]]) -> Image.Image:
    """The picture of a page.

    The order of the random draws is fixed: seeds must keep giving the same pages.
    """
    height, width = size
    paper = rng.randint(205, 255)
    tint = [max(0, paper - rng.randint(0, 22)) for _ in range(3)]
    ink = [rng.randint(0, 90) for _ in range(3)]
    if rng.random() < 0.1:  # white on dark, like a display
        tint, ink = ink, tint
    image = Image.new("RGB", (width, height), tuple(tint))
    canvas = ImageDraw.Draw(image)
    glyph_size, bold = rng.choice((12, 13, 13, 14)), rng.random() < 0.4
    dx, dy = rng.choice((0, 0, 0, 1)), rng.choice((0, 0, 1, -1))
    faint = tuple((2 * t + i) // 3 for t, i in zip(tint, ink, strict=True))
    if rng.random() < 0.3:  # a rule under some line
        y = (rng.choice(lines)[0] + 1) * CELL_H - 1
        canvas.line((4, y, width - 5, y), fill=faint)
    if rng.random() < 0.15:
        canvas.rectangle((2, 1, width - 3, height - 2), outline=faint)
    for row, column, text in lines:
        for i, character in enumerate(text):
            if character != " ":
                corner = ((column + i) * CELL_W + dx, row * CELL_H + dy)
                image.paste(tuple(ink), corner, _glyph(character, glyph_size, bold))
    if strength := rng.choice((0, 0, 4, 8, 12)):
        noise = Image.frombytes("L", (width, height), rng.randbytes(width * height))
        noise = noise.point([128 + (v - 128) * strength // 128 for v in range(256)])
        image = ImageChops.add(image, Image.merge("RGB", (noise,) * 3), 1, -128)
    return image


def draw_page(rng: random.Random, split: str, size: tuple[int, int] | None = None) -> Page:
    """Draw a page whose values all belong to `split` ("train" or "heldout").

    `size` is (height, width), one of SIZES; by default it is drawn from them. A page has its values
    beside their names ("Name: value"), in a second column, or, always on narrow pages, under their
    names. As in `_draw_image`, the order of the random draws is fixed.
    """
    size = size or rng.choice(SIZES)
    rows, columns = size[0] // CELL_H, size[1] // CELL_W
    margin = rng.randint(0, 1) if columns < 26 else rng.randint(0, 2)
    stacked = columns < 26 or (rows >= 12 and rng.random() < 0.15)
    per_field = 2 if stacked else 1
    has_title = rng.random() < 0.5 and rows > 5
    free = rows - (1 if has_title else 0)
    count = min(rng.randint(4, 10), free // per_field)
    spare = free - count * per_field  # empty lines to put between the fields
    lines: list[tuple[int, int, str]] = []
    fields: list[Field] = []
    row = 0
    if has_title:
        title = rng.choice(TITLES)
        lines.append((0, rng.choice((margin, (columns - len(title)) // 2)), title))
        row = 1
    tab = rng.randint(12, 13) if not stacked and rng.random() < 0.4 else None
    colon = ":" if rng.random() < (0.5 if stacked or tab else 0.9) else ""
    indent = rng.choice((0, 0, 1)) if stacked else 0
    for name in rng.sample(FIELD_NAMES, count):
        gap = rng.randint(0, 1) if spare else 0
        spare -= gap
        row += gap
        label = name + colon
        beside = margin + (tab or len(label) + (1 if colon else 2))
        start = (row + 1, margin + indent) if stacked else (row, beside)
        value = draw_value(rng, FIELD_TYPES[name], split, min(columns - start[1], 18))
        lines += [(row, margin, label), (*start, value)]
        fields.append(Field(name, FIELD_TYPES[name], value, *start))
        row += per_field
    return Page(_draw_image(rng, size, lines), tuple(lines), tuple(fields))


def _cells(row: int, column: int, text: str) -> list[tuple[int, int] | None]:
    """The cell of each character of a text that starts at a cell; None for spaces."""
    return [(row, column + i) if c != " " else None for i, c in enumerate(text)]


def short_question(rng: random.Random, page_field: Field) -> Question:
    """A question for the value of a field, in one of the phrasings."""
    name = page_field.name if rng.random() < 0.25 else page_field.name.lower()
    text = rng.choice(SHORT_PHRASINGS).format(name)
    cells = _cells(page_field.row, page_field.column, page_field.value)
    return Question(text, page_field.value, page_field.type, tuple(cells))


def long_question(rng: random.Random, page: Page, question_type: str) -> Question | None:
    """A question with a long answer.

    None if the answer would have over LONGEST_ANSWER characters, or under 40.
    """
    parts, separator = _long_answer_parts(page, question_type)
    answer = ""
    cells: list[tuple[int, int] | None] = []
    for pieces in parts:
        for i, (row, column, text) in enumerate(pieces):
            glue = separator if i == 0 else " "
            glue = glue if answer else ""
            answer += glue + text
            cells += [None] * len(glue) + _cells(row, column, text)
    if not 40 <= len(answer) <= LONGEST_ANSWER:
        return None
    return Question(rng.choice(LONG_PHRASINGS[question_type]), answer, question_type, tuple(cells))


def _long_answer_parts(page: Page, question_type: str) -> tuple[list[list[tuple[int, int, str]]], str]:
    """The parts of a long answer and what separates them.

    A part is a list of (row, column, text), joined by spaces.
    """
    if question_type == "transcribe":
        by_row: dict[int, list[tuple[int, int, str]]] = {}
        for line in page.lines:
            by_row.setdefault(line[0], []).append(line)
        return [by_row[row] for row in sorted(by_row)], "\n"
    if question_type == "fields":
        names = [next(line for line in page.lines if line[2].rstrip(":") == f.name) for f in page.fields]
        return [[(row, column, text.rstrip(":"))] for row, column, text in names], ", "
    return [[(f.row, f.column, f.value)] for f in page.fields], "; "


def heldout_pairs(pages: int, seed: int, long_share: float = 0.1) -> Iterator[tuple[Page, Question]]:
    """Yield `pages` held-out pages, each with a question.

    Value types take turns. A share `long_share` of the questions, chosen at random, have a long
    answer instead.
    """
    type_rng = random.Random(f"kinds {seed}")  # this string is part of the seed
    for index in range(pages):
        rng = random.Random(f"heldout {seed} {index}")
        wanted = TYPES[index % len(TYPES)]
        if type_rng.random() < long_share:
            wanted = type_rng.choice(LONG_TYPES)
        question = None
        while question is None:
            page = draw_page(rng, "heldout")
            if wanted in LONG_TYPES:
                question = long_question(rng, page, wanted)
            elif candidates := [f for f in page.fields if f.type == wanted]:
                question = short_question(rng, rng.choice(candidates))
        yield page, question


def write_docvqa(out: Path, pages: int, seed: int) -> Path:
    """Write a held-out set as `out`/val_v1.0.json and `out`/documents/*.png.

    Returns the path of the JSON file.
    """
    out = Path(out)
    (out / "documents").mkdir(parents=True, exist_ok=True)
    records = []
    for index, (page, question) in enumerate(heldout_pairs(pages, seed)):
        name = f"documents/page_{index:05}.png"
        page.image.save(out / name)
        records.append(
            {
                "questionId": index,
                "question": question.text,
                "question_types": [question.type],
                "image": name,
                "docId": index,
                "ucsf_document_id": f"demo{index:05}",
                "ucsf_document_page_no": "1",
                "answers": [question.answer],
                "data_split": "val",
            }
        )
    content = {
        "dataset_name": "minivlm demo pages",
        "dataset_version": "1.0",
        "dataset_split": "val",
        "data": records,
    }
    path = out / "val_v1.0.json"
    write_whole(path, lambda scratch: scratch.write_text(json.dumps(content, indent=1)))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eval.demo.pages",
        description="Write held-out demo pages in the official DocVQA layout.",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--pages", type=int, default=200, help="number of pages, with one question each (200)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other pages (0)")
    args = parser.parse_args()
    print(write_docvqa(args.out, args.pages, args.seed))


if __name__ == "__main__":
    main()
