"""Attention without an attention matrix: fused outputs and, apart from them, the weights of the few queries that score.

Nothing here ever holds S x S weights. Prefill goes through fused kernels; weights are computed for at most
`QUERY_BLOCK` queries at a time. Decode has two implementations of one interface: `decode_plain`, to read and to run
eagerly, slices what is live; `decode_static` has fixed shapes for `torch.compile`, which fuses it into one pass over
keys and one over values (on a CPU 2 to 4 times faster than SDPA with a single query).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

QUERY_BLOCK = 128  # queries whose weights are materialised at once
_COLUMN_BLOCK = 512  # keys that are in float32 at once
_ON_CUDA = 4  # times as many of both: there every block costs the same launches


def query_block(device: torch.device) -> int:
    """Queries whose weights are materialised at once."""
    return QUERY_BLOCK * (_ON_CUDA if device.type == "cuda" else 1)


def prefill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of a whole, right-padded prompt: q [B, H, S, D], k and v [B, H_kv, S, D] -> [B, H, S, D].

    No mask is needed for the padding: it comes after every real token.
    """
    return _fused(q, k, v, is_causal=True)


def prefill_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of S new tokens that see everything earlier and themselves causally.

    q [1, H, S, D]; k, v [1, H_kv, P + S, D], the P earlier entries first. A mask is built for one block of queries at
    a time.
    """
    new, past = q.shape[2], k.shape[2] - q.shape[2]
    columns = torch.arange(past + new, device=q.device)
    blocks = []
    for first in range(0, new, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, new)
        visible = columns[: past + last] <= torch.arange(past + first, past + last, device=q.device)[:, None]
        blocks.append(_fused(q[:, :, first:last], k[:, :, : past + last], v[:, :, : past + last], attn_mask=visible))
    return torch.cat(blocks, dim=2)


def _fused(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and (q.dtype == torch.float32 or "attn_mask" in how):
        # CUDA's fused kernels know no groups in this case, and the fallback would build the whole matrix.
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **how)


def weights(q: Tensor, k: Tensor, visible: Tensor | None = None) -> Tensor:
    """Attention weights of a few queries of one sequence, in float32, summed over each group of query heads.

    q [H, R, D] with R <= `query_block`, k [H_kv, M, D]; query r sees the first visible[r] columns, the others get
    exactly 0; None: it sees all. Returns [H_kv, R, M].
    """
    heads, count, dim = q.shape
    kv_heads, columns, _ = k.shape
    groups = heads // kv_heads
    q = q.reshape(kv_heads, groups * count, dim).float() * dim**-0.5
    scores = q.new_empty(kv_heads, groups * count, columns)
    size = _COLUMN_BLOCK * (_ON_CUDA if k.is_cuda else 1)
    for first in range(0, columns, size):  # otherwise 16-bit keys would exist a second time, in 32 bits
        block = slice(first, first + size)
        torch.bmm(q, k[:, block].float().transpose(1, 2), out=scores[..., block])
    scores = scores.view(kv_heads, groups, count, columns)
    if visible is not None:
        hidden = torch.arange(columns, device=k.device) >= visible[:, None]  # [R, M]
        scores.masked_fill_(hidden, -torch.inf)
    return scores.softmax(dim=-1).sum(dim=1)


def decode_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Sequence[tuple[int, int]],
    core: Tensor | None,
    want_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """One query per row over the row's live slots, row by row.

    q [B, H, 1, D]; k, v [B, H_kv, slots, D]; spans[b] = (first, end) of the live slots, of which only those marked in
    core [B, slots] take part, if it is given. Returns the output [B, H, 1, D] and, if wanted, the weights in float32
    summed over each group of query heads, [B, H_kv, slots].
    """
    batch, heads, _, dim = q.shape
    kv_heads, slots = k.shape[1], k.shape[2]
    attn = torch.zeros(batch, kv_heads, slots, device=q.device) if want_weights else None
    out = torch.empty_like(q)
    for row, (first, end) in enumerate(spans):
        query = q[row].view(kv_heads, heads // kv_heads, dim).float() * dim**-0.5  # [H_kv, G, D]
        scores = query @ k[row, :, first:end].float().transpose(1, 2)  # [H_kv, G, n]
        if core is not None:
            scores = scores.masked_fill(~core[row, first:end], -torch.inf)
        softmax = scores.softmax(dim=-1)
        out[row] = (softmax @ v[row, :, first:end].float()).view(heads, 1, dim)
        if attn is not None:
            attn[row, :, first:end] = softmax.sum(dim=1)
    return out, attn


def decode_static(q: Tensor, k: Tensor, v: Tensor, live: Tensor, want_weights: bool) -> tuple[Tensor, Tensor | None]:
    """The same with fixed shapes: `live` [B, slots] says which slots count. To be compiled.

    The values of slots without weight, dead ones among them, are selected away: 0 x NaN is NaN.
    """
    batch, heads, _, dim = q.shape
    kv_heads = k.shape[1]
    query = q.view(batch, kv_heads, heads // kv_heads, 1, dim).float() * dim**-0.5  # [B, H_kv, G, 1, D]
    scores = (query * k[:, :, None].float()).sum(dim=-1)  # [B, H_kv, G, slots]
    scores = torch.where(live[:, None, None], scores, -torch.inf)
    softmax = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    total = softmax.sum(dim=-1, keepdim=True)  # divided by last: not once per slot and channel
    values = torch.where(softmax[..., None] > 0, v[:, :, None], 0).float()  # [B, H_kv, G, slots, D]
    out = ((softmax[..., None] * values).sum(dim=-2) / total).view(batch, heads, 1, dim).to(q.dtype)
    return out, (softmax * total.reciprocal()).sum(dim=2) if want_weights else None
