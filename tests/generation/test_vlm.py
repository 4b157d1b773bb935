"""The public API: answers, batches, compiled steps, sampling, streams, and what ends an answer."""

from __future__ import annotations

import re
import statistics

import pytest
import torch
from PIL import Image

import tiny
import weights
from minivlm import VLM, Request, Sampling, UserError, preset
from minivlm.generation.generate import Generation
from minivlm.generation.sampling import choose_token
from policies import needs_compiler
from vlm_helpers import QUESTION, SETTINGS, content, endless_vlm, generated

# Answers


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_answer_is_the_greedy_one_to_the_processors_inputs(tmp_path, family, pages):
    vlm = endless_vlm(tmp_path, family)
    inputs = vlm.processor([vlm.processor.question(QUESTION, 2)], [pages])
    tokens = generated(vlm, inputs, Sampling(12))
    answer = vlm.ask(QUESTION, pages, sampling=Sampling(12))
    assert content(answer) == (vlm.processor.decode(tokens), tokens, "length")
    assert content(vlm.ask(QUESTION, [Image.open(page) for page in pages], sampling=Sampling(12))) == content(answer)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_batch_is_answered_as_its_questions_alone(vlm, pages, name):
    requests = [
        Request(QUESTION, pages[:1]),
        Request("And without?"),
        Request("<image> or <image>, which one is it?", pages),
    ]
    sampling, settings = Sampling(14), SETTINGS[name]
    batch = vlm.ask_batch(requests, sampling=sampling, settings=settings)
    for request, answer in zip(requests, batch, strict=True):
        alone = vlm.ask(request.prompt, request.images, sampling=sampling, settings=settings)
        assert content(alone) == content(answer)
    again = vlm.ask_batch(requests, sampling=sampling, settings=settings)  # in the buffers of the first batch
    assert list(map(content, again)) == list(map(content, batch))
    assert again[0].stats.live_bytes == batch[0].stats.live_bytes


def test_settings_change_answers_and_bytes(vlm, pages):
    full, half = (vlm.ask(QUESTION, pages, sampling=Sampling(14), settings=SETTINGS[name]) for name in ("full", "avl"))
    assert full.token_ids != half.token_ids
    assert full.stats.live_bytes == full.stats.full_bytes == half.stats.full_bytes > half.stats.live_bytes
    assert full.stats.entries_attended_per_step["vision core"] > half.stats.entries_attended_per_step["vision core"]


def test_statistics_of_a_batch(vlm, pages):
    prompts = [vlm.processor([vlm.processor.question(QUESTION, n)], [pages[:n]]) for n in (0, 2)]
    answers = vlm.ask_batch([Request(QUESTION), Request(QUESTION, pages)], sampling=Sampling(5))
    stats = answers[0].stats
    tokens = sum(int(inputs.lengths[0]) for inputs in prompts)
    assert stats == answers[1].stats
    assert (stats.prompt_tokens, stats.vision_tokens) == (tokens, 70 + 66)
    assert (stats.new_tokens, stats.decoded_tokens, stats.decode_steps) == (10, 8, 4)
    config = vlm.config.text
    entry = 2 * config.num_key_value_heads * config.head_dim * 4
    assert stats.live_bytes == stats.full_bytes == tokens * config.num_hidden_layers * entry <= stats.nbytes
    assert sum(stats.live_entries.values()) * config.head_dim * 2 * 4 == stats.live_bytes
    assert sum(stats.entries_attended_per_step.values()) == pytest.approx(tokens / 2 + statistics.mean(range(1, 5)))
    assert stats.tokens_per_s == 8 / stats.decode_s


@pytest.mark.parametrize("where", ["generation config", "config", "both"])
def test_every_end_of_sequence_id_ends_an_answer(tmp_path, where):
    endless = endless_vlm(tmp_path / "endless").ask(QUESTION, sampling=Sampling(30)).token_ids
    ends = sorted({endless[9], endless[21]})
    in_config = {"config": ends, "generation config": ends[0], "both": ends[0]}[where]
    in_generation_config = {
        "config": {},
        "generation config": {"eos_token_id": ends},
        "both": {"eos_token_id": ends[1]},
    }
    folder = tiny.write(tmp_path / "model", text_config={"num_hidden_layers": 3, "eos_token_id": in_config})
    tiny.dump(folder / "generation_config.json", in_generation_config[where])
    vlm = weights.load(folder, device="cpu")
    answer = vlm.ask(QUESTION, sampling=Sampling(30))
    first = min(endless.index(end) for end in ends)
    assert (answer.token_ids, answer.finish) == (endless[: first + 1], "stop")
    assert vlm.ask(QUESTION, sampling=Sampling(30, ignore_eos=True)).token_ids == endless
    batch = vlm.ask_batch([Request("Something longer than that?"), Request(QUESTION)], sampling=Sampling(30))
    assert batch[1].token_ids == answer.token_ids


def test_an_answer_ends_with_the_context(tmp_path):
    vlm = endless_vlm(tmp_path, max_position_embeddings=40)
    length = int(vlm.processor([vlm.processor.question(QUESTION)], [[]]).lengths[0])
    answer = vlm.ask(QUESTION, sampling=Sampling(100))
    assert (len(answer.token_ids), answer.finish) == (40 - length + 1, "length")  # the last one is never fed
    short = vlm.ask(QUESTION, sampling=Sampling(4))
    assert short.token_ids == answer.token_ids[:4]


def test_what_cannot_be_asked(vlm, pages, tmp_path):
    for ask, complaint in (
        (lambda: vlm.ask_batch([]), "no requests"),
        (lambda: vlm.ask("<image>?"), "1 <image> placeholders for 0 images"),
        (lambda: vlm.ask("long " * 3000), "the model's context is 2048"),
        (lambda: vlm.ask("\udcff"), "not valid Unicode"),
        (lambda: vlm.ask(QUESTION, [tmp_path / "none.png"]), "none.png: no such file"),
        (lambda: vlm.ask(QUESTION, settings=preset("fastv", filter_layer=4)), "the model has 3 layers"),
        (lambda: vlm.image_features(torch.zeros(1, 3, 56, 56), [(56, 56)]), "pixel_values have shape [1, 3, 56, 56]"),
    ):
        with pytest.raises(UserError, match=re.escape(complaint)):
            ask()
    assert vlm.ask(QUESTION, pages, sampling=Sampling(3)).token_ids  # the next question is answered


# Compiled


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", ["full", "avl"])
def test_compiled_answers_are_the_same_and_nothing_compiles_twice(vlm, pages, name):
    """After answers and conversations about one page, those about another page add no graph."""
    torch._dynamo.reset()
    compiled = VLM(vlm.model, vlm.processor, compiled=True)
    counters = torch._dynamo.utils.counters
    counters.clear()
    graphs = []  # built so far, after each page
    options = dict(sampling=Sampling(12), settings=SETTINGS[name])
    for page in (pages[0], Image.open(pages[0]).rotate(180)):
        assert content(compiled.ask(QUESTION, [page], **options)) == content(vlm.ask(QUESTION, [page], **options))
        conversations = [each.chat(**options) for each in (compiled, vlm)]
        for question, images in ((QUESTION, [page]), ("And what is that?", [])):
            streams = [conversation.ask(question, images) for conversation in conversations]
            texts = ["".join(stream) for stream in streams]
            assert texts[0] == texts[1] and len(streams[0].answer.token_ids) == 12
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 2 and not counters["graph_break"]
    torch._dynamo.reset()


# Sampling


def test_sampling_draws_from_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    for sampling, expected in (
        (Sampling(temperature=1.0), logits.softmax(-1)[0]),
        (Sampling(temperature=0.5), (2 * logits).softmax(-1)[0]),
        # 0.64, 0.24, 0.09, 0.03: the second token crosses 0.7 and stays.
        (Sampling(temperature=1.0, top_p=0.7), torch.tensor([2.0, 1.0]).softmax(-1)),
    ):
        generator, count = torch.Generator().manual_seed(3), 4000
        tokens = choose_token(logits.expand(count, -1), sampling, [generator] * count)
        frequencies = tokens.bincount(minlength=4) / count
        torch.testing.assert_close(frequencies[: len(expected)], expected, atol=0.03, rtol=0)
        assert frequencies[len(expected) :].sum() == 0


def test_a_sampled_answer_depends_on_its_seed_and_sample_number(vlm, pages):
    sampling = Sampling(16, temperature=1.2, seed=5)
    requests = [Request(QUESTION, pages[:1], sample=sample) for sample in (3, 1, 3)]
    batch = [answer.token_ids for answer in vlm.ask_batch(requests, sampling=sampling)]
    assert batch[0] == batch[2] != batch[1]
    for request, tokens in zip(requests, batch, strict=True):
        assert vlm.ask_batch([request], sampling=sampling)[0].token_ids == tokens
    assert vlm.ask_batch(requests[:1], sampling=Sampling(16, temperature=1.2, seed=6))[0].token_ids != batch[0]


# Streams


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_pieces_add_up_to_the_answer(tmp_path, family, pages):
    vlm = endless_vlm(tmp_path, family)
    for seed in range(3):
        sampling = Sampling(40, temperature=2.0, seed=seed)
        stream = vlm.stream(QUESTION, pages[:1], sampling=sampling)
        pieces = list(stream)
        assert len(pieces) > 5 and "" not in pieces
        assert "".join(pieces) == stream.answer.text == vlm.ask(QUESTION, pages[:1], sampling=sampling).text


def test_a_stream_that_is_left_early(vlm):
    whole = vlm.ask(QUESTION, sampling=Sampling(20)).token_ids
    left = vlm.stream(QUESTION, sampling=Sampling(20))
    next(iter(left))
    tokens = left.answer.token_ids
    assert 0 < len(tokens) < 20 and whole[: len(tokens)] == tokens
    stopped = vlm.stream(QUESTION, sampling=Sampling(20))
    for _ in stopped:
        stopped.stop()
    assert stopped.answer.token_ids == tokens


# Generations


def test_a_generation_takes_ids_and_yields_ids(vlm):
    """It never sees text; that is the stream's part."""
    prompts = [torch.tensor([1, 5, 9]), torch.tensor([1, 7])]
    generation = Generation(vlm.model, vlm.new_cache(SETTINGS["full"], [0, 1]), prompts, [], Sampling(3))
    steps = list(generation)
    assert [len(step) for step in steps] == [2, 2, 2]
    assert generation.tokens == [list(row) for row in zip(*steps, strict=True)]
    assert generation.unfed(0) == generation.tokens[0][-1:]
