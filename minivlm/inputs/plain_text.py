"""Strangers' text, made harmless for a prompt: no control token and no role marker is left in it.

A tokenizer finds control tokens (`</s>`, `<image>`, `<|im_start|>`) wherever their text stands, as in transformers, so
whoever may write into a prompt could end a turn or begin another. One space, put before the last character, makes
ordinary text of them, and both people and models still read what was meant: `</s >`, `USER :`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Tokenizer

from minivlm.errors import UserError

_ROUNDS = 64  # in each a space goes into every control token found; they overlap less deeply than that


def control_tokens(tokenizer: Tokenizer) -> set[str]:
    """The texts of a tokenizer's special tokens, and of its other added tokens unless they are words or white space."""
    added = tokenizer.get_added_tokens_decoder().values()
    return {token.content for token in added if has_sign(token.content) or (token.special and token.content.strip())}


def role_markers(between_turns: Iterable[str], controls: set[str]) -> set[str]:
    """What a chat template writes between turns, without control tokens and without plain words (ChatML's `user`)."""
    fragments = (fragment.strip() for text in between_turns for fragment in re.split(_any_of(controls), text))
    return {fragment for fragment in fragments if has_sign(fragment)}


def plain_text(text: str, tokenizer: Tokenizer, markers: set[str]) -> str:
    """The text with a space in each control token and in each of the `markers`; otherwise as it is.

    Control tokens are found in any spelling that the tokenizer reads as one; only the token of
    unknown characters may still come out of it. Raises `UserError` if the tokenizer deletes the
    spaces.
    """
    controls = control_tokens(tokenizer)
    unknown = getattr(tokenizer.model, "unk_token", None)  # what a character means that it does not know
    ids = {tokenizer.token_to_id(token) for token in controls if token != unknown}
    pattern = re.compile(_any_of(controls | markers))
    for _ in range(_ROUNDS):
        while pattern.search(text):
            text = pattern.sub(lambda match: _parted(match[0]), text)
        encoding = tokenizer.encode(text, add_special_tokens=False)
        spans = [span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token in ids]
        if not spans:
            return text
        for start, end in reversed(spans):
            text = text[:start] + _parted(text[start:end]) + text[end:]
    raise UserError("the tokenizer reads control tokens in this text that no space can break")


def has_sign(text: str) -> bool:
    """Whether there is anything but letters, digits and white space in it."""
    return any(not (character.isalnum() or character.isspace()) for character in text)


def _parted(token: str) -> str:
    """A token's text with a space before its last character; of a single character only the space."""
    body = token.strip()
    return token.replace(body, f"{body[:-1]} {body[-1]}") if len(body) > 1 else " "


def _any_of(texts: set[str]) -> str:
    """A pattern that finds each of the texts, longer ones first."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)"
