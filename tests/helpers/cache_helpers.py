"""Prompts and replayed answers on the real cache, and its comparison with the list-based re-statement of A-VL."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from avl_cases import Case, StreamingBudget
from avl_reference import Reference, Settings
from minivlm.cache.accounting import core_positions, live_positions
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.policies.avl import AVLSettings
from minivlm.cache.policies.streaming import SINKS, Streaming
from minivlm.cache.policy import Policy
from minivlm.cache.settings import CacheSettings
from minivlm.generation.steps import decode_step, prefill_logits, prefill_step
from minivlm.model.llava import Llava
from policies import embed, image_features

NO_STOP_IDS = torch.zeros(0, dtype=torch.int64)  # the stop ids of an answer that never ends by itself
MARGIN = 1e-4  # a decision taken more narrowly than this is a tie: rounding may reverse it

LayerSets = list[set[int]]  # positions, by layer
HeadSets = list[LayerSets]  # positions, by layer and key/value head


def prefill_prompts(model: Llava, cache: KVCache, prompts: Sequence[Tensor], max_new_tokens: int) -> Tensor:
    """Logits [B, V] of prompts [S], with random features for their image tokens."""
    features = [image for ids in prompts for image in image_features(model, ids)]
    return prefill_step(model, cache, prompts, features, max_new_tokens)


@torch.no_grad()
def greedy(model: Llava, settings: CacheSettings, ids: Tensor, steps: int, **options: bool) -> tuple[Tensor, KVCache]:
    """Logits [steps + 1, V] of a greedy answer that never ends, and the cache after it."""
    cache = KVCache(model.config.text, settings.build(model.config.text.num_hidden_layers), **options)
    logits = [prefill_prompts(model, cache, [ids], steps + 1)]
    for _ in range(steps):
        logits.append(decode_step(model, cache, logits[-1].argmax(dim=-1), NO_STOP_IDS))
    return torch.cat(logits), cache


@dataclass(frozen=True)
class StreamingWithin(Streaming):
    """Streaming whose budget is any function of the number of tokens seen."""

    room: StreamingBudget

    def limits(self, before: int, answer: int) -> tuple[int, int]:
        room = self.room(before + answer)
        return room, max(room - SINKS, 0)


def policy_of_reference(settings: Settings, num_layers: int) -> Policy:
    """The policy that the settings of the re-statement describe."""
    if settings.streaming is not None:
        return Policy("streaming", budget=StreamingWithin(0.0, settings.streaming))
    return AVLSettings(
        vision=settings.vision,
        vision_rate=settings.vision_rate,
        vision_compute_rate=settings.vision_compute_rate,
        vision_interval=settings.vision_interval,
        filter=settings.prefill_filter,
        filter_layer=settings.filter_layer,
        filter_rate=settings.filter_rate,
        text=settings.text is not None,
        text_rate=settings.text_rate,
        text_init_cache=settings.text_init_cache,
        text_hh_rate=settings.text_hh_rate,
        text_h2o=settings.text in (None, "h2o"),
        text_direct=settings.text == "direct",
        all_h2o=settings.all_h2o,
        score_window=settings.score_window,
    ).build(num_layers)


class Replay:
    """A batch whose answers are given, run on the real cache; keeps what every call of the model left behind.

    `poison` writes NaN into every slot that is not live before each call; `options` are the cache's.
    """

    def __init__(self, model: Llava, policy: Policy, batch: int = 1, poison: bool = False, **options: bool) -> None:
        self.model, self.poison = model, poison
        self.cache = KVCache(model.config.text, policy, range(batch), **options)
        self.logits: list[Tensor] = []  # by call: [B, V]
        self.live: list[list[HeadSets]] = []  # by call and row: positions of the entries held
        self.lengths: list[list[int]] = []  # by call and row: tokens that have a position
        self.cores: dict[int, list[LayerSets]] = {}  # by call, if it chose cores, and row: positions

    @torch.no_grad()
    def turn(self, embeds: Sequence[Tensor], is_vision: Sequence[Tensor], max_new_tokens: int) -> None:
        """The prefill of a turn, given the embeddings [S, C] of each row."""
        if self.poison and self.logits:
            self._poison()
        (prefill,) = self.cache.prefill(is_vision, max_new_tokens)
        logits = prefill_logits(self.model, prefill, pad_sequence(list(embeds), batch_first=True))
        self._record(logits, chose_cores=any(sequence.vision_positions for sequence in self.cache.sequences))

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> None:
        """A decode step, given the token of each row."""
        if self.poison:
            self._poison()
        logits = decode_step(self.model, self.cache, torch.tensor(tokens), NO_STOP_IDS)
        self._record(logits, chose_cores=self.cache.step_kinds[-1] == "refresh")

    def only(self, row: int, calls: Sequence[int]) -> Replay:
        """One row as a batch of its own, with those calls alone that it took part in."""
        alone = copy.copy(self)
        alone.logits = [self.logits[call][row : row + 1] for call in calls]
        alone.live = [[self.live[call][row]] for call in calls]
        alone.lengths = [[self.lengths[call][row]] for call in calls]
        alone.cores = {i: [self.cores[call][row]] for i, call in enumerate(calls) if call in self.cores}
        return alone

    def _record(self, logits: Tensor, chose_cores: bool) -> None:
        cache, call = self.cache, len(self.logits)
        rows, layers = range(len(cache.sequences)), range(len(cache.layers))
        self.logits.append(logits)
        self.lengths.append((cache.answer_start + cache.stored).tolist())
        self.live.append(
            [[[set(head) for head in live_positions(cache, layer, row).tolist()] for layer in layers] for row in rows]
        )
        if chose_cores and cache.policy.vision is not None:
            self.cores[call] = [[set(core_positions(cache, layer, row).tolist()) for layer in layers] for row in rows]

    def _poison(self) -> None:
        """Write NaN into the keys, values and scores of every slot that is not live."""
        for layer_idx, buffers in enumerate(self.cache.layers):
            layout = buffers.layout
            for row, counts in enumerate(buffers.counts):
                tail = self.cache.tail_length(layer_idx, row, int(self.cache.stored[row]))
                live = layout.live(counts, tail, self.cache.next_place[layer_idx, row])
                dead = torch.ones(buffers.k.shape[1:3], dtype=torch.bool).scatter(1, live, False)  # [H_kv, slots]
                buffers.k[row][dead] = torch.nan
                buffers.v[row][dead] = torch.nan
                if buffers.score is not None:
                    buffers.score[row][dead[:, layout.tail_start :]] = torch.nan
                buffers.vision_attn[row][dead[0, : layout.tail_start]] = torch.nan


def replay_prefill(
    model: Llava, policy: Policy, prompts: Sequence[Tensor], max_new_tokens: int, **options: bool
) -> Replay:
    """A batch of prompts after its prefill; the number of a prompt is the seed of its image features."""
    replayed = Replay(model, policy, batch=len(prompts), **options)
    is_vision = [ids == model.config.image_token_index for ids in prompts]
    replayed.turn(embed(model, prompts), is_vision, max_new_tokens)
    return replayed


def replay(case: Case, answers: Sequence[Sequence[int]], **options: bool) -> Replay:
    """A whole case on the real cache, with these answers to its turns."""
    policy = policy_of_reference(case.settings, case.model.config.text.num_hidden_layers)
    replayed = Replay(case.model, policy, **options)
    for turn_idx, turn in enumerate(case.turns):
        embeds, is_vision = case.inputs(turn_idx, answers)
        replayed.turn([embeds], [is_vision], turn.answer)
        for token in answers[turn_idx][:-1]:
            replayed.step([token])
    return replayed


def live_in_reference(ref: Reference, call: int, length: int) -> HeadSets:
    """Positions of the entries that the re-statement holds after a call, when the sequence has `length` tokens."""
    return [
        [{p for p, fate in enumerate(head[:length]) if fate == -1 or fate > call} for head in layer]
        for layer in ref.fate
    ]


def compare(replayed: Replay, ref: Reference) -> int:
    """Assert that the decisions and logits of one sequence are those of the re-statement before its first near-tie.

    Returns the number of calls before it.
    """
    tie = ref.first_tie(MARGIN)
    for call in range(min(tie + 1, len(ref.logits))):
        ours, expected = replayed.logits[call][0].double(), ref.logits[call].double()
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
        if call < tie:
            expected_live = live_in_reference(ref, call, replayed.lengths[call][0])
            assert replayed.live[call][0] == expected_live, f"entries after call {call}"
    for call, layers in ref.cores:
        if call < tie and replayed.cache.policy.vision is not None:
            assert replayed.cores[call][0] == [set(core) for core in layers], f"core of call {call}"
    return tie
