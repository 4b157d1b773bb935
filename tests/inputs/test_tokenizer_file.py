"""Hostile tokenizer.json, tokenizer_config.json and special_tokens_map.json: one line that names file and key."""

from __future__ import annotations

import json

import pytest

from minivlm.errors import UserError
from minivlm.inputs.processor import Processor
from minivlm.inputs.tokenizer import load_tokenizer
from text_checkpoints import edit_json, tokenizer_json, write_checkpoint, write_tokenizer

TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}


def replacing(text: str, content: str) -> dict:
    return {"type": "Replace", "pattern": {"String": text}, "content": content}


def split(pattern: dict) -> dict:
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def added(content: str, **changes: object) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": 7, "content": content, **flags, **changes}


def refused(folder, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder)
    message = str(caught.value)
    assert said in message and "\n" not in message and len(message) <= 1100


# What hangs the tokenizers library, aborts it, or makes texts explode; each was tried.
HOSTILE_PARTS = {
    "backtracking": ({"pre_tokenizer": split({"Regex": "(a+)+$"})}, "pre_tokenizer.pattern: regex is none of"),
    "broken pattern": ({"pre_tokenizer": split({"Regex": "("})}, "pre_tokenizer.pattern: regex is none of"),
    "empty pattern": ({"pre_tokenizer": split({"String": ""})}, "pre_tokenizer.pattern.String: expected str of length"),
    "empty pieces": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "pre_tokenizer.type: invalid value"),
    "growing": ({"normalizer": replacing("a", "a" * 200)}, "normalizer: content has more characters than String"),
    "growing decoder": ({"decoder": replacing("a", "bb")}, "decoder: content has more characters than String"),
    "chain": ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}] * 9}}, "normalizer.normalizers"),
    "nested": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}]}},
        "normalizer.normalizers[0].type: invalid value 'Sequence'",
    ),
    "pattern in a decoder": (
        {"decoder": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": " "}},
        "decoder.pattern",
    ),
    "charsmap": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "normalizer.type"),
    "empty prefix": ({"normalizer": {"type": "Prepend", "prepend": ""}}, "normalizer.prepend: expected str of length"),
    "cut on the right": (
        {"decoder": {"type": "Strip", "content": "a", "start": 1, "stop": 1}},
        "decoder.stop: expected int <= 0",
    ),
    "no text": ({"post_processor": {**TEMPLATE, "single": []}}, "post_processor: single does not have Sequence A once"),
    "second text": (
        {"post_processor": {**TEMPLATE, "single": [{"Sequence": {"id": "B", "type_id": 0}}]}},
        "post_processor: single does not have Sequence A once",
    ),
    "unknown token": ({"post_processor": {**TEMPLATE, "special_tokens": {}}}, "post_processor: special_tokens lacks"),
    "two templates": (
        {"post_processor": {"type": "Sequence", "processors": [TEMPLATE, TEMPLATE]}},
        "post_processor: processors has TemplateProcessing more than once",
    ),
    "other model": ({"model": {"type": "Unigram", "unk_id": 5, "vocab": [["a", -1.0]]}}, "model.type"),
    "id": ({"added_tokens": [added("x", id=10**12)]}, "added_tokens[0].id: expected int <"),
    "negative id": ({"added_tokens": [added("x", id=-1)]}, "added_tokens[0].id: expected int >= 0"),
    "token that is none": ({"added_tokens": [5]}, "added_tokens[0]: expected object, got int"),
    "long token": ({"added_tokens": [added("x" * 10**6)]}, "added_tokens[0].content: expected str of length <= 256"),
    "same space": ({"added_tokens": [added("<image>", rstrip=True), added(" ")]}, "begins with white space"),
    "no object": ({"normalizer": 5}, "normalizer: expected object | null, got int"),
    "version": ({"version": "2.0"}, "version: invalid"),
}


@pytest.mark.parametrize("case", HOSTILE_PARTS)
def test_parts(tmp_path, case):
    changes, said = HOSTILE_PARTS[case]
    write_tokenizer(tmp_path, "llama")
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer_json("llama")) | changes))
    refused(tmp_path, said)
    if case not in ("same space",):
        refused(tmp_path, "tokenizer.json: ")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"vocab": {"a": 0, "b": 0}, "merges": []}, "model: vocab gives the same id to several tokens"),
        ({"vocab": {"a": "0"}}, "model.vocab[...]: expected int"),
        ({"vocab": {"a": 2**32}}, "model.vocab[...]: expected int <"),
        ({"vocab": ["a"]}, "model.vocab: expected object"),
        ({"vocab": {"a" * 2000: 1}}, "key in model.vocab: expected str of length <= 1024"),
        ({"merges": "a b"}, "model.merges: expected array"),
        ({"merges": [["a"]]}, "model.merges[0]: expected array of length 2"),
        ({"merges": ["a"]}, "not a valid tokenizer"),
        ({"merges": ["ű ű"]}, "not a valid tokenizer"),
        ({"dropout": 0.5}, "model.dropout: expected float <= 0.0"),
        ({"unk_token": "nothing"}, "model: unk_token is not in vocab"),
        ({"continuing_subword_prefix": "é"}, "model.continuing_subword_prefix: expected str of length <= 0"),
        ({"end_of_word_suffix": "</w>"}, "model.end_of_word_suffix: expected str of length <= 0"),
        ({"byte_fallback": "yes"}, "model.byte_fallback: expected bool"),
    ],
)
def test_model(tmp_path, changes, said):
    write_tokenizer(tmp_path, "llama")
    raw = json.loads(tokenizer_json("llama"))
    raw["model"] |= changes
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    refused(tmp_path, said)


def test_a_key_that_is_there_twice(tmp_path):
    """The library could take another one of them than the check; it is given only what was checked."""
    write_tokenizer(tmp_path, "llama")
    expected = load_tokenizer(tmp_path).to_str()
    text = tokenizer_json("llama").strip()[1:]
    hostile = json.dumps(split({"Regex": "(a+)+$"}))
    (tmp_path / "tokenizer.json").write_text(f'{{"pre_tokenizer": {hostile}, {text}')
    refused(tmp_path, "pre_tokenizer.pattern")
    (tmp_path / "tokenizer.json").write_text(f'{{"normalizer": {json.dumps({"type": "NFC"})}, {text}')
    assert load_tokenizer(tmp_path).to_str() == expected


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "key in added_tokens_decoder: expected int"),
        ({"added_tokens_decoder": {str(10**12): {"content": "a"}}}, "key in added_tokens_decoder: expected int <"),
        ({"added_tokens_decoder": {"5": "a"}}, "added_tokens_decoder[...]: expected object"),
        ({"added_tokens_decoder": {"5": {}}}, "added_tokens_decoder[...].content is missing"),
        ({"added_tokens_decoder": {"5": {"content": 5}}}, "added_tokens_decoder[...].content: expected str"),
        ({"added_tokens_decoder": {"5": {"content": "a", "lstrip": 1}}}, "added_tokens_decoder[...].lstrip: expected"),
        ({"added_tokens_decoder": []}, "added_tokens_decoder: expected object | null"),
        ({"bos_token": 5}, "bos_token: expected str | object | null, got int"),
        ({"bos_token": {"content": None}}, "bos_token.content: expected str"),
        ({"image_token": {"content": ["<image>"]}}, "image_token.content: expected str"),
        ({"pad_token": "x" * 10**5}, "pad_token: expected str of length <= 256"),
        ({"additional_special_tokens": [5]}, "additional_special_tokens[0]: expected str | object"),
        ({"additional_special_tokens": "ab"}, "additional_special_tokens: expected array | null"),
        ({"extra_special_tokens": 5}, "extra_special_tokens: expected object | array | null"),
        ({"extra_special_tokens": {"image_token": 5}}, "extra_special_tokens[...]: expected str"),
        ({"tokenizer_class": []}, "tokenizer_class: expected str | null"),
        ({"legacy": "no"}, "legacy: expected bool | null"),
        ({"add_prefix_space": []}, "add_prefix_space: expected bool | null"),
    ],
)
def test_token_settings(tmp_path, changes, said):
    write_tokenizer(tmp_path, "llama", **changes)
    refused(tmp_path, f"tokenizer_config.json: {said}")


def test_settings_as_on_the_hub(tmp_path):
    write_tokenizer(
        tmp_path,
        "llama",
        "LlamaTokenizer",
        model_max_length=1000000000000000019884624838656,
        add_bos_token=True,
        sp_model_kwargs={},
        sep_token=None,
        added_tokens_decoder={"0": {"content": "<unk>", "lstrip": False, "special": True, "__type": "AddedToken"}},
        processor_class="LlavaProcessor",
    )
    assert load_tokenizer(tmp_path).encode("the").tokens[0] == "<s>"


def test_ids_beyond_the_model_s(tmp_path):
    config = write_checkpoint(tmp_path, "llama")
    raw = json.loads(tokenizer_json("llama"))
    raw["model"]["vocab"]["<0x00>"] = 448
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="the tokenizer has the id 448, config.json's vocab_size is 448"):
        Processor.from_folder(tmp_path, config)
    raw = json.loads(tokenizer_json("llama")) | {"post_processor": TEMPLATE}
    raw["post_processor"]["special_tokens"]["<s>"]["ids"] = [10**6]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="the tokenizer has the id 1000000"):
        Processor.from_folder(tmp_path, config)


@pytest.mark.parametrize(
    "file, changes, said",
    [
        ("processor_config.json", {"image_token": 5}, "image_token: expected str | object | null"),
        ("processor_config.json", {"image_processor": []}, "image_processor: expected object | null"),
        ("processor_config.json", {"chat_template": 5}, "chat_template: expected"),
        ("processor_config.json", {"chat_template": {"default": 5}}, "chat_template[...]: expected str"),
        ("processor_config.json", {"chat_template": {"rag": "x"}}, "chat_template has no template named default"),
        ("chat_template.json", {}, "chat_template is missing"),
        ("chat_template.json", {"chat_template": [5]}, "chat_template[0]: expected object"),
        (
            "chat_template.json",
            {"chat_template": [{"name": [], "template": "x"}]},
            "chat_template[0].name: expected str",
        ),
        ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}, "chat_template[0].template is missing"),
        ("tokenizer_config.json", {"chat_template": True}, "chat_template: expected"),
    ],
)
def test_processor_files(tmp_path, file, changes, said):
    config = write_checkpoint(tmp_path, "llama")
    edit_json(tmp_path / file, **changes)
    with pytest.raises(UserError) as caught:
        Processor.from_folder(tmp_path, config)
    assert f"{file}: {said}" in str(caught.value) and "\n" not in str(caught.value)
