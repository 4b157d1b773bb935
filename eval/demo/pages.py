"""The demo's data set: small business pages drawn by code, with questions about them.

A page is typed like a receipt: one character per cell of 8 x 16 pixels, glyphs of Pillow's own font squeezed into the
cell. Page sizes are chosen so that LLaVA-NeXT's scaling is exactly 1 for the demo's pinpoints (112 x 224, 224 x 112,
224 x 224) and its centred padding moves the cells by whole cells. Everything follows from one `random.Random`.

`python -m eval.demo.pages --out DIR --pages N --seed S` writes a held-out set in the layout of the official DocVQA files.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont

from eval.demo.page_values import TYPES, draw_value

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
FIELD_NAMES = tuple(name for kind in TYPES for name in FIELDS[kind])
TITLES = (
    "INVOICE",
    "RECEIPT",
    "Delivery note",
    "Order form",
    "REPORT",
    "Record",
    "Work order",
    "Summary",
    "TICKET",
    "Statement",
    "MEMO",
    "Booking",
)

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
LONG_KINDS = tuple(LONG_PHRASINGS)
SUFFIX = "\nAnswer the question using a single word or phrase."  # what the DocVQA task appends
LONGEST_ANSWER = 150  # characters of a long answer

# (height, width): scaling stays 1, the padding stays whole cells; every pinpoint, with and without unpadding
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
    """One field of a page: its name, type and value, and the cell where the value starts."""

    name: str
    kind: str
    value: str
    row: int
    column: int


@dataclass(frozen=True)
class Page:
    """A drawn page: `lines` are (row, column, text) in reading order, rows and columns counted in cells."""

    image: Image.Image
    lines: tuple[tuple[int, int, str], ...]
    fields: tuple[Field, ...]


@dataclass(frozen=True)
class Question:
    """`kind` is a value type or one of LONG_KINDS; `cells` gives the (row, column) of every answer character that
    stands on the page, and None for separators."""

    text: str
    answer: str
    kind: str
    cells: tuple[tuple[int, int] | None, ...] = field(repr=False)


@functools.cache
def _glyph(character: str, size: int, bold: bool) -> Image.Image:
    """An 8 x 16 mask ("L") of one character, drawn four times as large and squeezed into the cell."""
    font = ImageFont.load_default(size=4 * size)
    left, _, right, _ = font.getbbox(character)
    ink = max(right - left, 1)
    cell = Image.new("L", (max(ink, 4 * (CELL_W - 1)) + 4, 4 * CELL_H))
    ImageDraw.Draw(cell).text(
        ((cell.width - ink) / 2 - left, 4 * 12),
        character,
        fill=255,
        font=font,
        anchor="ls",
        stroke_width=1 if bold else 0,
    )
    return cell.resize((CELL_W, CELL_H), Image.Resampling.BOX)


def _draw(rng: random.Random, size: tuple[int, int], lines: list[tuple[int, int, str]]) -> Image.Image:
    height, width = size
    paper = rng.randint(205, 255)
    tint = [max(0, paper - rng.randint(0, 22)) for _ in range(3)]
    ink = [rng.randint(0, 90) for _ in range(3)]
    if rng.random() < 0.1:  # white on dark, like a display
        tint, ink = ink, tint
    image = Image.new("RGB", (width, height), tuple(tint))
    draw = ImageDraw.Draw(image)
    glyph_size, bold = rng.choice((12, 13, 13, 14)), rng.random() < 0.4
    dx, dy = rng.choice((0, 0, 0, 1)), rng.choice((0, 0, 1, -1))
    faint = tuple((2 * t + i) // 3 for t, i in zip(tint, ink))
    if rng.random() < 0.3:  # a rule under some line
        y = (rng.choice(lines)[0] + 1) * CELL_H - 1
        draw.line((4, y, width - 5, y), fill=faint)
    if rng.random() < 0.15:
        draw.rectangle((2, 1, width - 3, height - 2), outline=faint)
    fill = tuple(ink)
    for row, column, text in lines:
        for i, character in enumerate(text):
            if character != " ":
                image.paste(fill, ((column + i) * CELL_W + dx, row * CELL_H + dy), _glyph(character, glyph_size, bold))
    strength = rng.choice((0, 0, 4, 8, 12))
    if strength:
        noise = Image.frombytes("L", (width, height), rng.randbytes(width * height))
        noise = noise.point([128 + (v - 128) * strength // 128 for v in range(256)])
        image = ImageChops.add(image, Image.merge("RGB", (noise,) * 3), 1, -128)
    return image


def draw_page(rng: random.Random, split: str, size: tuple[int, int] | None = None) -> Page:
    """Draws a page whose values all belong to `split` ("train" or "heldout").

    `size` is (height, width), one of SIZES; by default drawn from them. Fields stand inline ("Key: value"), in two
    columns, or, always on narrow pages, with the value under its name.
    """
    size = size or rng.choice(SIZES)
    rows, columns = size[0] // CELL_H, size[1] // CELL_W
    margin = rng.randint(0, 1) if columns < 26 else rng.randint(0, 2)
    stacked = columns < 26 or (rows >= 12 and rng.random() < 0.15)
    per_field = 2 if stacked else 1
    title = rng.random() < 0.5 and rows > 5
    free = rows - (1 if title else 0)
    count = min(rng.randint(4, 10), free // per_field)
    spare = free - count * per_field  # empty lines to be put between
    lines, fields = [], []
    row = 0
    if title:
        text = rng.choice(TITLES)
        lines.append((0, rng.choice((margin, (columns - len(text)) // 2)), text))
        row = 1
    tab = rng.randint(12, 13) if not stacked and rng.random() < 0.4 else None
    colon = ":" if rng.random() < (0.5 if stacked or tab else 0.9) else ""
    indent = rng.choice((0, 0, 1)) if stacked else 0
    for name in rng.sample(FIELD_NAMES, count):
        kind = TYPES[FIELD_NAMES.index(name) // 8]
        gap = rng.randint(0, 1) if spare else 0
        spare -= gap
        row += gap
        label = name + colon
        if stacked:
            where = (row + 1, margin + indent)
        else:
            where = (row, margin + (tab if tab else len(label) + (1 if colon else 2)))
        value = draw_value(rng, kind, split, min(columns - where[1], 18))
        lines += [(row, margin, label), (*where, value)]
        fields.append(Field(name, kind, value, *where))
        row += per_field
    return Page(_draw(rng, size, lines), tuple(lines), tuple(fields))


def _cells(row: int, column: int, text: str) -> list[tuple[int, int] | None]:
    return [(row, column + i) if c != " " else None for i, c in enumerate(text)]


def short_question(rng: random.Random, which: Field) -> Question:
    """Asks for the value of the field `which`, in one of the phrasings."""
    name = which.name if rng.random() < 0.25 else which.name.lower()
    text = rng.choice(SHORT_PHRASINGS).format(name)
    return Question(text, which.value, which.kind, tuple(_cells(which.row, which.column, which.value)))


def long_question(rng: random.Random, page: Page, kind: str) -> Question | None:
    """Asks for a long answer; None where it would be over LONGEST_ANSWER characters or under 40."""
    by_row: dict[int, list[tuple[int, int, str]]] = {}
    for line in page.lines:
        by_row.setdefault(line[0], []).append(line)
    if kind == "transcribe":
        parts, between = [(" ", by_row[row]) for row in sorted(by_row)], "\n"
    elif kind == "fields":
        names = [next(line for line in page.lines if line[2].rstrip(":") == f.name) for f in page.fields]
        parts, between = [(" ", [(row, column, text.rstrip(":"))]) for row, column, text in names], ", "
    else:
        parts, between = [(" ", [(f.row, f.column, f.value)]) for f in page.fields], "; "
    answer, cells = "", []
    for joint, pieces in parts:
        for i, piece in enumerate(pieces):
            glue = (between if answer else "") if i == 0 else joint
            answer += glue + piece[2]
            cells += [None] * len(glue) + _cells(*piece)
    if not 40 <= len(answer) <= LONGEST_ANSWER:
        return None
    return Question(rng.choice(LONG_PHRASINGS[kind]), answer, kind, tuple(cells))


def heldout_pairs(pages: int, seed: int, long_share: float = 0.1):
    """Yields `pages` held-out (Page, Question) pairs: the types in turn, and a long answer in every tenth on average."""
    kinds = random.Random(f"kinds {seed}")
    for index in range(pages):
        rng = random.Random(f"heldout {seed} {index}")
        want = kinds.choice(LONG_KINDS) if kinds.random() < long_share else TYPES[index % len(TYPES)]
        while True:
            page = draw_page(rng, "heldout")
            if want in LONG_KINDS:
                question = long_question(rng, page, want)
            else:
                fitting = [f for f in page.fields if f.kind == want]
                question = short_question(rng, rng.choice(fitting)) if fitting else None
            if question:
                yield page, question
                break


def write_docvqa(out: Path, pages: int, seed: int) -> Path:
    """Writes the held-out set as `out`/val_v1.0.json and `out`/documents/*.png; returns the JSON's path."""
    out = Path(out)
    (out / "documents").mkdir(parents=True, exist_ok=True)
    data = []
    for index, (page, question) in enumerate(heldout_pairs(pages, seed)):
        name = f"documents/page_{index:05}.png"
        page.image.save(out / name)
        data.append(
            {
                "questionId": index,
                "question": question.text,
                "question_types": [question.kind],
                "image": name,
                "docId": index,
                "ucsf_document_id": f"demo{index:05}",
                "ucsf_document_page_no": "1",
                "answers": [question.answer],
                "data_split": "val",
            }
        )
    target, scratch = out / "val_v1.0.json", out / "val_v1.0.json.part"
    scratch.write_text(
        json.dumps(
            {"dataset_name": "minivlm demo pages", "dataset_version": "1.0", "dataset_split": "val", "data": data},
            indent=1,
        )
    )
    os.replace(scratch, target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eval.demo.pages", description="Write held-out demo pages as DocVQA."
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--pages", type=int, default=200, help="number of pages, one question each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(write_docvqa(args.out, args.pages, args.seed))


if __name__ == "__main__":
    main()
