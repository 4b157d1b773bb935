"""What is timed: a policy's prefill and decode steps, as `minivlm.generation` runs them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from eval.speed.machine import synchronize
from eval.speed.shapes import Prompts
from minivlm.cache import accounting
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.settings import CacheSettings
from minivlm.cache.state import StepKind
from minivlm.generation.compile import compiled_decode_step, graph_limit
from minivlm.generation.generate import Generation
from minivlm.generation.sampling import Sampling
from minivlm.generation.steps import decode_step
from minivlm.model.llava import Llava


class Contender(Protocol):
    """One way of answering; its steps repeat their kinds after `period` of them."""

    @property
    def name(self) -> str: ...

    @property
    def period(self) -> int: ...

    def prefill(self, prompts: Prompts, steps: int) -> float:
        """Start an answer with room for so many decode steps; returns seconds, the first token included."""

    def decode(self, steps: int) -> list[tuple[StepKind, float]]:
        """Run one step that is not timed and `steps` that are: the kind and the seconds of each."""

    def facts(self) -> dict:
        """What is known after the last turn; it may take `period` more steps.

        `step_bytes` by kind, `live_bytes`, `full_bytes` and `nbytes` of the KV cache, and the share
        of a core that a refresh replaces, `core_replaced`, or None.
        """


class PolicyContender:
    """A policy of this library."""

    def __init__(self, name: str, model: Llava, settings: CacheSettings, compiled: bool) -> None:
        self.name, self.model, self.settings, self.compiled = name, model, settings, compiled
        self.policy = settings.build(model.config.text.num_hidden_layers)
        self.period = max(self.policy.interval, 1)
        self.device = model.lm_head.weight.device
        self._step = compiled_decode_step(self.device) if compiled else decode_step
        self._cache: KVCache | None = None
        self._generation: Generation | None = None
        self._tokens: Iterator[list[int | None]] = iter(())

    @property
    def cache(self) -> KVCache:
        assert self._cache is not None, "nothing was prefilled"
        return self._cache

    @property
    def generation(self) -> Generation:
        assert self._generation is not None, "nothing was prefilled"
        return self._generation

    def warm_up(self, short: Prompts) -> None:
        """Compile what a prefill needs; its graphs serve prompts of other lengths as well."""
        self.prefill(short, 1)
        self._cache = None

    def prefill(self, prompts: Prompts, steps: int) -> float:
        samples = range(len(prompts.ids))
        if self._cache is None:
            text = self.model.config.text
            self._cache = KVCache(text, self.policy, samples, device=self.device, static=self.compiled)
        else:
            self._cache.reset(samples)
        sampling = Sampling(max_new_tokens=steps + 2, ignore_eos=True)
        with graph_limit():
            self._generation = Generation(
                self.model, self._cache, prompts.ids, prompts.features, sampling, step=self._step
            )
        self._tokens = iter(self._generation)
        return self._generation.prefill_s

    def decode(self, steps: int) -> list[tuple[StepKind, float]]:
        synchronize(self.device)
        self.step()  # not timed: the others' turns left nothing of ours in the processor's caches
        times = []
        for _ in range(steps):
            started = time.perf_counter()
            kind = self.step()
            times.append((kind, time.perf_counter() - started))
        return times

    def step(self) -> StepKind:
        """Run one decode step and return its kind."""
        tokens = self.generation.tokens[0]
        if not tokens:
            next(self._tokens)  # the prompt's token, which took no step
        next(self._tokens)
        return self.cache.step_kinds[len(tokens) - 2]  # of the step that gave this token: a GPU is one ahead

    def facts(self) -> dict:
        cache, generation = self.cache, self.generation
        read: dict[str, list[int]] = {kind: [] for kind in cache.step_kinds}
        for step, kind in enumerate(cache.step_kinds):
            kv_bytes = accounting.entries_read(cache, step) * accounting.entry_bytes(cache)
            read[kind].append(decoder_bytes(self.model) + kv_bytes)
        return {
            "settings": self.settings.to_dict(),
            "compiled": self.compiled,
            "step_bytes": {kind: round(statistics.mean(sizes)) for kind, sizes in read.items()},
            "live_bytes": generation.live_bytes,
            "full_bytes": generation.full_bytes,
            "nbytes": cache.nbytes,
            "core_replaced": self._core_replaced() if self.period > 1 else None,
        }

    def _core_replaced(self) -> float:
        """The share of the core that one more refresh replaces: the mean over layers, of the first sequence."""
        before = self._cores()
        for _ in range(self.period):
            self.step()
        shares = [
            1 - torch.isin(new, old).float().mean().item()
            for old, new in zip(before, self._cores(), strict=True)
            if len(new)
        ]
        return statistics.mean(shares) if shares else 0.0

    def _cores(self) -> list[Tensor]:
        return [accounting.core_positions(self.cache, layer_idx, 0) for layer_idx in range(len(self.cache.layers))]


def decoder_bytes(model: Llava) -> int:
    """Weights that every decode step reads: the layers', the final norm's and the head's."""
    parts = (model.language_model.layers, model.language_model.norm, model.lm_head)
    return sum(parameter.nbytes for part in parts for parameter in part.parameters())
