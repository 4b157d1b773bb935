"""Whole prefills and decode steps on the emulated device: the CPU's results, one device, and where the host waits.

On a real GPU the host runs ahead of the device. Where it waits, the device runs dry afterwards. So neither the layers
of a prefill nor a step may wait, whatever the policy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from avl_cases import tiny_model
from device_waits import Sync, by_minivlm, listed
from emulated_cuda import EmulatedCuda, numbers
from emulated_kernels import KERNELS
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.settings import CacheSettings
from minivlm.generation.steps import decode_step, prefill_step
from minivlm.model.llava import Llava
from policies import DECODES, POLICIES, image_features, prompt_ids

LAYERS, STEPS, STOP = 3, 7, 2
# The parts of two rows' prompts in two turns; the first row's second turn has no image.
TURNS = [[(3, 90, 12), (2, 84, 9)], [(4,), (3, 10, 9)]]

# How often the host waits:
IN_A_STEP = 0  # of any kind, the choice of cores included
IN_A_PREFILLS_LAYERS = 0  # in all of them together
AROUND_THEM = (0, 1)  # in the rest of each turn's prefill; a later turn asks what the last answer has stored

QUICK = ("full", "avl, h2o text, filter", "h2o", "random")
CASES = [
    pytest.param(
        *(name, heads, decode),
        id=f"{name}-{heads[0]} heads in {heads[1]}-{decode}",
        marks=[] if name in QUICK and heads == (4, 2) else pytest.mark.slow,
    )
    for name in POLICIES
    for heads in ((4, 2), (4, 4))
    for decode in ("plain", "gathering")
]


@dataclass
class Conversation:
    """Two turns on a device, with what they gave and where the host waited."""

    device: str
    cuda: EmulatedCuda | None = None
    logits: list[Tensor] = field(default_factory=list)
    prefills: list[list[Sync]] = field(default_factory=list)  # by turn
    layers: list[list[Sync]] = field(default_factory=list)  # by turn: those of them in the decoder
    steps: list[list[Sync]] = field(default_factory=list)  # by step

    @torch.no_grad()
    def run(self, model: Llava, settings: CacheSettings, **decode: bool) -> KVCache:
        """Feed given tokens; one of them ends the second row's answer."""
        cache = KVCache(model.config.text, settings.build(LAYERS), range(2), device=self.device, **decode)
        stop = torch.tensor([STOP], device=self.device)
        for turn, batch in enumerate(TURNS):
            prompts = [prompt_ids(model, *parts, seed=turn + row) for row, parts in enumerate(batch)]
            features = [image.to(self.device) for ids in prompts for image in image_features(model, ids)]
            before = len(self._syncs)
            with self._layers_watched(model.language_model):
                self.logits.append(prefill_step(model, cache, prompts, features, STEPS + 1))
            self.prefills.append(self._syncs[before:])
            for step in range(STEPS):
                token = torch.tensor([10 + step, STOP if step == 4 else 30 + step], device=self.device)
                before = len(self._syncs)
                self.logits.append(decode_step(model, cache, token, stop))
                self.steps.append(self._syncs[before:])
        return cache

    @property
    def _syncs(self) -> list[Sync]:
        return self.cuda.syncs if self.cuda else []

    @contextmanager
    def _layers_watched(self, decoder: nn.Module) -> Iterator[None]:
        """Note where the host waits in the decoder."""
        before: list[int] = []
        enters = decoder.register_forward_pre_hook(lambda *_: before.append(len(self._syncs)))
        leaves = decoder.register_forward_hook(lambda *_: self.layers.append(self._syncs[before.pop() :]))
        with enters, leaves:
            yield


@pytest.mark.parametrize("name, heads, decode", CASES)
def test_a_conversation_is_that_of_the_cpu_and_waits_for_nothing(name, heads, decode):
    if decode == "gathering":
        pytest.importorskip("triton", reason="Triton is not installed")
    model = tiny_model(1, layers=LAYERS, heads=heads)
    on_cpu = Conversation("cpu")
    on_cpu.run(model, POLICIES[name], **DECODES[decode])
    with EmulatedCuda(KERNELS) as cuda:
        on_device = Conversation("cuda", cuda)
        cache = on_device.run(copy.deepcopy(model).to("cuda"), POLICIES[name], static=decode == "gathering")
        assert all(tensor.is_cuda for tensor in cache.tensors())
    assert cache.gather == (decode == "gathering")  # as a static cache on CUDA chooses
    for ours, expected in zip(on_device.logits, on_cpu.logits, strict=True):
        torch.testing.assert_close(numbers(ours), expected, rtol=1e-5, atol=1e-5)
    for kind, syncs in zip(cache.step_kinds, on_device.steps[-STEPS:], strict=True):
        count = len(syncs)
        assert count == IN_A_STEP, f"in a {kind} step:\n{listed(syncs)}"
    for prefill, layers, around in zip(on_device.prefills, on_device.layers, AROUND_THEM, strict=True):
        count = len(layers)
        assert count == IN_A_PREFILLS_LAYERS, f"in the layers of a prefill:\n{listed(layers)}"
        count = len(by_minivlm(prefill)) - len(layers)
        assert count == around, f"in a whole prefill:\n{listed(by_minivlm(prefill))}"
