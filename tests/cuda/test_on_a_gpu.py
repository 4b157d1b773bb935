"""What only a GPU can show: compiled steps with recorded graphs, and the Triton kernels as they run there.

Without a GPU all of it is skipped; the other files of this folder check what can be checked without.
"""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from avl_cases import tiny_model
from cache_helpers import NO_STOP_IDS
from eval.speed.timing import added, compilations
from minivlm.cache.kv_cache import KVCache
from minivlm.generation.compile import compiled_decode_step
from minivlm.generation.steps import DecodeStep, decode_step, prefill_step
from minivlm.model.llava import Llava
from policies import POLICIES, image_features, prompt_ids
from triton_interpreter import Inputs, Step

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
    pytest.mark.filterwarnings("default"),  # inductor gives advice about a card, such as to use TF32
]

# Two batches, of prompts with texts and an image; the counts differ within a batch and from one to the other.
BATCHES = [[(3, 90, 12), (2, 84, 9), (4, 60, 20)], [(4, 86, 11), (1, 90, 14), (3, 88, 9)]]
STEPS = 12  # each kind of step at least three times: to compile, to record, to replay
RAGGED = Step(4, 2, 64, slots=320, tail_start=192, spans=[(0, 320), (70, 201), (191, 260)], want_weights=True)
KERNEL_STEPS = {
    "ragged": RAGGED,
    "by index": replace(RAGGED, cores=[50, 1, 0], width=96),
    "one live slot": Step(4, 4, 64, slots=128, tail_start=64, spans=[(64, 65)], want_weights=True),
    "7B": Step(32, 32, 128, slots=3328, tail_start=3072, spans=[(192, 3142)] * 2, want_weights=True),
    "7B, by index": Step(32, 32, 128, 3328, 3072, [(192, 3142)] * 2, cores=[864, 864], width=1024),
}
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.bfloat16: {"rtol": 0.01, "atol": 0.005}}


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def answer(model: Llava, cache: KVCache, parts: list[tuple[int, ...]], step: DecodeStep) -> Tensor:
    """Fill `cache` with a new batch; its logits [STEPS + 1, B, V]."""
    cache.reset(range(len(parts)))
    prompts = [prompt_ids(model, *counts, seed=row) for row, counts in enumerate(parts)]
    features = [image.to(DEVICE) for ids in prompts for image in image_features(model, ids)]
    logits = [prefill_step(model, cache, prompts, features, STEPS + 1)]
    for i in range(STEPS):
        token = torch.arange(10 + i, 10 + i + len(parts), device=DEVICE)
        logits.append(step(model, cache, token, NO_STOP_IDS.to(DEVICE)).clone())  # a replay writes over it
    return torch.stack(logits)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["full", "avl", "avl, h2o text, filter"])
def test_compiled_steps_are_the_eager_ones(name, batch):
    """Those of a second answer, too, which builds and records nothing."""
    model = tiny_model(1, layers=2, head_dim=64, hidden=64).to(DEVICE)
    compiled, policy = compiled_decode_step(DEVICE), POLICIES[name].build(2)
    plain, static = (KVCache(model.config.text, policy, range(batch), device=DEVICE, static=s) for s in (False, True))
    for number, parts in enumerate(BATCHES):
        before = compilations()
        expected = answer(model, plain, parts[:batch], decode_step)
        found = answer(model, static, parts[:batch], compiled)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
        built = added(dict.fromkeys(before, 0), before)
        assert not built["graph_breaks"] and not built["cuda_graphs_skipped"]
        assert bool(built["graphs"]) == (number == 0) and not built["cuda_graphs_recorded_again"]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("step", KERNEL_STEPS.values(), ids=KERNEL_STEPS)
def test_decode_split_is_decode_static(step, dtype):
    """Slots that take no part hold NaN throughout; in the buffers the token is all that changes."""
    step = replace(step, dtype=dtype)
    inputs = Inputs.of(step)
    tensors = {field.name: getattr(inputs, field.name) for field in fields(Inputs)}
    there = Inputs(**{name: None if tensor is None else tensor.to(DEVICE) for name, tensor in tensors.items()})
    buffers, (expected_out, expected_weights) = inputs.expected(step)
    out, weights = there.step(step)
    for found, expected in zip((there.k, there.v, there.positions), buffers, strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(out.cpu().float(), expected_out, **TOLERANCE[dtype])
    if step.want_weights:
        torch.testing.assert_close(weights.cpu(), expected_weights, rtol=1e-3, atol=1e-6)
