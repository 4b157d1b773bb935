"""The demo's tokenizer and prompt format.

The tokenizer is a byte-level BPE whose merges come from the questions alone. A question takes a
dozen tokens, while answers are trained and produced one character at a time.
"""

from __future__ import annotations

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from eval.demo import pages

PAD, BOS, EOS, IMAGE = range(4)
SPECIALS = ("<pad>", "<s>", "</s>", "<image>")
VOCAB_SIZE = 512  # 4 + 256 bytes + merges, filled up to a multiple of 64

CHAT_TEMPLATE = """\
{% for message in messages %}{% if message['role'] == 'assistant' %}{{ 'ASSISTANT:' }}{% else %}\
{{ message['role'] | upper + ': ' }}{% endif %}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}\
{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}\
{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

PREFIX = "USER: "  # before the image
FIRST_TURN, NEXT_TURN = "\n{} ASSISTANT:", "USER: {} ASSISTANT:"


def build_tokenizer() -> Tokenizer:
    """Build the tokenizer.

    It is always the same: its merges are learnt from questions drawn with a fixed seed.
    """
    rng = random.Random("demo tokenizer")
    corpus: list[str] = []
    while len(corpus) < 4000:
        page = pages.draw_page(rng, "train")
        for field in page.fields:
            corpus.append(pages.short_question(rng, field).text)
        for phrasings in pages.LONG_PHRASINGS.values():
            corpus.append(rng.choice(phrasings))
    corpus = [PREFIX + FIRST_TURN.format(q + (pages.SUFFIX if i % 2 else "")) for i, q in enumerate(corpus)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=list(SPECIALS),
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


class Encoder:
    """Encodes prompts with merges, and answers with one id per byte."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}
        self.prefix = [BOS, *self.prompt(PREFIX)]

    def prompt(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return self._cache[text]

    def answer(self, text: str) -> list[int]:
        return [self.prompt(character)[0] for character in text]
