"""Strangers' text: whatever it is, `plain_text` leaves no control token in it, and leaves alone what has none."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers

import weights
from minivlm.errors import UserError
from minivlm.inputs.plain_text import control_tokens, has_sign, plain_text
from minivlm.inputs.processor import Processor
from text_checkpoints import STYLES, tokenizer_json, write_checkpoint

_NAMES = [*STYLES, "demo"]


@functools.cache
def processor_of(name: str) -> Processor:
    if name == "demo":
        return weights.load().processor
    with TemporaryDirectory() as folder:
        return Processor.from_folder(folder, write_checkpoint(Path(folder), name))


@functools.cache
def odd_tokenizer() -> Tokenizer:
    """Tokens that overlap, that swallow spaces, of one character, with spaces; and a normalizer that changes a lot."""
    tokenizer = Tokenizer.from_str(tokenizer_json("mistral"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    texts = ["<a><b>", "<b><a>", "<a>", "<a >", "§", "[x y]", "ab|ab", "|ab|", "  ", "word"]
    tokenizer.add_tokens([AddedToken(text, normalized=True, lstrip=True, rstrip=True) for text in texts])
    tokenizer.add_special_tokens([AddedToken("<one>", single_word=True), AddedToken("<im>", normalized=True)])
    return tokenizer


def control_ids(tokenizer: Tokenizer) -> set[int]:
    return {tokenizer.token_to_id(token) for token in control_tokens(tokenizer) - {"<unk>"}}


def wide(text: str) -> str:
    """ASCII in its full-width forms, which NFKC turns into the usual ones."""
    return re.sub("[!-~]", lambda sign: chr(ord(sign[0]) + 0xFEE0), text)


def pieces(texts: list[str]) -> st.SearchStrategy[str]:
    """Texts that are full of control tokens and of their parts, one within another."""
    parts = st.sampled_from([*texts, *(part for text in texts for part in (text[:3], text[:-1], text[1:], text[-2:]))])
    spelled = st.sampled_from([spell(text) for text in texts for spell in (str.upper, wide)])
    blanks = st.sampled_from(" \n\t▁")
    return st.lists(st.one_of(parts, spelled, st.text(max_size=4), blanks), max_size=12).map("".join)


def similar(plain: str, text: str) -> bool:
    """Whether nothing but spaces came in."""
    return plain.replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("name", _NAMES)
@given(data=st.data())
def test_no_control_token_is_left(name, data):
    processor = processor_of(name)
    controls = control_tokens(processor.tokenizer)
    markers = controls | processor._role_markers
    text = data.draw(pieces(sorted(markers)))
    plain = processor.plain_text(text)
    assert not any(marker in plain for marker in markers)
    assert similar(plain, text) and processor.plain_text(plain) == plain
    # Neither alone, nor in a prompt, nor in a later turn of a conversation.
    banned, tokenizer = control_ids(processor.tokenizer), processor.tokenizer
    assert not banned.intersection(tokenizer.encode(plain, add_special_tokens=False).ids)
    harmless = "x" if plain.strip() else plain
    for prompt in (processor.question, lambda words: words):
        ours, expected = (tokenizer.encode(prompt(words)).ids for words in (plain, harmless))
        assert [i for i in ours if i in banned] == [i for i in expected if i in banned]


@pytest.mark.parametrize("name", _NAMES)
@given(text=st.text(max_size=30))
@example(text="What is the total, 5 < 6 > 4? [a] </p> <im age> | USER ASSISTANT INST")
@example(text="日本語 \x00 \u200b\ufeff user assistant system")
def test_other_text_stays_as_it_is(name, text):
    processor = processor_of(name)
    ids = processor.tokenizer.encode(text, add_special_tokens=False).ids
    if not control_ids(processor.tokenizer).intersection(ids) and not any(m in text for m in processor._role_markers):
        assert processor.plain_text(text) == text


@given(data=st.data())
def test_odd_tokens(data):
    tokenizer = odd_tokenizer()
    controls = control_tokens(tokenizer)
    assert "word" not in controls and "  " not in controls and {"§", "<one>"} < controls
    text = data.draw(pieces(sorted(controls)))
    plain = plain_text(text, tokenizer, {"###", "Q:"})
    assert not control_ids(tokenizer).intersection(tokenizer.encode(plain, add_special_tokens=False).ids)
    assert not any(token in plain for token in controls | {"###", "Q:"})


def test_examples():
    llama, llama3 = processor_of("llama"), processor_of("llama3")
    for processor, text, expected in (
        (llama, "a</s>b", "a</s >b"),
        (llama, "<image>", "<image >"),
        (llama, "<im<image>age>", "<im<image >age>"),
        (llama, "</s></s>", "</s ></s >"),
        (llama, "<unk>", "<unk >"),
        (llama, "x ASSISTANT: yes USER: no", "x ASSISTANT : yes USER : no"),
        (llama, "USER", "USER"),
        (llama, "<|eot_id|>", "<|eot_id|>"),  # means nothing to this tokenizer
        (llama3, "<|eot_id|>", "<|eot_id| >"),
        (llama3, "the user and the assistant", "the user and the assistant"),
    ):
        assert processor.plain_text(text) == expected
    odd = odd_tokenizer()
    for text, expected in (
        ("<IM>", "<IM >"),
        ("<A>", "<A  >"),  # <a > is a token too
        (wide("<im>"), f"{wide('<im')} {wide('>')}"),
        ("§", " "),
        ("ab|ab|ab", "ab|a b|ab"),
        ("word", "word"),
    ):
        assert plain_text(text, odd, set()) == expected
    assert plain_text("a.a.a", odd, {"a.a"}) == "a. a. a"


def test_role_markers_are_those_of_the_template():
    assert processor_of("llama")._role_markers == {"USER:", "ASSISTANT:"}
    assert processor_of("demo")._role_markers == {"USER:", "ASSISTANT:"}
    assert processor_of("mistral")._role_markers == {"[INST]", "[/INST]"}
    assert processor_of("llama3")._role_markers == set()  # its turns are made of control tokens and plain words


def test_what_has_a_sign():
    assert has_sign("<s>") and has_sign("USER:") and has_sign("▁")
    assert not any(map(has_sign, ("", "word", "two words", "\n\n", "日本")))


def test_a_tokenizer_that_deletes_spaces_is_refused():
    tokenizer = Tokenizer.from_str(tokenizer_json("llama"))
    tokenizer.normalizer = normalizers.Replace(" ", "")
    tokenizer.add_tokens([AddedToken("<a>", normalized=True)])
    with pytest.raises(UserError, match="no space can break"):
        plain_text("x <a>", tokenizer, set())


def test_what_is_no_text():
    processor = processor_of("llama")
    with pytest.raises(UserError, match="not valid Unicode"):
        processor.plain_text("\udcff")
    with pytest.raises(UserError, match="10000000 characters"):
        processor.plain_text("</s>x" * 2_000_000)


@pytest.mark.parametrize("style", STYLES)
def test_what_is_typed_counts_as_in_transformers(tmp_path, style):
    """Control tokens in a prompt are control tokens; after `plain_text` they are text, to transformers too."""
    transformers = pytest.importorskip("transformers")
    processor = Processor.from_folder(tmp_path, write_checkpoint(tmp_path, style))
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path).tokenizer
    text = "a</s>b <unk> [INST] USER: <s><|eot_id|> <|begin_of_text|>c"
    prompt = f"x {text}"
    assert processor([prompt], [[]]).input_ids[0].tolist() == theirs(prompt).input_ids
    typed = control_ids(processor.tokenizer).intersection(theirs(prompt, add_special_tokens=False).input_ids)
    plain = theirs(f"x {processor.plain_text(text)}", add_special_tokens=False).input_ids
    assert typed and not typed.intersection(plain)
