"""Driving the real cache the way the list-based re-statement is driven, and comparing the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from avl_cases import Budget, Case
from avl_reference import Reference, Settings
from minivlm.cache.accounting import core_positions, live_positions
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.policies.avl import AVLSettings
from minivlm.cache.policies.streaming import Streaming
from minivlm.cache.policy import Policy
from minivlm.generation.steps import decode_step, prefill_logits
from minivlm.model.llava import Llava


@dataclass(frozen=True)
class StreamingWithin(Streaming):
    """Streaming under any budget of the number of tokens seen."""

    columns: Budget

    def limits(self, prompt: int, answer: int) -> tuple[int, int]:
        columns = self.columns(prompt + answer)
        return columns, max(columns - 4, 0)


def policy_of(s: Settings, num_layers: int) -> Policy:
    """The policy that the re-statement's settings describe."""
    if s.streaming is not None:
        return Policy("streaming", budget=StreamingWithin(0.0, s.streaming))
    settings = AVLSettings(
        vision=s.vision, vision_rate=s.vision_rate, vision_compute_rate=s.vision_compute_rate, vision_interval=s.vision_interval,
        filter=s.prefill_filter, filter_layer=s.filter_layer, filter_rate=s.filter_rate,
        text=s.text is not None, text_rate=s.text_rate, text_init_cache=s.text_init_cache, text_hh_rate=s.text_hh_rate,
        text_h2o=s.text in (None, "h2o"), text_direct=s.text == "direct",
        all_h2o=s.all_h2o, score_window=s.score_window,
    )  # fmt: skip
    return settings.build(num_layers)


class Player:
    """A batch of sequences played on the real cache, teacher-forced; keeps logits and entries of every call."""

    def __init__(self, model: Llava, policy: Policy, batch: int = 1, poison: bool = False, **cache: bool) -> None:
        self.model, self.poison = model, poison
        self.cache = KVCache(model.config.text, policy, range(batch), **cache)
        self.logits: list[Tensor] = []  # [B, V] a call
        self.held: list[list[list[list[set[int]]]]] = []  # [call][b][layer][head]
        self.seen: list[list[int]] = []  # [call][b]: tokens that have a position
        self.cores: list[tuple[int, list[list[set[int]]]]] = []  # (call, [b][layer])

    @torch.no_grad()
    def turn(self, embeds: Sequence[Tensor], is_vision: Sequence[Tensor], max_new_tokens: int) -> None:
        """One prefill of ragged embeddings [S_b, C]."""
        if self.poison and self.logits:
            self._poison()
        (prefill,) = self.cache.prefill(is_vision, max_new_tokens)
        logits = prefill_logits(self.model, prefill, pad_sequence(list(embeds), batch_first=True))
        self._record(logits, chose=any(sequence.vision_positions for sequence in self.cache.sequences))

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> None:
        if self.poison:
            self._poison()
        logits = decode_step(self.model, self.cache, torch.tensor(tokens), stop=torch.zeros(0, dtype=torch.int64))
        self._record(logits, chose=self.cache.step_kinds[-1] == "refresh")

    def _record(self, logits: Tensor, chose: bool) -> None:
        self.logits.append(logits)
        self.seen.append((self.cache.answer_start + self.cache.stored).tolist())
        batch, layers = len(self.cache.sequences), range(len(self.cache.layers))
        self.held.append(
            [[[set(h) for h in live_positions(self.cache, i, b).tolist()] for i in layers] for b in range(batch)]
        )
        if chose and self.cache.policy.vision is not None:
            self.cores.append(
                (
                    len(self.logits) - 1,
                    [[set(core_positions(self.cache, i, b).tolist()) for i in layers] for b in range(batch)],
                )
            )

    def _poison(self) -> None:
        """NaN into every slot that is not live: keys, values and scores."""
        for layer_idx, buffers in enumerate(self.cache.layers):
            layout = buffers.layout
            for row, counts in enumerate(buffers.counts):
                tail = self.cache.tail_length(layer_idx, row, int(self.cache.stored[row]))
                live = layout.live(counts, tail, buffers.write_slot[row])
                dead = torch.ones(buffers.k.shape[1:3], dtype=torch.bool).scatter(1, live, False)
                buffers.k[row][dead] = buffers.v[row][dead] = torch.nan
                if buffers.score is not None:
                    buffers.score[row][dead[:, layout.tail_start :]] = torch.nan
                buffers.vision_attn[row][dead[0, : layout.tail_start]] = torch.nan


def play(case: Case, tokens: Sequence[Sequence[int]], **options) -> Player:
    """The whole case on the real cache, with `tokens` as the answer to each turn."""
    player = Player(case.model, policy_of(case.settings, case.model.config.text.num_hidden_layers), **options)
    for i, turn in enumerate(case.turns):
        embeds, is_vision = case.embeds(turn), case.is_vision(turn)
        if i:
            last = case.model.language_model.embed_tokens(torch.tensor(tokens[i - 1][-1:]))
            embeds, is_vision = torch.cat((last, embeds)), torch.cat((torch.tensor([False]), is_vision))
        player.turn([embeds], [is_vision], turn.answer)
        for token in tokens[i][:-1]:
            player.step([token])
    return player


def held_by(ref: Reference, call: int, length: int) -> list[list[set[int]]]:
    """[layer][head]: the positions that the re-statement holds after a call, `length` tokens into the sequence."""
    return [
        [{p for p, fate in enumerate(head[:length]) if fate == -1 or fate > call} for head in layer]
        for layer in ref.fate
    ]


def compare(player: Player, ref: Reference, b: int = 0, margin: float = 1e-4, logit_tolerance: float = 1e-4) -> int:
    """Assert equal decisions and logits before the first near-tie; returns the calls compared."""
    tie = ref.first_tie(margin)
    for call in range(min(tie + 1, len(ref.logits))):
        torch.testing.assert_close(
            player.logits[call][b].double(), ref.logits[call].double(), atol=logit_tolerance, rtol=1e-4
        )
        if call < tie:
            assert player.held[call][b] == held_by(ref, call, player.seen[call][b]), f"entries after call {call}"
    cores = {call: chosen for call, chosen in player.cores}
    for call, layers in ref.cores:
        if call < tie and player.cache.policy.vision is not None:
            assert cores[call][b] == [set(core) for core in layers], f"core of call {call}"
    return tie
