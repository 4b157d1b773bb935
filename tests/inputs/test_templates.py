"""Chat templates: the text of transformers' apply_chat_template, the built-in ones, and messages that are refused."""

import json

import pytest

from chat_templates import CONVERSATIONS, PARTS, SPECIAL, SYSTEM, answer, template, user
from minivlm.errors import UserError
from minivlm.inputs.processor import Processor
from minivlm.inputs.templates import BUILT_IN, built_in
from minivlm.model.config import VLMConfig
from text_checkpoints import edit_json, write_checkpoint

HELPERS = (
    "{{ bos_token }}{% set ns = namespace(turns=0, last='') %}\n"
    "{% for message in messages %}\n"
    "    {% set ns.turns = ns.turns + 1 %}\n"
    "    {% if message.role == 'system' %}{% continue %}{% endif %}\n"
    "    {% if message.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('bad role ' ~ message.role) }}{% endif %}\n"
    "<{{ message.role }} {{ ns.turns }}>{{ {'é': '<&>'} | tojson }}{{ [1, 2] | tojson(indent=1) }}\n"
    "    {% for part in message.content %}\n"
    "        {%- if part.type == 'image' %}<image>{% else %}[{{ part.text | trim }}]{% endif %}\n"
    "    {% endfor %}\n"
    "{% endfor %}\n"
    "{{ strftime_now('%Y') }} {{ dict(a=1, b='é<').items() | list }} {{ undefined_name }}|\n"
    "{{ 'no tools' if tools is none and not documents }}\n"
)
TEXTS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("source", [PARTS, HELPERS], ids=["parts", "helpers"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("generate", [True, False])
def test_rendering_is_that_of_transformers(source, conversation, generate):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    expected, _ = utils.render_jinja_template(
        [conversation], chat_template=source, add_generation_prompt=generate, **SPECIAL
    )
    assert template(source).render(conversation, generate) == expected[0]


def test_templates_of_text_models_get_texts():
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    turns = [("user", "<image>\nWhat?"), ("assistant", "This."), ("user", "Why?")]
    flat = [{"role": role, "content": text} for role, text in turns]
    expected, _ = utils.render_jinja_template([flat], chat_template=TEXTS, add_generation_prompt=True, **SPECIAL)
    assert template(TEXTS).render([user("<image>", "What?"), answer("This."), user("Why?")]) == expected[0]
    assert template(TEXTS).render(flat) == expected[0]


def test_a_text_may_say_where_the_images_stand(tmp_path):
    processor = Processor.from_folder(tmp_path, write_checkpoint(tmp_path, "llama"))
    assert processor.question("look: <image> what?", 1).endswith("USER: look: <image> what? ASSISTANT:")
    assert processor.question("what?", 2).endswith("USER: <image>\n<image>\nwhat? ASSISTANT:")
    assert processor.question("what?").endswith("human's questions. USER: what? ASSISTANT:")
    history = [processor.user_message("what?", 1), {"role": "assistant", "content": "that"}]
    assert processor.question("why?", history=history).endswith(
        "USER: <image>\nwhat? ASSISTANT: that</s>USER: why? ASSISTANT:"
    )


VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)
BUILT = {
    "llava-1.5": ("USER: <image>\n{q} ASSISTANT:", "{a}</s>USER: {q} ASSISTANT:"),
    "vicuna": (VICUNA + "USER: <image>\n{q} ASSISTANT:", "{a}</s>USER: {q} ASSISTANT:"),
    "mistral": ("[INST] <image>\n{q} [/INST]", "{a}</s>[INST] {q} [/INST]"),
    "chatml": (
        "<|im_start|>system\nAnswer the questions.<|im_end|>"
        "<|im_start|>user\n<image>\n{q}<|im_end|><|im_start|>assistant\n",
        "{a}<|im_end|><|im_start|>user\n{q}<|im_end|><|im_start|>assistant\n",
    ),
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\n{q}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "{a}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{q}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates(name):
    first, later = BUILT[name]
    made = template(BUILT_IN[name])
    assert made.render([user("<image>", "What?")]) == first.format(q="What?")
    whole = made.render([user("<image>", "What?"), answer("This."), user("Why?")])
    assert whole.startswith(first.format(q="What?")) and whole.endswith(later.format(a="This.", q="Why?"))
    if name != "mistral":
        assert "Be brief." in made.render([SYSTEM, user("What?")])


def test_a_system_message_replaces_the_default_one():
    assert template(BUILT_IN["vicuna"]).render([SYSTEM, user("Why?")]) == "Be brief. USER: Why? ASSISTANT:"
    chatml = template(BUILT_IN["chatml"]).render([SYSTEM, user("Why?")])
    assert chatml.startswith("<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\n")
    with pytest.raises(UserError, match="no role system"):
        template(BUILT_IN["mistral"]).render([SYSTEM, user("Why?")])


@pytest.mark.parametrize(
    "family, decoder, token, name",
    [
        ("llava", "llama", "<|im_start|>", "llava-1.5"),
        ("llava_next", "llama", "<s>", "vicuna"),
        ("llava_next", "mistral", "<s>", "mistral"),
        ("llava_next", "llama", "<|im_start|>", "chatml"),
        ("llava_next", "llama", "<|start_header_id|>", "llama3"),
    ],
)
def test_choice_of_the_built_in_template(family, decoder, token, name):
    vision = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
    text = {"model_type": decoder, "vocab_size": 32064}
    config = VLMConfig.from_dict({"model_type": family, "text_config": text, "vision_config": vision})
    assert built_in(config, {token: 3}) == name


FILES = ["processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json"]


@pytest.mark.parametrize("present", range(1, 16))
def test_the_checkpoint_s_own_template_wins(tmp_path, present):
    """Each file alone and all together: the order is the one in which transformers looks."""
    config = write_checkpoint(tmp_path, "llama")
    for i, name in enumerate(FILES):
        if present >> i & 1:
            parts = "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}"
            source = "{% for m in messages %}" + parts + "{% endfor %} " + name
            if name.endswith(".jinja"):
                (tmp_path / name).write_text(source)
            else:
                edit_json(tmp_path / name, chat_template=source)
    rendered = Processor.from_folder(tmp_path, config).question("What?", 1)
    expected = next(name for i, name in enumerate(FILES) if present >> i & 1)
    assert rendered == f"<image>What? {expected}"
    if present != 8:  # transformers' processor does not look into tokenizer_config.json
        transformers = pytest.importorskip("transformers")
        reference = transformers.AutoProcessor.from_pretrained(tmp_path)
        assert reference.apply_chat_template([user("<image>", "What?")]) == rendered


def test_named_templates(tmp_path):
    config = write_checkpoint(tmp_path, "llama")
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": PARTS}]
    edit_json(tmp_path / "tokenizer_config.json", chat_template=named)
    assert Processor.from_folder(tmp_path, config).question("What?", 1) == "USER: <image>\nWhat? ASSISTANT:"
    edit_json(tmp_path / "tokenizer_config.json", chat_template=named[:1])
    with pytest.raises(UserError, match="tokenizer_config.json: chat_template"):
        Processor.from_folder(tmp_path, config)


def test_special_tokens_are_variables(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = write_checkpoint(tmp_path, "llama")
    source = PARTS + "{{ bos_token ~ eos_token ~ unk_token ~ pad_token }}"
    (tmp_path / "chat_template.jinja").write_text(source)
    padding = {"content": "<unk>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    edit_json(tmp_path / "tokenizer_config.json", pad_token={"__type": "AddedToken", **padding})
    reference = transformers.AutoProcessor.from_pretrained(tmp_path)
    expected = reference.apply_chat_template([user("<image>", "What?")], add_generation_prompt=True)
    assert Processor.from_folder(tmp_path, config).question("What?", 1) == expected
    assert expected.endswith("<s></s><unk><unk>")


@pytest.mark.parametrize(
    "message",
    [
        "text",
        {"role": "user"},
        {"content": "x"},
        {"role": 3, "content": "x"},
        {"role": "user", "content": [{"type": "video"}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": ["x"]},
    ],
)
def test_messages_that_are_refused(message):
    with pytest.raises(UserError, match="message"):
        template(PARTS).render([message])


def test_only_plain_data_reaches_a_template():
    class Loud(str):
        def upper(self):
            raise AssertionError("called from a template")

    parts = [{"type": "image", "image": object()}, {"type": "text", "text": Loud("hi"), "extra": open}]
    assert template(PARTS).render([{"role": Loud("user"), "content": parts}]) == "USER: <image>\nhi ASSISTANT:"


def test_an_unreadable_template_file(tmp_path):
    config = write_checkpoint(tmp_path, "llama")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="chat_template.jinja"):
        Processor.from_folder(tmp_path, config)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"template": "x"}))
    with pytest.raises(UserError, match="chat_template.json"):
        Processor.from_folder(tmp_path, config)
