"""What the package's own CUDA kernels compute, row by row in torch: their answers on the emulated device."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_split(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    end: Tensor,
    want_weights: bool,
    core_slots: Tensor | None,
    core_count: Tensor | None,
    tail_start: int,
) -> tuple[Tensor, Tensor]:
    """As minivlm/cache/decode_split.py says it; unwanted weights have no columns, as with the kernel."""
    batch, heads, _, dim = q.shape
    kv_heads, slots = k.shape[1], k.shape[2]
    out = torch.empty_like(q)
    by_row = []
    for row in range(batch):
        columns = torch.arange(int(first[row]), int(end[row]))  # those that count, and the slots they stand for
        read, width = columns, slots
        if core_slots is not None and core_count is not None:
            listed, offset = torch.arange(int(core_count[row])), core_slots.shape[1] - tail_start
            tail = torch.arange(tail_start, int(end[row]))
            columns, read = torch.cat((listed, offset + tail)), torch.cat((core_slots[row, listed], tail))
            width = offset + slots
        query = q[row].view(kv_heads, heads // kv_heads, dim).float() * dim**-0.5  # [H_kv, G, D]
        softmax = (query @ k[row][:, read].float().transpose(1, 2)).softmax(dim=-1)  # [H_kv, G, n]
        out[row] = (softmax @ v[row][:, read].float()).view(heads, 1, dim)
        by_row.append(torch.zeros(kv_heads, width).index_copy_(1, columns, softmax.sum(dim=1)))
    weights = torch.stack(by_row)
    return out, weights if want_weights else weights[..., :0]


KERNELS = {"minivlm::decode_split": decode_split}
