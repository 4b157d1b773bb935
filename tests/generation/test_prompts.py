"""Prompts that a user may write: each is answered, or refused in one line before anything is computed."""

from __future__ import annotations

import pytest

from minivlm import VLM, Request, Sampling, UserError


@pytest.mark.parametrize(
    "prompt", ["", " ", "\n", "\0", "\0" * 500, "</s>", "<s><s>", "<unk>", "[INST]", "\u202e", "😀"]
)
def test_odd_prompts_are_answered(vlm, pages, prompt):
    for images in ([], pages[:1]):
        assert len(vlm.ask(prompt, images, sampling=Sampling(2)).token_ids) == 2


def test_images_alone(vlm, pages):
    for prompt in ("<image>", "<image>\n", "\n<image>"):
        assert vlm.ask(prompt, pages[:1], sampling=Sampling(2)).stats.vision_tokens > 0
    assert vlm.ask("<image><image>", pages, sampling=Sampling(2)).stats.vision_tokens > 0


REFUSED = [
    ("<image>", 0, "the prompt has 1 <image> placeholders for 0 images"),
    ("<image><image>", 1, "the prompt has 2 <image> placeholders for 1 images"),
    ("What is <image>?", 2, "the prompt has 1 <image> placeholders for 2 images"),
    ("\udcff", 0, "the prompt is not valid Unicode (character 1)"),
    ("ab\ud800c", 1, "the prompt is not valid Unicode (character 3)"),
    ("long " * 700, 0, "tokens, the model's context is 2048"),
    ("x" * 10_000_000, 0, "the prompt has 10000000 characters, the model's context is 2048 tokens"),
    ("<image>" * 2_000_000, 1, "the prompt has 14000000 characters, the model's context is 2048 tokens"),
    ("\udcff" * 10_000_000, 0, "the prompt has 10000000 characters"),
]


@pytest.mark.parametrize("prompt, images, said", REFUSED, ids=[said for *_, said in REFUSED])
def test_prompts_that_are_refused(vlm, pages, monkeypatch, prompt, images, said):
    def must_not_run(*_: object) -> None:
        raise AssertionError("the model runs")

    monkeypatch.setattr(VLM, "generate", must_not_run)
    conversation = vlm.chat()
    for ask in (vlm.ask, vlm.stream, conversation.ask):
        with pytest.raises(UserError) as caught:
            ask(prompt, pages[:images])
        assert said in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError):
        vlm.ask_batch([Request("x"), Request(prompt, pages[:images])])
    with pytest.raises(UserError):  # already rendered
        vlm.processor([prompt], [pages[:images]])


def test_a_prompt_that_cannot_fit_is_not_even_encoded(vlm, monkeypatch):
    longest = max(map(len, vlm.processor.tokenizer.get_vocab()))
    most = vlm.config.text.context_length * longest
    with pytest.raises(UserError, match="the prompt takes"):
        vlm.processor(["x" * most], [[]])
    monkeypatch.setattr(vlm.processor, "tokenizer", None)
    with pytest.raises(UserError, match=f"the prompt has {most + 1} characters"):
        vlm.processor(["x" * (most + 1)], [[]])
    with pytest.raises(UserError, match=f"the prompt has {most + 1} characters"):
        vlm.processor.user_message("x" * (most + 1))
