"""Attention without an attention matrix: fused outputs, and apart from them the few rows a policy scores with.

Nothing here ever holds S x S weights: prefill goes through fused kernels, and rows are computed for at most
`ROW_BLOCK` queries at a time.  Decode has two implementations of one interface: `decode_plain`, to read and to
run eagerly, slices what is live; `decode_static` has fixed shapes for `torch.compile`, which fuses it into one pass
over keys and one over values (on a CPU 2 to 4 times faster than SDPA with a single query).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

ROW_BLOCK = 128  # queries per block wherever weights are materialised
_COLUMN_BLOCK = 512  # keys that are in float32 at once


def prefill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of a whole, right-padded prompt: q [B, H, S, D], k and v [B, H_kv, S, D] -> [B, H, S, D].

    No mask is needed for the padding: it stands behind every real row.
    """
    return _fused(q, k, v, is_causal=True)


def prefill_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of S new tokens that see everything earlier and themselves causally.

    q [1, H, S, D]; k, v [1, H_kv, P + S, D], the P earlier entries first.  A mask is built for one block of
    queries at a time.
    """
    new, past = q.shape[2], k.shape[2] - q.shape[2]
    columns = torch.arange(past + new, device=q.device)
    blocks = []
    for first in range(0, new, ROW_BLOCK):
        last = min(first + ROW_BLOCK, new)
        visible = columns[: past + last] <= torch.arange(past + first, past + last, device=q.device)[:, None]
        blocks.append(_fused(q[:, :, first:last], k[:, :, : past + last], v[:, :, : past + last], attn_mask=visible))
    return torch.cat(blocks, dim=2)


def _fused(q: Tensor, k: Tensor, v: Tensor, **how) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and (q.dtype == torch.float32 or "attn_mask" in how):
        # CUDA's fused kernels for this case know no groups; the fallback would build the whole matrix.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **how)


def rows(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """Attention weights of a few queries of one sequence, in float32, summed over each group of query heads.

    q [H, R, D] with R <= ROW_BLOCK, k [H_kv, M, D]; row r sees the first visible[r] columns, the others get
    exactly 0.  Returns [H_kv, R, M].
    """
    heads, count, dim = q.shape
    (kv_heads, columns, _), groups = k.shape, heads // len(k)
    q = q.reshape(kv_heads, groups * count, dim).float() * dim**-0.5
    weights = q.new_empty(kv_heads, groups * count, columns)
    for first in range(0, columns, _COLUMN_BLOCK):  # else 16-bit keys would be there a second time, in 32 bits
        block = slice(first, first + _COLUMN_BLOCK)
        torch.bmm(q, k[:, block].float().transpose(1, 2), out=weights[..., block])
    weights = weights.view(kv_heads, groups, count, columns)
    hidden = torch.arange(columns, device=k.device) >= visible[:, None]
    return weights.masked_fill_(hidden, -torch.inf).softmax(dim=-1).sum(dim=1)


def decode_plain(
    q: Tensor, k: Tensor, v: Tensor, spans: Sequence[tuple[int, int]], core: Tensor | None, want_row: bool
) -> tuple[Tensor, Tensor | None]:
    """One query per sequence over its live slots, sequence by sequence.

    q [B, H, 1, D]; k, v [B, H_kv, slots, D]; spans[b] = (first, end) of the live slots, of which only those marked in
    core [B, slots] take part, if given.  Returns the output [B, H, 1, D] and, if wanted, the weights in float32 summed
    over each group's query heads [B, H_kv, slots].
    """
    batch, heads, _, dim = q.shape
    kv_heads, slots = k.shape[1], k.shape[2]
    row = torch.zeros(batch, kv_heads, slots, device=q.device) if want_row else None
    out = torch.empty_like(q)
    for b, (first, end) in enumerate(spans):
        query = q[b].view(kv_heads, heads // kv_heads, dim).float() * dim**-0.5  # [H_kv, G, D]
        scores = query @ k[b, :, first:end].float().transpose(1, 2)  # [H_kv, G, n]
        if core is not None:
            scores = scores.masked_fill(~core[b, first:end], -torch.inf)
        weights = scores.softmax(dim=-1)
        out[b] = (weights @ v[b, :, first:end].float()).view(heads, 1, dim)
        if want_row:
            row[b, :, first:end] = weights.sum(dim=1)
    return out, row


def decode_static(q: Tensor, k: Tensor, v: Tensor, live: Tensor, want_row: bool) -> tuple[Tensor, Tensor | None]:
    """As `decode_plain` with fixed shapes: `live` [B, slots] says which slots count.  To be compiled.

    The values of slots without weight, dead ones among them, are selected away: 0 x NaN is NaN.
    """
    batch, heads, _, dim = q.shape
    kv_heads = k.shape[1]
    query = q.view(batch, kv_heads, heads // kv_heads, 1, dim).float() * dim**-0.5
    scores = torch.where(
        live[:, None, None], (query * k[:, :, None].float()).sum(dim=-1), -torch.inf
    )  # [B, H_kv, G, slots]
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    total = weights.sum(dim=-1, keepdim=True)  # divided by last: not once per slot and channel
    values = torch.where(weights[..., None] > 0, v[:, :, None], 0).float()
    out = ((weights[..., None] * values).sum(dim=-2) / total).view(batch, heads, 1, dim).to(q.dtype)
    return out, (weights * total.reciprocal()).sum(dim=2) if want_row else None
