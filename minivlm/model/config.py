"""What a checkpoint's `config.json` says, as frozen dataclasses.

Configs on the hub are sparse: a missing field has the default that transformers gives it for the
`model_type`. Both generations of field names are read (`rope_theta` / `rope_parameters`,
`torch_dtype` / `dtype`, `image_token_index` / `image_token_id`). A setting that this library does
not implement is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minivlm.errors import UserError

# Defaults of transformers' LlamaConfig and MistralConfig where they differ from each other.
_TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": dict(
        intermediate_size=11008,
        num_key_value_heads=None,  # as many as attention heads
        max_position_embeddings=2048,
        sliding_window=None,
    ),
    "mistral": dict(
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        sliding_window=4096,
    ),
}
# What the decoder implements, of settings for which the architecture knows other values.
_TEXT_IMPLEMENTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
_NEXT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TextConfig:
    """A decoder of LLaMA's architecture."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    context_length: int  # tokens: the smaller of the position table and the sliding window

    @classmethod
    def from_dict(cls, raw: Mapping) -> TextConfig:
        """Read `text_config`. Raises `UserError` for a field that is malformed or not supported."""
        model_type = raw.get("model_type", "llama")
        if model_type not in _TEXT_DEFAULTS:
            raise UserError(
                f"config.json: text_config.model_type {model_type!r} is not supported (expected llama or mistral)"
            )
        raw = {**_TEXT_DEFAULTS[model_type], **raw}
        for key, implemented in _TEXT_IMPLEMENTED.items():
            _only(raw, key, implemented, "text_config.")
        hidden_size = _positive(raw, "hidden_size", 4096)
        heads, kv_heads, head_dim = _heads(raw, hidden_size)
        return cls(
            model_type=model_type,
            vocab_size=_positive(raw, "vocab_size", 32000),
            hidden_size=hidden_size,
            intermediate_size=_positive(raw, "intermediate_size", 0),
            num_hidden_layers=_positive(raw, "num_hidden_layers", 32),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
            rope_theta=_rope_theta(raw),
            context_length=_context_length(raw),
        )


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision transformer."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int  # side of a tile in pixels
    patch_size: int  # side of a patch in pixels
    layer_norm_eps: float
    hidden_act: str  # "quick_gelu" or "gelu"

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @classmethod
    def from_dict(cls, raw: Mapping) -> VisionConfig:
        """Read `vision_config`. Raises `UserError` for a field that is malformed or not supported."""
        model_type = raw.get("model_type", "clip_vision_model")
        if model_type != "clip_vision_model":
            raise UserError(
                f"config.json: vision_config.model_type {model_type!r} is not supported (expected clip_vision_model)"
            )
        _only(raw, "num_channels", 3, "vision_config.")
        act = raw.get("hidden_act", "quick_gelu")
        if act not in ("quick_gelu", "gelu"):
            raise UserError(
                f"config.json: vision_config.hidden_act {act!r} is not supported (expected quick_gelu or gelu)"
            )
        config = cls(
            hidden_size=_positive(raw, "hidden_size", 768),
            intermediate_size=_positive(raw, "intermediate_size", 3072),
            num_hidden_layers=_positive(raw, "num_hidden_layers", 12),
            num_attention_heads=_positive(raw, "num_attention_heads", 12),
            image_size=_positive(raw, "image_size", 224),
            patch_size=_positive(raw, "patch_size", 32),
            layer_norm_eps=_number(raw, "layer_norm_eps", 1e-5),
            hidden_act=act,
        )
        if config.hidden_size % config.num_attention_heads:
            raise UserError(
                f"config.json: vision hidden_size {config.hidden_size} is not a multiple of "
                f"its num_attention_heads {config.num_attention_heads}"
            )
        if config.image_size < config.patch_size:
            raise UserError(
                f"config.json: vision image_size {config.image_size} is smaller than patch_size {config.patch_size}"
            )
        return config


@dataclass(frozen=True)
class VLMConfig:
    """A whole LLaVA checkpoint: vision tower, projector and decoder."""

    model_type: str  # "llava" (LLaVA-1.5) or "llava_next"
    text: TextConfig
    vision: VisionConfig
    image_token_index: int  # the token id that stands for an image in a prompt
    vision_feature_layers: tuple[int, ...]  # into [embeddings, layer 1, ..., layer n], all >= 0
    select_strategy: str  # "default" drops the class token, "full" keeps it
    projector_bias: bool
    image_grid_pinpoints: tuple[tuple[int, int], ...]  # in pixels; empty for LLaVA-1.5
    eos_token_ids: tuple[int, ...]
    dtype: str  # "float32", "bfloat16" or "float16": how the checkpoint was saved

    @property
    def is_next(self) -> bool:
        return self.model_type == "llava_next"

    @classmethod
    def from_dict(cls, raw: Mapping, generation: Mapping | None = None) -> VLMConfig:
        """Read a `config.json` and, if there is one, the `generation_config.json` beside it.

        Raises `UserError`, naming the field, for one that is missing, malformed or not supported.
        """
        model_type = raw.get("model_type")
        if model_type not in ("llava", "llava_next"):
            raise UserError(f"config.json: model_type {model_type!r} is not supported (expected llava or llava_next)")
        for section in ("text_config", "vision_config"):
            if not isinstance(raw.get(section), Mapping):
                raise UserError(f"config.json: {section} is missing (expected an object)")
        _only(raw, "projector_hidden_act", "gelu", "")
        _only(raw, "tie_word_embeddings", False, "")
        text = TextConfig.from_dict(raw["text_config"])
        vision = VisionConfig.from_dict(raw["vision_config"])
        return cls(
            model_type=model_type,
            text=text,
            vision=vision,
            image_token_index=_image_token(raw, text.vocab_size),
            vision_feature_layers=_feature_layers(raw.get("vision_feature_layer", -2), vision.num_hidden_layers),
            select_strategy=_select_strategy(raw, model_type),
            projector_bias=bool(raw.get("multimodal_projector_bias", True)),
            image_grid_pinpoints=_pinpoints(raw, vision.image_size) if model_type == "llava_next" else (),
            eos_token_ids=_eos(raw, generation or {}),
            dtype=_dtype(raw),
        )


# Readers of values of any field


def _only(raw: Mapping, key: str, implemented: object, section: str) -> None:
    """Refuse a field that has another value than the one this library implements."""
    if raw.get(key, implemented) != implemented:
        raise UserError(f"config.json: {section}{key} {raw[key]!r} is not supported (expected {implemented!r})")


def _positive(raw: Mapping, key: str, default: int) -> int:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise UserError(f"config.json: {key} is {value!r} (expected a positive integer)")
    return value


def _number(raw: Mapping, key: str, default: float) -> float:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise UserError(f"config.json: {key} is {value!r} (expected a positive number)")
    return float(value)


# Readers of single fields


def _heads(raw: Mapping, hidden_size: int) -> tuple[int, int, int]:
    """(attention heads, key/value heads, head_dim), checked against each other."""
    heads = _positive(raw, "num_attention_heads", 32)
    kv_heads = heads if raw["num_key_value_heads"] is None else _positive(raw, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise UserError(f"config.json: {heads} attention heads are not a multiple of {kv_heads} key/value heads")
    if raw.get("head_dim") is not None:
        head_dim = _positive(raw, "head_dim", 0)
    elif hidden_size % heads:
        raise UserError(f"config.json: hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}")
    else:
        head_dim = hidden_size // heads
    if head_dim % 2:
        raise UserError(f"config.json: head_dim {head_dim} is odd, rotary embeddings need an even one")
    return heads, kv_heads, head_dim


def _context_length(raw: Mapping) -> int:
    length = _positive(raw, "max_position_embeddings", 0)
    if raw["sliding_window"] is None:
        return length
    # Within the window, a sliding window changes nothing. Past it, entries would have to be dropped
    # from the cache, so the window is where the context ends here.
    return min(length, _positive(raw, "sliding_window", 0))


def _rope_theta(raw: Mapping) -> float:
    """Theta is nested in `rope_parameters` (transformers 5) or stands beside `rope_scaling`."""
    nested = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = nested.get("rope_type", nested.get("type", "default"))
    if rope_type != "default":
        raise UserError(f"config.json: rope type {rope_type!r} is not supported (expected default)")
    theta = nested.get("rope_theta", raw.get("rope_theta", 10000.0))
    return _number({"rope_theta": theta}, "rope_theta", 0.0)


def _image_token(raw: Mapping, vocab_size: int) -> int:
    token = raw.get("image_token_index", raw.get("image_token_id", 32000))
    if not isinstance(token, int) or not 0 <= token < vocab_size:
        raise UserError(f"config.json: image_token_index {token!r} is not a token id below vocab_size {vocab_size}")
    return token


def _select_strategy(raw: Mapping, model_type: str) -> str:
    strategy = raw.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise UserError(
            f"config.json: vision_feature_select_strategy {strategy!r} is not supported (expected default or full)"
        )
    if strategy == "full" and model_type == "llava_next":
        raise UserError(
            "config.json: vision_feature_select_strategy 'full' has no meaning for llava_next (expected default)"
        )
    return strategy


def _feature_layers(value: Any, num_layers: int) -> tuple[int, ...]:
    """One index or several, negative ones counted from the end, -> indices that are all >= 0."""
    indices = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not indices or not all(isinstance(i, int) and -num_layers - 1 <= i <= num_layers for i in indices):
        raise UserError(f"config.json: vision_feature_layer {value!r} does not index the tower's {num_layers} layers")
    return tuple(i if i >= 0 else num_layers + 1 + i for i in indices)


def _pinpoints(raw: Mapping, tile: int) -> tuple[tuple[int, int], ...]:
    points = raw.get("image_grid_pinpoints", _NEXT_PINPOINTS)
    try:
        pairs = tuple((int(height), int(width)) for height, width in points)
    except (TypeError, ValueError):
        pairs = ()
    if not pairs or any(side <= 0 or side % tile for pair in pairs for side in pair):
        raise UserError(
            f"config.json: image_grid_pinpoints {points!r} are not (height, width) multiples of image_size {tile}"
        )
    return pairs


def _eos(raw: Mapping, generation: Mapping) -> tuple[int, ...]:
    """All end-of-sequence ids of the generation config and the model's; each an int or a list."""
    ids: list[int] = []
    for section in (generation, raw["text_config"], raw):
        value = section.get("eos_token_id")
        if isinstance(value, list):
            ids += value
        elif value is not None:
            ids.append(value)
    return tuple(dict.fromkeys(ids)) or (2,)  # 2 is transformers' default for LLaMA


def _dtype(raw: Mapping) -> str:
    sections = (raw, raw["text_config"])
    names = [section.get(key) for section in sections for key in ("dtype", "torch_dtype")]
    name = next((name for name in names if name), "float32")
    if name not in _DTYPES:
        raise UserError(f"config.json: dtype {name!r} is not supported (expected float32, bfloat16 or float16)")
    return name
