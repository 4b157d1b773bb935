"""What is timed: a policy's prefill and decode steps as `minivlm.generation.generate` runs them, and the limit they are held to.

A decode step has to read the decoder's weights and the live entries of its pass (on a CPU a core step passes over all
that is kept); divided by the bandwidth of the device that is the time below which it does not get.  Contenders
(policies, and peers from outside) are started once and then take turns, a few steps at a time, so that what disturbs a
machine disturbs all alike.
"""

from __future__ import annotations

import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from eval.speed.shapes import Prompts
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.settings import CacheSettings
from minivlm.generation.compile import compiled_decode_step, graph_limit
from minivlm.generation.generate import Generation, Sampling, decode_step
from minivlm.model.llava import Llava

WARM_UP = 3  # steps of each kind: to compile, to record, to replay


class Contender(Protocol):
    """One way of answering; `name` tells it apart, its steps repeat their kinds after `period` of them."""

    name: str
    period: int

    def prefill(self, prompts: Prompts, steps: int) -> float:
        """Start an answer with room for so many decode steps; returns seconds, the first token included."""

    def decode(self, steps: int) -> list[tuple[str, float]]:
        """Go on by one step that is not timed and `steps` that are: kind and seconds of each."""

    def facts(self) -> dict:
        """What is known after the last turn; it may take `period` more steps.

        `step_bytes` by kind, `live_bytes`, `full_bytes` and `nbytes` of the KV cache, and the share of a core that
        a refresh replaces, `core_replaced`, or None.
        """


class Ours:
    """A policy of this library."""

    def __init__(self, name: str, model: Llava, settings: CacheSettings, compiled: bool) -> None:
        self.name, self.model, self.settings, self.compiled = name, model, settings, compiled
        self.policy = settings.build(model.config.text.num_hidden_layers)
        self.period = max(self.policy.vision.interval, 1) if self.policy.vision else 1
        self._step = compiled_decode_step(model.lm_head.weight.device) if compiled else decode_step
        self._cache: KVCache | None = None

    def warm_up(self, short: Prompts) -> None:
        """Compile what a prefill needs; its graphs serve prompts of other lengths as well."""
        self.prefill(short, 1)
        self._cache = None

    def prefill(self, prompts: Prompts, steps: int) -> float:
        samples = range(len(prompts.ids))
        if self._cache is None:
            device = self.model.lm_head.weight.device
            self._cache = KVCache(self.model.config.text, self.policy, samples, device=device, static=self.compiled)
        else:
            self._cache.reset(samples)
        sampling = Sampling(max_new_tokens=steps + 2, ignore_eos=True)
        with graph_limit():
            self._generation = Generation(
                self.model, self._cache, prompts.ids, prompts.features, sampling, step=self._step
            )
        self._tokens = iter(self._generation)
        return self._generation.prefill_s

    def decode(self, steps: int) -> list[tuple[str, float]]:
        synchronize(self._cache.device)
        self.step()  # not timed: the others' turns left nothing of ours in the processor's caches
        times = []
        for _ in range(steps):
            started = time.perf_counter()
            kind = self.step()
            times.append((kind, time.perf_counter() - started))
        return times

    def step(self) -> str:
        """One decode step, and its kind."""
        if not self._generation.tokens[0]:
            next(self._tokens)  # the prompt's token, which took no step
        next(self._tokens)
        return self._cache.kinds[
            len(self._generation.tokens[0]) - 2
        ]  # of the step that gave this token: a GPU is one ahead

    def facts(self) -> dict:
        cache, generation = self._cache, self._generation
        weights = decoder_bytes(self.model)
        read = {kind: [] for kind in cache.kinds}
        for step, kind in enumerate(cache.kinds):
            read[kind].append(weights + entries_read(cache, step) * cache.entry_bytes())
        return {
            "settings": self.settings.to_dict(),
            "compiled": self.compiled,
            "step_bytes": {kind: round(statistics.mean(sizes)) for kind, sizes in read.items()},
            "live_bytes": generation.live_bytes,
            "full_bytes": generation.full_bytes,
            "nbytes": cache.nbytes,
            "core_replaced": self._replaced() if self.period > 1 else None,
        }

    def _replaced(self) -> float:
        """The share of the core that one more refresh replaces: the mean over layers, of the first sequence."""
        before = self._cores()
        for _ in range(self.period):
            self.step()
        shares = [1 - torch.isin(new, old).float().mean().item() for old, new in zip(before, self._cores()) if len(new)]
        return statistics.mean(shares) if shares else 0.0

    def _cores(self) -> list[Tensor]:
        return [self._cache.core_positions(layer, 0) for layer in range(len(self._cache.layers))]


def decoder_bytes(model: Llava) -> int:
    """Weights that every decode step reads: the layers', the final norm's and the head's."""
    parts = (model.language_model.layers, model.language_model.norm, model.lm_head)
    return sum(parameter.nbytes for part in parts for parameter in part.parameters())


def entries_read(cache: KVCache, step: int) -> int:
    """Entries that a step of this turn read, its own included, summed over sequences and layers."""
    core = cache.kinds[step] == "core" and cache.gather  # else a core step passes over the others, too
    return sum(
        (row.core + row.system if core else row.fixed) + track.tail[step] + 1
        for layer in cache.layers
        for row, track in zip(layer.rows, cache.tracks)
    )


def take_turns(
    contenders: Sequence[Contender], prompts: Prompts, *, prefills: int, rounds: int, steps: int, peak: PeakMemory
) -> dict[str, dict]:
    """Seconds and facts of each contender: prefills in turn, a warm-up each, then `rounds` of `steps` steps in turn.

    With more than one prefill the first counts as warm-up.  `steps` are rounded up to whole periods, so that kinds of
    steps are timed as often as they come.
    """
    turn = {c.name: -(-steps // c.period) * c.period for c in contenders}
    seen = {c.name: {"prefill_s": [], "steps": {}} for c in contenders}
    compiled = {c.name: dict.fromkeys(compilations(), 0) for c in contenders}
    for number in range(prefills):
        for c in contenders:
            before = compilations()
            peak.begin()
            seconds = c.prefill(prompts, 1 + WARM_UP * c.period + rounds * (1 + turn[c.name]) + c.period)
            seen[c.name]["peak_bytes"] = peak.end() if number == 0 else seen[c.name]["peak_bytes"]
            if number or prefills == 1:
                seen[c.name]["prefill_s"].append(seconds)
                compiled[c.name] = added(compiled[c.name], before)
    for c in contenders:
        started = time.perf_counter()
        c.decode(WARM_UP * c.period)
        seen[c.name]["warm_up_s"] = time.perf_counter() - started
    for c in list(contenders) * rounds:
        before = compilations()
        for kind, seconds in c.decode(turn[c.name]):
            seen[c.name]["steps"].setdefault(kind, []).append(seconds)
        compiled[c.name] = added(compiled[c.name], before)
    for c in contenders:
        seen[c.name] |= c.facts() | {"after_warm_up": compiled[c.name]}
    return seen


def compilations() -> dict[str, int]:
    """What torch.compile has done so far in this process, of which a warm prefill or decode step should do nothing."""
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "cuda_graphs_skipped": counters["inductor"]["cudagraph_skips"],
        "cuda_graphs_recorded_again": recorded_again(),
    }


def added(counts: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    """`counts` and what has come since `before`."""
    return {what: counts[what] + now - before[what] for what, now in compilations().items()}


def recorded_again() -> int:
    """CUDA graphs that were recorded once more because a buffer had moved."""
    if not torch.cuda.is_available():
        return 0
    from torch._inductor.cudagraph_trees import get_manager

    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    return sum(sum(by_graph.values()) for by_graph in manager.num_rerecord.values()) if manager else 0


# --- the machine -------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bandwidth(device: torch.device, nbytes: int | None = None, repeats: int = 10) -> dict[str, float]:
    """Bytes per second that the device copies (read and written ones added) and reads, medians of `repeats`."""
    count = (nbytes or (4 << 30 if device.type == "cuda" else 512 << 20)) // 4
    source, target = torch.rand(count, device=device), torch.empty(count, device=device)
    return {
        "copy": 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, repeats),
        "read": source.nbytes / median_seconds(source.sum, device, repeats),
    }


def median_seconds(run: Callable[[], Tensor], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


class PeakMemory:
    """How much more than before was in use at most between `begin` and `end`; on the CPU by pages of the process."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._before = device, 0

    def begin(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak, on Linux
        except OSError:
            pass  # then it is the highest since the process began
        self._before = self._status("VmRSS")

    def end(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._before
        return self._status("VmHWM") - self._before

    @staticmethod
    def _status(field: str) -> int:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:  # not Linux
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def largest(fits: Callable[[int], bool], least: int = 1) -> int:
    """The largest number that `fits`, which all smaller ones do too; 0 where `least` does not."""
    low, high = 0, least
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def batch_that_fits(
    model: Llava, settings: CacheSettings, prompts_of: Callable[[int], Prompts], new_tokens: int
) -> int:
    """The largest batch of such prompts that a GPU can prefill and go on to decode, with room for `new_tokens`."""

    def attempt(batch: int) -> None:
        prompts, policy = prompts_of(batch), settings.build(model.config.text.num_hidden_layers)
        cache = KVCache(model.config.text, policy, range(batch), device=model.lm_head.weight.device)
        sampling = Sampling(max_new_tokens=new_tokens, ignore_eos=True)
        tokens = iter(Generation(model, cache, prompts.ids, prompts.features, sampling))
        next(tokens), next(tokens)

    def fits(batch: int) -> bool:
        gc.collect()  # what an attempt before this one held
        torch.cuda.empty_cache()
        try:
            attempt(batch)
        except torch.OutOfMemoryError:
            return False
        return True

    return largest(fits)
