"""Memory: no attention matrix, exact byte counts, and a prefill that holds the compact cache and one layer at most."""

from __future__ import annotations

import re
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from avl_cases import IMAGE_TOKEN, tiny_model
from cache_helpers import NO_STOP_IDS, prefill_prompts
from contract_policies import DropSettings, PyramidWindowSettings
from minivlm.cache.accounting import ENTRY_CLASSES, entry_bytes, full_bytes, live_bytes, live_entries
from minivlm.cache.buffers import LayerBuffers
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.policies import preset
from minivlm.cache.prefill_pass import PrefillPass
from minivlm.cache.settings import CacheSettings
from minivlm.cache.slots import bucket
from minivlm.errors import UserError
from minivlm.generation.steps import decode_step
from minivlm.model.llava import Llava
from policies import POLICIES, embed, prompt_ids

HEADS = [(4, 4), (4, 2), (4, 1)]


class MatrixWatch(TorchDispatchMode):
    """Notes all results of operations that are, or could hold, the weights of `queries` x `columns` for every head."""

    def __init__(self, queries: int, columns: int, heads: int = 4) -> None:
        super().__init__()
        self.queries = queries
        self.matrix_size = heads * queries * columns
        self.matrices: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.matrices += [f"{func}: {list(leaf.shape)}" for leaf in tree_leaves(out) if self.is_matrix(leaf)]
        return out

    def is_matrix(self, leaf: object) -> bool:
        if not isinstance(leaf, torch.Tensor):
            return False
        return sum(size >= self.queries for size in leaf.shape) > 1 or leaf.numel() >= self.matrix_size


@torch.no_grad()
def decode(model: Llava, cache: KVCache, steps: int) -> None:
    for _ in range(steps):
        decode_step(model, cache, torch.full((len(cache.sequences),), 5), NO_STOP_IDS)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", POLICIES)
def test_no_operation_makes_an_attention_matrix(name, heads):
    """In two turns of a ragged batch, with their steps.

    The prompts are longer than every dimension of the model and than a block of queries.
    """
    model = tiny_model(0, layers=3, heads=heads, context=2048)
    cache = KVCache(model.config.text, POLICIES[name].build(3), (0, 1), static=heads == (4, 2))
    first_turn = [(3, 450, 20, 30, 90), (3, 500, 107)]  # 593 and 610 tokens
    second_turn = [(40, 450, 60), (30, 510, 10)]  # 550 tokens each
    for parts, shortest in ((first_turn, (593, 593)), (second_turn, (550, 593 + 550))):
        prompts = [prompt_ids(model, *counts) for counts in parts]
        with MatrixWatch(*shortest) as watch:
            prefill_prompts(model, cache, prompts, 4)
            decode(model, cache, 3)
        assert not watch.matrices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_watch_sees_attention_matrices(dtype):
    q = torch.randn(1, 4, 320, 8, dtype=dtype)
    with MatrixWatch(320, 320) as watch:
        (q @ q.transpose(2, 3)).softmax(dim=-1) @ q
    assert len(watch.matrices) >= 2
    with MatrixWatch(320, 320) as watch:
        torch.ones(4 * 320 * 320)
    assert watch.matrices
    with MatrixWatch(320, 320) as watch, sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert watch.matrices
    with MatrixWatch(320, 320) as watch:
        F.scaled_dot_product_attention(q, q[:, :2], q[:, :2], is_causal=True, enable_gqa=True)
    assert not watch.matrices


Counts = tuple[int, int, int]  # system, vision and text tokens of a prompt


def promised(settings: CacheSettings, layer_idx: int, prompt: Counts, steps: int) -> dict[str, int]:
    """Entries by class that a head of a layer holds after `steps` decode steps, from the rates alone.

    Where a budget is over the whole cache, all entries count as "all".
    """
    system, vision, text = prompt
    if settings.policy in ("h2o", "streaming"):
        return {"all": promised_of_whole_cache(settings.policy, sum(prompt), steps)}
    if isinstance(settings, PyramidWindowSettings):
        return {"all": min(settings.layer_capacity(layer_idx), sum(prompt)) + steps}
    if isinstance(settings, DropSettings):
        reached = int((0.8, 0.6, 0.3)[layer_idx] * vision)
        kept = min(reached, int(settings.vision_share(layer_idx) * vision))
        core = min(kept, int(settings.vision_share(layer_idx) * vision) // 2)
        return {"system": system, "vision core": core, "vision secondary": kept - core, "text": text + steps}
    filtered = settings.filter and layer_idx >= settings.filter_layer
    kept = core = int((1 - settings.filter_rate) * vision) if filtered else vision
    if settings.vision:
        kept = min(kept, int((1 - settings.vision_rate) * vision))
        core = min(kept, int((1 - settings.vision_compute_rate) * vision))
    if settings.text:
        for seen in range(text, text + steps + 1):
            text = min(text + (seen > text), max(round((1 - settings.text_rate) * seen), settings.text_init_cache))
    else:
        text += steps
    return {"system": system, "vision core": core, "vision secondary": kept - core, "text": text}


def promised_of_whole_cache(policy: str, length: int, steps: int) -> int:
    kept = length
    for seen in range(length, length + steps + 1):
        budget = int(seen * 0.5 * 0.25) + int(seen * 0.5 * 0.75) if policy == "h2o" else seen // 2
        kept = min(kept + (seen > length), budget)
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("name", POLICIES)
def test_bytes_are_exactly_what_the_rates_promise(name, heads, dtype):
    """By class and layer, after prefill and after each of 9 steps, for two rows with counts of their own."""
    settings, model = POLICIES[name], tiny_model(1, layers=3, heads=heads).to(dtype)
    counts: list[Counts] = [(4, 37, 26), (2, 21, 11)]
    cache = KVCache(model.config.text, settings.build(3), (0, 1))
    prefill_prompts(model, cache, [prompt_ids(model, *prompt) for prompt in counts], 10)
    one_entry = 2 * 8 * dtype.itemsize  # the key and value of one head
    for steps in range(10):
        total = 0
        for layer_idx, entries in enumerate(live_entries(cache)):
            expected: Counter[str] = Counter()
            for prompt in counts:
                for entry_class, count in promised(settings, layer_idx, prompt, steps).items():
                    expected[entry_class] += count * heads[1]
            assert list(entries) == list(ENTRY_CLASSES)
            ours = {"all": sum(entries.values())} if "all" in expected else entries
            assert ours == expected, (steps, layer_idx)
            total += sum(expected.values())
        assert live_bytes(cache) == total * one_entry
        assert full_bytes(cache) == 3 * heads[1] * one_entry * sum(sum(prompt) + steps for prompt in counts)
        if steps < 9:
            decode(model, cache, 1)


def documented_bytes(buffers: LayerBuffers, scored: bool) -> int:
    """What the docstring of `LayerBuffers.nbytes` says, for 2 rows, 2 key/value heads and 8 float32 dimensions."""
    batch, kv_heads, head_dim, itemsize = 2, 2, 8, 4
    left, slots = buffers.layout.tail_start, buffers.layout.slots
    per_row = slots * (kv_heads * (2 * head_dim * itemsize + 4) + 4)
    per_row += 4 * (slots - left) * kv_heads if scored else 0  # scores
    per_row += 4 * left  # vision_attn
    return batch * per_row


@pytest.mark.parametrize("name", POLICIES)
def test_allocated_bytes_are_the_documented_formula(name):
    """`nbytes` is what the tensors take, and follows from the entries held, the room for the answer, and slack."""
    model = tiny_model(1, layers=3, heads=(4, 2))
    prompts = [prompt_ids(model, 4, 137, 26), prompt_ids(model, 2, 21, 11)]
    for new_tokens in (1, 2, 40, 100):
        cache = KVCache(model.config.text, POLICIES[name].build(3), (0, 1), static=True, gather=new_tokens == 40)
        prefill_prompts(model, cache, prompts, new_tokens)
        scored = cache.policy.budget is not None
        step_tables = len(cache.tables) * 3 * 2 * bucket(new_tokens - 1) * 8
        assert sum(table.nbytes for table in cache.tables) == step_tables
        counters = (cache.counts, cache.next_place, cache.stored, cache.answer_start, cache.active)
        total = step_tables + sum(tensor.nbytes for tensor in counters)
        assert (cache.core_slots is not None) == (cache.gather and cache.policy.interval > 1)
        total += 0 if cache.core_slots is None else cache.core_slots.nbytes
        for buffers in cache.layers:
            assert buffers.nbytes == documented_bytes(buffers, scored)
            total += buffers.nbytes
            counts = buffers.counts
            needed = max(row.fixed for row in counts) + max(row.tail_capacity for row in counts)
            assert buffers.layout.slots - needed <= 2 * (cache.bucket_size - 1)  # slack
            # The answer grows the tail by at most a slot a step, and never beyond its budget and the step's token.
            assert all(row.tail <= row.tail_capacity <= row.tail + new_tokens - 1 for row in counts)
        assert cache.nbytes == total
        holders = (cache, *cache.layers)
        tensors = [t for holder in holders for t in vars(holder).values() if isinstance(t, torch.Tensor)]
        assert sum(tensor.untyped_storage().nbytes() for tensor in (*cache.tables, *tensors)) == total


@pytest.mark.parametrize("share", [0.8, 0.5, 0.29, 0.1, 0.05])
@pytest.mark.parametrize("name", ["avl", "avl and filter", "h2o", "fastv", "streaming", "random"])
def test_a_share_of_the_bytes_is_kept_to(name, share):
    """At most the share of the prompt's KV bytes, at most an entry of rounding below it in each layer; or an error."""
    settings = preset(name.split()[0], kv_budget=share, **({"filter": True} if name == "avl and filter" else {}))
    model = tiny_model(1, layers=4, heads=(4, 2))
    prompts = [prompt_ids(model, 2, 111, 9), prompt_ids(model, 2, 60, 7)]
    cache = KVCache(model.config.text, settings.build(4), (0, 1))
    # What stays in any case: text and system, and under fastv the two layers before its filter.
    least_share = {"fastv": 0.5 + 0.5 * 9 / 69, "h2o": 0.0, "streaming": 0.0}.get(name, 9 / 69)
    if share < least_share:
        with pytest.raises(UserError, match=re.escape(f"kv_budget {share:g} is infeasible")):
            prefill_prompts(model, cache, prompts, 9)
        return
    prefill_prompts(model, cache, prompts, 9)
    one_entry_of_each_row = 2 * entry_bytes(cache)
    if name != "avl and filter":  # there the filter's own rate may save more
        assert live_bytes(cache) > share * full_bytes(cache) - 4 * 2 * one_entry_of_each_row
    assert live_bytes(cache) <= share * full_bytes(cache)
    if name in ("h2o", "streaming"):  # these keep to it at every step
        for _ in range(8):
            decode(model, cache, 1)
            assert live_bytes(cache) <= share * full_bytes(cache)


class EntryWatch(TorchDispatchMode):
    """Counts the bytes of the keys and values that were made within it and that something still holds.

    Keys and values are tensors [..., H_kv, n, D], or views of such, with n > `least`: the queries of a block may have
    that shape as well.
    """

    def __init__(self, kv_heads: int, head_dim: int, least: int) -> None:
        super().__init__()
        self.kv_heads, self.head_dim, self.least = kv_heads, head_dim, least
        self.holders: dict[int, int] = {}  # tensors that hold a storage, by its address
        self.held_bytes = 0
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if self._is_entries(leaf):
                self._hold(leaf)
        return out

    def _is_entries(self, leaf: object) -> bool:
        if not isinstance(leaf, torch.Tensor) or leaf.dim() < 3:
            return False
        kv_heads, n, head_dim = leaf.shape[-3:]
        return n > self.least and (kv_heads, head_dim) == (self.kv_heads, self.head_dim)

    def _hold(self, tensor: torch.Tensor) -> None:
        address, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if address not in self.holders:
            self.holders[address] = 0
            self.held_bytes += size
            self.peak = max(self.peak, self.held_bytes)
        self.holders[address] += 1
        weakref.finalize(tensor, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self.holders[address] -= 1
        if not self.holders[address]:
            del self.holders[address]
            self.held_bytes -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", POLICIES)
def test_prefill_holds_the_compact_cache_and_one_layer(name, dtype, monkeypatch):
    """When a layer's attention begins it holds nothing else, and within it no more than small blocks on top."""
    kv_heads, dim = 2, 20
    model = tiny_model(0, layers=4, heads=(6, kv_heads), head_dim=dim, context=2048).to(dtype)
    ids = prompt_ids(model, 3, 2000, 9)
    settings = replace(POLICIES[name], capacity=1000) if name == "pyramid window" else POLICIES[name]
    cache = KVCache(model.config.text, settings.build(4))
    peaks = []  # by layer, beyond the layer's own keys and values
    attend = PrefillPass.attend

    def watched(self, layer_idx, q, k, v):
        one_layer = sum(tensor.untyped_storage().nbytes() for tensor in (k, v))  # keys share theirs with the queries
        assert watch.held_bytes == kv_bytes(cache) + one_layer
        watch.peak = watch.held_bytes
        out = attend(self, layer_idx, q, k, v)
        peaks.append(watch.peak - one_layer)
        return out

    monkeypatch.setattr(PrefillPass, "attend", watched)
    embeds = embed(model, [ids])[0][None]
    with torch.no_grad(), EntryWatch(kv_heads, dim, least=3 * 128) as watch:
        (prefill,) = cache.prefill([ids == IMAGE_TOKEN], 4)
        model(embeds, torch.arange(len(ids))[None], prefill)
    block = len(ids) * 8 * kv_heads + 512 * kv_heads * dim * 4  # indices of what stays, and 512 keys in float32
    assert block < len(ids) * kv_heads * dim * 4  # so no float32 copy of all keys can hide in it
    if name == "drop":  # which asks for all keys and makes float32 of them
        block += len(ids) * kv_heads * dim * (dtype.itemsize + 4)
    assert watch.held_bytes == kv_bytes(cache) and max(peaks) <= kv_bytes(cache) + block


def kv_bytes(cache: KVCache) -> int:
    """Bytes of the keys and values in the cache's buffers."""
    return sum(buffers.k.nbytes + buffers.v.nbytes for buffers in cache.layers)
