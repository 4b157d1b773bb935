"""Turns and their room: conversations, where an answer has to end, and turns that are refused."""

from __future__ import annotations

import random
import re

import pytest
import torch

from avl_cases import IMAGE_TOKEN, random_case, run_reference, tiny_model
from cache_helpers import Replay, compare, prefill_prompts, replay
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.policies import preset
from minivlm.cache.policies.avl import AVLSettings
from minivlm.errors import UserError
from minivlm.generation.generate import Generation
from minivlm.generation.sampling import Sampling
from policies import DECODES, POLICIES, embed, image_features, prompt_ids


@pytest.mark.parametrize("block", range(3))
def test_conversations_with_images_in_later_turns(block):
    """Three turns against the re-statement, with an image or two in most of the later turns."""
    later_images = 0
    for seed in range(2000 + block, 2018, 3):
        case = random_case(seed, turns=3)
        later_images += sum(len(turn.images) for turn in case.turns[1:])
        ref = run_reference(case)
        compare(replay(case, ref.tokens, **list(DECODES.values())[seed % 3 - 1]), ref)
    assert later_images > 2


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("how", ["plain", "static"])
def test_a_conversation_without_pruning_is_one_long_prompt(heads, how):
    """Three turns, most with images: every logit is that of the whole conversation prefilled at once."""
    model, rng = tiny_model(5, heads=heads), random.Random(0)
    conversation = Replay(model, AVLSettings().build(3), **DECODES[how])
    pieces = []  # token ids: for each turn what its prefill takes, then the tokens of the answer that are fed
    embeds = []
    last_positions = []  # by call: the position of the token whose logits it returned
    unfed = torch.zeros(0, dtype=torch.int64)
    for i, parts in enumerate([(4, 20, 140), (3, 9, 2, 12, 4), (2,)]):
        prompt = torch.cat((unfed, prompt_ids(model, *parts, seed=i)))
        answer = torch.tensor([rng.randrange(3, IMAGE_TOKEN) for _ in range(6)])
        pieces += [prompt, answer[:-1]]
        embeds += [embed(model, [prompt])[0], embed(model, [answer[:-1]])[0]]
        conversation.turn(embeds[-2:-1], [prompt == IMAGE_TOKEN], 6)
        for token in answer[:-1].tolist():
            conversation.step([token])
        end = sum(map(len, pieces))
        last_positions += range(end - 6, end)
        unfed = answer[-1:]
    whole = torch.cat(pieces)
    (prefill,) = KVCache(model.config.text, AVLSettings().build(3)).prefill([whole == IMAGE_TOKEN], 1)
    with torch.no_grad():
        hidden = model(torch.cat(embeds)[None], torch.arange(len(whole))[None], prefill)[0]
        logits = model.lm_head(hidden[last_positions])
    torch.testing.assert_close(torch.cat(conversation.logits), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("how", DECODES)
@pytest.mark.parametrize("name", POLICIES)
def test_an_answer_ends_where_its_room_ends(name, how):
    """By max_new_tokens, or where the context is full: with reason "length", and all but the last token stored."""
    model = tiny_model(3)
    # The context has room for 512 tokens; the last token of an answer needs none.
    for parts, max_new_tokens, expected in (((3, 30, 9), 20, 20), ((3, 480, 22), 20, 8), ((3, 480, 29), 5, 1)):
        ids = prompt_ids(model, *parts)
        cache = KVCache(model.config.text, POLICIES[name].build(3), **DECODES[how])
        sampling = Sampling(max_new_tokens, ignore_eos=True)
        generation = Generation(model, cache, [ids], image_features(model, ids), sampling)
        assert len(list(generation)) == expected and generation.finish == ["length"]
        assert len(generation.tokens[0]) == expected and cache.stored.tolist() == [expected - 1]
        assert generation.unfed(0) == generation.tokens[0][-1:]


def test_a_prompt_beyond_the_context_is_refused():
    model = tiny_model(3)
    cache = KVCache(model.config.text, AVLSettings().build(3))
    with pytest.raises(UserError, match=re.escape("513 tokens, the model's context only 512")):
        prefill_prompts(model, cache, [prompt_ids(model, 3, 480, 30)], 4)


def test_a_refused_turn_leaves_the_conversation_as_it_was():
    """A turn that is too long, or whose share is infeasible, changes nothing, and the next one goes on."""
    model = tiny_model(3)
    policy = preset("avl", kv_budget=0.5).build(3)
    first, second = prompt_ids(model, 3, 60, 9), prompt_ids(model, 4, 60, 9, seed=1)
    refusing, undisturbed = KVCache(model.config.text, policy), KVCache(model.config.text, policy)
    prefill_prompts(model, refusing, [first], 4)
    for parts, complaint in (((3, 20, 40), "infeasible"), ((3, 500, 9), "context")):
        with pytest.raises(UserError, match=complaint):
            prefill_prompts(model, refusing, [prompt_ids(model, *parts)], 4)
    logits = prefill_prompts(model, refusing, [second], 4)
    prefill_prompts(model, undisturbed, [first], 4)
    assert torch.equal(logits, prefill_prompts(model, undisturbed, [second], 4))
