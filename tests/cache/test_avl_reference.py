"""The plain re-statement of A-VL against every golden trace, the decoder itself, and the counts of the method."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from avl_cases import ALL_PARTS, Case, prefill_reference, random_case, run_reference, tiny_model
from avl_reference import SYSTEM, TEXT, VISION, Reference, Settings
from cache_helpers import MARGIN
from golden_helpers import TRACES, expand_ids, load_inputs, load_model, load_trace
from weights.layout import by_canonical_name

golden_model = functools.cache(load_model)


def all_logits(ref: Reference) -> Tensor:
    return torch.stack(ref.logits)


# -- the traces ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "config"), TRACES)
def test_golden_trace(name: str, config: str) -> None:
    """With the trace's tokens fed: tokens, logits, fates, kept and core sets, and the margins of the decisions.

    A small margin excuses nothing here.
    """
    trace, metadata = load_trace(name, config)
    model, inputs = golden_model(name), load_inputs(name)
    ref = Reference(model, Settings(**metadata["config"]))
    ref.prefill(inputs["inputs_embeds"], expand_ids(model, inputs) == model.config.image_token_index)
    kept = [[ref.vision_ordinal(p) for p in layer] for layer in ref.vision_kept()]
    for token in trace["tokens"][:-1].tolist():
        ref.step(token)

    torch.testing.assert_close(all_logits(ref).float(), trace["logits"], atol=1e-4, rtol=0)
    assert torch.equal(all_logits(ref).argmax(-1), trace["tokens"].long())
    assert ref.fate == trace["fate"].tolist()
    if "vision_kept" in trace:
        assert kept == [without_padding(layer) for layer in trace["vision_kept"].tolist()]
    assert [call for call, _ in ref.cores] == trace.get("core_steps", torch.empty(0)).tolist()
    for (_, cores), expected in zip(ref.cores, trace.get("core", torch.empty(0)).tolist(), strict=True):
        ordinals = [{ref.vision_ordinal(p) for p in core} for core in cores]
        assert ordinals == [set(without_padding(core)) for core in expected]

    close = functools.partial(torch.testing.assert_close, atol=1e-6, rtol=1e-6)
    close(torch.tensor(ref.margins[0]["vision"]), trace["vision_margin"])
    for (call, _), expected in zip(ref.cores, trace["core_margin"], strict=True):
        close(torch.tensor(ref.margins[call]["core"]), expected)
    if metadata["config"]["text"] != "history":  # the re-statement computes those margins more carefully
        close(torch.tensor([margins["text"] for margins in ref.margins]), trace["text_margin"])


def without_padding(ordinals: list[int]) -> list[int]:
    """A trace's list, which is padded with -1."""
    return [ordinal for ordinal in ordinals if ordinal >= 0]


# -- the decoder --------------------------------------------------------------------------------


class FullAttention:
    """Stands in for a cache in one causal prefill, and keeps nothing."""

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def survivors(self, layer_idx: int) -> None:
        return None


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_without_pruning_it_is_the_decoder(heads: tuple[int, int]) -> None:
    model = tiny_model(1, heads=heads)
    embeds = torch.randn(30, 32, generator=torch.Generator().manual_seed(2))
    expected = model.lm_head(model(embeds[None], torch.arange(30)[None], FullAttention()))[0]
    ref = Reference(model, Settings())
    first = ref.prefill(embeds[:20], [False] * 5 + [True] * 10 + [False] * 5)
    second = ref.turn(embeds[20:], [True] * 4 + [False] * 6)
    torch.testing.assert_close(first.float(), expected[19], atol=2e-5, rtol=0)
    torch.testing.assert_close(second.float(), expected[-1], atol=2e-5, rtol=0)
    assert ref.live_counts() == [{SYSTEM: 5, VISION: 14, TEXT: 11}] * 3


# -- what the rates promise ---------------------------------------------------------------------


def counts_by_formula(case: Case, layer_idx: int, fed: int) -> dict[str, int]:
    """Entries that one head of a layer holds after a first turn and `fed` tokens of the answer, by the formulas."""
    settings = case.settings
    flags = case.inputs(0, [])[1].tolist()
    n, system = flags.count(True), flags.index(True) if True in flags else 1
    filtered = settings.prefill_filter and layer_idx >= settings.filter_layer
    vision = int((1 - settings.filter_rate) * n) if filtered else n
    if settings.vision:
        vision = min(vision, int((1 - settings.vision_rate) * n))
    text = len(flags) - n - system + fed
    if settings.text:
        text = min(text, max(round((1 - settings.text_rate) * text), settings.text_init_cache))
    return {SYSTEM: system, VISION: vision, TEXT: text}


@pytest.mark.parametrize("seed", range(40))
def test_counts_are_what_the_rates_promise(seed: int) -> None:
    case = random_case(seed, turns=1)
    ref = run_reference(case)
    fed, seen = ref.turn_step, len(ref.token_kinds)
    sizes = {len(live) for layer in ref.layers for live in layer.live}
    if case.settings.all_h2o:
        room = min(seen, int(seen * 0.125) + int(seen * 0.375))
        # At a multiple of eight the budget grows by two, the cache by one.
        lagging = seen % 8 == 0 and fed > 0 and room < seen
        assert sizes == {room - lagging}
    elif case.settings.streaming:
        assert sizes == {min(seen, case.settings.streaming(seen))}
    else:
        assert ref.live_counts() == [counts_by_formula(case, layer_idx, fed) for layer_idx in range(len(ref.layers))]
    assert not all_logits(ref).isnan().any()  # nothing evicted was read


def test_vision_counts_are_truncated_doubles() -> None:
    """(1 - 0.8) · 25 is 4.999... and (1 - 0.9) · 70 is 6.999..., not 5 and 7."""
    ref = prefill_reference(Settings(vision=True, vision_rate=0.8, vision_compute_rate=0.9), "s" + "v" * 25 + "t")
    assert [len(kept) for kept in ref.vision_kept()] == [4] * 3
    ref = prefill_reference(Settings(vision=True, vision_rate=0.9, vision_compute_rate=0.0), "s" + "v" * 70 + "t")
    assert [len(core) for core in ref.cores[0][1]] == [6] * 3


def test_text_budget_rounds_half_to_even() -> None:
    counts = []
    ref = prefill_reference(Settings(text="h2o", text_init_cache=0), "sv" + "t" * 5)
    for token in range(5):
        counts.append(ref.live_counts()[0][TEXT])
        ref.step(token)
    assert counts == [2, 3, 4, 4, 4]  # of 2.5, 3, 3.5, 4, 4.5


# -- settings that must not matter --------------------------------------------------------------


@pytest.mark.parametrize("text", ["h2o", "direct", "history"])
def test_rates_of_zero_change_nothing(text: str) -> None:
    zero = dict(vision_rate=0.0, vision_compute_rate=0.0, text_rate=0.0, text_init_cache=0, filter_rate=0.0)
    prompt = "sss" + "v" * 20 + "ttttt"
    full = prefill_reference(Settings(), prompt)
    nothing_removed = prefill_reference(replace(ALL_PARTS, text=text, **zero), prompt)
    full.generate(12)
    nothing_removed.generate(12)
    torch.testing.assert_close(all_logits(nothing_removed), all_logits(full), atol=1e-10, rtol=0)


def same_logits(one: Settings, other: Settings) -> bool:
    refs = [prefill_reference(settings, "sss" + "v" * 20 + "t" * 9, seed=5) for settings in (one, other)]
    for ref in refs:
        for token in range(7):
            ref.step(token)
    return torch.equal(all_logits(refs[0]), all_logits(refs[1]))


def test_settings_with_the_same_meaning() -> None:
    core = Settings(vision=True, vision_compute_rate=0.8, vision_interval=3)
    assert same_logits(replace(core, vision_interval=1), replace(core, vision_interval=-1))
    assert same_logits(replace(core, vision_compute_rate=0.2), replace(core, vision_compute_rate=0.5))
    assert not same_logits(core, replace(core, vision_interval=1))
    assert same_logits(replace(core, score_window=9), replace(core, score_window=100))
    assert not same_logits(core, replace(core, score_window=9))
    last = Settings(prefill_filter=True, filter_layer=3, filter_rate=1.0)
    assert same_logits(last, Settings())
    assert not same_logits(replace(last, filter_layer=2), Settings())


def test_layer_decisions_average_over_all_query_heads() -> None:
    """Two forms of one model choose alike: key/value heads that a group shares, or repeated for each query head."""
    grouped, repeated = tiny_model(3, heads=(6, 2)), tiny_model(3, heads=(6, 6))
    theirs = by_canonical_name(repeated.state_dict(), repeated.config.text)
    for name, weight in by_canonical_name(grouped.state_dict(), grouped.config.text).items():
        if name.startswith("language_model") and ("k_proj" in name or "v_proj" in name):
            weight = weight.unflatten(0, (2, -1)).repeat_interleave(3, dim=0).flatten(0, 1)
        theirs[name].copy_(weight)
    settings = replace(ALL_PARTS, text=None, score_window=4)
    refs = [prefill_reference(settings, "ss" + "v" * 30 + "t" * 6, model) for model in (grouped, repeated)]
    assert refs[0].generate(10) == refs[1].generate(10)
    assert refs[0].vision_kept() == refs[1].vision_kept()
    assert refs[0].cores == refs[1].cores


# -- precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(100, 130))
def test_float32_decides_alike_above_the_margin(seed: int) -> None:
    """So the margin is wide enough to tell an error from rounding."""
    case = random_case(seed)
    exact = run_reference(case)
    rough = Reference(case.model, case.settings, torch.float32)
    for turn_idx, answer in enumerate(exact.tokens):
        rough.turn(*case.inputs(turn_idx, exact.tokens))
        for token in answer[:-1]:
            rough.step(token)
    tie = exact.first_tie(MARGIN)
    torch.testing.assert_close(all_logits(rough)[: tie + 1].double(), all_logits(exact)[: tie + 1], atol=1e-4, rtol=0)
    fates = torch.tensor(exact.fate)
    sure = (fates >= 0) & (fates < tie)
    assert torch.equal(torch.tensor(rough.fate)[sure], fates[sure])


def test_refusals() -> None:
    with pytest.raises(ValueError, match="vision token"):
        prefill_reference(Settings(), "xvv")
    with pytest.raises(ValueError, match="alone"):
        Settings(all_h2o=True, vision=True)
    with pytest.raises(ValueError, match="no text rule"):
        Settings(text="h20")
