"""The form of `config.json` and `generation_config.json`: what is read of them, in which types and bounds.

Defaults are those of transformers. The bounds lie far beyond every known model. What exceeds them
cannot be meant, and is refused before anything of that size is built.
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType

Layers = Annotated[int, Meta(ge=1, le=256)]
Width = Annotated[int, Meta(ge=1, le=1 << 20)]  # channels
Heads = Annotated[int, Meta(ge=1, le=1 << 12)]
HeadDim = Annotated[int, Meta(ge=1, le=1 << 12)]
Vocabulary = Annotated[int, Meta(ge=1, le=1 << 24)]
Length = Annotated[int, Meta(ge=1, le=1 << 31)]  # tokens
TileSide = Annotated[int, Meta(ge=1, le=1 << 12)]  # pixels
PinpointSide = Annotated[int, Meta(ge=1, le=1 << 16)]  # pixels
# Outside of these, angles and norms are infinite or NaN in float32.
Epsilon = Annotated[float, Meta(ge=1e-30, le=1)]
Theta = Annotated[float, Meta(ge=1, le=1e15)]
Word = Annotated[str, Meta(max_length=64)]  # one of a few names
# Some checkpoints write -1 for none. An id that the vocabulary does not have ends no answer.
EndToken = Annotated[int, Meta(ge=-1, lt=1 << 31)]
EndTokens = EndToken | Annotated[list[EndToken], Meta(max_length=1024)] | None


class ModelType(Struct, kw_only=True):
    """The key that decides how all others are read."""

    model_type: Word | UnsetType = UNSET


class Generation(Struct, kw_only=True):
    """`generation_config.json`."""

    eos_token_id: EndTokens = None


class Saved(Struct, kw_only=True):
    """What stands in `config.json` itself, in its `text_config`, or in both."""

    eos_token_id: EndTokens = None
    dtype: Word | None = None
    torch_dtype: Word | None = None


class Checkpoint(Saved, kw_only=True):
    """`config.json`; its sections have forms of their own."""

    text_config: dict[str, Any]
    vision_config: dict[str, Any]
    image_token_index: int | UnsetType = UNSET
    image_token_id: int | UnsetType = UNSET
    vision_feature_layer: int | Annotated[list[int], Meta(min_length=1, max_length=256)] = -2
    vision_feature_select_strategy: Word = "default"
    projector_hidden_act: Word = "gelu"
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool = False
    image_grid_pinpoints: (
        Annotated[list[tuple[PinpointSide, PinpointSide]], Meta(min_length=1, max_length=256)] | None
    ) = None


class Rope(Struct, kw_only=True):
    """`rope_parameters` of transformers 5, and `rope_scaling` of earlier ones."""

    rope_type: Word | UnsetType = UNSET
    type: Word | UnsetType = UNSET
    rope_theta: Theta | UnsetType = UNSET


class Text(Struct, kw_only=True):
    """`text_config` of `model_type` llama."""

    vocab_size: Vocabulary = 32000
    hidden_size: Width = 4096
    intermediate_size: Width = 11008
    num_hidden_layers: Layers = 32
    num_attention_heads: Heads = 32
    num_key_value_heads: Heads | None = None  # as many as attention heads
    head_dim: HeadDim | None = None
    max_position_embeddings: Length = 2048
    sliding_window: Length | None = None
    rms_norm_eps: Epsilon = 1e-6
    rope_theta: Theta = 10000.0
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None
    hidden_act: Word = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False


class MistralText(Text, kw_only=True):
    """`text_config` of `model_type` mistral, where its defaults are others."""

    intermediate_size: Width = 14336
    num_key_value_heads: Heads | None = 8
    max_position_embeddings: Length = 131072
    sliding_window: Length | None = 4096


class Vision(Struct, kw_only=True):
    """`vision_config` of `model_type` clip_vision_model."""

    hidden_size: Width = 768
    intermediate_size: Width = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: Heads = 12
    num_channels: int = 3
    image_size: TileSide = 224
    patch_size: TileSide = 32
    layer_norm_eps: Epsilon = 1e-5
    hidden_act: Word = "quick_gelu"
