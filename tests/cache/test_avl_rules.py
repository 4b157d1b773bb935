"""The plain re-statement of A-VL on small cases that are worked out by hand, and in later turns."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from avl_cases import ALL_PARTS, StreamingBudget, prefill_reference, tiny_model
from avl_reference import SYSTEM, TEXT, VISION, Attention, Reference, Settings, best, quantile


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


WEIGHTS = [
    [[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0.1, 0.2, 0.7, 0], [0.3, 0.35, 0.05, 0.3]],
    [[1.0, 0, 0, 0], [0.2, 0.8, 0, 0], [0.1, 0.3, 0.6, 0], [0.1, 0.05, 0.65, 0.2]],
]


def crafted(settings: Settings) -> Reference:
    """A prompt of one system token and three of text in one key/value head, whose two query heads attend as WEIGHTS."""
    ref = Reference(tiny_model(0, layers=1, heads=(2, 1)), settings)
    attend(ref, [SYSTEM, TEXT, TEXT, TEXT], WEIGHTS)
    return ref


def attend(ref: Reference, kinds: list[str], weights: list[list[list[float]]]) -> None:
    """Let new tokens enter the only layer, with these attention weights [G, queries, columns], and evict."""
    live = ref.layers[0].live[0]
    positions = ref._begin(kinds)
    live += positions
    ref._prune_columns(0, Attention(positions, [list(live)], [torch.tensor(weights, dtype=torch.float64)]))


def test_h2o_sums_text_queries_over_the_group() -> None:
    # The budget is round(0.6 · 3) = 2: one heavy hitter, one recent.
    ref = crafted(Settings(text="h2o", text_rate=0.4, text_init_cache=0, text_hh_rate=0.5))
    # Column 1 has 1.8, column 2 has 2.0; the system token counts neither as query nor as column.
    assert ref.layers[0].live[0] == [0, 2, 3]
    assert ref.layers[0].score[0] == pytest.approx({2: 2.0, 3: 0.5})
    # In a later turn scores go on; the budget is round(0.6 · 5) = 3: one heavy hitter, two recent.
    later_turn = [
        [[0.2, 0.0, 0.7, 0.1, 0.0], [0.1, 0.1, 0.6, 0.2, 0.0]],
        [[0.1, 0.1, 0.3, 0.5, 0.0], [0.2, 0.1, 0.3, 0.2, 0.2]],
    ]
    attend(ref, [TEXT, TEXT], later_turn)
    assert ref.layers[0].live[0] == [0, 3, 4, 5]
    assert ref.layers[0].score[0] == pytest.approx({3: 2.4, 4: 1.0, 5: 0.2})


def test_direct_takes_the_last_query_and_protects_nothing() -> None:
    # The last query gives 0.4, 0.7 and 0.5.
    ref = crafted(Settings(text="direct", text_rate=0.4, text_init_cache=0))
    assert ref.layers[0].live[0] == [0, 2, 3]
    ref = crafted(Settings(text="direct", text_rate=0.7, text_init_cache=0))
    assert ref.layers[0].live[0] == [0, 2]  # the current token goes too


def test_history_scores_above_the_quantile_of_the_others() -> None:
    ref = crafted(Settings(text="history", text_rate=0.5, text_init_cache=0))  # the budget is round(1.5) = 2
    # Column 1 starts at 0.9; it gains 0.5 - q(0.5) = 0, then 0.4 - q(0.4, 0.7) = -0.15.
    # Column 2 starts at 1.3 and gains 0.15.
    assert ref.layers[0].live[0] == [0, 2, 3]
    assert ref.layers[0].score[0] == pytest.approx({2: 1.45, 3: 0.5})
    ref.turn_step = 1
    # A step's text columns get 0.3, 0.3 and 0.2; the median, with the token itself, is 0.3.
    attend(ref, [TEXT], [[[0.1, 0.2, 0.1, 0.1]], [[0.1, 0.1, 0.2, 0.1]]])
    assert ref.layers[0].score[0] == pytest.approx({2: 1.45, 4: 0.2})
    assert ref.layers[0].live[0] == [0, 2, 4]  # round(0.5 · 4) = 2, one of them recent


def test_kinds_of_tokens() -> None:
    def kinds(prompt: str) -> str:
        return "".join(kind[0] for kind in prefill_reference(Settings(), prompt).token_kinds)

    assert kinds("xxvvxvxx") == "ssvvtvtt"
    assert kinds("vx") == "vt"
    assert kinds("xxx") == "stt"
    assert kinds("x") == "s"


def test_streaming_keeps_the_first_four_and_the_last() -> None:
    ref = prefill_reference(Settings(streaming=StreamingBudget(0.0, 7)), "ssvvvvvvttt")
    ref.step(3)
    assert ref.layers[1].live[0] == [0, 1, 2, 3, 9, 10, 11]
    ref = prefill_reference(Settings(streaming=StreamingBudget(0.0, 2)), "ssvvvvvvttt")
    assert ref.layers[0].live[1] == [0, 1]


def test_a_filter_drops_tokens_for_the_later_layers_only() -> None:
    ref = prefill_reference(Settings(prefill_filter=True, filter_layer=2, filter_rate=0.75), "sss" + "v" * 8 + "tt")
    assert [len(kept) for kept in ref.vision_kept()] == [8, 8, 2]
    never_there = [p for p, fate in enumerate(ref.fate[2][0]) if fate == -2]
    assert len(never_there) == 6 and set(never_there) == set(range(3, 11)) - set(ref.vision_kept()[2])


# -- later turns --------------------------------------------------------------------------------


def test_a_later_turn_prunes_its_own_image_and_chooses_the_core_anew() -> None:
    settings = replace(ALL_PARTS, prefill_filter=False, vision_compute_rate=0.75)
    ref = prefill_reference(settings, "sss" + "v" * 20 + "t" * 7)
    unfed = ref.embed(ref.generate(8)[-1:])
    kept_before = ref.vision_kept()
    second_turn = torch.cat((unfed, torch.randn(12, 32, dtype=torch.float64)))
    ref.turn(second_turn, [False] + [True] * 8 + [False] * 4)
    for layer, before, after in zip(ref.layers, kept_before, ref.vision_kept(), strict=True):
        assert after[:10] == before and len(after) == 14
        assert len(layer.core) == 5 + 2 and set(layer.core) <= set(after)
    assert ref.live_counts()[0] == {SYSTEM: 3, VISION: 14, TEXT: 10}  # round(0.5 · (7 + 7 + 5)) = round(9.5)
    ref.generate(5)
    assert [call for call, _ in ref.cores] == [0, 3, 6, 8, 11]


def test_a_first_image_in_a_later_turn() -> None:
    ref = prefill_reference(ALL_PARTS, "xxxxx")
    ref.generate(4)
    assert ref.cores == []
    ref.turn(torch.randn(12, 32), [False] * 3 + [True] * 8 + [False])
    ref.generate(4)
    assert ref.live_counts() == [{SYSTEM: 1, VISION: 4, TEXT: 7}] * 3  # 14 text tokens seen
    assert [call for call, _ in ref.cores] == [4, 7]
