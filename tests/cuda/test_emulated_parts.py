"""What surrounds prefill and decode, on the emulated device and equal to the CPU.

That is the loop of an answer, which runs ahead of the host, loading, images, traces, overlays and saved caches. What is
compiled cannot run there: other tests look at the code of compiled steps.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny
import weights
from avl_cases import tiny_model
from cli_helpers import Ran, call, generate, script, write_pages
from device_waits import by_minivlm, listed
from emulated_cuda import DeviceTensor, EmulatedCuda, numbers
from emulated_kernels import KERNELS
from golden_helpers import GOLDEN
from minivlm import VLM, Request, Sampling, UserError
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.storage import load_cache, save_cache
from minivlm.generation.generate import Generation
from minivlm.generation.steps import decode_step, prefill_step
from minivlm.model.llava import Llava
from policies import POLICIES, image_features, prompt_ids
from vlm_helpers import QUESTION, SETTINGS, content, endless_vlm

MODEL = tiny_model(1)
TOKENS = 9
SAMPLINGS = {
    "greedy": Sampling(TOKENS),
    "endless": Sampling(TOKENS, ignore_eos=True),
    "temperature": Sampling(TOKENS, temperature=0.7),
    "top_p": Sampling(TOKENS, temperature=0.7, top_p=0.9),
}


def new_cache(model: Llava, name: str, device: str) -> KVCache:
    """For two rows; a static one on the device, as compiled steps have it."""
    static = device == "cuda"
    if static:
        pytest.importorskip("triton", reason="Triton is not installed")
    policy = POLICIES[name].build(len(model.language_model.layers))
    return KVCache(model.config.text, policy, range(2), device=device, static=static)


def generation(model: Llava, device: str, name: str, sampling: Sampling, **options) -> Generation:
    """A ragged batch of two, prefilled."""
    prompts = [prompt_ids(model, 3, 90, 12), prompt_ids(model, 2, 84, 9, seed=1)]
    features = [image.to(device) for ids in prompts for image in image_features(model, ids)]
    return Generation(model, new_cache(model, name, device), prompts, features, sampling, **options)


def assert_close(ours: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(numbers(one), numbers(other), rtol=1e-5, atol=1e-5)


# The answer's loop


@pytest.mark.parametrize(
    "name, sampling",
    [
        ("full", "greedy"),
        *(pytest.param("full", name, marks=pytest.mark.slow) for name in list(SAMPLINGS)[1:]),
        *(pytest.param("avl, h2o text, filter", name, marks=pytest.mark.slow) for name in SAMPLINGS),
    ],
)
def test_each_token_is_waited_for_once_and_a_step_late(name, sampling):
    expected = generation(MODEL, "cpu", name, SAMPLINGS[sampling])
    list(expected)
    with EmulatedCuda(KERNELS) as cuda:
        read_before: list[int] = []  # by step: the tokens that the host had read when the step was launched

        def step(*arguments: object) -> Tensor:
            read_before.append(len(cuda.syncs))
            return decode_step(*arguments)

        answer = generation(copy.deepcopy(MODEL).to("cuda"), "cuda", name, SAMPLINGS[sampling], step=step)
        assert len(by_minivlm(cuda.syncs)) == 1, listed(by_minivlm(cuda.syncs))  # for the first token
        cuda.syncs.clear()
        tokens = list(answer)
        assert all(sync.is_event for sync in cuda.syncs), listed(cuda.syncs)
        assert len(cuda.syncs) == len(tokens)  # one for each
        assert read_before == list(range(len(read_before)))  # the step after a token is launched before it is read
        assert len(read_before) in (len(tokens), TOKENS - 1)
    assert answer.tokens == expected.tokens and answer.finish == expected.finish


@pytest.mark.parametrize("ends", [1, 4, TOKENS - 1])
def test_an_answer_that_ends_wastes_one_step_and_stores_nothing_of_it(ends):
    answer = generation(MODEL, "cpu", "full", SAMPLINGS["endless"])
    list(answer)
    model = copy.deepcopy(MODEL)
    model.config = dataclasses.replace(MODEL.config, eos_token_ids=tuple({row[ends] for row in answer.tokens}))
    expected = generation(model, "cpu", "full", SAMPLINGS["greedy"])
    list(expected)
    with EmulatedCuda(KERNELS):
        ours = generation(model.to("cuda"), "cuda", "full", SAMPLINGS["greedy"])
        list(ours)
        assert ours.tokens == expected.tokens and ours.finish == expected.finish
        assert ours.cache.stored.tolist() == expected.cache.stored.tolist()
        assert [ours.unfed(row) for row in range(2)] == [expected.unfed(row) for row in range(2)]
        assert ours.cache.steps - expected.cache.steps == (ends < TOKENS - 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_batches_and_conversations(tmp_path, name):
    def answers(vlm: VLM) -> list[tuple]:
        requests = [Request(QUESTION, pages[:1]), Request("And without?"), Request("Which one?", pages)]
        options = dict(sampling=Sampling(8), settings=SETTINGS[name])
        batch = vlm.ask_batch(requests, **options)
        again = vlm.ask_batch(requests, **options)  # in the buffers of the first batch
        chat = vlm.chat(**options)
        turns = []
        for images in (pages[:1], [], pages[1:]):
            stream = chat.ask(QUESTION, images)
            text = "".join(stream)
            turns.append((text, stream.answer.token_ids))
        stats = [(answer.stats.live_bytes, answer.stats.live_entries, answer.stats.nbytes) for answer in batch]
        return [*map(content, batch), *map(content, again), *turns, *stats]

    pages = write_pages(tmp_path)
    expected = answers(endless_vlm(tmp_path / "model"))
    with EmulatedCuda(KERNELS):
        on_device = weights.load(tmp_path / "model", device="cuda", dtype="float32")
        assert on_device.model.lm_head.weight.is_cuda
        assert answers(on_device) == expected


@pytest.mark.slow
def test_numbers_that_are_none_are_found_and_explained(tmp_path):
    vlm = endless_vlm(tmp_path / "model")
    pages = write_pages(tmp_path)
    broken = "language_model.layers.1.mlp.down_proj.weight"
    dict(vlm.model.named_parameters())[broken].data[0] = torch.nan
    with pytest.raises(UserError) as expected:
        vlm.ask(QUESTION, pages)
    with EmulatedCuda(KERNELS):
        on_device = VLM(vlm.model.to("cuda"), vlm.processor)
        with pytest.raises(UserError) as ours:
            on_device.ask(QUESTION, pages)
    assert str(ours.value) == str(expected.value)


# Loading


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_a_checkpoint_is_loaded_onto_the_device(tmp_path, dtype):
    tiny.write(tmp_path, "next-vicuna", dtype=torch.bfloat16)
    expected = weights.load_model(tmp_path, device="cpu", dtype={"auto": "bfloat16"}.get(dtype, dtype))
    with EmulatedCuda(KERNELS):
        for device in ("auto", "cuda", "cuda:0"):
            model = weights.load_model(tmp_path, device=device, dtype=dtype)
            for name, parameter in model.named_parameters():
                assert isinstance(parameter, DeviceTensor)
                assert torch.equal(numbers(parameter), expected.get_parameter(name)), name
        with pytest.raises(UserError, match="device 'cuda:1': this machine has 1 CUDA devices"):
            weights.load_model(tmp_path, device="cuda:1")


@pytest.mark.slow
def test_weights_that_do_not_fit_the_device(tmp_path):
    tiny.write(tmp_path, "llava-1.5")
    with (
        EmulatedCuda(KERNELS),
        mock.patch.object(torch.cuda, "mem_get_info", lambda device: (1000, 80 << 30)),
        pytest.raises(UserError, match="the weights take .* MB in float32, cuda has 0.00 MB free"),
    ):
        weights.load_model(tmp_path, device="cuda")


# Images


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava-1.5", "next-vicuna"])
def test_image_features(tmp_path, family):
    model = weights.load_model(tiny.write(tmp_path, family), device="cpu")
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    sizes = [(50, 130), (90, 60)]
    if model.config.is_next:
        pixels = pixels[:, None].repeat(1, 5, 1, 1, 1) + torch.arange(5.0)[:, None, None, None]
    expected = model.image_features(pixels, sizes)
    with EmulatedCuda(KERNELS) as cuda:
        on_device = copy.deepcopy(model).to("cuda")
        pixels = pixels.to("cuda")
        cuda.syncs.clear()
        features = on_device.image_features(pixels, sizes)
        assert not cuda.syncs, listed(cuda.syncs)
    assert_close(features, expected)


# Traces, overlays, saved caches


def traced(folder: Path, out: Path, *flags: object) -> dict[str, Tensor]:
    arguments = ("--model", folder / "model", "--inputs", folder / "input.safetensors", "--steps", 12, "--out", out)
    ran = call(script("trace").main, *arguments, "--dtype", "float32", *flags)
    assert ran == Ran(0, "", "")
    return load_file(out)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llava-m", "next-s"])
@pytest.mark.parametrize("policy", ["avl", "h2o"])
def test_a_trace(tmp_path, model, policy):
    flags = ["--policy", policy, *(["--prefill_filter_flag", "--text_pruning_flag"] if policy == "avl" else [])]
    expected = traced(GOLDEN / model, tmp_path / "cpu.safetensors", "--device", "cpu", *flags)
    with EmulatedCuda(KERNELS) as cuda:
        ours = traced(GOLDEN / model, tmp_path / "cuda.safetensors", "--device", "cuda", *flags)
        assert cuda.syncs  # it did run there
    assert ours.keys() == expected.keys()
    torch.testing.assert_close(ours.pop("logits"), expected.pop("logits"), atol=1e-3, rtol=0)
    for name, tensor in ours.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
def test_an_answer_and_its_overlay_on_the_command_line(tmp_path):
    def answered(device: str) -> tuple[str, bytes]:
        flags = ("--policy", "avl", "--max_new_tokens", 6, "--overlay", tmp_path / "out.png", "--dtype", "float32")
        ran = generate("--image", page, "--prompt", "What is it?", "--device", device, *flags)
        assert ran.status == 0, ran.err
        return ran.out, (tmp_path / "out.png").read_bytes()

    page = write_pages(tmp_path)[0]
    expected = answered("cpu")
    with EmulatedCuda(KERNELS) as cuda:
        assert answered("cuda") == expected
        assert any(sync.is_event for sync in cuda.syncs)  # it did run there


@pytest.mark.slow
@pytest.mark.parametrize("name", ["avl, h2o text, filter", "h2o", "random"])
def test_a_cache_is_saved_on_one_device_and_goes_on_on_the_other(tmp_path, name):
    @torch.no_grad()
    def decoded(cache: KVCache, steps: range) -> list[Tensor]:
        tokens = [torch.tensor([10 + step, 30 + step]).to(cache.device) for step in steps]
        return [decode_step(models[cache.device.type], cache, each, no_stop.to(cache.device)) for each in tokens]

    no_stop = torch.zeros(0, dtype=torch.int64)
    with EmulatedCuda(KERNELS):
        models = {"cpu": MODEL, "cuda": copy.deepcopy(MODEL).to("cuda")}
        for source, target in (("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")):
            saved, loaded = (new_cache(MODEL, name, device) for device in (source, target))
            prompts = [prompt_ids(MODEL, 3, 90, 12), prompt_ids(MODEL, 2, 84, 9, seed=1)]
            features = [image.to(source) for ids in prompts for image in image_features(MODEL, ids)]
            prefill_step(models[source], saved, prompts, features, 12)
            decoded(saved, range(4))
            save_cache(saved, tmp_path / "cache")
            load_cache(loaded, tmp_path / "cache", torch.float32)
            assert all(tensor.device.type == target for tensor in loaded.tensors())
            assert_close(decoded(loaded, range(4, 11)), decoded(saved, range(4, 11)))
