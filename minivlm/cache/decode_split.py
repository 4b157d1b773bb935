"""A decode step's attention on CUDA, split over the sequence: two Triton kernels, after Flash-Decoding.

At small batches there are fewer heads than multiprocessors, so each head's live entries are shared out among several
programs (Dao, Haziza, Massa, Sizov, 2023: https://crfm.stanford.edu/2023/10/12/flashdecoding.html). The first kernel
leaves, for each share, the weighted values with their maximum and sum; the second puts the shares together.

The first kernel also writes the step's token where it belongs. Its key and value are never read back: each head's first
program adds them from registers, and all its programs pass over their place. So none has to wait for another.

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
    token: tuple[Tensor, Tensor, Tensor, Tensor],
    buffers: tuple[Tensor, Tensor, Tensor],
    place: Tensor,
    used: Tensor,
    left: Tensor,
    tail_start: int,
    want_weights: bool,
    core_slots: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Write one token of each row into a layer's buffers, and attend to all that is live.

    The token is its query [B, H, 1, D], its key and value [B, H_kv, 1, D] and its position, int32 [B, 1]. The buffers
    are those of keys and values [B, H_kv, slots, D] and of positions, int32 [B, H_kv, slots]. All other tensors are
    int64. `place` [B, H_kv] says where in the tail the token goes: to one of its first `used` [B, 1] places.

    A row's live slots are the last `left` [B, 1] ones before `tail_start` and the used ones from there on; there is a
    column per slot. With `core_slots` [B, width] they are its first `left` numbers, all before `tail_start`, and the
    used ones; the columns are those of the list, then the tail's.

    Returns the output [B, H, 1, D] and, if wanted, the weights in float32 summed over each group of query heads,
    [B, H_kv, columns], exactly 0 where nothing is live. Raises ValueError for buffers that are not contiguous: the
    kernels write them in place.
    """
    for tensor in buffers:
        if not tensor.is_contiguous():
            raise ValueError(f"a buffer is not contiguous: strides {tensor.stride()} of {tuple(tensor.shape)}")
    out, weights = _decode_split(*token, *buffers, place, used, left, core_slots, tail_start, want_weights)
    return out, weights if want_weights else None


@triton_op("minivlm::decode_split", mutates_args={"k", "v", "positions"})
def _decode_split(
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
    # Parts of one product as they are: of each row, all heads one after the other.
    new = [tensor if tensor[0].is_contiguous() else tensor.contiguous() for tensor in (q, new_k, new_v)]
    layout = {
        "KV_HEADS": kv_heads,
        "GROUPS": groups,
        "DIM": dim,
        "CHANNELS": triton.next_power_of_2(dim),
        "INDEXED": core_slots is not None,
        "WEIGHTS": want_weights,
    }
    padded_groups, is_float32 = triton.next_power_of_2(groups), q.dtype == torch.float32
    wrap_triton(_parts_kernel)[(batch * kv_heads, splits)](
        *new, position.contiguous(), k, v, positions,
        place.contiguous(), used.contiguous(), left.contiguous(),
        left if core_slots is None else core_slots.contiguous(),  # without a list nothing is read there
        scores, part, best, total, *(tensor.stride(0) for tensor in new), slots, width, tail_start, columns,
        # A tensor core takes 16 rows; float32 is multiplied without one.
        ROWS=padded_groups if is_float32 else max(16, padded_groups),
        BLOCK=_BLOCK // 2 if is_float32 else _BLOCK, **layout,
    )  # fmt: skip
    blocks = triton.cdiv(columns, _COLUMNS) if want_weights else 0
    wrap_triton(_whole_kernel)[(batch * kv_heads, groups + blocks)](
        scores, part, best, total, used.contiguous(), left.contiguous(), out, weights,
        splits, width, tail_start, columns,
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
    q, new_k, new_v, position, k, v, positions, place, used, left_counts, core_slots, scores, part, best, total,
    q_stride, k_stride, v_stride, slots, width, tail_start, columns,
    KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr,
    INDEXED: tl.constexpr, WEIGHTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One share of a row's live entries, for a group of query heads; programs (row x key head, share).

    part[s] = sum of exp(x - best) v and total[s] = sum of exp(x - best), where x are the share's scaled scores and best
    their maximum, for each query head. The token counts as the first share's, wherever its place is. A share without
    other entries than its place has best = -inf, and a part that is not read.
    """
    pair, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row, head = pair // KV_HEADS, pair % KV_HEADS
    pair = pair.to(tl.int64)  # what it is multiplied with need not fit into 32 bits
    group, channel = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    is_head, is_channel = (group < GROUPS)[:, None], (channel < DIM)[None]
    query = q + row * q_stride + (head * GROUPS + group[:, None]) * DIM + channel[None]
    query = tl.load(query, is_head & is_channel, 0.0)

    # The row's entries are numbered: first those left of the tail, then the used places of the tail.
    left = tl.load(left_counts + row).to(tl.int32)
    live = left + tl.load(used + row).to(tl.int32)
    new_place = tl.load(place + pair).to(tl.int32)  # the token's, counted from the tail's start
    share = tl.cdiv(tl.cdiv(live, splits), BLOCK) * BLOCK
    stop = tl.minimum(split * share + share, live)
    keys, values = k + pair * slots * DIM, v + pair * slots * DIM
    index, row_scores = core_slots + row.to(tl.int64) * width, scores + pair * GROUPS * columns

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    weight_sum = tl.zeros([ROWS], tl.float32)
    value_sum = tl.zeros([ROWS, CHANNELS], tl.float32)
    if split == 0:  # the token itself
        slot = tail_start + new_place
        new, in_entry = head * DIM + channel, channel < DIM  # [CHANNELS]
        key = tl.load(new_k + row * k_stride + new, in_entry, 0.0)
        value = tl.load(new_v + row * v_stride + new, in_entry, 0.0)
        tl.store(keys + slot * DIM + channel, key, in_entry)
        tl.store(values + slot * DIM + channel, value, in_entry)
        tl.store(positions + pair * slots + slot, tl.load(position + row))
        maximum = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None], 1) * DIM**-0.5  # [ROWS]
        weight_sum += 1.0
        value_sum += value.to(tl.float32)[None]
        if WEIGHTS:
            column = width + new_place if INDEXED else slot
            tl.store(row_scores + group * columns + column, maximum, group < GROUPS)

    for start in range(split * share, stop, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        is_live = (entry < stop) & (entry != left + new_place)
        if INDEXED:
            in_list = entry < left
            slot = tl.load(index + entry, in_list & is_live, 0).to(tl.int32)
            slot = tl.where(in_list, slot, tail_start + entry - left)
            column = tl.where(in_list, entry, width + entry - left)
        else:
            slot = tail_start + entry - left
            column = slot
        at = slot[:, None] * DIM + channel[None]  # [BLOCK, CHANNELS], within a head
        key = tl.load(keys + at, is_live[:, None] & is_channel, 0.0)
        # The scale is no argument: of a Python float inductor makes one of 64 bits, and all after it were, too.
        x = tl.dot(query, tl.trans(key), input_precision="ieee") * DIM**-0.5  # [ROWS, BLOCK]
        x = tl.where(is_live[None], x, float("-inf"))
        if WEIGHTS:
            tl.store(row_scores + group[:, None] * columns + column[None], x, is_head & is_live[None])
        new_maximum = tl.maximum(maximum, tl.max(x, 1))
        top = tl.where(new_maximum > float("-inf"), new_maximum, 0.0)  # the token may be a block's only live entry
        decay, weight = tl.exp(maximum - top), tl.exp(x - top[:, None])
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
    scores, part, best, total, used, left_counts, out, weights, splits, width, tail_start, columns,
    KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr,
    INDEXED: tl.constexpr, WEIGHTS: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The shares put together. Programs (row x key head, task): the first tasks are the outputs of the group's query
    heads, the others blocks of weights."""
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

        left, in_tail = tl.load(left_counts + pair // KV_HEADS), tl.load(used + pair // KV_HEADS)
        if INDEXED:
            is_live = (column < left) | ((column >= width) & (column < width + in_tail))
        else:
            is_live = (column >= tail_start - left) & (column < tail_start + in_tail)
        at = (pair * GROUPS + group[:, None]) * columns + column[None]
        x = tl.load(scores + at, is_head[:, None] & is_live[None], float("-inf"))  # [ROWS, BLOCK]
        weight = tl.sum(tl.exp(x - top[:, None]) / sums[:, None], 0)
        tl.store(weights + pair * columns + column, weight, column < columns)
