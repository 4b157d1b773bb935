"""The LLaMA decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Touvron et al. 2023 (arXiv 2302.13971); Mistral has the same architecture. Modules are named as in
Hugging Face checkpoints, with two exceptions. `qkv_proj` is q_proj, k_proj and v_proj in one, and
`gate_up_proj` is gate_proj and up_proj, since one large product is faster than several small ones.
`weights/layout.py` knows which of their rows are which.

The decoder does not know how keys and values are kept. Each layer hands q, k, v to a cache (`Cache`
below) and gets the attention output back. After each layer it asks the cache which tokens go on to
the next one: in the prefill, a KV policy may drop some.

Dimensions: B sequences, S tokens, C channels, H query heads, H_kv key/value heads, D channels per
head.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minivlm.model.config import TextConfig


class Cache(Protocol):
    """What the decoder asks of a KV cache."""

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v [B, H_kv, S, D]; return the attention output [B, H, S, D] of q.

        q and k are already rotated.
        """

    def survivors(self, layer_idx: int) -> Tensor | None:
        """Indices [B, S'], ascending, of the tokens that go on after this layer. None keeps all."""


class RMSNorm(nn.Module):
    """x / rms(x), computed in float32, cast back and then scaled by a learned weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()  # squares overflow in float16 and lose precision in bfloat16
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rope_table(positions: Tensor, config: TextConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, S, D/2] of the rotary angles of integer positions [B, S].

    Angles are computed in float32, because bfloat16 cannot tell large positions apart; the result
    is in `dtype`.
    """
    dims = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / config.rope_theta ** (dims / config.head_dim)  # [D/2]
    angles = positions[:, None, :, None].float() * frequencies  # [B, 1, S, D/2]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x [B, H, S, D]; as in Hugging Face, dimension i is paired with i + D/2."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    # A cat makes inductor store its result. Without one it would fuse the rotation into the
    # attention and rotate the query again for every key.
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)  # q, k, v
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.heads) * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, H, S, D] and keys, and values, both [B, H_kv, S, D], of x [B, S, C]."""
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H + 2 * H_kv, S, D]
        heads, kv_heads, _ = self.heads
        qk, v = qkv.split((heads + kv_heads, kv_heads), dim=1)
        q, k = rotate(qk, rope).split((heads, kv_heads), dim=1)
        # A prompt's values get memory of their own: a view would keep all of `qkv` alive during attention.
        return q, k, v if x.shape[1] == 1 else v.contiguous()

    def merge(self, out: Tensor) -> Tensor:
        """The output projection of all heads together: [B, H, S, D] -> [B, S, C]."""
        return self.o_proj(out.transpose(1, 2).flatten(2))


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of their concatenation: [..., 2 * I] -> [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)  # in place, because this is where memory peaks


class MLP(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, rope: tuple[Tensor, Tensor], cache: Cache) -> Tensor:
        # In one expression, so that no local name keeps q, k and v alive while the MLP runs, when
        # memory peaks.
        return self.after(hidden, cache.attend(self.layer_idx, *self.before(hidden, rope)))

    # The parts before and after attention are methods of their own because they can be compiled by
    # themselves. The attention between them belongs to the cache, whose prefill stays eager.

    def before(self, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The part before attention: q, k, v of the hidden states [B, S, C]."""
        return self.self_attn.project(self.input_layernorm(hidden), rope)

    def after(self, hidden: Tensor, out: Tensor) -> Tensor:
        """The part after attention: both residual sums, given its output [B, H, S, D]."""
        hidden = hidden + self.self_attn.merge(out)
        del out  # as large as the hidden states, and the MLP needs the memory
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Llama(nn.Module):
    """Token embeddings, decoder layers and the final norm; the head belongs to `Llava`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Embeddings [B, S, C] at original positions [B, S] -> normed hidden states [B, S', C].

        S' < S if the cache dropped tokens on the way.
        """
        rope = rope_table(positions, self.config, hidden.dtype)
        for layer_idx, layer in enumerate(self.layers):
            hidden = layer(hidden, rope, cache)
            survivors = cache.survivors(layer_idx)  # [B, S'] or None
            if survivors is not None:
                index = survivors[..., None].expand(-1, -1, hidden.shape[-1])  # [B, S', C]
                hidden = hidden.gather(1, index)
                # The survivors keep their original positions, so their rotary angles do not change.
                positions = positions.gather(1, survivors)
                rope = rope_table(positions, self.config, hidden.dtype)
        return self.norm(hidden)
