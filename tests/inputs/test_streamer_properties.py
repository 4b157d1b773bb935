"""A streamed answer is the whole answer, whatever its tokens are."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from minivlm.inputs.tokenizer import Streamer, load_tokenizer
from text_checkpoints import STYLES, tokenizer_json
from weights import find_checkpoint


@functools.cache
def tokenizer_of(style: str) -> Tokenizer:
    return load_tokenizer(find_checkpoint()) if style == "demo" else Tokenizer.from_str(tokenizer_json(style))


def check(tokenizer: Tokenizer, ids: list[int]) -> None:
    streamer = Streamer(tokenizer)
    pieces = [streamer.put(token) for token in ids]
    assert not any(piece.endswith("\ufffd") for piece in pieces)  # half a character is held back
    assert "".join(pieces) + streamer.end() == tokenizer.decode(ids)
    assert streamer.end() == ""


@pytest.mark.parametrize("style", [*STYLES, "demo"])
@given(data=st.data())
def test_pieces_add_up_to_the_whole_text(style, data):
    tokenizer = tokenizer_of(style)
    ids = st.integers(0, tokenizer.get_vocab_size() - 1)
    check(tokenizer, data.draw(st.lists(ids, max_size=40)))
    check(tokenizer, tokenizer.encode(data.draw(st.text(max_size=40))).ids)
