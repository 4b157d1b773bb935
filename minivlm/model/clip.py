"""The CLIP vision transformer (Radford et al. 2021, arXiv 2103.00020), as far as LLaVA reads it.

Modules are named as in Hugging Face checkpoints (`pre_layrnorm` is their spelling). Checkpoints
also contain the layers after the last feature layer and `post_layernorm`; LLaVA never uses these,
so they are not built.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minivlm.model.config import VisionConfig


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU, with which CLIP was trained."""
    return x * torch.sigmoid(1.702 * x)


class Embeddings(nn.Module):
    """Non-overlapping patches and a class token, with learned positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(config.grid**2 + 1, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels)  # [tiles, C, grid, grid]
        patches = patches.flatten(2).transpose(1, 2)  # [tiles, grid², C]
        cls = self.class_embedding.expand(len(pixels), 1, -1)
        embeds = torch.cat((cls, patches), dim=1)  # [tiles, 1 + grid², C]
        return embeds + self.position_embedding.weight


class SelfAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q = self._split(self.q_proj(x))
        k = self._split(self.k_proj(x))
        v = self._split(self.v_proj(x))
        out = F.scaled_dot_product_attention(q, k, v)  # [tiles, H, S, D], without a mask
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """[tiles, S, C] -> [tiles, H, S, D]"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.act = quick_gelu if config.hidden_act == "quick_gelu" else F.gelu
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class EncoderLayer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """Holds the layers under the name they have in checkpoints; `ClipVision` runs them."""

    def __init__(self, config: VisionConfig, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(num_layers))


class ClipVision(nn.Module):
    """The vision tower: tiles in, hidden states of the feature layers out.

    `feature_layers` are indices into [embeddings, layer 1, ..., layer n]. If there are several,
    their states are concatenated along the channels.
    """

    def __init__(self, config: VisionConfig, feature_layers: tuple[int, ...]) -> None:
        super().__init__()
        self.feature_layers = feature_layers
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.encoder = Encoder(config, max(feature_layers))

    def forward(self, pixels: Tensor) -> Tensor:
        """[tiles, 3, image_size, image_size] -> [tiles, 1 + grid², C · len(feature_layers)]

        The class token comes first, then the patches line by line.
        """
        states = [self.pre_layrnorm(self.embeddings(pixels))]  # each [tiles, 1 + grid², C]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        return torch.cat([states[i] for i in self.feature_layers], dim=-1)
