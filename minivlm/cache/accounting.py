"""What a cache holds now and what its steps read: positions, entries by class, bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minivlm.cache.kv_cache import KVCache
from minivlm.cache.ranking import best_first
from minivlm.transfer import to_device

ENTRY_CLASSES = ("system", "vision core", "vision secondary", "text")


def entry_bytes(cache: KVCache) -> int:
    """Bytes of one entry's key and value in all key/value heads of one layer."""
    return 2 * cache.config.num_key_value_heads * cache.config.head_dim * cache.layers[0].k.element_size()


def full_bytes(cache: KVCache, stored: Sequence[int] | None = None) -> int:
    """Bytes of the entries that the full cache would hold now, or when it had `stored` tokens of each row's answer."""
    stored = cache.stored.tolist() if stored is None else stored
    tokens = sum(sequence.length for sequence in cache.sequences) + sum(stored)
    return tokens * len(cache.layers) * entry_bytes(cache)


def live_bytes(cache: KVCache) -> int:
    """Bytes of the entries held now."""
    entries = sum(sum(by_class.values()) for by_class in live_entries(cache))
    return entries * entry_bytes(cache) // cache.config.num_key_value_heads


def live_entries(
    cache: KVCache, stored: Sequence[int] | None = None, tail_vision: Tensor | None = None
) -> list[dict[str, int]]:
    """Per layer, the entries held now by class, summed over sequences and key/value heads.

    Or those of an earlier time in this turn: when the cache had `stored` tokens of each row's answer, and
    `vision_in_tail` returned `tail_vision`.
    """
    stored = cache.stored.tolist() if stored is None else stored
    tail_vision = vision_in_tail(cache, stored) if tail_vision is None else tail_vision
    heads, by_layer = cache.config.num_key_value_heads, []
    for layer_idx, (buffers, in_tail) in enumerate(zip(cache.layers, tail_vision.tolist(), strict=True)):
        entries = dict.fromkeys(ENTRY_CLASSES, 0)
        for row, counts in enumerate(buffers.counts):
            entries["system"] += counts.system * heads
            entries["vision core"] += counts.core * heads
            entries["vision secondary"] += (counts.vision - counts.core) * heads
            entries["text"] += cache.tail_length(layer_idx, row, stored[row]) * heads
        entries["vision core"] += in_tail
        entries["text"] -= in_tail
        by_layer.append(entries)
    return by_layer


def vision_in_tail(cache: KVCache, stored: Sequence[int]) -> Tensor:
    """How many image entries are in the tails of each layer [L], in all rows and heads; nothing waits for the device.

    Only a whole-cache budget has them there. `stored` are each row's tokens of the answer, which the host may know.
    """
    if not cache.policy.whole_cache:
        return torch.zeros(len(cache.layers), dtype=torch.int64)
    rows, heads = len(stored), cache.config.num_key_value_heads
    is_vision = torch.zeros(rows, cache.config.context_length, dtype=torch.bool)
    for row, sequence in enumerate(cache.sequences):
        is_vision[row, sequence.vision_positions] = True
    is_vision = to_device(is_vision, cache.device)[:, None].expand(-1, heads, -1)  # [B, H_kv, positions]
    layers = range(len(cache.layers))
    tails = torch.tensor([[cache.tail_length(layer, row, stored[row]) for row in range(rows)] for layer in layers])
    tails = to_device(tails, cache.device)[..., None, None]  # [L, B, 1, 1]
    found = []
    for buffers, tail, next_place in zip(cache.layers, tails, cache.next_place, strict=True):
        start = buffers.layout.tail_start
        slots = torch.arange(buffers.layout.tail, device=cache.device)
        # Among the slots up to the first unused one, one is free: see `SlotLayout.live`.
        live = (slots <= tail) & (slots != next_place[..., None])  # [B, H_kv, T]
        found.append((live & is_vision.gather(2, buffers.position[:, :, start:].long())).sum())
    return torch.stack(found)


def entries_attended(cache: KVCache) -> dict[str, float]:
    """Entries by class that took part in a step of this turn: the mean over steps, sequences and layers, per head.

    A whole-cache budget keeps no classes apart; then all of them count as "all".
    """
    whole_cache = cache.policy.whole_cache
    attended = dict.fromkeys(("all",) if whole_cache else ENTRY_CLASSES, 0)
    stored = cache.stored.tolist()
    for layer_idx, buffers in enumerate(cache.layers):
        for row, counts in enumerate(buffers.counts):
            steps = stored[row]
            tail = steps + sum(cache.tail_length(layer_idx, row, step) for step in range(steps))
            if whole_cache:
                attended["all"] += tail
                continue
            beyond_core = sum(kind != "core" for kind in cache.step_kinds[:steps])
            attended["system"] += counts.system * steps
            attended["vision core"] += counts.core * steps
            attended["vision secondary"] += (counts.vision - counts.core) * beyond_core
            attended["text"] += tail
    return {name: count / max(sum(stored) * len(cache.layers), 1) for name, count in attended.items()}


def entries_read(cache: KVCache, step: int) -> int:
    """Entries that a step of this turn read, its own included, summed over sequences and layers.

    A core step reads the core alone only if it reads by index; otherwise it passes over everything that was kept.
    """
    core_alone = cache.step_kinds[step] == "core" and cache.gather
    return sum(
        (counts.core + counts.system if core_alone else counts.fixed) + cache.tail_length(layer_idx, row, step) + 1
        for layer_idx, buffers in enumerate(cache.layers)
        for row, counts in enumerate(buffers.counts)
    )


def live_positions(cache: KVCache, layer_idx: int, row: int) -> Tensor:
    """Original positions [H_kv, n] of a row's entries: vision, system, tail."""
    buffers = cache.layers[layer_idx]
    tail = cache.tail_length(layer_idx, row, int(cache.stored[row]))
    slots = buffers.layout.live(buffers.counts[row], tail, cache.next_place[layer_idx, row])
    return buffers.position[row].gather(1, slots)


def core_positions(cache: KVCache, layer_idx: int, row: int) -> Tensor:
    """Original positions [C] of a row's core in a layer, best first."""
    buffers = cache.layers[layer_idx]
    vision = buffers.layout.vision(buffers.counts[row])
    core = buffers.in_core_step[row, vision] > 0
    position = buffers.position[row, 0, vision][core]
    return position[best_first(buffers.vision_attn[row, vision][core])].cpu()
