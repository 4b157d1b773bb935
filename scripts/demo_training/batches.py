"""Training batches: pages of one size, each with all its questions packed into one sequence.

A sequence is prefix, image tokens, then one segment per conversation. A segment sees prefix, image and itself, and its
positions continue those of the image: exactly what inference sees when it asks that question alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

import torch
from PIL import Image
from torch import Tensor

from demo_training.text import EOS, FIRST_TURN, NEXT_TURN, Encoder
from eval.demo import pages
from minivlm.model import anyres
from minivlm.model.config import VLMConfig

IGNORE = -100
CHARS = 1 + len(pages.CHARACTERS)  # classes of a character slot, 0 is blank
FIELDS = 1 + len(pages.FIELD_NAMES)  # classes of "which field's value is here", 0 is none
OFFSETS = 11  # classes of "how many patches into the value"
_CHAR_CLASS = {c: 1 + i for i, c in enumerate(pages.CHARACTERS)}
_QUESTIONS, _SUFFIXED, _LONG, _SECOND_TURN = 6, 0.45, 0.5, 0.1  # short ones a page; shares


@dataclass
class Batch:
    """B pages of one size; N image tokens, T packed text tokens, G tiles a page (the base view first)."""

    size: tuple[int, int]
    tiles: Tensor  # [B, G, 3, tile, tile] uint8
    chars: Tensor  # [B, N, 2] character classes of each patch's two cells, IGNORE off the page grid
    field: Tensor  # [B, N] field class
    offset: Tensor  # [B, N] patches into the value, IGNORE outside values
    tokens: Tensor  # [B, T]
    targets: Tensor  # [B, T] next token where it belongs to an answer, else IGNORE
    segment: Tensor  # [B, T] conversation number, -1 for padding
    position: Tensor  # [B, T] offset behind prefix and image
    pointer: Tensor  # [4, P] int64 rows (b, t, n, patches of the token's target): where the next character stands

    def to(self, device: torch.device) -> Batch:
        return Batch(
            **{
                f.name: v.to(device, non_blocking=True) if isinstance(v := getattr(self, f.name), Tensor) else v
                for f in fields(self)
            }
        )


def page_tiles(image: Image.Image, config: VLMConfig) -> Tensor:
    """[G, 3, tile, tile] uint8 of a page whose scale is 1, as the processor's geometry has it."""
    side, (width, height) = config.vision.image_size, image.size
    target = anyres.best_resolution((height, width), config.image_grid_pinpoints)
    if anyres.fitted_size((height, width), target) != (height, width):
        raise ValueError(f"a page of {height} x {width} would be rescaled")
    top, left = anyres.padding_before((height, width), target)
    canvas = Image.new("RGB", (target[1], target[0]))
    canvas.paste(image, (left, top))
    base = image.resize((side, side), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(
        target[0] // side, side, target[1] // side, side, 3
    )
    views = torch.frombuffer(bytearray(base.tobytes()), dtype=torch.uint8).view(1, side, side, 3)
    return torch.cat((views, pixels.transpose(1, 2).reshape(-1, side, side, 3))).permute(0, 3, 1, 2)


class PatchMap:
    """From a cell of a page of one size to the image token that holds it."""

    def __init__(self, size: tuple[int, int], config: VLMConfig) -> None:
        side = config.vision.grid
        target = anyres.best_resolution(size, config.image_grid_pinpoints)
        top, left = anyres.padding_before(size, target)
        rows, cols = anyres.tile_grid(size, config)
        box = anyres.unpadded_box(size, (rows * side, cols * side))
        self.row0, self.col0 = top // pages.CELL_H, left // pages.CELL_W  # cells of padding
        self.box, self.base = box, side * side
        self.width = box[3] - box[2] + 1  # patches and a newline
        self.count = anyres.image_tokens(size, config)
        self.off_grid = list(range(self.base)) + [self.base + (r + 1) * self.width - 1 for r in range(box[1] - box[0])]

    def locate(self, row: int, column: int) -> tuple[int, int]:
        """(image token, slot 0 or 1) of the character at a cell."""
        patch_row, cell = row + self.row0 - self.box[0], column + self.col0
        return self.base + patch_row * self.width + cell // 2 - self.box[2], cell % 2


def _segments(rng: random.Random, page: pages.Page) -> list[list[pages.Question]]:
    """Conversations about a page: mostly one question each."""
    asked = rng.sample(page.fields, min(len(page.fields), _QUESTIONS))
    singles = [[pages.short_question(rng, f)] for f in asked]
    for kind in pages.LONG_KINDS:
        long = pages.long_question(rng, page, kind) if rng.random() < _LONG else None
        if long:
            singles.append([long])
    if rng.random() < _SECOND_TURN * len(singles):
        last = singles.pop()
        singles[0] = singles[0] + last
    return singles


def draw_batch(
    rng: random.Random, config: VLMConfig, encoder: Encoder, split: str, count: int, size: tuple[int, int] | None = None
) -> Batch:
    """`count` pages of one random size (fewer tiles, more pages) with their questions."""
    size = size or rng.choice(pages.SIZES)
    where = PatchMap(size, config)
    sheets = [pages.draw_page(rng, split, size) for _ in range(count)]
    chars = torch.zeros(count, where.count, 2, dtype=torch.long)
    chars[:, where.off_grid] = IGNORE
    field = torch.zeros(count, where.count, dtype=torch.long)
    field[:, where.off_grid] = IGNORE
    offset = torch.full((count, where.count), IGNORE)
    rows, pointer = [], []
    for b, page in enumerate(sheets):
        for row, column, text in page.lines:
            for i, character in enumerate(text):
                if character != " ":
                    token, slot = where.locate(row, column + i)
                    chars[b, token, slot] = _CHAR_CLASS[character]
        for f in page.fields:
            first, last = where.locate(f.row, f.column)[0], where.locate(f.row, f.column + len(f.value) - 1)[0]
            field[b, first : last + 1] = 1 + pages.FIELD_NAMES.index(f.name)
            offset[b, first : last + 1] = torch.arange(last + 1 - first)
        tokens, targets, segment, position = [], [], [], []
        for s, turns in enumerate(_segments(rng, page)):
            start = len(tokens)
            for turn, question in enumerate(turns):
                text = question.text + (pages.SUFFIX if rng.random() < _SUFFIXED else "")
                prompt = encoder.prompt((NEXT_TURN if turn else FIRST_TURN).format(text))
                answer = encoder.answer(question.answer) + [EOS]
                first = len(tokens) + len(prompt) - 1  # the row that predicts the first character
                patches = [where.locate(*cell)[0] if cell else None for cell in question.cells]
                if question.kind in pages.TYPES:  # the last prompt token looks at all of the value
                    whole = sorted({p for p in patches if p is not None})
                    pointer += [(b, first, p, len(whole)) for p in whole]
                else:
                    pointer.append((b, first, patches[0], 1))
                pointer += [(b, first + i, p, 1) for i, p in enumerate(patches) if i and p is not None]
                tokens += prompt + answer
                targets += [IGNORE] * (len(prompt) - 1) + answer + [IGNORE]
            segment += [s] * (len(tokens) - start)
            position += range(len(tokens) - start)
        rows.append((tokens, targets, segment, position))
    longest = max(len(r[0]) for r in rows)
    tokens, targets, segment, position = (
        torch.tensor([r[i] + [fill] * (longest - len(r[i])) for r in rows]) for i, fill in enumerate((0, IGNORE, -1, 0))
    )
    return Batch(
        size,
        torch.stack([page_tiles(page.image, config) for page in sheets]),
        chars,
        field,
        offset,
        tokens,
        targets,
        segment,
        position,
        torch.tensor(pointer).t().contiguous(),
    )
