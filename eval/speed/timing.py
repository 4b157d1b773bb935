"""How contenders are timed: started once, then in turns, so that what disturbs a machine disturbs all alike.

A decode step has to read the decoder's weights and the entries of its pass (on a CPU a core step passes over everything
that was kept). Those bytes, divided by the bandwidth of the device, are the time that no step can beat.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.utils import counters

from eval.speed.contenders import Contender
from eval.speed.machine import PeakMemory
from eval.speed.shapes import Prompts
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.settings import CacheSettings
from minivlm.generation.generate import Generation
from minivlm.generation.sampling import Sampling
from minivlm.model.llava import Llava

WARM_UP = 3  # steps of each kind: to compile, to record, to replay


def take_turns(
    contenders: Sequence[Contender], prompts: Prompts, *, prefills: int, rounds: int, steps: int, peak: PeakMemory
) -> dict[str, dict]:
    """Seconds and facts of each contender: prefills in turn, a warm-up each, then `rounds` of `steps` steps in turn.

    With more than one prefill the first counts as warm-up. `steps` are rounded up to whole periods, so that kinds of
    steps are timed as often as they come.
    """
    turn = {c.name: _whole_periods(c, steps) for c in contenders}
    seen: dict[str, dict[str, Any]] = {c.name: {"prefill_s": [], "steps": {}} for c in contenders}
    compiled = {c.name: dict.fromkeys(compilations(), 0) for c in contenders}
    for number in range(prefills):
        for c in contenders:
            before = compilations()
            peak.begin()
            seconds = c.prefill(prompts, steps_needed(c, rounds, steps))
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


def _whole_periods(contender: Contender, steps: int) -> int:
    return -(-steps // contender.period) * contender.period


def steps_needed(contender: Contender, rounds: int, steps: int) -> int:
    """The decode steps of a contender in `take_turns`, and those that its facts may take."""
    timed = rounds * (1 + _whole_periods(contender, steps))
    return 1 + WARM_UP * contender.period + timed + contender.period


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
