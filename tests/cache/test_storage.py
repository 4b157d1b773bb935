"""A cache saved in the middle of an answer goes on identically once it is loaded; nothing wrong is loaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from avl_cases import tiny_model
from cache_helpers import prefill_prompts
from minivlm.cache.accounting import core_positions, entries_attended, full_bytes, live_entries, live_positions
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.policies.avl import AVLSettings
from minivlm.cache.settings import CacheSettings
from minivlm.cache.storage import checksum_of, checksum_of_tensor, load_cache, save_cache
from minivlm.errors import UserError
from minivlm.generation.steps import decode_step
from policies import DECODES, POLICIES, prompt_ids

MODEL = tiny_model(6, heads=(4, 2))
TEXT_CONFIG = MODEL.config.text
STOP = torch.tensor([2])
SAMPLES = (5, 2, 9)
KEY, CHECKSUM = "minivlm.kv_cache", "minivlm.sha256"  # of a file's metadata
AVL = POLICIES["avl, h2o text, filter"]


def new_cache(settings: CacheSettings, samples=SAMPLES, config=TEXT_CONFIG, **options) -> KVCache:
    return KVCache(config, settings.build(3), samples, **options)


def prefill_turn(cache: KVCache, turn_idx: int) -> torch.Tensor:
    """Logits of a ragged prefill. The second row has no image in its first turn, and one in its second."""
    parts = [[(3, 30, 9), (14,), (2, 12, 3, 9, 8)], [(4,), (2, 10, 5), (1, 8, 4)]][turn_idx]
    prompts = [prompt_ids(MODEL, *counts, seed=10 * turn_idx + row) for row, counts in enumerate(parts)]
    return prefill_prompts(MODEL, cache, prompts, 12)


@torch.no_grad()
def decode(cache: KVCache, first: int, end: int) -> list[torch.Tensor]:
    """Logits of the steps first ... end - 1 of three rows; step 2 ends the second one."""
    logits = []
    for step in range(first, end):
        token = torch.tensor([10 + step, 2 if step == 2 else 20 + step, 30 + step])
        logits.append(decode_step(MODEL, cache, token, STOP))
    return logits


def positions(cache: KVCache) -> list[list[int]]:
    """Those of all entries and of all cores, by layer and row."""
    places = [(layer_idx, row) for layer_idx in range(len(cache.layers)) for row in range(len(cache.sequences))]
    live = [live_positions(cache, *place).tolist() for place in places]
    return live + [core_positions(cache, *place).tolist() for place in places]


def assert_all_equal(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("how", DECODES)
def test_an_answer_goes_on_identically(name, how, tmp_path):
    """Three rows, one of them finished: saved after four steps, and once more in the next turn."""
    path = tmp_path / "cache.safetensors"
    cache = new_cache(POLICIES[name], **DECODES[how])
    prefill_turn(cache, 0)
    decode(cache, 0, 4)
    for turn_idx in range(2):
        save_cache(cache, path)
        loaded = new_cache(POLICIES[name], (0, 0, 0), **DECODES[how])
        load_cache(loaded, path, torch.float32)
        assert positions(loaded) == positions(cache) and live_entries(loaded) == live_entries(cache)
        assert loaded.nbytes == cache.nbytes
        assert full_bytes(loaded) == full_bytes(cache)
        assert entries_attended(loaded) == entries_attended(cache)
        assert_all_equal(decode(loaded, 4, 11), decode(cache, 4, 11))
        assert positions(loaded) == positions(cache) and loaded.step_kinds == cache.step_kinds
        if turn_idx == 0:
            assert torch.equal(prefill_turn(loaded, 1), prefill_turn(cache, 1))
            assert positions(loaded) == positions(cache)
            assert_all_equal(decode(loaded, 0, 4), decode(cache, 0, 4))
            cache = loaded  # so that a loaded cache is saved
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("how", DECODES)
@pytest.mark.parametrize("steps", [19, 20, 21])
def test_an_answer_that_has_filled_its_tail_is_loaded(steps, how, tmp_path):
    """With 12 tokens of text, 20 steps fill a bucket of 32 slots: then no slot follows the last entry."""
    cache = new_cache(POLICIES["full"], (0,), **DECODES[how])
    prefill_prompts(MODEL, cache, [prompt_ids(MODEL, 3, 30, 12)], steps + 1)
    for step in range(steps):
        decode_step(MODEL, cache, torch.tensor([10 + step]), STOP)
    save_cache(cache, tmp_path / "cache")
    loaded = new_cache(POLICIES["full"], (0,), **DECODES[how])
    load_cache(loaded, tmp_path / "cache", torch.float32)
    assert positions(loaded) == positions(cache)
    logits = [prefill_prompts(MODEL, each, [prompt_ids(MODEL, 2, 10, 5)], 4) for each in (cache, loaded)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_implementation_may_go_on_but_not_another_dtype(dtype, tmp_path):
    model = tiny_model(6, heads=(4, 2)).to(dtype)
    cache = KVCache(model.config.text, AVL.build(3), static=True)
    token = prefill_prompts(model, cache, [prompt_ids(model, 3, 30, 9)], 4).argmax(dim=-1)
    save_cache(cache, tmp_path / "cache")
    complaint = f'dtype "{str(dtype).removeprefix("torch.")}", to be loaded with "float32"'
    with pytest.raises(UserError, match=re.escape(complaint)):
        load_cache(new_cache(AVL, (0,)), tmp_path / "cache", torch.float32)
    others = [KVCache(model.config.text, AVL.build(3), **options) for options in DECODES.values()]
    for other in others:
        load_cache(other, tmp_path / "cache", dtype)
    expected = decode_step(model, cache, token, STOP)
    for other in others:
        torch.testing.assert_close(decode_step(model, other, token, STOP), expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "cache.safetensors"
    cache = new_cache(AVL)
    prefill_turn(cache, 0)
    decode(cache, 0, 4)
    save_cache(cache, path)
    return path


def with_avl(**changes: object) -> KVCache:
    return new_cache(replace(AVL, **changes))


def with_config(**changes: object) -> KVCache:
    return new_cache(AVL, config=replace(TEXT_CONFIG, **changes))


MISMATCHES: dict[str, Callable[[], KVCache]] = {
    "policy.vision.rate 0.5, to be loaded with 0.25": lambda: with_avl(vision_rate=0.25),
    "policy.vision.interval 3, to be loaded with 4": lambda: with_avl(vision_interval=4),
    "policy.window 1, to be loaded with 4": lambda: with_avl(score_window=4),
    "policy.budget.init_cache 4, to be loaded with 5": lambda: with_avl(text_init_cache=5),
    'policy.budget.rule "TextH2O", to be loaded with "TextHistory"': lambda: with_avl(text_h2o=False),
    "policy.filters.parts 1, to be loaded with 0": lambda: with_avl(filter=False),
    'policy.name "avl", to be loaded with "full"': lambda: new_cache(AVLSettings()),
    "config.rope_theta 10000.0, to be loaded with 500000.0": lambda: with_config(rope_theta=5e5),
    "config.num_hidden_layers 3, to be loaded with 4": lambda: with_config(num_hidden_layers=4),
    "config.num_key_value_heads 2, to be loaded with 4": lambda: with_config(num_key_value_heads=4),
    "sequences 3, to be loaded with 1": lambda: new_cache(AVL, (0,)),
}


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_a_mismatch_is_refused(saved, mismatch):
    with pytest.raises(UserError) as error:
        load_cache(MISMATCHES[mismatch](), saved, torch.float32)
    assert str(error.value) == f"{saved}: saved with {mismatch}"


def tampered(
    saved: Path,
    path: Path,
    metadata: Mapping[str, object] | None = None,
    drop: str | None = None,
    checksum: str | None = None,
    **changes: Callable,
) -> Path:
    """A copy of the file with other metadata or tensors, and the checksum of these unless another is given.

    `changes` are functions of a tensor, by its name with two underscores for a dot.
    """
    with safe_open(saved, framework="pt") as file:
        content = {**json.loads(file.metadata()[KEY]), **(metadata or {})}
    tensors = load_file(saved)
    for spelled, change in changes.items():
        name = spelled.replace("__", ".")
        tensors[name] = change(tensors.get(name))
    tensors.pop(drop, None)
    text = json.dumps(content)
    right = checksum_of(text, {name: checksum_of_tensor(tensor) for name, tensor in tensors.items()})
    save_file(tensors, path, {KEY: text, CHECKSUM: checksum or right})
    return path


# What is complained of, a trailing space telling apart two cases; and what is changed in the file.
DAMAGE: dict[str, dict[str, Any]] = {
    "no tensor": dict(drop="layers.1.v"),
    "unexpected tensor 'more'": dict(more=lambda t: torch.zeros(1)),
    "layers.0.k has shape": dict(layers__0__k=lambda t: t[:, :, 1:].contiguous()),
    "layers.0.counts has shape": dict(layers__0__counts=lambda t: t[:1].contiguous()),
    "layers.2.v is torch.float64": dict(layers__2__v=lambda t: t.double()),
    "layers.0.write_slot leaves": dict(layers__0__write_slot=lambda t: t + 1000),
    "layers.0.write_slot leaves ": dict(layers__0__write_slot=lambda t: t - 1000),
    "damaged (layers.0.write_slot)": dict(layers__0__write_slot=lambda t: t + 12),
    "layers.0.position leaves": dict(layers__0__position=lambda t: t + 512),
    "layers.1.counts leaves": dict(layers__1__counts=lambda t: t - 50),
    "layers.1.counts leaves ": dict(layers__1__counts=lambda t: t + 10**9),
    "damaged (layers.1.counts)": dict(layers__1__counts=lambda t: t + 1),
    "damaged (layers.0.counts)": dict(layers__0__counts=lambda t: t[:, [1, 0, 2, 3, 4]]),
    "damaged (layers.2.in_core_step)": dict(layers__2__in_core_step=lambda t: 1 - t),
    "damaged (layers.1.in_core_step)": dict(layers__1__in_core_step=torch.ones_like),
    "layers.1.k has shape": dict(layers__1__counts=lambda t: t + torch.tensor([400, 0, 0, 0, 0])),
    "stored leaves 0..4": dict(stored=lambda t: t + 5),
    "active is torch.uint8": dict(active=lambda t: t.byte()),
    "sequences.0.evictable_positions leaves": dict(sequences__0__evictable_positions=lambda t: t + 100),
    "the lists of sequence 0": dict(sequences__0__vision_positions=lambda t: t.flip(0)),
    "the lists of sequence 1": dict(sequences__1__tail_lengths=lambda t: t * 2),
    "steps that do not agree": dict(sequences__1__tail_lengths=lambda t: t[:, :-1].clone()),
    "expected samples and lengths up to 512 of 3 sequences": dict(metadata={"lengths": [10, 20]}),
    "expected samples and lengths up to 512 of 3 sequences ": dict(metadata={"lengths": [10, 20, 10**6]}),
    "damaged metadata: lengths[0]": dict(metadata={"lengths": [0, 20, 30]}),
    "damaged metadata: lengths[1]": dict(metadata={"lengths": [10, 2.5, 30]}),
    "damaged metadata: samples[2]": dict(metadata={"samples": [1, 2, "3"]}),
    "damaged metadata: samples[0]": dict(metadata={"samples": [2**63, 2, 3]}),
    "damaged metadata: turns": dict(metadata={"turns": 0}),
    "damaged metadata: turns ": dict(metadata={"turns": True}),
    "damaged metadata: step_kinds[1]": dict(metadata={"step_kinds": ["core", "none"]}),
    "saved with policy.window more than a value": dict(metadata={"policy": {"name": "avl", "window": {"a": []}}}),
    "saved with version 99": dict(metadata={"version": 99}),
    "saved with policy.name null": dict(metadata={"policy": "avl"}),
}


@pytest.mark.parametrize("complaint", DAMAGE)
def test_a_damaged_file_is_refused_and_changes_nothing(saved, complaint, tmp_path):
    path = tampered(saved, tmp_path / "damaged.safetensors", **DAMAGE[complaint])
    cache = new_cache(AVL)
    load_cache(cache, saved, torch.float32)
    before = [buffer.clone() for buffer in cache.tensors()]
    with pytest.raises(UserError) as error:
        load_cache(cache, path, torch.float32)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and complaint.strip() in message and "\n" not in message
    assert_all_equal(list(cache.tensors()), before)
    assert cache.step_kinds == ["core", "core", "refresh", "core"]


@pytest.mark.parametrize(
    "change",
    [
        dict(layers__0__k=lambda t: t + 1),
        dict(layers__2__v=lambda t: t * float("nan")),
        dict(layers__1__score=lambda t: -t),
        dict(layers__1__vision_attn=lambda t: t.flip(1)),
        dict(metadata={"samples": [5, 2, 8]}),
        dict(metadata={"turns": 7}),
        dict(metadata={"step_kinds": ["full"] * 4}),
        dict(checksum="0" * 64),
    ],
)
def test_changed_values_are_refused_by_the_checksum(saved, change, tmp_path):
    with safe_open(saved, framework="pt") as file:
        checksum = file.metadata()[CHECKSUM]
    path = tampered(saved, tmp_path / "changed.safetensors", **{"checksum": checksum, **change})
    cache = new_cache(AVL)
    with pytest.raises(UserError, match=f"^{path}: damaged .its checksum is that of other content.$"):
        load_cache(cache, path, torch.float32)
    assert not cache.layers


def test_every_byte_counts(saved, tmp_path):
    """One flipped bit anywhere is refused; the last byte of the header may be padding."""
    content, wrong = saved.read_bytes(), tmp_path / "wrong.safetensors"
    header = 8 + int.from_bytes(content[:8], "little")
    for place in (*range(0, header, 211), *range(header, len(content), len(content) // 40), len(content) - 1):
        if content[place : place + 1] == b" ":
            continue
        changed = bytearray(content)
        changed[place] ^= 1
        wrong.write_bytes(changed)
        with pytest.raises(UserError, match=f"^{wrong}: ") as error:
            load_cache(new_cache(AVL), wrong, torch.float32)
        assert "\n" not in str(error.value)


def test_files_that_are_no_cache(saved, tmp_path):
    cache = new_cache(AVL)
    content, wrong = saved.read_bytes(), tmp_path / "wrong.safetensors"
    for size in (0, 5, 100, len(content) // 2, len(content) - 1):
        wrong.write_bytes(content[:size])
        with pytest.raises(UserError, match="not a readable safetensors file"):
            load_cache(cache, wrong, torch.float32)
    for metadata in (None, {KEY: "{}"}, {CHECKSUM: "0"}):
        save_file({"x": torch.zeros(1)}, wrong, metadata)
        with pytest.raises(UserError, match="not a saved cache"):
            load_cache(cache, wrong, torch.float32)
    deep = '{"policy": ' + '{"a": ' * 900 + "1" + "}" * 901
    for text, complaint in (
        ("{", "damaged metadata"),
        ("[" * 10**5, "damaged metadata"),
        ("[]", "damaged metadata: expected object, got array"),
        ('{"version": NaN}', "damaged metadata"),
        ('{"version": 1e999}', "damaged metadata"),
        (deep, "saved with version null|damaged metadata"),
    ):
        save_file({"x": torch.zeros(1)}, wrong, {KEY: text, CHECKSUM: "0"})
        with pytest.raises(UserError, match=complaint):
            load_cache(cache, wrong, torch.float32)
    os.mkfifo(tmp_path / "fifo")
    for path, complaint in (
        (tmp_path / "none", "no such file"),
        (tmp_path, "is a folder"),
        (tmp_path / "fifo", "is a FIFO"),
    ):
        with pytest.raises(UserError, match=complaint):
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
    too_much = "x" * (101 << 20)  # more than the header of a safetensors file may hold
    monkeypatch.setattr("minivlm.cache.storage.json.dumps", lambda metadata: too_much)
    with pytest.raises(UserError, match="cannot be written"):
        save_cache(cache, tmp_path / "cache")
    assert (tmp_path / "cache").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
