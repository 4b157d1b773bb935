"""What must hold of the cache under any policy: neutral rates, dead slots, both decode implementations, precision."""

from __future__ import annotations

import random

import pytest
import torch

from avl_cases import Case, Turn, random_case, run, tiny_model
from avl_reference import Settings
from cache_helpers import Player, compare, play
from minivlm.cache import attention, buffers, decode_pass, prefill_pass, ranking
from minivlm.cache.accounting import full_bytes, live_bytes, live_positions
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.policies import preset
from minivlm.cache.policies.avl import AdaptiveVision, AVLSettings, TextBudget
from minivlm.cache.settings import CacheSettings
from minivlm.errors import UserError
from minivlm.generation.generate import Generation
from minivlm.generation.sampling import Sampling
from minivlm.generation.steps import decode_step, prefill_step
from policies import DECODES, POLICIES, embed, image_features, prompt_ids

NEVER = torch.zeros(0, dtype=torch.int64)


def forced_tokens(case: Case) -> list[list[int]]:
    """An answer to each turn, drawn at random: what is fed is the same for every way of running the case."""
    rng = random.Random(case.seed)
    return [[rng.randrange(3, 47) for _ in range(turn.answer)] for turn in case.turns]


@torch.no_grad()
def greedy(model, settings: CacheSettings, ids: torch.Tensor, steps: int, **options) -> tuple[torch.Tensor, KVCache]:
    """Logits [steps + 1, V] of a greedy answer that never ends."""
    cache = KVCache(model.config.text, settings.build(model.config.text.num_hidden_layers), **options)
    logits = [prefill_step(model, cache, [ids], image_features(model, ids), steps + 1)]
    for _ in range(steps):
        logits.append(decode_step(model, cache, logits[-1].argmax(dim=-1), NEVER))
    return torch.cat(logits), cache


@pytest.mark.parametrize("text", [dict(), dict(text_h2o=False), dict(text_h2o=False, text_direct=True)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_rates_of_zero_change_nothing(text, heads, monkeypatch):
    """All parts on, nothing removed: the result of the full cache, through the very same selections."""
    calls = dict.fromkeys(("vision", "text"), 0)

    def counted(owner, name, part):
        plain = getattr(owner, name)

        def count(*arguments):
            calls[part] += 1
            return plain(*arguments)

        monkeypatch.setattr(owner, name, count)

    counted(AdaptiveVision, "scores", "vision")
    counted(TextBudget, "budget", "text")
    zero = preset(
        "avl", vision_rate=0.0, vision_compute_rate=0.0, filter=True, filter_layer=1, filter_rate=0.0, text=True, text_rate=0.0,
        text_init_cache=0, **text,
    )  # fmt: skip
    model = tiny_model(1, heads=heads)
    ids = prompt_ids(model, 3, 30, 2, 11, 9)
    full, _ = greedy(model, AVLSettings(), ids, 12)
    assert calls == {"vision": 0, "text": 0}
    ours, cache = greedy(model, zero, ids, 12)
    torch.testing.assert_close(ours, full, atol=1e-5, rtol=0)
    assert calls["vision"] == 3 and calls["text"] > 12
    assert set(cache.step_kinds) == {"core", "refresh"} and live_bytes(cache) == full_bytes(cache)


@pytest.mark.parametrize("how", DECODES)
@pytest.mark.parametrize("block", range(3))
def test_dead_slots_are_never_read(block, how):
    """NaN in every dead slot before every step and turn; logits and entries stay the same to the bit."""
    for seed in range(1000 + block, 1045, 3):
        case = random_case(seed)
        tokens = forced_tokens(case)
        clean, poisoned = (play(case, tokens, poison=poison, **DECODES[how]) for poison in (False, True))
        for call, (a, b) in enumerate(zip(clean.logits, poisoned.logits)):
            assert torch.equal(a, b), (seed, call)
        assert clean.held == poisoned.held and clean.cores == poisoned.cores


def test_poison_shows_where_dead_slots_are_read(monkeypatch):
    """The test above can fail: an attention that weights dead values by zero gives NaN."""

    def careless(q, k, v, live, want_weights):
        weights = (q * k).sum(dim=-1).masked_fill(~live[:, None], -torch.inf).softmax(dim=-1)
        return (weights[..., None, :] @ v), None

    monkeypatch.setattr(attention, "decode_static", careless)
    model = tiny_model(0, heads=(4, 4))
    ids = [prompt_ids(model, 2, 9, 5)]
    player = Player(model, AVLSettings().build(3), static=True, poison=True)
    player.turn(embed(model, ids), [ids[0] == 47], 4)
    player.step([5])
    assert player.logits[-1].isnan().any()


@pytest.mark.parametrize("block", range(3))
def test_all_decode_implementations_agree(block):
    for seed in range(1100 + block, 1124, 3):
        case = random_case(seed)
        ref = run(case)
        plain, *others = (play(case, ref.tokens, **options) for options in DECODES.values())
        for other in others:
            tie = compare(other, ref)
            for call in range(min(tie + 1, len(plain.logits))):
                torch.testing.assert_close(other.logits[call], plain.logits[call], atol=1e-4, rtol=1e-4)
            assert other.held[:tie] == plain.held[:tie]


@torch.no_grad()
def test_a_gathering_core_step_reads_the_core_alone(monkeypatch):
    read, decode_static = [], attention.decode_static

    def watched(q, k, v, live, want_weights):
        assert k.shape == v.shape and k.shape[2] == live.shape[1]
        read.append(k.shape[2])
        return decode_static(q, k, v, live, want_weights)

    monkeypatch.setattr(attention, "decode_static", watched)
    model = tiny_model(1)
    ids = prompt_ids(model, 3, 300, 9)
    _, cache = greedy(model, preset("avl"), ids, 3, **DECODES["gathering"])
    counts, layout = cache.layers[0].counts, cache.layers[0].layout
    assert cache.step_kinds == ["core", "core", "refresh"] and counts[0].core == 90
    assert read == 6 * [96 + layout.slots - layout.tail_start] + 3 * [layout.slots] and 96 < layout.tail_start == 160


@pytest.mark.parametrize("how", DECODES)
@torch.no_grad()
def test_what_is_outside_the_core_takes_no_part(how):
    """Garbage in the other vision entries changes no core step, and does change a refresh."""
    model = tiny_model(1, heads=(4, 2))
    ids = [prompt_ids(model, 3, 60, 9), prompt_ids(model, 2, 45, 12, seed=1)]
    token = torch.tensor([5, 6])

    def logits(garbage: bool) -> list[torch.Tensor]:
        cache = KVCache(model.config.text, preset("avl").build(3), (0, 1), **DECODES[how])
        prefill_step(model, cache, ids, [f for row in ids for f in image_features(model, row)], 4)
        for held in cache.layers if garbage else ():
            others = (held.in_core == 0) & (torch.arange(held.layout.slots) >= held.vision_start)
            assert others.sum(dim=1).tolist() == [row.vision - row.core for row in held.counts] != [0, 0]
            for buffer in (held.k, held.v):
                buffer.transpose(1, 2)[others] = 1e3
        found = []
        for _ in range(3):
            found.append(decode_step(model, cache, token, NEVER))
        assert cache.step_kinds == ["core", "core", "refresh"]
        return found

    clean, dirty = logits(False), logits(True)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])
    assert not torch.allclose(clean[2], dirty[2], atol=0.1)


@pytest.mark.parametrize("block", range(3))
def test_conversations_with_images_in_later_turns(block):
    """Three turns against the list-based re-statement, most with an image or two behind the first turn."""
    images = 0
    for seed in range(2000 + block, 2018, 3):
        case = random_case(seed, turns=3)
        images += sum(len(turn.images) for turn in case.turns[1:])
        ref = run(case)
        compare(play(case, ref.tokens, **list(DECODES.values())[seed % 3 - 1]), ref)
    assert images > 2


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("how", ["plain", "static"])
def test_a_conversation_without_pruning_is_one_long_prompt(heads, how):
    """Three turns with images in each: every logit is that of the whole conversation prefilled at once."""
    model, rng = tiny_model(5, heads=heads), random.Random(0)
    player = Player(model, AVLSettings().build(3), **DECODES[how])
    said, ends, unfed = [], [], NEVER
    for i, parts in enumerate([(4, 20, 140), (3, 9, 2, 12, 4), (2,)]):
        said.append(torch.cat((unfed, prompt_ids(model, *parts, seed=i))))
        player.turn(embed(model, said[-1:]), [said[-1] == 47], 6)
        ends.append(sum(map(len, said)) - 1)
        answer = torch.tensor([rng.randrange(3, 47) for _ in range(6)])
        for token in answer[:-1].tolist():
            player.step([token])
            ends.append(ends[-1] + 1)
        said.append(answer[:-1])
        unfed = answer[-1:]
    whole = torch.cat(said)
    # Each part's features are drawn for itself, as its turn drew them.
    rows = torch.cat([embed(model, [ids])[0] for ids in said])
    (alone,) = KVCache(model.config.text, AVLSettings().build(3)).prefill([whole == 47], 1)
    with torch.no_grad():
        logits = model.lm_head(model(rows[None], torch.arange(len(whole))[None], alone)[0])
    torch.testing.assert_close(torch.cat(player.logits), logits[ends], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", POLICIES)
def test_half_precision_decides_in_float32(dtype, name, monkeypatch):
    seen = []

    def watched(choose):
        def choosing(scores, *rest):
            seen.append(scores.dtype)
            return choose(scores, *rest)

        return choosing

    for name_of, modules in (("order_key", (decode_pass, prefill_pass, ranking)), ("best_of", (buffers,))):
        choosing = watched(getattr(ranking, name_of))
        for module in modules:
            monkeypatch.setattr(module, name_of, choosing)
    model = tiny_model(2).to(dtype)
    ids = prompt_ids(model, 3, 30, 2, 11, 9)
    logits = {}
    for how, options in DECODES.items():
        logits[how], cache = greedy(model, POLICIES[name], ids, 8, **options)
        assert logits[how].dtype == cache.layers[0].k.dtype == cache.layers[0].v.dtype == dtype
        assert logits[how].isfinite().all()
        for held in cache.layers:
            assert held.vision_attn.dtype == torch.float32
            assert held.score is None or held.score.dtype == torch.float32
    assert set(seen) == (set() if name == "full" else {torch.float32})
    for how in DECODES:
        torch.testing.assert_close(logits[how][:1], logits["plain"][:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_what_float64_would(dtype, monkeypatch):
    """The vision entries kept are the best by the exact attention of the rounded queries and keys."""
    given = []

    def watched(self, layer, q, k, v):
        given.append((q, k))
        return attend(self, layer, q, k, v)

    attend = prefill_pass.PrefillPass.attend
    monkeypatch.setattr(prefill_pass.PrefillPass, "attend", watched)
    model = tiny_model(4, heads=(4, 2)).to(dtype)
    ids = prompt_ids(model, 3, 200, 9)
    cache = KVCache(model.config.text, preset("avl").build(3))
    prefill_step(model, cache, [ids], image_features(model, ids), 4)
    for i, (q, k) in enumerate(given):
        keys = k[0].double().repeat_interleave(2, dim=0)  # [H, S, D]
        row = (keys @ q[0, :, -1:].double().transpose(1, 2) / k.shape[-1] ** 0.5).softmax(dim=1).mean(dim=0)[3:203, 0]
        held = live_positions(cache, i, 0)[0].tolist()
        assert set(held) - {0, 1, 2} - set(range(203, 212)) == {3 + n for n in row.topk(100).indices.tolist()}


EDGES = {
    "text alone, all parts on": (Settings(vision=True, vision_interval=2, text="h2o", text_init_cache=4, prefill_filter=True, filter_layer=1), (25,)),
    "filter keeps fewer than vision": (Settings(vision=True, vision_rate=0.25, vision_interval=2, prefill_filter=True, filter_layer=1, filter_rate=0.9), (2, 30, 6)),
    "filter and text, vision off": (Settings(text="h2o", text_init_cache=4, prefill_filter=True, filter_layer=1), (2, 30, 14)),
    "filter behind the last layer": (Settings(prefill_filter=True, filter_layer=3), (2, 30, 6)),
    "nothing of the image stays": (Settings(vision=True, vision_rate=1.0, vision_interval=2), (2, 30, 6)),
    "the core is empty": (Settings(vision=True, vision_compute_rate=1.0, vision_interval=3), (2, 30, 6)),
    "the filter drops all": (Settings(prefill_filter=True, filter_layer=1, filter_rate=1.0), (2, 30, 6)),
    "everything is removed": (
        Settings(vision=True, vision_rate=1.0, text="h2o", text_rate=1.0, text_init_cache=0, prefill_filter=True, filter_layer=1, filter_rate=1.0), (2, 30, 6),
    ),
    "text between images, image first": (Settings(vision=True, vision_interval=3, text="h2o", text_init_cache=4), (0, 12, 8, 12, 8)),
    "one token of text": (Settings(vision=True, vision_interval=3, text="history", text_init_cache=0, score_window=16), (0, 12, 1)),
    "one token in all": (Settings(vision=True, vision_interval=3, text="h2o", prefill_filter=True, filter_layer=1), (1,)),
}  # fmt: skip


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_edges_of_the_method(name, heads):
    settings, parts = EDGES[name]
    model = tiny_model(7, heads=heads)
    ids = prompt_ids(model, *parts, seed=3)
    case = Case(0, model, settings, (Turn(ids, tuple(image_features(model, ids)), answer=10),))
    ref = run(case)
    assert ref.first_tie(1e-4) > 5  # else nothing would be compared
    for options in DECODES.values():
        compare(play(case, ref.tokens, **options), ref)


def test_random_selection_depends_on_seed_sample_and_layer_alone():
    model = tiny_model(0, layers=2)
    ids = prompt_ids(model, 3, 40, 9)

    def kept(samples, seed=0):
        cache = KVCache(model.config.text, preset("random", seed=seed).build(2), samples)
        batch = [prompt_ids(model, 3, 40, 9 + i % 2, seed=i) for i in range(len(samples) - 1)] + [ids]
        prefill_step(model, cache, batch, [f for row in batch for f in image_features(model, row)], 4)
        return [set(live_positions(cache, i, len(samples) - 1)[0].tolist()) for i in range(2)]

    one = kept([7])
    assert one == kept([7]) == kept([1, 2, 7])
    assert one[0] != one[1] and len(one[0] | one[1]) > len(one[0])
    assert one[0] != kept([8])[0] and one[0] != kept([7], seed=1)[0]
    assert kept([7], seed=1) == kept([7], seed=1)


@pytest.mark.parametrize("how", DECODES)
@pytest.mark.parametrize("name", POLICIES)
def test_an_answer_ends_where_its_room_ends(name, how):
    """By max_new_tokens, or where the model's context is full; with reason "length", and all but the last token stored."""
    model = tiny_model(3)
    # The context holds 512 tokens; the last of an answer needs no place in it.
    for parts, asked, wanted in (((3, 30, 9), 20, 20), ((3, 480, 22), 20, 8), ((3, 480, 29), 5, 1)):
        ids = prompt_ids(model, *parts)
        cache = KVCache(model.config.text, POLICIES[name].build(3), **DECODES[how])
        generation = Generation(model, cache, [ids], image_features(model, ids), Sampling(asked, ignore_eos=True))
        assert len(list(generation)) == wanted and generation.finish == ["length"]
        assert len(generation.tokens[0]) == wanted and cache.stored.tolist() == [wanted - 1]
        assert generation.unfed(0) == generation.tokens[0][-1:]


def test_a_prompt_beyond_the_context_is_refused():
    model = tiny_model(3)
    ids = prompt_ids(model, 3, 480, 30)
    with pytest.raises(UserError, match="513 tokens, the model's context only 512"):
        prefill_step(model, KVCache(model.config.text, AVLSettings().build(3)), [ids], image_features(model, ids), 4)


def test_a_turn_that_is_refused_leaves_the_conversation_as_it_was():
    """Too long a turn, or one whose share is infeasible, changes nothing: the next one goes on."""
    model = tiny_model(3)
    cache = KVCache(model.config.text, preset("avl", kv_budget=0.5).build(3))
    first, second = prompt_ids(model, 3, 60, 9), prompt_ids(model, 4, 60, 9, seed=1)
    prefill_step(model, cache, [first], image_features(model, first), 4)
    for parts, complaint in (((3, 20, 40), "infeasible"), ((3, 500, 9), "context")):
        ids = prompt_ids(model, *parts)
        with pytest.raises(UserError, match=complaint):
            prefill_step(model, cache, [ids], image_features(model, ids), 4)
    logits = prefill_step(model, cache, [second], image_features(model, second), 4)
    again = KVCache(model.config.text, preset("avl", kv_budget=0.5).build(3))
    prefill_step(model, again, [first], image_features(model, first), 4)
    assert torch.equal(logits, prefill_step(model, again, [second], image_features(model, second), 4))
