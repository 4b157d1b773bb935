"""What the contract can say beyond the shipped policies, against plain re-statements: layers and heads that differ,
scores from keys, eviction once or at every step, filters at several layers and before the decoder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from avl_cases import tiny_model
from cache_helpers import Player
from contract_policies import Diverse, DropSettings, PyramidWindowSettings, ShareFilter, SmallKeys, SmallVisionKeys
from minivlm.cache.decode_pass import DecodePass
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.policy import Policy, Prompt
from minivlm.cache.prefill_pass import PrefillPass
from minivlm.errors import UserError
from minivlm.generation.steps import prefill_logits, prefill_step
from policies import DECODES, embed, image_features, prompt_ids

MODEL = tiny_model(8, layers=3, heads=(4, 2))
IDS = [prompt_ids(MODEL, 3, 40, 9), prompt_ids(MODEL, 2, 22, 20, seed=1)]
IS_VISION = [ids == MODEL.config.image_token_index for ids in IDS]


@pytest.fixture
def projected(monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Queries and keys of every layer of a prefill, then of every layer of each step."""
    seen = []
    for owner in (PrefillPass, DecodePass):

        def attend(self, layer_idx, q, k, v, plain=owner.attend):
            seen.append((q, k))
            return plain(self, layer_idx, q, k, v)

        monkeypatch.setattr(owner, "attend", attend)
    return seen


def prefilled(policy: Policy, batch: int = 2, new_tokens: int = 9, **options) -> Player:
    player = Player(MODEL, policy, batch=batch, **options)
    player.turn(embed(MODEL, IDS[:batch]), IS_VISION[:batch], new_tokens)
    return player


def weights(q: torch.Tensor, k: torch.Tensor, row: int, length: int) -> torch.Tensor:
    """Causal attention [H, S, S] of a row of a prefill, in float64."""
    keys = k[row, :, :length].double().repeat_interleave(q.shape[1] // k.shape[1], dim=0)
    scores = q[row, :, :length].double() @ keys.transpose(1, 2) / q.shape[-1] ** 0.5
    return scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(dim=-1)


def test_a_budget_that_differs_by_layer_and_head_and_evicts_once(projected):
    settings = PyramidWindowSettings(capacity=30, window=4)
    player = prefilled(settings.build(3))
    for layer_idx, (q, k) in enumerate(projected):
        for row, ids in enumerate(IDS):
            n, capacity = len(ids), 30 - 6 * layer_idx
            attn = weights(q, k, row, n)[:, -4:].sum(dim=1).view(2, 2, n).sum(dim=1)  # [H_kv, S]
            for head in range(2):
                pooled = [max(attn[head, max(i - 1, 0) : i + 2]) for i in range(n)]
                best = sorted(range(n - 4), key=lambda i: (-pooled[i], i))[: capacity - 4]
                assert player.held[0][row][layer_idx][head] == {*best, *range(n - 4, n)}
    heads_differ = sum(len(set(map(frozenset, layer))) > 1 for row in player.held[0] for layer in row)
    assert heads_differ > 0
    for step in range(8):
        player.step([5, 6])
        for row, ids in enumerate(IDS):
            answer = set(range(len(ids), len(ids) + step + 1))
            for layer_idx in range(3):
                before = player.held[0][row][layer_idx]
                assert player.held[-1][row][layer_idx] == [head | answer for head in before]


@pytest.mark.parametrize("how", DECODES)
def test_a_budget_that_scores_by_keys_at_every_step(how, projected):
    player = prefilled(Policy("keys", budget=SmallKeys(0.5)), **DECODES[how])
    norms = [[{} for _ in range(2)] for _ in range(3)]  # [layer][row]: [H_kv] norms by position

    def note(first: int, positions: list[range]) -> None:
        for layer_idx, (_, k) in enumerate(projected[first : first + 3]):
            for row, of_row in enumerate(positions):
                for i, position in enumerate(of_row):
                    norms[layer_idx][row][position] = k[row, :, i].norm(dim=-1)

    note(0, [range(len(ids)) for ids in IDS])
    for step in range(8):
        player.step([5, 6])
        note(len(projected) - 3, [range(len(ids) + step, len(ids) + step + 1) for ids in IDS])
        for layer_idx in range(3):
            for row, ids in enumerate(IDS):
                allowed = (len(ids) + step + 1) // 2
                for head in range(2):
                    before = player.held[-2][row][layer_idx][head] | {len(ids) + step}
                    kept = sorted(before, key=lambda p: float(norms[layer_idx][row][p][head]))[:allowed]
                    assert player.held[-1][row][layer_idx][head] == set(kept)


def test_a_selection_that_differs_by_layer_and_scores_by_keys(projected):
    """The core is still chosen by attention."""
    shares = (0.6, 0.4, 0.2)
    player = prefilled(Policy("keys", vision=tuple(map(SmallVisionKeys, shares))))
    for layer_idx, (q, k) in enumerate(projected):
        for row, ids in enumerate(IDS):
            vision = IS_VISION[row].nonzero()[:, 0].tolist()
            norm = k[row].norm(dim=-1).mean(dim=0)
            kept = sorted(vision, key=lambda p: float(norm[p]))[: int(shares[layer_idx] * len(vision))]
            others = set(range(len(ids))) - set(vision)
            assert player.held[0][row][layer_idx] == [{*kept, *others}] * 2
            attn = weights(q, k, row, len(ids))[:, -1].mean(dim=0)
            core = sorted(kept, key=lambda p: -float(attn[p]))[: int(shares[layer_idx] * len(vision)) // 2]
            assert player.cores[0][1][row][layer_idx] == set(core)


def test_filters_at_two_layers(projected):
    player = prefilled(Policy("pyramid drop", filters=(ShareFilter(1, 0.5), ShareFilter(2, 0.2))))
    for row, ids in enumerate(IDS):
        vision, others = IS_VISION[row].nonzero()[:, 0].tolist(), (~IS_VISION[row]).nonzero()[:, 0].tolist()
        tokens = list(range(len(ids)))
        for layer_idx, share in enumerate((0.5, 0.2)):
            assert player.held[0][row][layer_idx] == [set(tokens)] * 2
            q, k = projected[layer_idx]
            attn = weights(q, k, row, len(tokens))[:, -1].mean(dim=0)
            left = sorted(set(tokens) - set(others), key=lambda p: -float(attn[tokens.index(p)]))
            tokens = sorted([*others, *left[: int(share * len(vision))]])
        assert player.held[0][row][2] == [set(tokens)] * 2


@pytest.mark.parametrize("how", DECODES)
@torch.no_grad()
def test_a_filter_before_the_decoder(how):
    """As if the dropped tokens had never been there, but for the positions of the others; steps go on at theirs."""
    policy = Policy("diverse", inputs=Diverse(0.3))
    player = prefilled(policy, **DECODES[how])
    for _ in range(3):
        player.step([5, 6])
    for row, ids in enumerate(IDS):
        rows = embed(MODEL, IDS)[row]
        vision = IS_VISION[row].nonzero()[:, 0]
        scores = Diverse(0.3).scores(rows[vision], int(0.3 * len(vision)))
        chosen = vision[scores.topk(int(0.3 * len(vision))).indices].tolist()
        tokens = sorted({*chosen, *(~IS_VISION[row]).nonzero()[:, 0].tolist()})
        assert player.held[0][row] == [[set(tokens)] * 2] * 3
        answer = MODEL.language_model.embed_tokens(torch.tensor([5, 5, 5] if row == 0 else [6, 6, 6]))
        places = torch.tensor([*tokens, *range(len(ids), len(ids) + 3)])
        whole = torch.cat((rows[tokens], answer))[None]
        (alone,) = KVCache(MODEL.config.text, Policy("full")).prefill([torch.zeros(len(places), dtype=torch.bool)], 1)
        logits = MODEL.lm_head(MODEL(whole, places[None], alone)[0])
        ours = torch.stack([call[row] for call in player.logits])
        torch.testing.assert_close(ours, logits[len(tokens) - 1 :], atol=1e-4, rtol=0)


def test_the_greedy_choice_is_diverse():
    """Of two tight clusters and one outlier, three choices take one each."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(3)[[0, 0, 0, 1, 1, 2]]
    embeds = centres + 0.01 * torch.randn(6, 3, generator=generator)
    best = Diverse(0.5).scores(embeds, 3).topk(3).indices
    assert {int(i) // 3 if i < 5 else 2 for i in best} == {0, 1, 2}


@pytest.mark.parametrize("settings", [DropSettings(), PyramidWindowSettings()], ids=lambda settings: settings.policy)
@pytest.mark.parametrize("how", DECODES)
def test_batches_and_turns(settings, how):
    """A ragged batch is its rows alone, in two turns, whichever way steps are run."""

    def play(rows: list[int]) -> list[torch.Tensor]:
        player = Player(MODEL, settings.build(3), batch=len(rows), **DECODES[how])
        second = [torch.cat((torch.tensor([7]), prompt_ids(MODEL, 2, 12 + 5 * i, 6, seed=9 + i))) for i in range(2)]
        for ids in (IDS, second):
            embeds = embed(MODEL, ids)
            player.turn([embeds[i] for i in rows], [ids[i] == 47 for i in rows], 6)
            for token in range(10, 15):
                player.step([token + i for i in rows])
        return player.logits

    both = play([0, 1])
    for row in range(2):
        for ours, alone in zip(both, play([row]), strict=True):
            torch.testing.assert_close(ours[row], alone[0], atol=1e-4, rtol=0)


def test_policies_that_are_refused():
    keys, diverse = SmallKeys(0.5), Diverse(0.5)
    for parts in ({"vision": SmallVisionKeys(0.5)}, {"filters": (ShareFilter(1, 0.5),)}, {"inputs": diverse}):
        with pytest.raises(UserError, match="'both': a budget over all entries excludes"):
            Policy("both", budget=keys, **parts)
    for parts in ({"vision": (SmallVisionKeys(0.5),) * 2}, {"budget": (keys,) * 4}):
        cache = KVCache(MODEL.config.text, Policy("short", **parts))
        with pytest.raises(UserError, match="policy 'short' has parts for [24] layers, the model has 3"):
            prefill_step(MODEL, cache, IDS[:1], image_features(MODEL, IDS[0]), 4)


def test_a_policy_knows_what_reaches_a_layer():
    policy, prompt = DropSettings().build(3), Prompt(length=120, vision=100)
    assert [policy.vision_tokens(prompt, layer_idx) for layer_idx in range(3)] == [80, 60, 30]
    assert replace(policy, filters=()).vision_tokens(prompt, 2) == 80
    assert Policy("full").vision_tokens(prompt, 2) == 100


@torch.no_grad()
def test_a_prompt_without_an_image_passes_an_input_filter():
    cache = KVCache(MODEL.config.text, Policy("diverse", inputs=Diverse(0.5)))
    ids = prompt_ids(MODEL, 9)
    (each,) = cache.prefill([ids == 47], 4)
    logits = prefill_logits(MODEL, each, embed(MODEL, [ids])[0][None])
    (full,) = KVCache(MODEL.config.text, Policy("full")).prefill([ids == 47], 4)
    assert torch.equal(logits, prefill_logits(MODEL, full, embed(MODEL, [ids])[0][None]))
