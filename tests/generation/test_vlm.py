"""The public API: answers, batches, streams, sampling, end tokens, and conversations that keep their cache."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
from PIL import Image

import tiny
import weights
from cli_helpers import write_pages
from minivlm import VLM, Answer, CacheSettings, Request, Sampling, UserError
from minivlm.cache.policies import preset
from minivlm.generation.generate import Generation
from minivlm.generation.sampling import choose_token
from minivlm.inputs.processor import ModelInputs
from policies import needs_compiler

QUESTION = "What is this?"
AVL = preset("avl", text=True, text_init_cache=4)
SETTINGS = {
    "full": CacheSettings(),
    "avl": AVL,
    "h2o": preset("h2o"),
    "fastv": preset("fastv"),
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> list[Path]:
    return write_pages(tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="module")
def vlm(tmp_path_factory) -> VLM:
    """It never ends an answer by itself."""
    return endless(tmp_path_factory.mktemp("model"))


def endless(folder: Path, family: str = "next-vicuna", **text: object) -> VLM:
    tiny.write(folder, family, text_config={"num_hidden_layers": 3, "eos_token_id": tiny.VOCAB, **text})
    tiny.dump(folder / "generation_config.json", {})
    return weights.load(folder, device="cpu")


def generated(vlm: VLM, inputs: ModelInputs, sampling: Sampling) -> list[int]:
    """What a fresh full cache makes of model inputs: no text, no conversation."""
    generation = vlm.generate(inputs, vlm.new_cache(CacheSettings()), sampling)
    return [token for (token,) in generation]


def said(answer: Answer) -> tuple:
    return answer.text, answer.token_ids, answer.finish


# Compiled


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", ["full", "avl"])
def test_compiled_answers_are_the_same_and_nothing_compiles_twice(vlm, pages, name):
    """Answers and conversations about one page, then about another one: no graph is added."""
    torch._dynamo.reset()
    compiled = VLM(vlm.model, vlm.processor, compiled=True)
    counters, graphs = torch._dynamo.utils.counters, []
    options = dict(sampling=Sampling(12), settings=SETTINGS[name])
    counters.clear()
    for page in (pages[0], Image.open(pages[0]).rotate(180)):
        assert said(compiled.ask(QUESTION, [page], **options)) == said(vlm.ask(QUESTION, [page], **options))
        chats = [model.chat(**options) for model in (compiled, vlm)]
        for question, images in ((QUESTION, [page]), ("And what is that?", [])):
            streams = [chat.ask(question, images) for chat in chats]
            texts = ["".join(stream) for stream in streams]
            assert texts[0] == texts[1] and len(streams[0].answer.token_ids) == 12
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 2 and not counters["graph_break"]
    torch._dynamo.reset()


# Answers


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_answer_is_greedy_over_the_processors_inputs(tmp_path, family, pages):
    vlm = endless(tmp_path, family)
    inputs = vlm.processor([vlm.processor.question(QUESTION, 2)], [pages])
    tokens = generated(vlm, inputs, Sampling(12))
    answer = vlm.ask(QUESTION, pages, sampling=Sampling(12))
    assert said(answer) == (vlm.processor.decode(tokens), tokens, "length")
    assert said(vlm.ask(QUESTION, [Image.open(page) for page in pages], sampling=Sampling(12))) == said(answer)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_batch_answers_as_its_questions_alone(vlm, pages, name):
    requests = [
        Request(QUESTION, pages[:1]),
        Request("And without?"),
        Request("<image> or <image>, which one is it?", pages),
    ]
    sampling, settings = Sampling(14), SETTINGS[name]
    batch = vlm.ask_batch(requests, sampling=sampling, settings=settings)
    for request, answer in zip(requests, batch):
        assert said(vlm.ask(request.prompt, request.images, sampling=sampling, settings=settings)) == said(answer)
    again = vlm.ask_batch(requests, sampling=sampling, settings=settings)  # in the buffers of the batch before
    assert list(map(said, again)) == list(map(said, batch))
    assert again[0].stats.live_bytes == batch[0].stats.live_bytes


def test_settings_change_answers_and_bytes(vlm, pages):
    full, half = (vlm.ask(QUESTION, pages, sampling=Sampling(14), settings=SETTINGS[name]) for name in ("full", "avl"))
    assert full.token_ids != half.token_ids
    assert full.stats.live_bytes == full.stats.full_bytes == half.stats.full_bytes > half.stats.live_bytes
    assert full.stats.entries_attended_per_step["vision core"] > half.stats.entries_attended_per_step["vision core"]


def test_statistics_of_a_batch(vlm, pages):
    prompts = [vlm.processor([vlm.processor.question(QUESTION, n)], [pages[:n]]) for n in (0, 2)]
    answers = vlm.ask_batch([Request(QUESTION), Request(QUESTION, pages)], sampling=Sampling(5))
    stats, tokens = answers[0].stats, sum(int(inputs.lengths[0]) for inputs in prompts)
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
    free = endless(tmp_path / "free").ask(QUESTION, sampling=Sampling(30)).token_ids
    ends = sorted({free[9], free[21]})
    folder = tiny.write(
        tmp_path / "model", text_config={"num_hidden_layers": 3, "eos_token_id": ends if where == "config" else ends[0]}
    )
    tiny.dump(
        folder / "generation_config.json",
        {} if where == "config" else {"eos_token_id": ends if where != "both" else ends[1]},
    )
    vlm = weights.load(folder, device="cpu")
    answer = vlm.ask(QUESTION, sampling=Sampling(30))
    first = min(free.index(end) for end in ends)
    assert (answer.token_ids, answer.finish) == (free[: first + 1], "stop")
    assert vlm.ask(QUESTION, sampling=Sampling(30, ignore_eos=True)).token_ids == free
    rows = vlm.ask_batch([Request("Something longer than that?"), Request(QUESTION)], sampling=Sampling(30))
    assert rows[1].token_ids == answer.token_ids


def test_an_answer_ends_with_the_context(tmp_path):
    vlm = endless(tmp_path, max_position_embeddings=40)
    length = int(vlm.processor([vlm.processor.question(QUESTION)], [[]]).lengths[0])
    answer = vlm.ask(QUESTION, sampling=Sampling(100))
    assert (len(answer.token_ids), answer.finish) == (40 - length + 1, "length")  # the last one is never fed
    short = vlm.ask(QUESTION, sampling=Sampling(4))
    assert short.token_ids == answer.token_ids[:4]


def test_what_cannot_be_asked(vlm, pages, tmp_path):
    for call, text in (
        (lambda: vlm.ask_batch([]), "no requests"),
        (lambda: vlm.ask("<image>?"), "1 <image> placeholders for 0 images"),
        (lambda: vlm.ask("long " * 3000), "the model's context is 2048"),
        (lambda: vlm.ask("\udcff"), "not valid Unicode"),
        (lambda: vlm.ask(QUESTION, [tmp_path / "none.png"]), "none.png: no such file"),
        (lambda: vlm.ask(QUESTION, settings=preset("fastv", filter_layer=4)), "the model has 3 layers"),
        (lambda: vlm.image_features(torch.zeros(1, 3, 56, 56), [(56, 56)]), "pixel_values have shape [1, 3, 56, 56]"),
    ):
        with pytest.raises(UserError, match=text.replace("[", r"\[")):
            call()
    assert vlm.ask(QUESTION, pages, sampling=Sampling(3)).token_ids  # and the next question is answered


# Sampling


def test_sampling_draws_from_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    for sampling, expected in (
        (Sampling(temperature=1.0), logits.softmax(-1)[0]),
        (Sampling(temperature=0.5), (2 * logits).softmax(-1)[0]),
        # .64 + .24 + .09 + .03: the second token is the one that crosses 0.7, and stays.
        (Sampling(temperature=1.0, top_p=0.7), torch.tensor([2.0, 1.0]).softmax(-1)),
    ):
        generator, count = torch.Generator().manual_seed(3), 4000
        drawn = choose_token(logits.expand(count, -1), sampling, [generator] * count).bincount(minlength=4) / count
        torch.testing.assert_close(drawn[: len(expected)], expected, atol=0.03, rtol=0)
        assert drawn[len(expected) :].sum() == 0


def test_a_sampled_answer_goes_by_its_seed_and_number(vlm, pages):
    sampling = Sampling(16, temperature=1.2, seed=5)
    requests = [Request(QUESTION, pages[:1], sample=sample) for sample in (3, 1, 3)]
    batch = [answer.token_ids for answer in vlm.ask_batch(requests, sampling=sampling)]
    assert batch[0] == batch[2] != batch[1]
    for request, tokens in zip(requests, batch):
        assert vlm.ask_batch([request], sampling=sampling)[0].token_ids == tokens
    assert vlm.ask_batch(requests[:1], sampling=Sampling(16, temperature=1.2, seed=6))[0].token_ids != batch[0]


def test_numbers_of_sampling_that_mean_nothing():
    for wrong in (
        dict(max_new_tokens=0),
        dict(temperature=-0.5),
        dict(temperature=float("nan")),
        dict(top_p=0.0),
        dict(top_p=1.1),
    ):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Sampling(**wrong)


# Streams


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_pieces_add_up_to_the_answer(tmp_path, family, pages):
    vlm = endless(tmp_path, family)
    for seed in range(3):
        sampling = Sampling(40, temperature=2.0, seed=seed)
        stream = vlm.stream(QUESTION, pages[:1], sampling=sampling)
        pieces = list(stream)
        assert len(pieces) > 5 and "" not in pieces
        assert "".join(pieces) == stream.answer.text == vlm.ask(QUESTION, pages[:1], sampling=sampling).text


def test_a_stream_that_is_left_early(vlm):
    whole = vlm.ask(QUESTION, sampling=Sampling(20)).token_ids
    stream = vlm.stream(QUESTION, sampling=Sampling(20))
    next(iter(stream))
    few = stream.answer.token_ids
    assert 0 < len(few) < 20 and whole[: len(few)] == few
    stopped = vlm.stream(QUESTION, sampling=Sampling(20))
    for _ in stopped:
        stopped.stop()
    assert stopped.answer.token_ids == few


# Conversations


def turn_ids(vlm: VLM, messages: list[dict], message: dict, images: list[Path]) -> torch.Tensor:
    """The ids of a later turn, behind the answer before it."""
    text = vlm.processor.next_turn(messages, message)
    return vlm.processor([text], [images], continues=True).input_ids[0]


@pytest.mark.parametrize("family", ["llava-1.5", "next-mistral", "next-llama3"])
def test_a_conversation_is_one_long_prompt(tmp_path, family, pages):
    """Under the full cache each turn's answer is that of one prompt: all ids so far, the answers as they were generated."""
    vlm, sampling = endless(tmp_path, family), Sampling(10)
    turns = [("First?", pages[:1]), ("Second?", []), ("Now <image> too?", pages[1:])]
    conversation, messages, ids, images = vlm.chat(sampling=sampling), [], torch.zeros(0, dtype=torch.int64), []
    for prompt, shown in turns:
        stream = conversation.ask(prompt, shown)
        list(stream)
        message = vlm.processor.user_message(prompt, len(shown))
        if messages:
            new = turn_ids(vlm, messages, message, shown)
        else:
            new = vlm.processor([vlm.processor.render([message])], [shown]).input_ids[0]
        ids, images = torch.cat((ids, new)), images + shown
        joint = vlm.processor([vlm.processor.question("x", len(images))], [images])  # for the pictures alone
        inputs = ModelInputs(ids[None], torch.tensor([len(ids)]), joint.pixel_values, joint.image_sizes)
        assert stream.answer.token_ids == generated(vlm, inputs, sampling)
        unfed = 1 if messages else 0  # the last token of the answer before
        assert stream.answer.stats.prompt_tokens == len(new) + unfed
        assert stream.answer.stats.vision_tokens == int((new == vlm.config.image_token_index).sum())
        ids = torch.cat((ids, torch.tensor(stream.answer.token_ids)))
        messages = [*messages, message, {"role": "assistant", "content": stream.answer.text}]
    assert conversation.messages == messages[:-1]


def dialogue(
    vlm: VLM, settings: CacheSettings, *turns: tuple, upset=lambda turn, conversation: None
) -> list[list[int]]:
    conversation, tokens = vlm.chat(sampling=Sampling(8), settings=settings), []
    for number, (prompt, images) in enumerate(turns):
        upset(number, conversation)
        stream = conversation.ask(prompt, images)
        list(stream)
        tokens.append(stream.answer.token_ids)
    return tokens


@pytest.mark.parametrize("name", SETTINGS)
def test_a_refused_turn_leaves_no_trace(vlm, pages, name, tmp_path):
    turns = [("One?", pages[:1]), ("Two?", []), ("Three?", pages[1:])]

    def upset(number: int, conversation) -> None:
        for prompt, images in (
            ("<image>", []),
            ("?", [tmp_path / "none"]),
            ("long " * 390, []),
            ("long " * 3000, []),
            ("\udcff", []),
        ):
            with pytest.raises(UserError):
                conversation.ask(prompt, images)

    short = endless(tmp_path, max_position_embeddings=400)
    assert dialogue(short, SETTINGS[name], *turns, upset=upset) == dialogue(short, SETTINGS[name], *turns)


def test_a_full_context_says_so(tmp_path):
    vlm = endless(tmp_path, max_position_embeddings=64)
    conversation = vlm.chat(sampling=Sampling(8))
    list(conversation.ask("Hi?"))
    with pytest.raises(
        UserError, match=r"the conversation is 29 tokens long and this turn takes 59, the model's context is 64"
    ):
        conversation.ask("long " * 8)
    list(conversation.ask("Ok?"))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("read", [0, 1, 4])
def test_a_conversation_goes_on_behind_an_answer_that_was_cut(vlm, pages, name, read):
    """Turned away from after `read` tokens, an answer counts as one of that many."""
    conversations = []
    for length in (8, max(read, 1)):
        conversation = vlm.chat(sampling=Sampling(length), settings=SETTINGS[name])
        stream = conversation.ask("One?", pages[:1])
        for _, _ in zip(range(read), stream.generation):
            pass
        conversation.sampling = Sampling(8)
        second = conversation.ask("Two?")
        list(second)
        conversations.append(second.answer)
    assert conversations[0].token_ids == conversations[1].token_ids
    assert conversations[0].stats.prompt_tokens == conversations[1].stats.prompt_tokens


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("where", ["prefill", "decode"])
def test_a_conversation_survives_an_interruption_at_any_moment(vlm, pages, monkeypatch, name, where):
    """An exception within a layer leaves the cache torn: then the conversation is computed anew, from its text."""
    settings = SETTINGS[name]
    conversation = vlm.chat(sampling=Sampling(6), settings=settings)
    list(conversation.ask("One?", pages[:1]))
    mlp, heard = vlm.model.language_model.layers[1].mlp, []

    def interrupted(call) -> None:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(mlp, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            call()

    if where == "prefill":
        interrupted(lambda: conversation.ask("Two?", pages[1:]))
    else:
        stream = conversation.ask("Two?", pages[1:])
        tokens = iter(stream.generation)
        heard = [next(tokens)[0], next(tokens)[0]]
        interrupted(lambda: next(tokens))
    last = conversation.ask("Three?")
    list(last)

    fresh = vlm.chat(sampling=Sampling(6), settings=settings)
    fresh.messages, fresh.images = conversation.messages[:-1], conversation.images
    expected = fresh.ask("Three?")
    list(expected)
    assert last.answer.token_ids == expected.answer.token_ids
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * (2 if heard else 1) + [
        "user"
    ]
    if heard:
        assert conversation.messages[3]["content"] == vlm.processor.decode(heard)
    assert len(conversation.images) == (2 if heard else 1)


def test_an_answer_takes_tokens_and_no_text(vlm):
    """A `Generation` is told ids and yields ids: text is the stream's."""
    generation = Generation(
        vlm.model,
        vlm.new_cache(CacheSettings(), [0, 1]),
        [torch.tensor([1, 5, 9]), torch.tensor([1, 7])],
        [],
        Sampling(3),
    )
    steps = list(generation)
    assert [len(step) for step in steps] == [2, 2, 2] and generation.tokens == [list(row) for row in zip(*steps)]
    assert generation.unfed(0) == generation.tokens[0][-1:]
