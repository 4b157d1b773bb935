"""Single-query attention on CUDA, split over the sequence: two Triton kernels, after Flash-Decoding.

At small batches there are fewer heads than multiprocessors, so each head's live entries are shared out among several
programs (Dao, Haziza, Massa, Sizov, 2023: https://crfm.stanford.edu/2023/10/12/flashdecoding.html). The first kernel
leaves, for each share, the weighted values with their maximum and sum; the second puts the shares together.

What is shared out are a row's live entries, numbered from 0, and not the buffer's slots: dead slots are never loaded,
however large the buffer is, and all programs of a row have work. The grid depends on shapes alone. `decode_static` in
attention.py says the same to read; inductor's code for it takes one program for a whole head, and reads the values
across their rows where it gathers.
"""

# Triton ships no types, and gives a kernel's arguments its own.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

_BLOCK = 32  # entries that a program holds at once in 16 bit; half as many in float32
_COLUMNS = 256  # columns of weights for a program of the second kernel
_PROGRAMS = 512  # about four for each multiprocessor of an A100 or H100
_SMALL_SHARE = 64  # entries: with fewer, writing a share's result and reading it again would be felt
_LARGE_SHARE = 512  # entries: with more, rows of different lengths would leave the last programs running alone
_MAX_SPLITS = 64  # the second kernel holds that many results of a head at once


def decode_split(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    end: Tensor,
    want_weights: bool,
    core_slots: Tensor | None = None,
    core_count: Tensor | None = None,
    tail_start: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """One query per row, q [B, H, 1, D], over the live slots of k and v [B, H_kv, slots, D].

    Without `core_slots` a row's live slots are first <= slot < end, both int64 [B], and there is a column per slot.
    With `core_slots`, int64 [B, width], they are its first `core_count` [B] numbers, all left of `tail_start`, and
    tail_start <= slot < end; the columns are those of the list, then the tail's. Every row has a live slot.

    Returns the output [B, H, 1, D] and, if wanted, the weights in float32 summed over each group of query heads,
    [B, H_kv, columns], exactly 0 where nothing is live. Raises ValueError for a tensor, `q` aside, that is not
    contiguous: the kernels read them in place.
    """
    tensors = {"k": k, "v": v, "first": first, "end": end, "core_slots": core_slots, "core_count": core_count}
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous: strides {tensor.stride()} of {tuple(tensor.shape)}")
    out, weights = _decode_split(q, k, v, first, end, want_weights, core_slots, core_count, tail_start)
    return out, weights if want_weights else None


@triton_op("minivlm::decode_split", mutates_args={})
def _decode_split(
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
    """The same as an operator of torch's, whose kernels inductor sees. It cannot return None: unwanted weights have no
    columns."""
    batch, heads, _, dim = q.shape
    kv_heads, slots = k.shape[1], k.shape[2]
    groups, width = heads // kv_heads, 0 if core_slots is None else core_slots.shape[1]
    columns = slots if core_slots is None else width + slots - tail_start
    splits = split_count(batch * kv_heads, columns)

    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    weights = q.new_empty(batch, kv_heads, columns if want_weights else 0, dtype=torch.float32)
    scores = q.new_empty(batch, kv_heads, groups, columns if want_weights else 0, dtype=torch.float32)
    part = q.new_empty(batch, kv_heads, splits, groups, dim, dtype=torch.float32)
    best, total = (q.new_empty(part.shape[:-1], dtype=torch.float32) for _ in range(2))
    layout = {
        "KV_HEADS": kv_heads,
        "GROUPS": groups,
        "DIM": dim,
        "CHANNELS": triton.next_power_of_2(dim),
        "INDEXED": core_slots is not None,
        "WEIGHTS": want_weights,
    }
    padded_groups, is_float32 = triton.next_power_of_2(groups), q.dtype == torch.float32
    index = first if core_slots is None else core_slots  # never read without a list
    listed = first if core_count is None else core_count
    wrap_triton(_parts_kernel)[(batch * kv_heads, splits)](
        q.contiguous(), k, v, first, end, index, listed, scores, part, best, total,
        slots, width, tail_start, columns,
        # A tensor core takes 16 rows; float32 is multiplied without one.
        ROWS=padded_groups if is_float32 else max(16, padded_groups),
        BLOCK=_BLOCK // 2 if is_float32 else _BLOCK, **layout,
    )  # fmt: skip
    blocks = triton.cdiv(columns, _COLUMNS) if want_weights else 0
    wrap_triton(_whole_kernel)[(batch * kv_heads, groups + blocks)](
        scores, part, best, total, first, end, listed, out, weights, splits, width, tail_start, columns,
        ROWS=padded_groups, SPLITS=triton.next_power_of_2(splits), BLOCK=_COLUMNS, **layout,
    )  # fmt: skip
    return out, weights


def split_count(pairs: int, columns: int) -> int:
    """Into how many shares the entries of each of `pairs` rows x key heads go.

    A share has `_LARGE_SHARE` columns at most, and fewer, down to `_SMALL_SHARE`, where multiprocessors would be idle.
    """
    wanted = max(triton.cdiv(_PROGRAMS, pairs), triton.cdiv(columns, _LARGE_SHARE))
    return min(wanted, triton.cdiv(columns, _SMALL_SHARE), _MAX_SPLITS)


@triton.jit
def _parts_kernel(
    q, k, v, first, end, core_slots, core_count, scores, part, best, total,
    slots, width, tail_start, columns,
    KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr,
    INDEXED: tl.constexpr, WEIGHTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One share of a row's live entries, for a group of query heads; programs (row x key head, share).

    part[s] = sum of exp(x - best) v and total[s] = sum of exp(x - best), where x are the share's scaled scores and best
    their maximum, for each query head. A share without entries has best = -inf, and no part.
    """
    pair, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row, pair = pair // KV_HEADS, pair.to(tl.int64)  # what `pair` is multiplied with need not fit into 32 bits
    group, channel = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    is_head, is_channel = (group < GROUPS)[:, None], (channel < DIM)[None]
    query = tl.load(q + (pair * GROUPS + group[:, None]) * DIM + channel[None], is_head & is_channel, 0.0)

    first_slot, listed, live = _live_entries(row, first, end, core_count, tail_start, INDEXED)
    share = tl.cdiv(tl.cdiv(live, splits), BLOCK) * BLOCK
    stop = tl.minimum(split * share + share, live)
    keys, values = k + pair * slots * DIM, v + pair * slots * DIM
    index, row_scores = core_slots + row.to(tl.int64) * width, scores + pair * GROUPS * columns

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    weight_sum = tl.zeros([ROWS], tl.float32)
    value_sum = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(split * share, stop, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        is_live = entry < stop
        if INDEXED:
            in_list = entry < listed
            slot = tl.load(index + entry, in_list & is_live, 0).to(tl.int32)
            slot = tl.where(in_list, slot, tail_start + entry - listed)
            column = tl.where(in_list, entry, width + entry - listed)
        else:
            slot = first_slot + entry
            column = slot
        at = slot[:, None] * DIM + channel[None]  # [BLOCK, CHANNELS], within a head
        key = tl.load(keys + at, is_live[:, None] & is_channel, 0.0)
        # The scale is no argument: of a Python float inductor makes one of 64 bits, and all after it were, too.
        x = tl.dot(query, tl.trans(key), input_precision="ieee") * DIM**-0.5  # [ROWS, BLOCK]
        x = tl.where(is_live[None], x, float("-inf"))
        if WEIGHTS:
            tl.store(row_scores + group[:, None] * columns + column[None], x, is_head & is_live[None])
        new_maximum = tl.maximum(maximum, tl.max(x, 1))
        decay, weight = tl.exp(maximum - new_maximum), tl.exp(x - new_maximum[:, None])
        value = tl.load(values + at, is_live[:, None] & is_channel, 0.0)
        added = tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        value_sum = value_sum * decay[:, None] + added
        weight_sum = weight_sum * decay + tl.sum(weight, 1)
        maximum = new_maximum

    result = (pair * splits + split) * GROUPS + group
    tl.store(best + result, maximum, group < GROUPS)
    tl.store(total + result, weight_sum, group < GROUPS)
    if split * share < stop:
        tl.store(part + result[:, None] * DIM + channel[None], value_sum, is_head & is_channel)


@triton.jit
def _whole_kernel(
    scores, part, best, total, first, end, core_count, out, weights, splits, width, tail_start, columns,
    KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr,
    INDEXED: tl.constexpr, WEIGHTS: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs (row x key head, task): the first tasks are the outputs of the group's query heads, the others blocks of
    weights."""
    pair, task = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split = tl.arange(0, SPLITS)
    is_split, result = split < splits, (pair * splits + split) * GROUPS  # [SPLITS]
    if task < GROUPS:
        channel = tl.arange(0, CHANNELS)
        maximum = tl.load(best + result + task, is_split, float("-inf"))  # [SPLITS]
        factor = tl.exp(maximum - tl.max(maximum, 0))
        whole = tl.sum(factor * tl.load(total + result + task, is_split, 0.0), 0)
        is_part = (maximum > float("-inf"))[:, None] & (channel < DIM)[None]
        parts = tl.load(part + (result + task)[:, None] * DIM + channel[None], is_part, 0.0)  # [SPLITS, CHANNELS]
        output = tl.sum(factor[:, None] * parts, 0) / whole
        tl.store(out + (pair * GROUPS + task) * DIM + channel, output.to(out.dtype.element_ty), channel < DIM)
    elif WEIGHTS:
        group, column = tl.arange(0, ROWS), (task - GROUPS) * BLOCK + tl.arange(0, BLOCK)
        is_head = group < GROUPS
        results, is_result = result[:, None] + group[None], is_split[:, None] & is_head[None]
        maxima = tl.load(best + results, is_result, float("-inf"))  # [SPLITS, ROWS]
        top = tl.where(is_head, tl.max(maxima, 0), 0.0)  # [ROWS]
        sums = tl.sum(tl.exp(maxima - top[None]) * tl.load(total + results, is_result, 0.0), 0)
        sums = tl.where(is_head, sums, 1.0)  # [ROWS]

        first_slot, listed, live = _live_entries(pair // KV_HEADS, first, end, core_count, tail_start, INDEXED)
        if INDEXED:
            is_live = (column < listed) | ((column >= width) & (column - width < live - listed))
        else:
            is_live = (column >= first_slot) & (column < first_slot + live)
        at = (pair * GROUPS + group[:, None]) * columns + column[None]
        x = tl.load(scores + at, is_head[:, None] & is_live[None], float("-inf"))  # [ROWS, BLOCK]
        weight = tl.sum(tl.exp(x - top[:, None]) / sums[:, None], 0)
        tl.store(weights + pair * columns + column, weight, column < columns)


@triton.jit
def _live_entries(row, first, end, core_count, tail_start, INDEXED: tl.constexpr):
    """A row's first live slot, how many of its live entries are listed, and how many there are."""
    last = tl.load(end + row).to(tl.int32)
    if INDEXED:
        first_slot = tail_start
        listed = tl.load(core_count + row).to(tl.int32)
    else:
        first_slot = tl.load(first + row).to(tl.int32)
        listed = 0
    return first_slot, listed, listed + tl.maximum(last - first_slot, 0)
