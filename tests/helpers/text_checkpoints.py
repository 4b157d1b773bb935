"""The text half of small checkpoints in Hugging Face layout: tokenizers as Llama, Mistral and Llama 3 have them.

There are no weights: what these folders test is the processor.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from minivlm.model.config import VLMConfig
from tiny import PINPOINTS

STYLES = ("llama", "mistral", "llama3")
TILE = 56
_TEXT = [
    "USER: What is the date on this page? ASSISTANT: The quick brown fox jumps over the lazy dog.\n\n[INST] [/INST]"
] * 3
_TEXT_CONFIG = {
    "vocab_size": 448,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "sliding_window": None,
}
_VISION_CONFIG = {
    "model_type": "clip_vision_model",
    "image_size": TILE,
    "patch_size": 14,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_LLAMA3_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@functools.cache
def tokenizer_json(style: str) -> str:
    """A `tokenizer.json` with `<image>`, in one of `STYLES`.

    As in the hub's files, `llama` marks the start of a word in the normalizer, and `mistral` in the pre-tokenizer.
    """
    if style == "llama3":
        return _byte_level().to_str()
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if style == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    special = ["<unk>", "<s>", "</s>"]
    alphabet = special + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(
        _TEXT, trainers.BpeTrainer(vocab_size=360, special_tokens=alphabet, show_progress=False)
    )
    # The trainer made special tokens of the bytes too; there they are plain ones.
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    bos = [("<s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=bos)
    return tokenizer.to_str()


def _byte_level() -> Tokenizer:
    """A tokenizer on bytes, as Llama 3 has it."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        _TEXT, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    )
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    bos = tokenizer.token_to_id(special[0])
    template = processors.TemplateProcessing(
        single=f"{special[0]} $A", pair=f"{special[0]} $A {special[0]} $B", special_tokens=[(special[0], bos)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def special_tokens(style: str) -> dict[str, str]:
    """The special tokens that `tokenizer_config.json` names."""
    if style == "llama3":
        return {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    return {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def write_tokenizer(
    folder: Path, style: str, tokenizer_class: str = "PreTrainedTokenizerFast", **settings: object
) -> Tokenizer:
    """Write `tokenizer.json` and `tokenizer_config.json`, the latter with `settings`, and return the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(style), encoding="utf-8")
    written = {**special_tokens(style), "tokenizer_class": tokenizer_class, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    return Tokenizer.from_str(tokenizer_json(style))


def write_checkpoint(folder: Path, style: str = "llama", family: str = "llava_next", **changes: object) -> VLMConfig:
    """Write a folder from which this library and transformers' AutoProcessor make a processor.

    `changes` replace entries of config.json. Returns the configuration.
    """
    is_next = family == "llava_next"
    tokenizer = write_tokenizer(folder, style)
    config = {
        "model_type": family,
        "image_token_index": tokenizer.token_to_id("<image>"),
        "text_config": {"model_type": "mistral" if style == "mistral" else "llama", **_TEXT_CONFIG},
        "vision_config": _VISION_CONFIG,
    }
    images: dict[str, object] = {
        "size": {"shortest_edge": TILE},
        "crop_size": {"height": TILE, "width": TILE},
    }
    if is_next:
        config["image_grid_pinpoints"] = images["image_grid_pinpoints"] = PINPOINTS
    images["image_processor_type"] = "LlavaNextImageProcessor" if is_next else "CLIPImageProcessor"
    config.update(changes)
    processor = {
        "processor_class": "LlavaNextProcessor" if is_next else "LlavaProcessor",
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    for name, content in (("config", config), ("preprocessor_config", images), ("processor_config", processor)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return VLMConfig.from_dict(config)


def edit_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON file, which need not exist yet; None removes a key."""
    raw = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    raw.update(changes)
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}), encoding="utf-8")
