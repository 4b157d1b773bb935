"""Numbers that are none: no answer, but one line that names the first stage at fault and what to do."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import weights
from minivlm import VLM, Conversation, Request, Sampling, UserError
from minivlm.app.trace import trace
from minivlm.generation.sampling import NOT_FINITE, checked, choose_token
from policies import POLICIES, needs_compiler
from vlm_helpers import QUESTION, SETTINGS, endless_vlm

NAN, INF = float("nan"), float("inf")


@contextmanager
def broken(parameter: torch.Tensor, value: float, row: int | slice = 0) -> Iterator[None]:
    """One row of a parameter holds this value."""
    before = parameter.detach().clone()
    parameter.data[row] = value
    try:
        yield
    finally:
        parameter.data.copy_(before)


def complaint(call: Callable[..., object], *args: object, **kwargs: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


STAGES = {
    "vision_tower.embeddings.patch_embedding.weight": "the vision tower's patch embeddings",
    "vision_tower.pre_layrnorm.bias": "the vision tower's first norm",
    "vision_tower.encoder.layers.1.mlp.fc1.weight": "layer 1 of the vision tower",
    "multi_modal_projector.linear_2.weight": "the projector",
    "image_newline": "the image features (image_newline)",
    "language_model.layers.0.self_attn.qkv_proj.weight": "layer 0 of the decoder",
    "language_model.layers.2.mlp.down_proj.weight": "layer 2 of the decoder",
    "language_model.norm.weight": "the decoder's last norm",
    "lm_head.weight": "the head that gives the logits",
}


@pytest.mark.parametrize("name", STAGES)
def test_weights_that_hold_nan_are_named(vlm, pages, name):
    with broken(vlm.model.get_parameter(name), NAN):
        said = complaint(lambda: vlm.ask(QUESTION, pages[:1], sampling=Sampling(4)))
    assert said == f"the weights of {STAGES[name]} hold NaN (expected a checkpoint without)"
    assert vlm.ask(QUESTION, pages[:1], sampling=Sampling(4)).token_ids  # nothing of it stays


@pytest.mark.parametrize("name", POLICIES)
def test_under_every_policy(vlm, pages, name):
    with broken(vlm.model.language_model.layers[1].mlp.gate_up_proj.weight, NAN):
        ask = dict(sampling=Sampling(4, temperature=0.7, top_p=0.9), settings=POLICIES[name])
        assert "the weights of layer 1 of the decoder" in complaint(lambda: vlm.ask(QUESTION, pages[:1], **ask))


@pytest.mark.parametrize("dtype, remedy", [("float16", "dtype bfloat16 or float32"), ("float32", "a checkpoint whose")])
@pytest.mark.parametrize("layer_idx", [0, 2])
def test_an_overflow_names_its_layer(tmp_path, pages, dtype, remedy, layer_idx):
    folder = tmp_path / "model"
    endless_vlm(folder)
    vlm = weights.load(folder, device="cpu", dtype=dtype)
    largest = torch.finfo(vlm.dtype).max
    for settings in SETTINGS.values():
        with broken(vlm.model.language_model.layers[layer_idx].mlp.down_proj.weight, largest, slice(None)):
            said = complaint(vlm.ask, QUESTION, pages[:1], sampling=Sampling(4), settings=settings)
        assert said.startswith(f"the numbers overflow {dtype} in layer {layer_idx} of the decoder (expected {remedy}")


def test_weights_too_large_for_float16(tmp_path, pages):
    vlm = endless_vlm(tmp_path)
    vlm.model.language_model.layers[1].mlp.gate_up_proj.weight.data[0] = 1e6
    half = VLM(vlm.model.half(), vlm.processor)
    said = "the weights of layer 1 of the decoder hold infinity in float16 (expected dtype bfloat16 or float32)"
    assert complaint(lambda: half.ask(QUESTION, pages[:1])) == said


# While an answer is generated


@pytest.fixture
def late(vlm, pages) -> Iterator[tuple[list[int], int]]:
    """The embedding of an answer's fourth token is NaN: the fifth is none. Yields the answer's first tokens."""
    tokens = vlm.ask(QUESTION, pages[:1], sampling=Sampling(8)).token_ids
    assert tokens[3] not in tokens[:3]
    with broken(vlm.model.language_model.embed_tokens.weight, NAN, tokens[3]):
        yield tokens[:4]


LATE = "the weights of the token embeddings hold NaN (expected a checkpoint without)"


def test_a_stream_ends_where_numbers_do(vlm, pages, late):
    stream = vlm.stream(QUESTION, pages[:1], sampling=Sampling(8))
    pieces: list[str] = []
    assert complaint(lambda: pieces.extend(stream)) == LATE
    assert stream.answer.token_ids == late
    assert pieces and stream.answer.text.startswith("".join(pieces))


def test_one_row_fails_a_batch_and_nobody_alone(vlm, pages, late):
    requests = [Request("What?"), Request(QUESTION, pages[:1]), Request("Which one?")]
    assert complaint(lambda: vlm.ask_batch(requests, sampling=Sampling(8))) == LATE
    for request in requests[::2]:
        assert len(vlm.ask_batch([request], sampling=Sampling(8))[0].token_ids) == 8


def test_a_row_that_has_finished_may_overflow(tmp_path):
    """Nothing of what it computes after its end is read."""
    vlm = endless_vlm(tmp_path)
    requests = [Request(QUESTION), Request("Something longer than that?")]
    tokens = [answer.token_ids for answer in vlm.ask_batch(requests, sampling=Sampling(8))]
    end = next(token for token in tokens[0] if token not in tokens[1])
    vlm = endless_vlm(tmp_path, eos_token_id=end)
    with broken(vlm.model.language_model.embed_tokens.weight, NAN, end):
        answers = vlm.ask_batch(requests, sampling=Sampling(8))
    assert [answer.token_ids for answer in answers] == [tokens[0][: tokens[0].index(end) + 1], tokens[1]]


def begun(vlm: VLM, pages: list[Path], name: str) -> Conversation:
    """A conversation after its first answer."""
    conversation = vlm.chat(sampling=Sampling(6), settings=SETTINGS[name])
    list(conversation.ask(QUESTION, pages[:1]))
    return conversation


@pytest.mark.parametrize("name", SETTINGS)
def test_a_turn_whose_prefill_fails_is_forgotten(vlm, pages, name):
    conversation = begun(vlm, pages, name)
    with broken(vlm.model.language_model.layers[0].mlp.gate_up_proj.weight, NAN):
        assert "layer 0 of the decoder" in complaint(lambda: conversation.ask("And?"))
    assert len(conversation.messages) == 2
    stream = conversation.ask("And?")
    assert list(stream) and len(conversation.messages) == 3
    assert stream.answer.stats.prompt_tokens == len(conversation._ids)  # all of it was computed anew


@pytest.mark.parametrize("name", SETTINGS)
def test_an_answer_that_fails_counts_as_far_as_it_came(vlm, pages, name):
    first = next(iter(begun(vlm, pages, name).ask("And now?").generation))[0]
    conversation = begun(vlm, pages, name)
    with broken(vlm.model.language_model.embed_tokens.weight, NAN, first):
        stream = conversation.ask("And now?")
        assert first not in conversation._ids
        assert complaint(lambda: list(stream)) == LATE
        assert stream.answer.token_ids == [first]
        assert complaint(lambda: conversation.ask("What then?")) == LATE  # it would read its answer again
    assert list(conversation.ask("What then?"))
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2 + ["user"]


@pytest.mark.slow
@needs_compiler
def test_compiled(vlm, pages, late):
    torch._dynamo.reset()
    compiled = VLM(vlm.model, vlm.processor, compiled=True)
    assert complaint(lambda: compiled.ask(QUESTION, pages[:1], sampling=Sampling(8))) == LATE
    with broken(vlm.model.vision_tower.encoder.layers[0].mlp.fc1.weight, NAN):
        said = complaint(lambda: compiled.ask(QUESTION, pages[:1], sampling=Sampling(8)))
    assert said == "the weights of layer 0 of the vision tower hold NaN (expected a checkpoint without)"
    torch._dynamo.reset()


def test_a_trace_of_what_is_no_number_is_refused(vlm, pages, late):
    inputs = vlm.processor([vlm.processor.question(QUESTION, 1)], [pages[:1]])
    features = vlm.image_features(inputs.pixel_values, inputs.image_sizes)
    assert len(trace(vlm, inputs.input_ids[0], features, 4, SETTINGS["full"])["tokens"]) == 4
    assert complaint(lambda: trace(vlm, inputs.input_ids[0], features, 6, SETTINGS["full"])) == LATE
    forced = torch.tensor([5, late[3], 7])
    assert complaint(lambda: trace(vlm, inputs.input_ids[0], features, 4, SETTINGS["full"], forced)) == LATE


# The parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0), Sampling(temperature=0.5, top_p=0.5)])
def test_the_host_is_told_and_the_model_gets_a_valid_id(dtype, sampling):
    rows = [[1.0, 5.0, 2.0], [NAN] * 3, [1.0, NAN, 2.0], [INF, 1.0, 2.0], [1.0, -INF, 2.0], [-1.0, -1.0, 0.0]]
    logits = torch.tensor(rows, dtype=dtype)
    token = choose_token(logits, sampling, [torch.Generator().manual_seed(0)] * len(rows))
    assert all(0 <= value < 3 for value in token.tolist())
    told = checked(token, logits).tolist()
    assert [value == NOT_FINITE for value in told] == [False, True, True, True, True, False]
    assert (told[0], told[5]) == (token[0], token[5])


def test_no_temperature_is_too_small():
    logits = torch.tensor([[0.0, 1.0, 0.5]])
    for temperature in (1e-30, 1e-45, 1e-50, 5e-324):
        assert choose_token(logits, Sampling(temperature=temperature), [torch.Generator()]).tolist() == [1]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn]
)
def test_pixel_values_of_any_real_type(vlm, dtype):
    pixels, sizes = torch.zeros(1, 3, 3, 56, 56), [(56, 112)]
    ours, expected = (vlm.image_features(each, sizes)[0] for each in (pixels.to(dtype), pixels))
    assert torch.equal(ours, expected)


def test_pixel_values_that_are_no_numbers(vlm):
    pixels, sizes = torch.zeros(1, 3, 3, 56, 56), [(56, 112)]
    assert "complex numbers" in complaint(lambda: vlm.image_features(pixels.to(torch.complex64), sizes))
    for value, dtype in ((NAN, torch.float32), (INF, torch.bfloat16), (1e300, torch.float64)):
        bad = pixels.to(dtype).index_fill(3, torch.tensor([7]), value)
        assert "NaN or infinity" in complaint(vlm.image_features, bad, sizes)
    with broken(vlm.model.multi_modal_projector.linear_1.bias, NAN):
        assert "the weights of the projector hold NaN" in complaint(lambda: vlm.image_features(pixels, sizes))


HUGE = 10**25
BAD = {
    "max_new_tokens": [0, -1, HUGE, 2**31, 1.5, NAN, True, None, "5"],
    "temperature": [-0.5, NAN, INF, 10**400, True, None, "1", 1j],
    "top_p": [0, -1, 1.1, NAN, INF, True, None, "1"],
    "seed": [1.5, NAN, None, "1", True],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD.items() for value in values], ids=str)
def test_sampling_values_that_cannot_be_meant(name, value):
    said = complaint(lambda: Sampling(**{name: value}))
    assert said.startswith(f"{name} is ") and "expected" in said and "\n" not in said and len(said) < 500


def test_any_integer_is_a_seed(vlm):
    seeds = [0, -1, HUGE, -HUGE, 3**8000]
    answers = [vlm.ask(QUESTION, sampling=Sampling(12, temperature=1.5, seed=seed)).token_ids for seed in seeds]
    assert all(a != b for a, b in itertools.combinations(answers, 2))
    (answer,) = vlm.ask_batch([Request(QUESTION, sample=-HUGE)], sampling=Sampling(3, temperature=1.0))
    assert len(answer.token_ids) == 3


def test_requests_that_cannot_be_meant():
    for bad, said in (
        (lambda: Request(5), "prompt is 5"),
        (lambda: Request(None), "prompt is None"),
        (lambda: Request("x", sample=1.5), "sample is 1.5"),
        (lambda: Request("x", sample="a\nb"), "sample is 'a\\nb'"),
    ):
        assert re.match(re.escape(said), complaint(bad))
