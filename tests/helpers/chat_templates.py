"""A template and conversations that several tests render."""

from __future__ import annotations

from minivlm.inputs.templates import ChatTemplate

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
# In the manner of the hub's LLaVA templates: images first, then texts; the generation tag around answers.
PARTS = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{# images #}{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% else %}{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def part(text: str) -> dict:
    return {"type": "image"} if text == "<image>" else {"type": "text", "text": text}


def user(*texts: str) -> dict:
    return {"role": "user", "content": [part(text) for text in texts]}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": [part(text)]}


SYSTEM = {"role": "system", "content": [part("Be brief.")]}
CONVERSATIONS = [
    [user("<image>", "What is it?")],
    [user("What is it?")],
    [SYSTEM, user("<image>", "<image>", "Which?"), answer("<b> & é."), user("Why?")],
    [user("one", "<image>", "two"), answer(" x "), user("", "<image>")],
]


def template(source: str, special: dict = SPECIAL) -> ChatTemplate:
    return ChatTemplate(source, "test.jinja", "<image>", special)
