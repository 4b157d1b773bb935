"""Text in, ids and pixels out, text back: against transformers' AutoTokenizer and AutoProcessor, and alone."""

import json
import random

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models

from minivlm.errors import UserError
from minivlm.inputs.processor import Processor
from minivlm.inputs.tokenizer import Streamer, load_tokenizer
from minivlm.model import anyres
from minivlm.model.llava import Llava
from text_checkpoints import STYLES, edit_json, tokenizer_json, write_checkpoint, write_tokenizer

PIECES = [
    "<image>", "<image>\n", "\n", "\n\n", " ", "  ", "USER:", " ASSISTANT:", "What is the date?", "日本", "é", "😀",
    "▁", "<s>", "</s>", "<|eot_id|>", "<|begin_of_text|>", "[INST]", " [/INST]", "the fox", "<pad>", "<x>", " <y> ",
    "\u200b", "\x00",
]  # fmt: skip
TEXTS = [
    "",
    "<s> x",
    "USER: <image>\nWhat is the date? ASSISTANT:",
    "[INST] <image>\nWhat? [/INST]",
    "<image><image>\n\nfox",
]


def random_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return TEXTS + ["".join(rng.choice(PIECES) for _ in range(rng.randint(1, 12))) for _ in range(count)]


def token(content: str, **flags: object) -> dict:
    off = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, **off, "special": True, **flags}


ADDED = [token("<s>"), token("</s>"), token("<x>", special=False, normalized=True), token("<y>", lstrip=True)]
SETTINGS = [
    {},
    {"legacy": True, "add_bos_token": False},
    {"legacy": False, "add_eos_token": True},
    {"add_prefix_space": False},
    {"pad_token": "<pad>", "additional_special_tokens": ["<x>"]},
    {"extra_special_tokens": {"image_token": "<image>", "foo_token": "<y>"}},
    {"added_tokens_decoder": {str(i): each for i, each in zip((1, 2, 700, 701), ADDED, strict=True)}},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "+".join(settings) or "plain")
@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("style", STYLES)
def test_ids_are_those_of_autotokenizer(tmp_path, style, tokenizer_class, settings):
    transformers = pytest.importorskip("transformers")
    for model_type in (None, "llava_next"):  # what config.json says decides whether transformers trusts the class
        folder = tmp_path / str(model_type)
        write_tokenizer(folder, style, tokenizer_class, **settings)
        if model_type is not None:
            (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        expected, tokenizer = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
        for text in random_texts(25):
            ids = tokenizer.encode(text).ids
            assert ids == expected(text).input_ids, (model_type, text)
            assert tokenizer.decode(ids, skip_special_tokens=True) == expected.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("change", ["post_processor", "added_tokens", "truncation", "special_tokens_map"])
def test_ids_with_an_incomplete_or_odd_file(tmp_path, style, change):
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path, style, "LlamaTokenizer")
    raw = json.loads(tokenizer_json(style))
    if change == "post_processor":
        raw["post_processor"] = None
    elif change == "added_tokens":
        for added in raw["added_tokens"]:
            added["special"] = False
    elif change == "truncation":
        raw["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    else:
        named = {
            "pad_token": "<pad>",
            "bos_token": {key: value for key, value in token("<x>").items() if key != "special"},
        }
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    expected, tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for text in random_texts(25, seed=1):
        ids = tokenizer.encode(text).ids
        assert ids == expected(text).input_ids, text
        assert tokenizer.decode(ids, skip_special_tokens=True) == expected.decode(ids, skip_special_tokens=True)


def test_tokens_around_the_image(tmp_path):
    """The file as it is puts a word boundary between `<image>` and the line break; the rebuilt tokenizer does not."""
    write_tokenizer(tmp_path, "llama", "LlamaTokenizer")
    rebuilt = load_tokenizer(tmp_path).encode("<image>\nthe").tokens
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    kept = load_tokenizer(tmp_path).encode("<image>\nthe").tokens
    assert kept[:4] == ["<s>", "<image>", "▁", "\n"] and rebuilt[:3] == ["<s>", "<image>", "\n"]


def images(*sizes: tuple[int, int]) -> list[Image.Image]:
    rng = random.Random(0)
    return [Image.frombytes("RGB", (width, height), rng.randbytes(3 * height * width)) for height, width in sizes]


BATCHES = {
    "one image": [["<image>\nWhat is the date?", (90, 61)]],
    "two images": [["<image>\nthe <image>dog?", (30, 140), (61, 61)]],
    "text only": [["What is the date?"]],
    "ragged": [["<image>\nfox?", (1, 1)], ["What?"], ["<image><image>\n dog", (200, 31), (56, 112)]],
    "extreme": [["<image>", (1, 2000)], ["<image>", (300, 100)]],
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_inputs_are_those_of_autoprocessor_and_fit_the_model(tmp_path, family, style, batch):
    transformers = pytest.importorskip("transformers")
    config = write_checkpoint(tmp_path, style, family)
    processor, expected = Processor.from_folder(tmp_path, config), transformers.AutoProcessor.from_pretrained(tmp_path)
    expected.tokenizer.pad_token = expected.tokenizer.eos_token
    prompts = [prompt for prompt, *_ in BATCHES[batch]]
    groups = [images(*sizes) for _, *sizes in BATCHES[batch]]
    flat = [image for group in groups for image in group]
    inputs = processor(prompts, groups)
    wanted = expected(text=prompts, images=flat or None, padding=True, padding_side="right", return_tensors="pt")

    assert inputs.lengths.tolist() == wanted.attention_mask.sum(1).tolist()
    for ids, length, wanted_ids in zip(inputs.input_ids, inputs.lengths, wanted.input_ids, strict=True):
        assert torch.equal(ids[:length], wanted_ids[:length])
    assert inputs.input_ids.dtype == inputs.lengths.dtype == torch.int64
    assert inputs.input_ids.shape[1] == inputs.lengths.max()
    assert inputs.image_sizes == [(image.height, image.width) for image in flat]
    if not flat:
        assert inputs.pixel_values is None
        return
    assert torch.equal(inputs.pixel_values, wanted.pixel_values)
    with torch.inference_mode():
        packed = [len(features) for features in Llava(config).image_features(inputs.pixel_values, inputs.image_sizes)]
    assert packed == [anyres.image_tokens(size, config) for size in inputs.image_sizes]
    assert (inputs.input_ids == config.image_token_index).sum() == sum(packed)


@pytest.mark.parametrize("style", STYLES)
def test_nested_processor_config_of_transformers_5(tmp_path, style):
    transformers = pytest.importorskip("transformers")
    config = write_checkpoint(tmp_path / "old", style)
    transformers.AutoProcessor.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / "preprocessor_config.json").exists()
    (tmp_path / "new" / "config.json").write_text((tmp_path / "old" / "config.json").read_text())
    old, new = (Processor.from_folder(tmp_path / name, config) for name in ("old", "new"))
    assert new.image_settings == old.image_settings
    prompts, groups = ["<image>\nWhat is the date? ASSISTANT:"], [images((77, 130))]
    assert torch.equal(new(prompts, groups).input_ids, old(prompts, groups).input_ids)
    assert new(prompts, groups).image_sizes == [(77, 130)]


@pytest.mark.parametrize("style", STYLES)
def test_bos_is_never_doubled(tmp_path, style):
    processor = Processor.from_folder(tmp_path, write_checkpoint(tmp_path, style))
    bos = processor.tokenizer.encode("").ids
    assert len(bos) == 1
    written = processor.tokenizer.id_to_token(bos[0])
    for prompt in ("What?", f"{written}What?"):
        ids = processor([prompt], [[]]).input_ids[0].tolist()
        assert ids[0] == bos[0] and ids.count(bos[0]) == 1
    assert bos[0] not in processor(["What?"], [[]], continues=True).input_ids[0].tolist()


def test_bad_inputs(tmp_path):
    config = write_checkpoint(tmp_path, "llama")
    processor = Processor.from_folder(tmp_path, config)
    with pytest.raises(UserError, match=r"2 <image> placeholders for 1 images"):
        processor(["<image><image>x"], [images((9, 9))])
    with pytest.raises(UserError, match=r"0 <image> placeholders for 1 images"):
        processor(["x", "y"], [[], images((9, 9))])
    with pytest.raises(UserError, match="2 prompts came with 1 lists"):
        processor(["x", "y"], [[]])
    with pytest.raises(UserError, match="nothing.png: no such file"):
        processor(["<image>"], [[tmp_path / "nothing.png"]])


def test_image_tokens_count_towards_the_context_and_are_never_cut(tmp_path):
    config = write_checkpoint(tmp_path, "llama")
    processor, size = Processor.from_folder(tmp_path, config), (112, 112)
    per_image = anyres.image_tokens(size, config)
    most = (2048 - 1) // per_image  # beside BOS
    assert processor(["<image>" * most], [images(*[size] * most)]).lengths.tolist() == [1 + most * per_image]
    with pytest.raises(UserError, match=f"takes {1 + (most + 1) * per_image} tokens, the model's context is 2048"):
        processor(["<image>" * (most + 1)], [images(*[size] * (most + 1))])


def test_a_prompt_may_fill_the_context(tmp_path):
    config = write_checkpoint(tmp_path, "llama3")
    processor = Processor.from_folder(tmp_path, config)
    assert processor(["\x00" * 2047], [[]]).lengths.tolist() == [2048]
    with pytest.raises(UserError, match="takes 2049 tokens, the model's context is 2048"):
        processor(["\x00" * 2048], [[]])


def test_image_token_must_be_the_model_s(tmp_path):
    config = write_checkpoint(tmp_path, "llama", image_token_index=7)
    with pytest.raises(UserError, match=r"id of <image> is \d+, config.json's image_token_index is 7"):
        Processor.from_folder(tmp_path, config)
    edit_json(tmp_path / "tokenizer_config.json", image_token="<s>")
    with pytest.raises(UserError, match=r"id of <s> is 1, config.json's image_token_index is 7"):
        Processor.from_folder(tmp_path, config)


JSON_FILES = ["tokenizer_config", "special_tokens_map", "processor_config", "preprocessor_config", "chat_template"]


@pytest.mark.parametrize("name", [f"{name}.json" for name in JSON_FILES])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe{}", b"[" * 100_000])
def test_malformed_json_is_named(tmp_path, name, content):
    config = write_checkpoint(tmp_path, "llama")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as excinfo:
        Processor.from_folder(tmp_path, config)
    assert name in str(excinfo.value) and "\n" not in str(excinfo.value)


def test_missing_and_broken_files(tmp_path):
    config = write_checkpoint(tmp_path, "llama")
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder={"x": 1})
    with pytest.raises(UserError, match="tokenizer_config.json: key in added_tokens_decoder: expected int, got str"):
        Processor.from_folder(tmp_path, config)
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=None)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match="tokenizer.json: model: expected object, got int"):
        Processor.from_folder(tmp_path, config)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json: no such file"):
        Processor.from_folder(tmp_path, config)
    write_tokenizer(tmp_path, "llama")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="expected preprocessor_config.json"):
        Processor.from_folder(tmp_path, config)


def test_pad_to_square_is_an_option(tmp_path):
    config = write_checkpoint(tmp_path, "llama", "llava")
    cropped, padded = (Processor.from_folder(tmp_path, config, pad_to_square=choice) for choice in (None, True))
    image = [images((40, 90))]
    assert not torch.equal(cropped(["<image>"], image).pixel_values, padded(["<image>"], image).pixel_values)


@pytest.mark.parametrize("style", STYLES)
def test_a_conversation_goes_on_with_the_ids_of_the_whole(tmp_path, style):
    """Only the new turn is tokenised, and its ids are the tail of the whole conversation's."""
    processor = Processor.from_folder(tmp_path, write_checkpoint(tmp_path, style))
    history = [processor.user_message("What is the date?", 1), {"role": "assistant", "content": "The fox."}]
    following = processor.user_message("the lazy dog?")
    text, whole = processor.next_turn(history, following), processor.render([*history, following])
    assert whole.endswith("The fox." + text)
    ids = processor([text], [[]], continues=True).input_ids[0].tolist()
    assert processor.tokenizer.encode(whole).ids[-len(ids) :] == ids


@pytest.mark.parametrize("style", STYLES)
def test_continued_text_has_no_beginning(tmp_path, style):
    """Neither BOS nor the word boundary that a tokenizer puts before a text's first word."""
    processor = Processor.from_folder(tmp_path, write_checkpoint(tmp_path, style))
    for text in ("fox", " fox", "\n", "\n\nfox", "[INST] fox", "<image>\nfox"):
        ids = processor([text], [images((56, 56))[: text.count("<image>")]], continues=True).input_ids[0].tolist()
        whole = processor.tokenizer.encode("the 日本" + text).ids  # nothing merges with these bytes
        short = [i for k, i in enumerate(ids) if i != processor.config.image_token_index or i not in ids[:k]]
        assert whole[-len(short) :] == short, text


def test_images_in_a_later_turn(tmp_path):
    processor = Processor.from_folder(tmp_path, write_checkpoint(tmp_path, "llama"))
    history = [processor.user_message("What?"), {"role": "assistant", "content": "The fox."}]
    text = processor.next_turn(history, processor.user_message("the dog?", 1))
    assert text == "</s>USER: <image>\nthe dog? ASSISTANT:"
    inputs = processor([text], [images((56, 56))], continues=True)
    count = anyres.image_tokens((56, 56), processor.config)
    assert (inputs.input_ids == processor.config.image_token_index).sum() == count
    assert inputs.pixel_values.shape[0] == 1


def test_a_template_may_space_and_trim_answers(tmp_path):
    """As the hub's LLaVA-1.5 template does: a space before and after an answer, and no end-of-sequence token."""
    config = write_checkpoint(tmp_path, "llama")
    turns = "{% for m in messages %}{{ m.role | upper }}: {{ m.content | trim }} {% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(turns + "{% if add_generation_prompt %}ASSISTANT:{% endif %}")
    processor = Processor.from_folder(tmp_path, config)
    history = [processor.user_message("What?", 1), {"role": "assistant", "content": " The fox.\n"}]
    assert processor.next_turn(history, processor.user_message("Why?")) == " USER: Why? ASSISTANT:"


def test_a_conversation_must_go_on_from_an_answer(tmp_path):
    processor = Processor.from_folder(tmp_path, write_checkpoint(tmp_path, "llama"))
    user = processor.user_message("x")
    for history in ([], [user]):
        with pytest.raises(UserError, match="must end with an answer"):
            processor.next_turn(history, user)
    counting = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(counting)
    processor = Processor.from_folder(tmp_path, processor.config)
    with pytest.raises(UserError, match="rewrites earlier turns"):
        processor.next_turn([user, {"role": "assistant", "content": "y"}], user)


def streamed(streamer: Streamer, ids: list[int]) -> tuple[list[str], str]:
    pieces = [streamer.put(i) for i in ids] + [streamer.end()]
    return pieces, "".join(pieces)


@pytest.mark.parametrize("style", STYLES)
def test_streaming_adds_up_to_the_whole_text(tmp_path, style):
    write_tokenizer(tmp_path, style, "LlamaTokenizer")
    tokenizer, rng = load_tokenizer(tmp_path), random.Random(0)
    for text in random_texts(60, seed=2):
        ids = tokenizer.encode(text).ids
        pieces, whole = streamed(Streamer(tokenizer), ids)
        assert whole == tokenizer.decode(ids)
        assert not any(piece.endswith("\ufffd") for piece in pieces)
    streamer = Streamer(tokenizer)
    for _ in range(150):  # any ids at all, also bytes that are no text
        ids = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(rng.randint(0, 60))]
        assert streamed(streamer, ids)[1] == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "decoder", [None, decoders.Metaspace(), decoders.WordPiece(cleanup=False), decoders.Fuse(), decoders.BPEDecoder()]
)
def test_streaming_with_other_decoders(decoder):
    vocabulary = {word: i for i, word in enumerate(["▁a", "b", "▁", "##c", "d</w>", " ", "<0x41>", "日", "<eos>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="b"))
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    if decoder is not None:
        tokenizer.decoder = decoder
    rng, streamer = random.Random(0), Streamer(tokenizer)
    for _ in range(200):
        ids = [rng.randrange(len(vocabulary)) for _ in range(rng.randint(0, 12))]
        assert streamed(streamer, ids)[1] == tokenizer.decode(ids)


def test_a_character_of_several_tokens_comes_at_once(tmp_path):
    processor = Processor.from_folder(tmp_path, write_checkpoint(tmp_path, "llama3"))
    ids = processor.tokenizer.encode("é😀", add_special_tokens=False).ids
    assert len(ids) == 6
    streamer = processor.streamer()
    assert [streamer.put(i) for i in ids] == ["", "é", "", "", "", "😀"] and streamer.end() == ""
    assert streamer.put(ids[0]) == "" and streamer.end() == "\ufffd"


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.decoded = tokenizer, 0
        self.id_to_token = tokenizer.id_to_token

    def decode(self, ids, **options):
        self.decoded += len(ids)
        return self.tokenizer.decode(ids, **options)


def test_streaming_a_long_answer_takes_linear_work(tmp_path):
    write_tokenizer(tmp_path, "llama")
    tokenizer = Counting(load_tokenizer(tmp_path))
    ids = (tokenizer.tokenizer.encode("the quick 日本 fox\n", add_special_tokens=False).ids * 200)[:2000]
    pieces, whole = streamed(Streamer(tokenizer), ids)
    assert whole == tokenizer.tokenizer.decode(ids) and max(map(len, pieces)) < 20
    assert tokenizer.decoded < 20 * len(ids)
