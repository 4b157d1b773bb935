"""No attention matrix, exact byte counts, and a prefill that never holds more than the compact cache and one layer."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from avl_cases import tiny_model
from contract_policies import DropSettings, PyramidWindowSettings
from minivlm.cache.accounting import ENTRY_CLASSES, entry_bytes, full_bytes, live_bytes, live_entries
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.policies import preset
from minivlm.cache.prefill_pass import PrefillPass
from minivlm.cache.settings import CacheSettings
from minivlm.cache.slots import bucket
from minivlm.errors import UserError
from minivlm.generation.steps import decode_step, prefill_step
from policies import POLICIES, embed, image_features, prompt_ids

NEVER = torch.zeros(0, dtype=torch.int64)
HEADS = [(4, 4), (4, 2), (4, 1)]


class MatrixWatch(TorchDispatchMode):
    """Notes every result of a dispatched operation that is, or could hold, the weights of `rows` x `columns`, or more."""

    def __init__(self, rows: int, columns: int, heads: int = 4) -> None:
        super().__init__()
        self.rows, self.most = rows, heads * rows * columns
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                if sum(size >= self.rows for size in tensor.shape) > 1 or tensor.numel() >= self.most:
                    self.found.append(f"{func}: {list(tensor.shape)}")
        return out


@torch.no_grad()
def decode(model, cache: KVCache, steps: int) -> None:
    for _ in range(steps):
        decode_step(model, cache, torch.full((len(cache.sequences),), 5), NEVER)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", POLICIES)
def test_no_operation_makes_an_attention_matrix(name, heads):
    """First turn, steps and a later turn, in a ragged batch; S exceeds every dimension of the model and a block of rows."""
    model = tiny_model(0, layers=3, heads=heads, context=2048)
    cache = KVCache(model.config.text, POLICIES[name].build(3), (0, 1), static=heads == (4, 2))
    turns = [(3, 450, 20, 30, 90), (3, 500, 107)], [(40, 450, 60), (30, 510, 10)]  # 593 and 610 tokens, then 550 each
    for parts, least in zip(turns, ((593, 593), (550, 1143))):
        ids = [prompt_ids(model, *counts) for counts in parts]
        features = [f for row in ids for f in image_features(model, row)]
        with MatrixWatch(*least) as watch:
            prefill_step(model, cache, ids, features, 4)
            decode(model, cache, 3)
        assert not watch.found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_watch_sees_attention_matrices(dtype):
    q = torch.randn(1, 4, 320, 8, dtype=dtype)
    with MatrixWatch(320, 320) as watch:
        (q @ q.transpose(2, 3)).softmax(dim=-1) @ q
    assert len(watch.found) >= 2
    with MatrixWatch(320, 320) as watch:
        torch.ones(4 * 320 * 320)
    assert watch.found
    with MatrixWatch(320, 320) as watch, sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert watch.found
    with MatrixWatch(320, 320) as watch:
        F.scaled_dot_product_attention(q, q[:, :2], q[:, :2], is_causal=True, enable_gqa=True)
    assert not watch.found


def promised(settings: CacheSettings, layer: int, system: int, vision: int, text: int, steps: int) -> dict[str, int]:
    """Entries a layer holds per head after `steps` decode steps, by the rates alone: the counts of the method's description."""
    length = system + vision + text
    if settings.policy in ("h2o", "streaming"):
        kept = length
        for seen in range(length, length + steps + 1):
            budget = int(seen * 0.5 * 0.25) + int(seen * 0.5 * 0.75) if settings.policy == "h2o" else seen // 2
            kept = min(kept + (seen > length), budget)
        return {"all": kept}
    if isinstance(settings, PyramidWindowSettings):
        return {"all": min(settings.layer_capacity(layer), length) + steps}
    if isinstance(settings, DropSettings):
        reached = int((0.8, 0.6, 0.3)[layer] * vision)
        kept = min(reached, int(settings.vision_share(layer) * vision))
        core = min(kept, int(settings.vision_share(layer) * vision) // 2)
        return {"system": system, "vision core": core, "vision secondary": kept - core, "text": text + steps}
    kept = int((1 - settings.filter_rate) * vision) if settings.filter and layer >= settings.filter_layer else vision
    core = kept
    if settings.vision:
        kept = min(kept, int((1 - settings.vision_rate) * vision))
        core = min(kept, int((1 - settings.vision_compute_rate) * vision))
    if settings.text:
        for seen in range(text, text + steps + 1):
            text = min(text + (seen > text), max(round((1 - settings.text_rate) * seen), settings.text_init_cache))
    else:
        text += steps
    return {"system": system, "vision core": core, "vision secondary": kept - core, "text": text}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("name", POLICIES)
def test_bytes_are_exactly_what_the_rates_promise(name, heads, dtype):
    """Per class and layer, after prefill and after each of 9 steps, for two sequences with their own counts."""
    settings, model = POLICIES[name], tiny_model(1, layers=3, heads=heads).to(dtype)
    kinds = [(4, 37, 26), (2, 21, 11)]
    ids = [prompt_ids(model, system, vision, text) for system, vision, text in kinds]
    cache = KVCache(model.config.text, settings.build(3), (0, 1))
    prefill_step(model, cache, ids, [f for row in ids for f in image_features(model, row)], 10)
    for steps in range(10):
        entries = 0
        for layer, held in enumerate(live_entries(cache)):
            wanted: dict[str, int] = {}
            for counts in kinds:
                for kind, count in promised(settings, layer, *counts, steps).items():
                    wanted[kind] = wanted.get(kind, 0) + count * heads[1]
            assert (held if "all" not in wanted else {"all": sum(held.values())}) == wanted, (steps, layer)
            assert list(held) == list(ENTRY_CLASSES)
            entries += sum(wanted.values())
        one = 2 * 8 * dtype.itemsize  # a head's key and value
        assert live_bytes(cache) == entries * one
        assert full_bytes(cache) == 3 * heads[1] * one * sum(sum(counts) + steps for counts in kinds)
        if steps < 9:
            decode(model, cache, 1)


@pytest.mark.parametrize("name", POLICIES)
def test_allocated_bytes_are_the_documented_formula(name):
    """nbytes is what the tensors take, and is computed from what is held, the room for the answer, and slack."""
    model = tiny_model(1, layers=3, heads=(4, 2))
    ids = [prompt_ids(model, 4, 137, 26), prompt_ids(model, 2, 21, 11)]
    for new_tokens in (1, 2, 40, 100):
        cache = KVCache(model.config.text, POLICIES[name].build(3), (0, 1), static=True, gather=new_tokens == 40)
        prefill_step(model, cache, ids, [f for row in ids for f in image_features(model, row)], new_tokens)
        scored = cache.policy.budget is not None
        total = len(cache.tables) * 3 * 2 * bucket(new_tokens - 1) * 8  # the step tables
        for layer in cache.layers:
            left, slots = layer.layout.tail_start, layer.layout.slots
            total += 2 * (
                slots * (2 * (2 * 8 * 4 + 4) + 4) + (4 * (slots - left) * 2 if scored else 0) + 4 * left + 8 * 2 + 24
            )
            total += 2 * 8 * layer.core_slots.shape[1] if cache.indexed else 0
            room = max(row.tail_capacity for row in layer.counts)
            assert slots - max(row.fixed for row in layer.counts) - room <= 62  # slack
            # The answer grows text by at most a slot a step, and never beyond its budget and the newcomer.
            assert all(row.tail <= row.tail_capacity <= row.tail + new_tokens - 1 for row in layer.counts)
        assert (
            cache.nbytes
            == total
            == sum(table.nbytes for table in cache.tables) + sum(layer.nbytes for layer in cache.layers)
        )
        tensors = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]
        assert sum(t.untyped_storage().nbytes() for t in (*cache.tables, *tensors)) == total


@pytest.mark.parametrize("share", [0.8, 0.5, 0.29, 0.1, 0.05])
@pytest.mark.parametrize("name", ["avl", "avl and filter", "h2o", "fastv", "streaming", "random"])
def test_a_share_of_the_bytes_is_kept_to(name, share):
    """At most the share of the prompt's KV bytes, and no more than an entry of rounding a layer below; or an error."""
    settings = preset(name.split()[0], kv_budget=share, **({"filter": True} if name == "avl and filter" else {}))
    model = tiny_model(1, layers=4, heads=(4, 2))
    ids = [prompt_ids(model, 2, 111, 9), prompt_ids(model, 2, 60, 7)]
    cache = KVCache(model.config.text, settings.build(4), (0, 1))
    features = [f for row in ids for f in image_features(model, row)]
    # What must stay in any case: text and system, and for fastv the two layers before its filter.
    least = {"fastv": 0.5 + 0.5 * 9 / 69, "h2o": 0.0, "streaming": 0.0}.get(name, 9 / 69)
    if share < least:
        with pytest.raises(UserError, match=f"kv_budget {share:g} is infeasible"):
            prefill_step(model, cache, ids, features, 9)
        return
    prefill_step(model, cache, ids, features, 9)
    per_layer = entry_bytes(cache) * 2  # an entry of each sequence
    if name != "avl and filter":  # there the filter's own rate may save more
        assert live_bytes(cache) > share * full_bytes(cache) - 4 * 2 * per_layer
    assert live_bytes(cache) <= share * full_bytes(cache)
    if name in ("h2o", "streaming"):  # they keep to it all along
        for _ in range(8):
            decode(model, cache, 1)
            assert live_bytes(cache) <= share * full_bytes(cache)


class EntryWatch(TorchDispatchMode):
    """The bytes of all keys and values made inside that something still holds, by a tensor [.., H_kv, n, D] or a view.

    n > `least`, for a block of queries may have the shape as well.
    """

    def __init__(self, kv_heads: int, head_dim: int, least: int) -> None:
        super().__init__()
        self.like, self.least = (kv_heads, head_dim), least
        self.holders: dict[int, int] = {}  # by storage
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 2 and tensor.shape[-2] > self.least:
                if (tensor.shape[-3], tensor.shape[-1]) == self.like:
                    self._hold(tensor)
        return out

    def _hold(self, tensor: torch.Tensor) -> None:
        pointer, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if pointer not in self.holders:
            self.holders[pointer] = 0
            self.now += size
            self.peak = max(self.peak, self.now)
        self.holders[pointer] += 1
        weakref.finalize(tensor, self._drop, pointer, size)

    def _drop(self, pointer: int, size: int) -> None:
        self.holders[pointer] -= 1
        if not self.holders[pointer]:
            del self.holders[pointer]
            self.now -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", POLICIES)
def test_prefill_holds_the_compact_cache_and_one_layer(name, dtype, monkeypatch):
    """Nothing else: not when a layer's attention begins, and within it no more than small blocks on top."""
    kv_heads, dim = 2, 20
    model = tiny_model(0, layers=4, heads=(6, kv_heads), head_dim=dim, context=2048).to(dtype)
    ids = prompt_ids(model, 3, 2000, 9)
    settings = replace(POLICIES[name], capacity=1000) if name == "pyramid window" else POLICIES[name]
    cache = KVCache(model.config.text, settings.build(4))
    peaks, attend = [], PrefillPass.attend

    def watched(self, layer, q, k, v):
        assert watch.now == sum(held.k.nbytes + held.v.nbytes for held in self.layers) + k.nbytes + v.nbytes
        watch.peak = watch.now
        out = attend(self, layer, q, k, v)
        peaks.append(watch.peak - k.nbytes - v.nbytes)
        return out

    monkeypatch.setattr(PrefillPass, "attend", watched)
    rows = embed(model, [ids])[0][None]
    with torch.no_grad(), EntryWatch(kv_heads, dim, least=3 * 128) as watch:
        model(rows, torch.arange(len(ids))[None], cache.prefill([ids == 47], 4)[0])
    compact = sum(held.k.nbytes + held.v.nbytes for held in cache.layers)
    block = len(ids) * 8 * kv_heads + 512 * kv_heads * dim * 4  # what stays, by index; 512 keys in float32
    assert block < len(ids) * kv_heads * dim * 4  # so no copy of all keys hides in it
    if name == "drop":  # which asks for the keys, and makes float32 of them
        block += len(ids) * kv_heads * dim * (dtype.itemsize + 4)
    assert watch.now == compact and max(peaks) <= compact + block
