"""What the package's own CUDA kernels compute, row by row in torch: their answers on the emulated device."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_split(
    q: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    position: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    place: Tensor,
    used: Tensor,
    left: Tensor,
    core_slots: Tensor | None,
    tail_start: int,
    want_weights: bool,
) -> tuple[Tensor, Tensor]:
    """As minivlm/cache/decode_split.py says it; unwanted weights have no columns, as with the kernels."""
    batch, heads, _, dim = q.shape
    kv_heads, slots = k.shape[1], k.shape[2]
    tail_column = tail_start if core_slots is None else core_slots.shape[1]
    out, by_row = torch.empty_like(q), []
    for row in range(batch):
        head = torch.arange(kv_heads)
        where = (row, head, tail_start + place[row])  # [H_kv]
        k[where], v[where], positions[where] = new_k[row, :, 0], new_v[row, :, 0], position[row, 0]
        count = int(left[row])
        if core_slots is None:
            slots_left = columns = torch.arange(tail_start - count, tail_start)
        else:
            slots_left, columns = core_slots[row, :count], torch.arange(count)
        tail = torch.arange(int(used[row]))
        live, columns = torch.cat((slots_left, tail_start + tail)), torch.cat((columns, tail_column + tail))
        query = q[row].view(kv_heads, heads // kv_heads, dim).float() * dim**-0.5  # [H_kv, G, D]
        softmax = (query @ k[row][:, live].float().transpose(1, 2)).softmax(dim=-1)  # [H_kv, G, n]
        out[row] = (softmax @ v[row][:, live].float()).view(heads, 1, dim)
        weights = torch.zeros(kv_heads, tail_column + slots - tail_start)
        by_row.append(weights.index_copy_(1, columns, softmax.sum(dim=1)))
    weights = torch.stack(by_row)
    return out, weights if want_weights else weights[..., :0]


KERNELS = {"minivlm::decode_split": decode_split}
