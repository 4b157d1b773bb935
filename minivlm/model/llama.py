"""The LLaMA decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Touvron et al. 2023 (arXiv 2302.13971); Mistral has the same architecture.  Module names are those of
Hugging Face checkpoints, so loading is a rename of prefixes.  The decoder knows nothing of how keys
and values are kept: each layer hands q, k, v to a cache (`Cache` below) and gets the attention
output back; in prefill it asks once per layer which rows of the sequence go on.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minivlm.model.config import TextConfig


class Cache(Protocol):
    """What the decoder asks of a KV cache."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store this step's k, v [B, H_kv, S, D] (rotated) and return the attention of q [B, H, S, D], same shape."""

    def survivors(self, layer: int) -> Tensor | None:
        """Row indices [B, S'] of the hidden states that go on after `layer`, ascending; None keeps all."""


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, then scaled."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rope_table(positions: Tensor, config: TextConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, S, D/2] for integer positions [B, S]; angles in float32, the result in `dtype`."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
    angles = positions[:, None, :, None].float() * (1.0 / config.rope_theta**exponents)  # [B, 1, S, D/2]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding in the half-split form: dimension i is paired with i + D/2 (Hugging Face's layout)."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    # Ending in cat, the result is stored; else inductor would rotate the query again for every key it meets.
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, S, D], keys and values [B, H_kv, S, D] of x [B, S, C], rotated."""
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.head_dim)
        q = self.q_proj(x).view(heads).transpose(1, 2)  # [B, H, S, D]
        k = self.k_proj(x).view(heads).transpose(1, 2)  # [B, H_kv, S, D]
        v = self.v_proj(x).view(heads).transpose(1, 2)
        return rotate(q, rope), rotate(k, rope), v

    def merge(self, out: Tensor) -> Tensor:
        """The attention's output [B, H, S, D] -> [B, S, C]."""
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, rope: tuple[Tensor, Tensor], cache: Cache) -> Tensor:
        return self.after(hidden, cache.attend(self.layer, *self.before(hidden, rope)))

    def before(self, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What comes before attention: q, k, v."""
        return self.self_attn.project(self.input_layernorm(hidden), rope)

    def after(self, hidden: Tensor, out: Tensor) -> Tensor:
        """What comes behind it: both residual sums."""
        hidden = hidden + self.self_attn.merge(out)
        del out  # as large as the hidden states, and the MLP's are larger still
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Llama(nn.Module):
    """Token embeddings, decoder layers and the final norm; the language-model head lives with the caller."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Embeddings [B, S, C] at original positions [B, S] -> normed hidden states [B, S', C].

        S' < S when the cache's prompt filter dropped rows on the way.
        """
        rope = rope_table(positions, self.config, hidden.dtype)
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden, rope, cache)
            rows = cache.survivors(i)
            if rows is not None:
                hidden = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
                positions = positions.gather(1, rows)
                rope = rope_table(positions, self.config, hidden.dtype)
        return self.norm(hidden)
