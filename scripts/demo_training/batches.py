"""Training batches: pages of one size, each with all its questions packed into one sequence.

A sequence consists of the prefix, the image tokens, and one segment per conversation. A segment
attends to the prefix, the image and itself, and its positions continue those of the image. This is
exactly what inference sees when it asks that question alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, fields

import torch
from PIL import Image
from torch import Tensor

from demo_training.text import EOS, FIRST_TURN, NEXT_TURN, Encoder
from eval.demo import pages
from minivlm.model import anyres
from minivlm.model.config import VLMConfig

IGNORE = -100
CHARS = 1 + len(pages.CHARACTERS)  # classes of a cell: 0 is blank
FIELDS = 1 + len(pages.FIELD_NAMES)  # classes of "which field's value is here": 0 is none
OFFSETS = 11  # classes of "how many patches into the value"
_CHAR_CLASS = {c: 1 + i for i, c in enumerate(pages.CHARACTERS)}
_SHORT_QUESTIONS = 6  # per page, at most
_SUFFIX_SHARE = 0.45  # of questions that carry the suffix of the DocVQA task
_LONG_SHARE = 0.5  # of pages that are asked a long question of each type
_SECOND_TURN_RATE = 0.1  # second turns per question


@dataclass
class Batch:
    """B pages of one size, each with N image tokens, T text tokens and G tiles."""

    size: tuple[int, int]  # (height, width) of the pages
    tiles: Tensor  # [B, G, 3, tile, tile] uint8, the base view first
    chars: Tensor  # [B, N, 2] character classes of each patch's two cells, IGNORE off the page grid
    field: Tensor  # [B, N] field class
    offset: Tensor  # [B, N] patches into the value, IGNORE outside of values
    tokens: Tensor  # [B, T]
    targets: Tensor  # [B, T] the next token if it belongs to an answer, else IGNORE
    segment: Tensor  # [B, T] number of the conversation, -1 for padding
    position: Tensor  # [B, T] offset from the end of the image
    # [4, P] (b, t, n, count): text token t of page b should look at image token n, one of `count`
    pointer: Tensor

    def to(self, device: torch.device) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in values.items()})


def page_tiles(image: Image.Image, config: VLMConfig) -> Tensor:
    """Cut a page into tiles [G, 3, tile, tile] uint8, as the processor does.

    Raises ValueError for a page that would have to be scaled.
    """
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
    """Finds the image token that shows a given cell, on pages of one size."""

    def __init__(self, size: tuple[int, int], config: VLMConfig) -> None:
        side = config.vision.grid
        target = anyres.best_resolution(size, config.image_grid_pinpoints)
        top, left = anyres.padding_before(size, target)
        rows, cols = anyres.tile_grid(size, config)
        box = anyres.unpadded_box(size, (rows * side, cols * side))
        self.row0, self.col0 = top // pages.CELL_H, left // pages.CELL_W  # cells of padding
        self.box = box
        self.base = side * side  # image tokens of the base view, which come first
        self.width = box[3] - box[2] + 1  # patches of a row, and a newline
        self.count = anyres.image_tokens(size, config)
        newlines = [self.base + (r + 1) * self.width - 1 for r in range(box[1] - box[0])]
        self.off_grid = [*range(self.base), *newlines]  # image tokens that show no cell

    def locate(self, row: int, column: int) -> tuple[int, int]:
        """The image token that shows a cell, and the cell's place in the patch, 0 or 1."""
        patch_row, cell = row + self.row0 - self.box[0], column + self.col0
        return self.base + patch_row * self.width + cell // 2 - self.box[2], cell % 2


@dataclass
class _PackedText:
    """The packed conversations about one page, and their pointers (t, n, count)."""

    tokens: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    segment: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    pointer: list[tuple[int, int, int]] = field(default_factory=list)


def draw_batch(
    rng: random.Random,
    config: VLMConfig,
    encoder: Encoder,
    split: str,
    count: int,
    size: tuple[int, int] | None = None,
) -> Batch:
    """Draw `count` pages of one size, with their questions.

    The size is random unless it is given.
    """
    size = size or rng.choice(pages.SIZES)
    patches = PatchMap(size, config)
    drawn = [pages.draw_page(rng, split, size) for _ in range(count)]
    labels = [_label_image_tokens(page, patches) for page in drawn]
    texts = [_pack_text(rng, page, patches, encoder) for page in drawn]
    longest = max(len(text.tokens) for text in texts)

    def padded(lists: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([values + [fill] * (longest - len(values)) for values in lists])

    return Batch(
        size=size,
        tiles=torch.stack([page_tiles(page.image, config) for page in drawn]),
        chars=torch.stack([chars for chars, _, _ in labels]),
        field=torch.stack([fields for _, fields, _ in labels]),
        offset=torch.stack([offsets for _, _, offsets in labels]),
        tokens=padded([text.tokens for text in texts], 0),
        targets=padded([text.targets for text in texts], IGNORE),
        segment=padded([text.segment for text in texts], -1),
        position=padded([text.position for text in texts], 0),
        pointer=torch.tensor([(b, *target) for b, text in enumerate(texts) for target in text.pointer])
        .t()
        .contiguous(),
    )


def _label_image_tokens(page: pages.Page, patches: PatchMap) -> tuple[Tensor, Tensor, Tensor]:
    """What the image tokens of a page show: `chars`, `field` and `offset` of `Batch`."""
    chars = torch.zeros(patches.count, 2, dtype=torch.long)
    field_class = torch.zeros(patches.count, dtype=torch.long)
    offset = torch.full((patches.count,), IGNORE)
    chars[patches.off_grid] = IGNORE
    field_class[patches.off_grid] = IGNORE
    for row, column, text in page.lines:
        for i, character in enumerate(text):
            if character != " ":
                token, cell = patches.locate(row, column + i)
                chars[token, cell] = _CHAR_CLASS[character]
    for f in page.fields:
        first, _ = patches.locate(f.row, f.column)
        last, _ = patches.locate(f.row, f.column + len(f.value) - 1)
        field_class[first : last + 1] = 1 + pages.FIELD_NAMES.index(f.name)
        offset[first : last + 1] = torch.arange(last + 1 - first)
    return chars, field_class, offset


def _pack_text(rng: random.Random, page: pages.Page, patches: PatchMap, encoder: Encoder) -> _PackedText:
    """Draw conversations about a page and pack them, one segment each."""
    packed = _PackedText()
    for number, turns in enumerate(_conversations(rng, page)):
        start = len(packed.tokens)
        for turn, question in enumerate(turns):
            text = question.text + (pages.SUFFIX if rng.random() < _SUFFIX_SHARE else "")
            prompt = encoder.prompt((NEXT_TURN if turn else FIRST_TURN).format(text))
            answer = [*encoder.answer(question.answer), EOS]
            first = len(packed.tokens) + len(prompt) - 1  # the token that predicts the first character
            packed.pointer += _pointers(question, first, patches)
            packed.tokens += prompt + answer
            packed.targets += [IGNORE] * (len(prompt) - 1) + answer + [IGNORE]
        length = len(packed.tokens) - start
        packed.segment += [number] * length
        packed.position += range(length)
    return packed


def _conversations(rng: random.Random, page: pages.Page) -> list[list[pages.Question]]:
    """Conversations about a page; most have a single question."""
    asked = rng.sample(page.fields, min(len(page.fields), _SHORT_QUESTIONS))
    conversations = [[pages.short_question(rng, f)] for f in asked]
    for question_type in pages.LONG_TYPES:
        question = pages.long_question(rng, page, question_type) if rng.random() < _LONG_SHARE else None
        if question:
            conversations.append([question])
    if rng.random() < _SECOND_TURN_RATE * len(conversations):
        last = conversations.pop()
        conversations[0] = conversations[0] + last
    return conversations


def _pointers(question: pages.Question, first: int, patches: PatchMap) -> list[tuple[int, int, int]]:
    """Where the text tokens of an answer should look: (t, n, count).

    Token `first` predicts the first character.

    Every token looks at the patch of the character that it predicts. For a short answer, the first
    one looks at all patches of the value.
    """
    targets = [patches.locate(*cell)[0] if cell else None for cell in question.cells]
    later = [(first + i, n, 1) for i, n in enumerate(targets) if i and n is not None]
    if question.type in pages.TYPES:
        value = sorted({n for n in targets if n is not None})
        return [(first, n, len(value)) for n in value] + later
    assert targets[0] is not None, "a long answer starts with a character of the page"
    return [(first, targets[0], 1), *later]
