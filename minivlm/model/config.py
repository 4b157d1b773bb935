"""What a checkpoint's `config.json` says, as frozen dataclasses.

Configs on the hub are sparse: a missing field has the default that transformers gives it for the
`model_type`. Both generations of field names are read (`rope_theta` / `rope_parameters`,
`torch_dtype` / `dtype`, `image_token_index` / `image_token_id`). A setting that this library does
not implement is refused by name, never ignored. `config_file.py` has the types and bounds of fields;
here they are checked against each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from msgspec import UNSET

from minivlm.errors import UserError
from minivlm.model.config_file import Checkpoint, Generation, MistralText, ModelType, Saved, Text, Vision
from minivlm.schema import convert

_TEXT_FORMS = {"llama": Text, "mistral": MistralText}
_NEXT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
_DTYPES = ("float32", "bfloat16", "float16")
# Bounds of sizes that follow from several fields.
_MAX_GRID = 256  # patches along one side of a tile
_MAX_PINPOINT_PIXELS = 1 << 24


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
        model_type = _model_type(raw, tuple(_TEXT_FORMS), "llama", "text_config")
        file = convert(raw, _TEXT_FORMS[model_type], "config.json", "text_config")
        _only("text_config.hidden_act", file.hidden_act, "silu")
        _only("text_config.attention_bias", file.attention_bias, False)
        _only("text_config.mlp_bias", file.mlp_bias, False)
        _only("text_config.tie_word_embeddings", file.tie_word_embeddings, False)
        heads, kv_heads, head_dim = _heads(file)
        return cls(
            model_type=model_type,
            vocab_size=file.vocab_size,
            hidden_size=file.hidden_size,
            intermediate_size=file.intermediate_size,
            num_hidden_layers=file.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=file.rms_norm_eps,
            rope_theta=_rope_theta(file),
            # Within the window, a sliding window changes nothing. Past it, entries would have to be
            # dropped from the cache, so the window is where the context ends here.
            context_length=min(file.max_position_embeddings, file.sliding_window or file.max_position_embeddings),
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
        _model_type(raw, ("clip_vision_model",), "clip_vision_model", "vision_config")
        file = convert(raw, Vision, "config.json", "vision_config")
        _only("vision_config.num_channels", file.num_channels, 3)
        _only("vision_config.hidden_act", file.hidden_act, "quick_gelu", "gelu")
        config = cls(
            hidden_size=file.hidden_size,
            intermediate_size=file.intermediate_size,
            num_hidden_layers=file.num_hidden_layers,
            num_attention_heads=file.num_attention_heads,
            image_size=file.image_size,
            patch_size=file.patch_size,
            layer_norm_eps=file.layer_norm_eps,
            hidden_act=file.hidden_act,
        )
        if config.hidden_size % config.num_attention_heads:
            raise UserError(
                f"config.json: vision_config.hidden_size {config.hidden_size} is not a multiple of "
                f"its num_attention_heads {config.num_attention_heads}"
            )
        if not 1 <= config.grid <= _MAX_GRID:
            raise UserError(
                f"config.json: vision_config.image_size {config.image_size} makes {config.grid} patches of patch_size "
                f"{config.patch_size} along a side (expected 1 to {_MAX_GRID})"
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
        model_type = _model_type(raw, ("llava", "llava_next"))
        file = convert(raw, Checkpoint, "config.json")
        _only("projector_hidden_act", file.projector_hidden_act, "gelu")
        _only("tie_word_embeddings", file.tie_word_embeddings, False)
        text = TextConfig.from_dict(file.text_config)
        vision = VisionConfig.from_dict(file.vision_config)
        in_text = convert(file.text_config, Saved, "config.json", "text_config")
        ends = convert({} if generation is None else generation, Generation, "generation_config.json")
        return cls(
            model_type=model_type,
            text=text,
            vision=vision,
            image_token_index=_image_token(file, text.vocab_size),
            vision_feature_layers=_feature_layers(file.vision_feature_layer, vision.num_hidden_layers),
            select_strategy=_select_strategy(file, model_type),
            projector_bias=file.multimodal_projector_bias,
            image_grid_pinpoints=_pinpoints(file, vision.image_size) if model_type == "llava_next" else (),
            eos_token_ids=_end_tokens(ends, in_text, file),
            dtype=_dtype(file, in_text),
        )


def _model_type(raw: Mapping, supported: tuple[str, ...], default: str | None = None, section: str = "") -> str:
    """The section's `model_type`, one of those supported."""
    given = convert(raw, ModelType, "config.json", section).model_type
    model_type = default if given is UNSET else given
    if model_type not in supported:
        key = f"{section}.model_type" if section else "model_type"
        expected = " or ".join(supported)
        raise UserError(f"config.json: {key} {model_type!r} is not supported (expected {expected})")
    return model_type


def _only(key: str, value: object, *implemented: object) -> None:
    """Refuse a field that has another value than those that this library implements."""
    if value not in implemented:
        expected = " or ".join(str(each) for each in implemented)
        raise UserError(f"config.json: {key} {value!r} is not supported (expected {expected})")


def _heads(file: Text) -> tuple[int, int, int]:
    """(attention heads, key/value heads, head_dim), checked against each other."""
    heads, kv_heads, head_dim = file.num_attention_heads, file.num_key_value_heads, file.head_dim
    if kv_heads is None:
        kv_heads = heads
    if heads % kv_heads:
        raise UserError(
            f"config.json: text_config.num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim is None:
        if file.hidden_size % heads:
            raise UserError(
                f"config.json: text_config.hidden_size {file.hidden_size} is not a multiple of "
                f"num_attention_heads {heads}"
            )
        head_dim = file.hidden_size // heads
    if head_dim % 2:
        raise UserError(f"config.json: text_config.head_dim {head_dim} is odd, rotary embeddings need an even one")
    return heads, kv_heads, head_dim


def _rope_theta(file: Text) -> float:
    """Theta is nested in `rope_parameters` (transformers 5) or stands beside `rope_scaling`."""
    nested = file.rope_parameters or file.rope_scaling
    if nested is None:
        return file.rope_theta
    rope_type = nested.type if nested.rope_type is UNSET else nested.rope_type
    if rope_type is not UNSET:
        _only("text_config rope type", rope_type, "default")
    return file.rope_theta if nested.rope_theta is UNSET else nested.rope_theta


def _image_token(file: Checkpoint, vocab_size: int) -> int:
    token = next((each for each in (file.image_token_index, file.image_token_id) if each is not UNSET), 32000)
    if not 0 <= token < vocab_size:
        raise UserError(f"config.json: image_token_index {token} is not a token id below vocab_size {vocab_size}")
    return token


def _select_strategy(file: Checkpoint, model_type: str) -> str:
    strategy = file.vision_feature_select_strategy
    _only("vision_feature_select_strategy", strategy, "default", "full")
    if strategy == "full" and model_type == "llava_next":
        raise UserError(
            "config.json: vision_feature_select_strategy 'full' has no meaning for llava_next (expected default)"
        )
    return strategy


def _feature_layers(value: int | list[int], num_layers: int) -> tuple[int, ...]:
    """One index or several, negative ones counted from the end, -> indices that are all >= 0."""
    indices = [value] if isinstance(value, int) else value
    if not all(-num_layers - 1 <= i <= num_layers for i in indices):
        raise UserError(f"config.json: vision_feature_layer {value} does not index the tower's {num_layers} layers")
    return tuple(i if i >= 0 else num_layers + 1 + i for i in indices)


def _pinpoints(file: Checkpoint, tile: int) -> tuple[tuple[int, int], ...]:
    pairs = _NEXT_PINPOINTS if file.image_grid_pinpoints is None else tuple(file.image_grid_pinpoints)
    for height, width in pairs:
        if height % tile or width % tile:
            raise UserError(
                f"config.json: image_grid_pinpoints has ({height}, {width}), no (height, width) in multiples of "
                f"vision_config.image_size {tile}"
            )
        if height * width > _MAX_PINPOINT_PIXELS:
            raise UserError(
                f"config.json: image_grid_pinpoints has ({height}, {width}), more than {_MAX_PINPOINT_PIXELS} pixels"
            )
    return pairs


def _end_tokens(*files: Generation | Saved) -> tuple[int, ...]:
    """All end-of-sequence ids, each once."""
    values = [file.eos_token_id for file in files if file.eos_token_id is not None]
    ids = [token for value in values for token in ([value] if isinstance(value, int) else value)]
    return tuple(dict.fromkeys(ids)) or (2,)  # 2 is transformers' default for LLaMA


def _dtype(*files: Saved) -> str:
    names = [name for file in files for name in (file.dtype, file.torch_dtype)]
    name = next((name for name in names if name), "float32")
    _only("dtype", name, *_DTYPES)
    return name
