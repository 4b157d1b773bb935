"""Conversations that keep their cache: each turn is that of one long prompt, whatever is cut off, refused or broken."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minivlm import VLM, Conversation, Sampling, Stream, UserError
from minivlm.generation import generate
from minivlm.inputs.images import load_image
from minivlm.inputs.processor import ModelInputs
from vlm_helpers import SETTINGS, endless_vlm, generated


def finished(stream: Stream) -> Stream:
    """The stream, read to its end."""
    for _ in stream:
        pass
    return stream


def turn_ids(vlm: VLM, messages: list[dict], message: dict, images: list[Path]) -> torch.Tensor:
    """The token ids of a turn, which follow the answer to the turn before."""
    if not messages:
        return vlm.processor([vlm.processor.render([message])], [images]).input_ids[0]
    text = vlm.processor.next_turn(messages, message)
    return vlm.processor([text], [images], continues=True).input_ids[0]


def joined(vlm: VLM, messages: list[dict], images: list[list[Path]], answers: list[list[int]]) -> ModelInputs:
    """A conversation, given the images of each turn, as a single prompt: the answers as their tokens, up to the last
    question."""
    ids, is_vision = [], []
    for i, new_images in enumerate(images):
        turn = turn_ids(vlm, messages[: 2 * i], messages[2 * i], new_images)
        answer = torch.tensor(answers[i] if i < len(answers) else [], dtype=torch.int64)
        ids += [turn, answer]
        is_vision += [turn == vlm.config.image_token_index, torch.zeros(len(answer), dtype=torch.bool)]
    loaded = [load_image(path) for group in images for path in group]
    return ModelInputs.of_rows([torch.cat(ids)], [torch.cat(is_vision)], *vlm.processor.pixels(loaded))


@pytest.mark.parametrize("family", ["llava-1.5", "next-mistral", "next-llama3"])
def test_a_conversation_is_one_long_prompt(tmp_path, family, pages):
    """With the full cache, each answer is that to a single prompt: all ids so far, earlier answers as generated."""
    vlm, sampling = endless_vlm(tmp_path, family), Sampling(10)
    conversation = vlm.chat(sampling=sampling)
    messages: list[dict] = []
    ids = torch.zeros(0, dtype=torch.int64)
    images: list[Path] = []
    for prompt, new_images in (("First?", pages[:1]), ("Second?", []), ("Now <image> too?", pages[1:])):
        answer = finished(conversation.ask(prompt, new_images)).answer
        message = vlm.processor.user_message(prompt, len(new_images))
        new_ids = turn_ids(vlm, messages, message, new_images)
        ids = torch.cat((ids, new_ids))
        images = images + new_images
        joint = vlm.processor([vlm.processor.question("x", len(images))], [images])  # for its pixels alone
        mask = ids == vlm.config.image_token_index
        inputs = ModelInputs.of_rows([ids], [mask], joint.pixel_values, joint.image_sizes)
        assert answer.token_ids == generated(vlm, inputs, sampling)
        unfed = 1 if messages else 0  # the last token of the previous answer
        assert answer.stats.prompt_tokens == len(new_ids) + unfed
        assert answer.stats.vision_tokens == int((new_ids == vlm.config.image_token_index).sum())
        ids = torch.cat((ids, torch.tensor(answer.token_ids)))
        messages = [*messages, message, {"role": "assistant", "content": answer.text}]
    assert conversation.messages == messages[:-1]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_refused_turn_leaves_no_trace(pages, name, tmp_path):
    vlm = endless_vlm(tmp_path, max_position_embeddings=400)

    def answers(before_each_turn: Callable[[Conversation], None]) -> list[list[int]]:
        conversation = vlm.chat(sampling=Sampling(8), settings=SETTINGS[name])
        tokens = []
        for prompt, images in (("One?", pages[:1]), ("Two?", []), ("Three?", pages[1:])):
            before_each_turn(conversation)
            tokens.append(finished(conversation.ask(prompt, images)).answer.token_ids)
        return tokens

    def ask_what_is_refused(conversation: Conversation) -> None:
        for prompt, images in (
            ("<image>", []),
            ("?", [tmp_path / "none"]),
            ("long " * 390, []),
            ("long " * 3000, []),
            ("\udcff", []),
        ):
            with pytest.raises(UserError):
                conversation.ask(prompt, images)

    assert answers(ask_what_is_refused) == answers(lambda conversation: None)


def test_a_full_context_says_so(tmp_path):
    conversation = endless_vlm(tmp_path, max_position_embeddings=64).chat(sampling=Sampling(8))
    finished(conversation.ask("Hi?"))
    complaint = "the conversation is 29 tokens long and this turn takes 59, the model's context is 64"
    with pytest.raises(UserError, match=re.escape(complaint)):
        conversation.ask("long " * 8)
    finished(conversation.ask("Ok?"))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("read", [0, 1, 4])
def test_a_conversation_goes_on_after_an_answer_that_was_cut(vlm, pages, name, read):
    """An answer of which only `read` tokens were read counts as one of that many."""
    answers = []
    for max_new_tokens in (8, max(read, 1)):
        conversation = vlm.chat(sampling=Sampling(max_new_tokens), settings=SETTINGS[name])
        tokens = iter(conversation.ask("One?", pages[:1]).generation)
        for _ in range(read):
            next(tokens)
        conversation.sampling = Sampling(8)
        answers.append(finished(conversation.ask("Two?")).answer)
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].stats.prompt_tokens == answers[1].stats.prompt_tokens


def raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("where", ["prefill", "decode"])
def test_a_conversation_survives_an_interruption_at_any_moment(vlm, pages, monkeypatch, name, where):
    """After an exception within a layer the cache is half changed: the next turn computes all tokens anew."""
    settings = SETTINGS[name]
    conversation = vlm.chat(sampling=Sampling(6), settings=settings)
    answers = [finished(conversation.ask("One?", pages[:1])).answer.token_ids]
    images = [pages[:1], []]  # of the turns that are remembered
    mlp = vlm.model.language_model.layers[1].mlp

    def interrupt(call: Callable[[], object]) -> None:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(mlp, "forward", raise_interrupt)
            call()

    if where == "prefill":
        interrupt(lambda: conversation.ask("Two?", pages[1:]))
    else:
        tokens = iter(conversation.ask("Two?", pages[1:]).generation)
        answers.append([next(tokens)[0], next(tokens)[0]])
        images.insert(1, pages[1:])
        interrupt(lambda: next(tokens))
    last = finished(conversation.ask("Three?")).answer

    messages = conversation.messages
    assert [message["role"] for message in messages] == ["user", "assistant"] * len(answers) + ["user"]
    assert [message["content"] for message in messages[1::2]] == [vlm.processor.decode(tokens) for tokens in answers]
    assert len(conversation.images) == len(answers)
    whole = joined(vlm, messages, images, answers)
    expected = vlm.generate(whole, vlm.new_cache(settings), Sampling(6))
    assert last.token_ids == [token for (token,) in expected]
    assert last.stats.prompt_tokens == len(whole.input_ids[0])


def say(monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> None:
    """Let the next answer be these tokens."""
    left = iter(tokens)
    monkeypatch.setattr(generate, "choose_token", lambda logits, *_: torch.tensor([next(left)]))


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("name", ["full", "avl"])
@pytest.mark.parametrize("answer", ["<image>", "x<image>", "<image>x<image>", "written"])
def test_an_answer_may_hold_an_image_token(vlm, pages, monkeypatch, answer, name, interrupted):
    """Generated, it stands for no image, whether the cache holds it or not; nor does an answer that spells it."""
    tokenizer, settings = vlm.processor.tokenizer, SETTINGS[name]
    tokens = tokenizer.encode(answer, add_special_tokens=False).ids
    assert vlm.config.image_token_index in tokens or answer == "written"
    if answer == "written":
        tokens = [tokenizer.token_to_id(character) for character in "<image>"]
        assert None not in tokens and "<image>" in vlm.processor.decode(tokens)
    conversation = vlm.chat(sampling=Sampling(len(tokens)), settings=settings)
    with monkeypatch.context() as patch:
        say(patch, tokens)
        assert finished(conversation.ask("One?", pages[:1])).answer.token_ids == tokens
    conversation.sampling = Sampling(6)
    if interrupted:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(vlm.model.language_model.layers[1].mlp, "forward", raise_interrupt)
            conversation.ask("Lost?")
    second = finished(conversation.ask("Two?", pages[1:])).answer
    third = finished(conversation.ask("Three?")).answer
    assert third.stats.vision_tokens == 0
    if name == "full":  # under a policy, turns evict one after the other
        images = [pages[:1], pages[1:], []]
        for turns, ours in ((2, second), (3, third)):
            answers = [tokens, second.token_ids][: turns - 1]
            whole = joined(vlm, conversation.messages[: 2 * turns - 1], images[:turns], answers)
            assert ours.token_ids == generated(vlm, whole, Sampling(6))


def test_a_user_may_write_anything(vlm, pages):
    """Also what stands for an answer where the processor looks for the end of one."""
    conversation = vlm.chat(sampling=Sampling(3))
    for text in ("\ue000minivlm-answer\ue001", "</s>", "\0", "[INST]<s>", " ", "x" * 200):
        for _ in range(2):
            assert len(finished(conversation.ask(text)).answer.token_ids) == 3
