"""The plain re-statement of A-VL against every golden trace; and what no trace covers, by counting and by hand."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from avl_cases import Budget, Case, random_case, run, tiny_model
from avl_reference import SYSTEM, TEXT, VISION, Attention, Reference, Settings, best, quantile
from golden_helpers import TRACES, expand_ids, load_inputs, load_model, load_trace

golden_model = functools.cache(load_model)
EVERYTHING = Settings(
    vision=True, vision_interval=3, text="h2o", text_init_cache=4, prefill_filter=True, filter_layer=1
)


def prefilled(settings: Settings, kinds: str, model=None, seed: int = 0) -> Reference:
    """A re-statement after a prompt of random embeddings, `v` a vision token and anything else none."""
    model = model or tiny_model(seed)
    ref = Reference(model, settings)
    embeds = torch.randn(len(kinds), model.config.text.hidden_size, generator=torch.Generator().manual_seed(seed))
    ref.prefill(embeds, [kind == "v" for kind in kinds])
    return ref


def logits(ref: Reference) -> Tensor:
    return torch.stack(ref.logits)


# -- the traces ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "config"), TRACES)
def test_golden_trace(name: str, config: str) -> None:
    """Tokens, logits, fates, kept and core sets, and the margins of the decisions, teacher-forced.

    Nothing is excused for a small margin: both sides' sets were decided once, and these in float64.
    """
    trace, meta = load_trace(name, config)
    model, inputs = golden_model(name), load_inputs(name)
    ref = Reference(model, Settings(**meta["config"]))
    ref.prefill(inputs["inputs_embeds"], expand_ids(model, inputs) == model.config.image_token_index)
    kept = [[ref.vision_ordinal(p) for p in layer] for layer in ref.vision_kept()]
    for token in trace["tokens"][:-1].tolist():
        ref.step(token)

    torch.testing.assert_close(logits(ref).float(), trace["logits"], atol=1e-4, rtol=0)
    assert torch.equal(logits(ref).argmax(-1), trace["tokens"].long())
    assert ref.fate == trace["fate"].tolist()
    if "vision_kept" in trace:
        assert kept == [[i for i in layer if i >= 0] for layer in trace["vision_kept"].tolist()]
    assert [call for call, _ in ref.cores] == trace.get("core_steps", torch.empty(0)).tolist()
    for (_, cores), expected in zip(ref.cores, trace.get("core", torch.empty(0)).tolist()):
        assert [{ref.vision_ordinal(p) for p in core} for core in cores] == [
            {i for i in core if i >= 0} for core in expected
        ]

    close = functools.partial(torch.testing.assert_close, atol=1e-6, rtol=1e-6)
    close(torch.tensor(ref.margins[0]["vision"]), trace["vision_margin"])
    for (call, _), expected in zip(ref.cores, trace["core_margin"]):
        close(torch.tensor(ref.margins[call]["core"]), expected)
    if meta["config"]["text"] != "history":  # whose margins are taken more carefully here
        close(torch.tensor([margins["text"] for margins in ref.margins]), trace["text_margin"])


# -- the decoder --------------------------------------------------------------------------------


class FullAttention:
    """A cache that keeps nothing: one causal prefill."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def survivors(self, layer: int) -> None:
        return None


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_without_pruning_it_is_the_decoder(heads: tuple[int, int]) -> None:
    model = tiny_model(1, heads=heads)
    embeds = torch.randn(30, 32, generator=torch.Generator().manual_seed(2))
    expected = model.lm_head(model(embeds[None], torch.arange(30)[None], FullAttention()))[0]
    ref = Reference(model, Settings())
    first = ref.prefill(embeds[:20], [False] * 5 + [True] * 10 + [False] * 5)
    torch.testing.assert_close(first.float(), expected[19], atol=2e-5, rtol=0)
    torch.testing.assert_close(ref.turn(embeds[20:], [True] * 4 + [False] * 6).float(), expected[-1], atol=2e-5, rtol=0)
    assert ref.live_counts() == [{SYSTEM: 5, VISION: 14, TEXT: 11}] * 3


# -- what the rates promise ---------------------------------------------------------------------


def promised(case: Case, layer: int, answer: int) -> dict[str, int]:
    """Entries one head of a layer holds by the formulas, after a first turn and `answer` fed tokens."""
    s, flags = case.settings, case.is_vision(case.turns[0]).tolist()
    n, system = flags.count(True), flags.index(True) if True in flags else 1
    text = len(flags) - n - system + answer
    vision = n if not s.prefill_filter or layer < s.filter_layer else int((1 - s.filter_rate) * n)
    if s.vision:
        vision = min(vision, int((1 - s.vision_rate) * n))
    if s.text:
        text = min(text, max(round((1 - s.text_rate) * text), s.text_init_cache))
    return {SYSTEM: system, VISION: vision, TEXT: text}


@pytest.mark.parametrize("seed", range(40))
def test_counts_are_what_the_rates_promise(seed: int) -> None:
    case = random_case(seed, turns=1)
    ref = run(case)
    fed, seq = ref.turn_step, len(ref.kind)
    if case.settings.all_h2o:
        # At a multiple of eight the budget grows by two, the cache by one.
        room = min(seq, int(seq * 0.125) + int(seq * 0.375))
        assert {len(live) for layer in ref.layers for live in layer.live} == {
            room - (seq % 8 == 0 and fed > 0 and room < seq)
        }
    elif case.settings.streaming:
        room = min(seq, case.settings.streaming(seq))
        assert {len(live) for layer in ref.layers for live in layer.live} == {room}
    else:
        assert ref.live_counts() == [promised(case, layer, fed) for layer in range(len(ref.layers))]
    assert not logits(ref).isnan().any()  # nothing evicted was read


def test_vision_keeps_the_doubles_truncation() -> None:
    """(1 - 0.8) · 25 is 4.999…, and (1 - 0.9) · 70 is 6.999…."""
    ref = prefilled(Settings(vision=True, vision_rate=0.8, vision_compute_rate=0.9), "s" + "v" * 25 + "t")
    assert [len(kept) for kept in ref.vision_kept()] == [4] * 3
    ref = prefilled(Settings(vision=True, vision_rate=0.9, vision_compute_rate=0.0), "s" + "v" * 70 + "t")
    assert [len(core) for core in ref.cores[0][1]] == [6] * 3


def test_text_budget_rounds_half_to_even() -> None:
    counts = []
    ref = prefilled(Settings(text="h2o", text_init_cache=0), "sv" + "t" * 5)
    for token in range(5):
        counts.append(ref.live_counts()[0][TEXT])
        ref.step(token)
    assert counts == [2, 3, 4, 4, 4]  # of 2.5, 3, 3.5, 4, 4.5


# -- settings that must not matter --------------------------------------------------------------


@pytest.mark.parametrize("text", ["h2o", "direct", "history"])
def test_rates_of_zero_change_nothing(text: str) -> None:
    zero = dict(vision_rate=0.0, vision_compute_rate=0.0, text_rate=0.0, text_init_cache=0, filter_rate=0.0)
    prompt = "sss" + "v" * 20 + "ttttt"
    full, kept = prefilled(Settings(), prompt), prefilled(replace(EVERYTHING, text=text, **zero), prompt)
    full.generate(12), kept.generate(12)
    torch.testing.assert_close(logits(kept), logits(full), atol=1e-10, rtol=0)


def same_answer(one: Settings, other: Settings, prompt: str = "sss" + "v" * 20 + "t" * 9) -> bool:
    refs = [prefilled(settings, prompt, seed=5) for settings in (one, other)]
    for ref in refs:
        for token in range(7):
            ref.step(token)
    return torch.equal(logits(refs[0]), logits(refs[1]))


def test_settings_with_the_same_meaning() -> None:
    core = Settings(vision=True, vision_compute_rate=0.8, vision_interval=3)
    assert same_answer(replace(core, vision_interval=1), replace(core, vision_interval=-1))
    assert same_answer(replace(core, vision_compute_rate=0.2), replace(core, vision_compute_rate=0.5))
    assert not same_answer(core, replace(core, vision_interval=1))
    assert same_answer(replace(core, score_window=9), replace(core, score_window=100))
    assert not same_answer(core, replace(core, score_window=9))
    last = Settings(prefill_filter=True, filter_layer=3, filter_rate=1.0)
    assert same_answer(last, Settings())
    assert not same_answer(replace(last, filter_layer=2), Settings())


def test_layer_decisions_average_over_all_query_heads() -> None:
    """Key/value heads shared by a group, or repeated for each of its query heads: the same model, the same choices."""
    grouped, repeated = tiny_model(3, heads=(6, 2)), tiny_model(3, heads=(6, 6))
    weights = grouped.state_dict()
    for name in weights:
        if name.startswith("language_model") and ("k_proj" in name or "v_proj" in name):
            weights[name] = weights[name].unflatten(0, (2, -1)).repeat_interleave(3, dim=0).flatten(0, 1)
    repeated.load_state_dict(weights)
    settings = replace(EVERYTHING, text=None, score_window=4)
    refs = [prefilled(settings, "ss" + "v" * 30 + "t" * 6, model) for model in (grouped, repeated)]
    assert refs[0].generate(10) == refs[1].generate(10)
    assert refs[0].vision_kept() == refs[1].vision_kept()
    assert refs[0].cores == refs[1].cores


# -- the rules by hand --------------------------------------------------------------------------


def test_best_breaks_ties_by_position_and_measures_its_margin() -> None:
    assert best({7: 1.0, 3: 1.0, 5: 2.0}, 2) == ([5, 3], 0.0)
    assert best({1: 4.0, 2: 1.0}, 1) == ([1], 0.75)
    assert best({1: 4.0, 2: 1.0}, 0) == ([], math.inf)
    assert best({1: 4.0, 2: 1.0}, 5) == ([1, 2], math.inf)
    assert best({1: 1e-40, 2: 0.0}, 1)[1] < 1e-9  # both zero in float32


def test_quantile_is_linear() -> None:
    values = torch.rand(11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for q in (0.0, 0.3, 0.5, 0.77, 1.0):
        for n in (1, 2, 11):
            assert quantile(values[:n].tolist(), q) == pytest.approx(values[:n].quantile(q).item(), abs=1e-15)


def crafted(settings: Settings, weights: list[list[list[float]]]) -> Reference:
    """One key/value head with two query heads: a prompt of a system token and text, whose attention is `weights` [G, R, R]."""
    ref = Reference(tiny_model(0, layers=1, heads=(2, 1)), settings)
    rows = ref._begin([SYSTEM] + [TEXT] * (len(weights[0]) - 1))
    ref.layers[0].live[0] += rows
    ref._prune_columns(0, Attention(rows, [rows], [torch.tensor(weights, dtype=torch.float64)]))
    return ref


ROWS = [
    [[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0.1, 0.2, 0.7, 0], [0.3, 0.35, 0.05, 0.3]],
    [[1.0, 0, 0, 0], [0.2, 0.8, 0, 0], [0.1, 0.3, 0.6, 0], [0.1, 0.05, 0.65, 0.2]],
]


def test_h2o_sums_text_rows_over_the_group() -> None:
    # B = round(0.6 · 3) = 2, one of them best, one recent.
    ref = crafted(Settings(text="h2o", text_rate=0.4, text_init_cache=0, text_hh_rate=0.5), ROWS)
    assert ref.layers[0].live[0] == [0, 2, 3]  # column 1: 1.8, column 2: 2.0; the system row and column do not count
    assert ref.layers[0].score[0] == pytest.approx({2: 2.0, 3: 0.5})
    rows = ref._begin([TEXT, TEXT])  # a later turn: scores go on, B = round(0.6 · 5) = 3, one of them best
    ref.layers[0].live[0] += rows
    turn = [
        [[0.2, 0.0, 0.7, 0.1, 0.0], [0.1, 0.1, 0.6, 0.2, 0.0]],
        [[0.1, 0.1, 0.3, 0.5, 0.0], [0.2, 0.1, 0.3, 0.2, 0.2]],
    ]
    ref._prune_columns(0, Attention(rows, [[0, 2, 3, 4, 5]], [torch.tensor(turn, dtype=torch.float64)]))
    assert ref.layers[0].live[0] == [0, 3, 4, 5]
    assert ref.layers[0].score[0] == pytest.approx({3: 2.4, 4: 1.0, 5: 0.2})


def test_direct_takes_the_last_row_and_protects_nothing() -> None:
    ref = crafted(Settings(text="direct", text_rate=0.4, text_init_cache=0), ROWS)  # last row 0.40, 0.70, 0.50
    assert ref.layers[0].live[0] == [0, 2, 3]
    ref = crafted(Settings(text="direct", text_rate=0.7, text_init_cache=0), ROWS)
    assert ref.layers[0].live[0] == [0, 2]  # the current token goes too


def test_history_scores_above_the_quantile_of_the_others() -> None:
    ref = crafted(Settings(text="history", text_rate=0.5, text_init_cache=0), ROWS)  # B = round(1.5) = 2
    # Column 1 starts at 0.9, gains 0.5 - q(0.5) = 0 and 0.4 - q(0.4, 0.7) = -0.15; column 2 starts at 1.3 and gains 0.15.
    assert ref.layers[0].live[0] == [0, 2, 3]
    assert ref.layers[0].score[0] == pytest.approx({2: 1.45, 3: 0.5})
    ref.turn_step, rows = 1, ref._begin([TEXT])
    ref.layers[0].live[0] += rows
    row = torch.tensor([[[0.1, 0.2, 0.1, 0.1]], [[0.1, 0.1, 0.2, 0.1]]], dtype=torch.float64)
    ref._prune_columns(
        0, Attention(rows, [[0, 2, 3, 4]], [row])
    )  # text 0.3, 0.3, 0.2: the median, itself included, is 0.3
    assert ref.layers[0].score[0] == pytest.approx({2: 1.45, 4: 0.2})
    assert ref.layers[0].live[0] == [0, 2, 4]  # round(0.5 · 4) = 2, one of them recent


def test_kinds_of_tokens() -> None:
    def kinds(prompt: str) -> str:
        return "".join(kind[0] for kind in prefilled(Settings(), prompt).kind)

    assert kinds("xxvvxvxx") == "ssvvtvtt"
    assert kinds("vx") == "vt"
    assert kinds("xxx") == "stt"
    assert kinds("x") == "s"


def test_streaming_keeps_the_first_four_and_the_last() -> None:
    ref = prefilled(Settings(streaming=Budget(0.0, 7)), "ssvvvvvvttt")
    ref.step(3)
    assert ref.layers[1].live[0] == [0, 1, 2, 3, 9, 10, 11]
    assert prefilled(Settings(streaming=Budget(0.0, 2)), "ssvvvvvvttt").layers[0].live[1] == [0, 1]


def test_filter_drops_rows_for_the_later_layers_only() -> None:
    ref = prefilled(Settings(prefill_filter=True, filter_layer=2, filter_rate=0.75), "sss" + "v" * 8 + "tt")
    assert [len(kept) for kept in ref.vision_kept()] == [8, 8, 2]
    never = [p for p, fate in enumerate(ref.fate[2][0]) if fate == -2]
    assert len(never) == 6 and set(never) == set(range(3, 11)) - set(ref.vision_kept()[2])


# -- later turns --------------------------------------------------------------------------------


def test_a_later_turn_prunes_its_own_image_and_chooses_the_core_anew() -> None:
    ref = prefilled(replace(EVERYTHING, prefill_filter=False, vision_compute_rate=0.75), "sss" + "v" * 20 + "t" * 7)
    tokens = ref.generate(8)
    first = ref.vision_kept()
    ref.turn(
        torch.cat((ref.embed(tokens[-1:]), torch.randn(12, 32, dtype=torch.float64))),
        [False] + [True] * 8 + [False] * 4,
    )
    for layer, before, after in zip(ref.layers, first, ref.vision_kept()):
        assert after[:10] == before and len(after) == 14
        assert len(layer.core) == 5 + 2 and set(layer.core) <= set(after)
    assert ref.live_counts()[0] == {SYSTEM: 3, VISION: 14, TEXT: 10}  # round(0.5 · (7 + 7 + 5)) = round(9.5)
    ref.generate(5)
    assert [call for call, _ in ref.cores] == [0, 3, 6, 8, 11]


def test_a_first_image_in_a_later_turn() -> None:
    ref = prefilled(EVERYTHING, "xxxxx")
    ref.generate(4)
    assert ref.cores == []
    ref.turn(torch.randn(12, 32), [False] * 3 + [True] * 8 + [False])
    ref.generate(4)
    assert ref.live_counts() == [{SYSTEM: 1, VISION: 4, TEXT: 7}] * 3  # 14 text tokens seen
    assert [call for call, _ in ref.cores] == [4, 7]


# -- precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(100, 130))
def test_float32_decides_alike_above_the_margin(seed: int) -> None:
    """So a margin of 1e-4 is enough to tell an error from rounding."""
    case = random_case(seed)
    exact = run(case)
    rough = Reference(case.model, case.settings, torch.float32)
    for i, turn in enumerate(case.turns):
        embeds, is_vision = case.embeds(turn), case.is_vision(turn).tolist()
        if i:
            embeds, is_vision = torch.cat((rough.embed(exact.tokens[i - 1][-1:]), embeds)), [False, *is_vision]
        rough.turn(embeds, is_vision)
        for token in exact.tokens[i][:-1]:
            rough.step(token)
    sure = exact.first_tie(1e-4)
    torch.testing.assert_close(logits(rough)[: sure + 1].double(), logits(exact)[: sure + 1], atol=1e-4, rtol=0)
    fates = torch.tensor(exact.fate)
    assert torch.equal(torch.tensor(rough.fate)[(fates >= 0) & (fates < sure)], fates[(fates >= 0) & (fates < sure)])


def test_refusals() -> None:
    with pytest.raises(ValueError, match="vision token"):
        prefilled(Settings(), "xvv")
    with pytest.raises(ValueError, match="alone"):
        Settings(all_h2o=True, vision=True)
    with pytest.raises(ValueError, match="no text rule"):
        Settings(text="h20")
