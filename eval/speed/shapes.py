"""Models to time: the shapes of the real checkpoints with random weights, and random prompts.

What a decode step costs depends on shapes and counts alone, with one exception: the number of
entries of a core that change from one refresh to the next. Trained models look at much the same
places step after step; models with random weights do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import weights
from minivlm.errors import UserError
from minivlm.files import is_folder, user_path
from minivlm.model.config import VLMConfig
from minivlm.model.llava import Llava
from weights.build import read_config

_CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_TINY_TOWER = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}


def _shape(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    context: int,
    *,
    model_type: str = "llava_next",
    tower: dict[str, int] = _CLIP,
    dtype: str = "float16",
    rope_theta: float | None = None,
) -> dict[str, Any]:
    """The content of a config.json."""
    decoder: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
    }
    if rope_theta is not None:
        decoder["rope_theta"] = rope_theta
    return {
        "model_type": model_type,
        "image_token_index": vocab - 64,
        "text_config": decoder,
        "vision_config": tower,
        "torch_dtype": dtype,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": _shape(4096, 11008, 32, 32, 32, 32064, 4096, model_type="llava"),
    "llava-1.5-13b": _shape(5120, 13824, 40, 40, 40, 32064, 4096, model_type="llava"),
    "llava-v1.6-vicuna-7b": _shape(4096, 11008, 32, 32, 32, 32064, 4096),
    "llava-v1.6-vicuna-13b": _shape(5120, 13824, 40, 40, 40, 32064, 4096),
    "llava-v1.6-mistral-7b": _shape(4096, 14336, 32, 32, 8, 32064, 32768, rope_theta=1e6),
    "llava-v1.6-34b": _shape(7168, 20480, 60, 56, 8, 64064, 4096, rope_theta=5e6),
    "llama3-llava-next-8b": _shape(4096, 14336, 32, 32, 8, 128320, 8192, rope_theta=5e5),
    "cpu-268m": _shape(1024, 2752, 16, 16, 16, 32064, 4096, tower=_TINY_TOWER, dtype="float32"),
    "cpu-tiny": _shape(64, 96, 2, 4, 2, 512, 2048, tower=_TINY_TOWER, dtype="float32"),
}


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts of one length: ids [S] and image features [N, C] of each sequence."""

    ids: list[Tensor]
    features: list[Tensor]

    @property
    def length(self) -> int:
        return len(self.ids[0])


def shape_config(shape: str) -> VLMConfig:
    """The config of a named shape or of a checkpoint folder.

    Raises `UserError` for anything else.
    """
    if shape in SHAPES:
        return VLMConfig.from_dict(SHAPES[shape])
    folder = user_path(shape)
    if not is_folder(folder):
        raise UserError(f"--shape {shape!r} is neither a checkpoint folder nor one of {', '.join(SHAPES)}")
    return read_config(folder)


def make_model(shape: str, device: str, dtype: str, seed: int, random_weights: bool) -> Llava:
    """Load the checkpoint of a folder, or make a model of a shape with random weights."""
    config = shape_config(shape)
    if shape not in SHAPES and not random_weights:
        return weights.load_model(user_path(shape), device=device, dtype=dtype)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA device that torch can use")
    on_cuda = device != "cpu" and torch.cuda.is_available()
    if dtype == "auto":
        dtype = config.dtype if on_cuda else "float32"
    return random_model(config, torch.device("cuda" if on_cuda else "cpu"), getattr(torch, dtype), seed)


def random_model(config: VLMConfig, device: torch.device, dtype: torch.dtype, seed: int) -> Llava:
    """Make a model whose weights keep activations near one.

    Weights are normal, scaled by the number of inputs; those of norms are one.
    """
    with torch.device("meta"):
        model = Llava(config).to(dtype)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.fill_(1.0)
        else:
            fan_in = parameter[0].numel() if parameter.ndim > 1 and "embed_tokens" not in name else 1
            parameter.normal_(std=fan_in**-0.5, generator=generator)
    return model


def synthetic_prompts(model: Llava, batch: int, vision_tokens: int, text_tokens: int, seed: int) -> Prompts:
    """Make prompts of random text around `vision_tokens` image tokens with random features.

    Each sequence of the batch has another prompt.
    """
    config, device = model.config, model.lm_head.weight.device
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, config.text.vocab_size - 1, (batch, text_tokens), generator=generator)
    text += (text >= config.image_token_index).long()  # any token but the image token
    image = torch.full((vision_tokens,), config.image_token_index)
    before = text_tokens // 2
    ids = [torch.cat((words[:before], image, words[before:])) for words in text]
    on_device = torch.Generator(device).manual_seed(seed)
    shape, dtype = (vision_tokens, config.text.hidden_size), model.lm_head.weight.dtype
    features = [
        torch.randn(shape, generator=on_device, device=device, dtype=dtype)
        for _ in range(batch if vision_tokens else 0)
    ]
    return Prompts(ids, features)
