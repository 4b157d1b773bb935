"""Caches saved in the middle of an answer and loaded again: they go on identically, and nothing wrong is loaded."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from avl_cases import tiny_model
from minivlm.cache.accounting import core_positions, entries_attended, full_bytes, live_entries, live_positions
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.policies.avl import AVLSettings
from minivlm.cache.settings import CacheSettings
from minivlm.cache.storage import load_cache, save_cache
from minivlm.errors import UserError
from minivlm.generation.steps import decode_step, prefill_step
from policies import DECODES, POLICIES, image_features, prompt_ids

MODEL = tiny_model(6, heads=(4, 2))
SAMPLES = (5, 2, 9)
AVL = POLICIES["avl, h2o text, filter"]


def new_cache(settings: CacheSettings, samples=SAMPLES, config=MODEL.config.text, **options) -> KVCache:
    return KVCache(config, settings.build(3), samples, **options)


@torch.no_grad()
def turn(cache: KVCache, number: int, new_tokens: int = 12) -> torch.Tensor:
    """A ragged prefill: the middle sequence's first turn has no image, its second has."""
    parts = [[(3, 30, 9), (14,), (2, 12, 3, 9, 8)], [(4,), (2, 10, 5), (1, 8, 4)]][number]
    ids = [prompt_ids(MODEL, *counts, seed=10 * number + b) for b, counts in enumerate(parts[: len(cache.sequences)])]
    return prefill_step(MODEL, cache, ids, [f for row in ids for f in image_features(MODEL, row)], new_tokens)


@torch.no_grad()
def steps(cache: KVCache, first: int, last: int) -> list[torch.Tensor]:
    """Logits of decode steps; token 2 ends the second sequence at step 2."""
    logits = []
    for step in range(first, last):
        token = torch.tensor([10 + step, 2 if step == 2 else 20 + step, 30 + step][: len(cache.sequences)])
        logits.append(decode_step(MODEL, cache, token, torch.tensor([2])))
    return logits


def entries(cache: KVCache) -> list[list[int]]:
    layers = range(len(cache.layers))
    held = [live_positions(cache, i, b).tolist() for i in layers for b in range(len(cache.sequences))]
    cores = [core_positions(cache, i, b).tolist() for i in layers for b in range(len(cache.sequences))]
    return held + cores


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("how", DECODES)
def test_an_answer_goes_on_identically(name, how, tmp_path):
    """Batch of three, one finished: saved after four steps, and once more in the turn after."""
    cache = new_cache(POLICIES[name], **DECODES[how])
    turn(cache, 0)
    steps(cache, 0, 4)
    for number in range(2):
        save_cache(cache, tmp_path / "cache.safetensors")
        again = new_cache(POLICIES[name], (0, 0, 0), **DECODES[how])
        load_cache(again, tmp_path / "cache.safetensors", torch.float32)
        assert entries(again) == entries(cache) and live_entries(again) == live_entries(cache)
        assert (again.nbytes, full_bytes(again), entries_attended(again)) == (
            cache.nbytes,
            full_bytes(cache),
            entries_attended(cache),
        )
        for ours, theirs in zip(steps(again, 4, 11), steps(cache, 4, 11)):
            assert torch.equal(ours, theirs)
        assert entries(again) == entries(cache) and again.step_kinds == cache.step_kinds
        if number == 0:
            assert torch.equal(turn(again, 1), turn(cache, 1))
            assert entries(again) == entries(cache)
            for ours, theirs in zip(steps(again, 0, 4), steps(cache, 0, 4)):
                assert torch.equal(ours, theirs)
            cache = again  # one that was loaded is saved
    assert list(tmp_path.iterdir()) == [tmp_path / "cache.safetensors"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_implementation_and_dtype_may_go_on(dtype, tmp_path):
    model = tiny_model(6, heads=(4, 2)).to(dtype)
    cache = KVCache(model.config.text, AVL.build(3), static=True)
    ids = prompt_ids(model, 3, 30, 9)
    logits = prefill_step(model, cache, [ids], image_features(model, ids), 4)
    save_cache(cache, tmp_path / "c")
    with pytest.raises(UserError, match=f'dtype "{str(dtype)[6:]}", to be loaded with "float32"'):
        load_cache(new_cache(AVL, (0,)), tmp_path / "c", torch.float32)
    others = [KVCache(model.config.text, AVL.build(3), **options) for options in DECODES.values()]
    for other in others:
        load_cache(other, tmp_path / "c", dtype)
    token = logits.argmax(dim=-1)
    theirs = decode_step(model, cache, token, torch.tensor([2]))
    for other in others:
        torch.testing.assert_close(decode_step(model, other, token, torch.tensor([2])), theirs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "cache.safetensors"
    cache = new_cache(AVL)
    turn(cache, 0)
    steps(cache, 0, 4)
    save_cache(cache, path)
    return path


MISMATCHES = {
    'policy.vision.rate 0.5, to be loaded with 0.25': lambda: new_cache(replace(AVL, vision_rate=0.25)),
    'policy.vision.interval 3, to be loaded with 4': lambda: new_cache(replace(AVL, vision_interval=4)),
    'policy.window 1, to be loaded with 4': lambda: new_cache(replace(AVL, score_window=4)),
    'policy.budget.init_cache 4, to be loaded with 5': lambda: new_cache(replace(AVL, text_init_cache=5)),
    'policy.budget.rule "TextH2O", to be loaded with "TextHistory"': lambda: new_cache(replace(AVL, text_h2o=False)),
    'policy.filters.parts 1, to be loaded with 0': lambda: new_cache(replace(AVL, filter=False)),
    'policy.name "avl", to be loaded with "full"': lambda: new_cache(AVLSettings()),
    'config.rope_theta 10000.0, to be loaded with 500000.0': lambda: new_cache(AVL, config=replace(MODEL.config.text, rope_theta=5e5)),
    'config.num_hidden_layers 3, to be loaded with 4': lambda: new_cache(AVL, config=replace(MODEL.config.text, num_hidden_layers=4)),
    'config.num_key_value_heads 2, to be loaded with 4': lambda: new_cache(AVL, config=replace(MODEL.config.text, num_key_value_heads=4)),
    'sequences 3, to be loaded with 1': lambda: new_cache(AVL, (0,)),
}  # fmt: skip


@pytest.mark.parametrize("said", MISMATCHES)
def test_a_mismatch_is_refused(saved, said):
    with pytest.raises(UserError) as error:
        load_cache(MISMATCHES[said](), saved, torch.float32)
    assert str(error.value) == f"{saved}: saved with {said}"


def tampered(saved, path, about=None, drop=None, **changed):
    """A copy of the file with other tensors or metadata."""
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    stored = json.loads(metadata["minivlm.kv_cache"])
    tensors = load_file(saved)
    for name, change in changed.items():
        tensors[name.replace("__", ".")] = change(tensors.get(name.replace("__", ".")))
    tensors.pop(drop, None)
    save_file(tensors, path, {"minivlm.kv_cache": json.dumps({**stored, **(about or {})})})
    return path


DAMAGE = {
    "no tensor": dict(drop="layers.1.v"),
    "unexpected tensor 'more'": dict(more=lambda t: torch.zeros(1)),
    "layers.0.k has shape": dict(layers__0__k=lambda t: t[:, :, 1:].contiguous()),
    "layers.0.counts has shape": dict(layers__0__counts=lambda t: t[:1].contiguous()),
    "layers.2.v is torch.float64": dict(layers__2__v=lambda t: t.double()),
    "layers.0.write_slot leaves": dict(layers__0__write_slot=lambda t: t + 1000),
    "layers.0.write_slot leaves ": dict(layers__0__write_slot=lambda t: t - 1000),
    "layers.0.position leaves": dict(layers__0__position=lambda t: t + 512),
    "layers.1.counts leaves": dict(layers__1__counts=lambda t: t - 50),
    "layers.1.counts leaves ": dict(layers__1__counts=lambda t: t + 10**9),
    "damaged (layers.1.counts)": dict(layers__1__counts=lambda t: t + 1),
    "damaged (layers.0.counts)": dict(layers__0__counts=lambda t: t[:, [1, 0, 2, 3, 4]]),
    "damaged (layers.2.in_core)": dict(layers__2__in_core=lambda t: 1 - t),
    "damaged (layers.1.in_core)": dict(layers__1__in_core=torch.ones_like),
    "layers.1.k has shape": dict(layers__1__counts=lambda t: t + torch.tensor([400, 0, 0, 0, 0])),
    "stored leaves 0..4": dict(stored=lambda t: t + 5),
    "active is torch.uint8": dict(active=lambda t: t.byte()),
    "sequences.0.evictable_positions leaves": dict(sequences__0__evictable_positions=lambda t: t + 100),
    "the lists of sequence 0": dict(sequences__0__vision_positions=lambda t: t.flip(0)),
    "the lists of sequence 1": dict(sequences__1__tail_lengths=lambda t: t * 2),
    "steps that do not agree": dict(sequences__1__tail_lengths=lambda t: t[:, :-1].clone()),
    "damaged metadata (lengths)": dict(about={"lengths": [10, 20]}),
    "damaged metadata (lengths) ": dict(about={"lengths": [10, 20, 10**6]}),
    "damaged metadata (samples)": dict(about={"samples": [1, 2, "3"]}),
    "damaged metadata (turns)": dict(about={"turns": 0}),
    "damaged metadata (step_kinds)": dict(about={"step_kinds": ["core", "none"]}),
    "saved with version 99": dict(about={"version": 99}),
    "saved with policy.name null": dict(about={"policy": "avl"}),
}  # fmt: skip


@pytest.mark.parametrize("said", DAMAGE)
def test_a_damaged_file_is_refused_and_changes_nothing(saved, said, tmp_path):
    path = tampered(saved, tmp_path / "damaged.safetensors", **DAMAGE[said])
    cache = new_cache(AVL)
    load_cache(cache, saved, torch.float32)
    before = [buffer.clone() for buffer in cache.tensors()]
    with pytest.raises(UserError) as error:
        load_cache(cache, path, torch.float32)
    assert (
        str(error.value).startswith(f"{path}: ") and said.strip() in str(error.value) and "\n" not in str(error.value)
    )
    assert all(map(torch.equal, before, cache.tensors())) and cache.step_kinds == ["core", "core", "refresh", "core"]


def test_files_that_are_no_cache(saved, tmp_path):
    cache = new_cache(AVL)
    whole, wrong = saved.read_bytes(), tmp_path / "wrong.safetensors"
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        wrong.write_bytes(whole[:size])
        with pytest.raises(UserError, match="not a readable safetensors file"):
            load_cache(cache, wrong, torch.float32)
    save_file({"x": torch.zeros(1)}, wrong)
    with pytest.raises(UserError, match="not a saved cache"):
        load_cache(cache, wrong, torch.float32)
    for text, said in (("{", "damaged metadata"), ("[" * 10**5, "damaged metadata"), ("[]", "expected an object")):
        save_file({"x": torch.zeros(1)}, wrong, {"minivlm.kv_cache": text})
        with pytest.raises(UserError, match=said):
            load_cache(cache, wrong, torch.float32)
    for path, said in ((tmp_path / "none", "no such file"), (tmp_path, "not a readable")):
        with pytest.raises(UserError, match=said):
            load_cache(cache, path, torch.float32)
    assert not cache.layers


def test_what_cannot_be_saved(saved, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="an empty cache"):
        save_cache(new_cache(AVL), tmp_path / "cache")
    cache = new_cache(AVL)
    load_cache(cache, saved, torch.float32)
    with pytest.raises(UserError, match="cannot be written"):
        save_cache(cache, tmp_path / "no such folder" / "cache")
    (tmp_path / "cache").write_text("old")
    monkeypatch.setattr(
        "minivlm.cache.storage.json.dumps", lambda about: "x" * (101 << 20)
    )  # more than a header may hold
    with pytest.raises(UserError, match="cannot be written"):
        save_cache(cache, tmp_path / "cache")
    assert (tmp_path / "cache").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["cache"]
