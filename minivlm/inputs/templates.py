"""Chat templates turn messages into the text of a prompt.

A template is Jinja source, as Hugging Face writes it. A checkpoint's own template is used if it has
one, and one of the built-in templates below if not. Templates may use the helpers of transformers'
`apply_chat_template`: `raise_exception`, `strftime_now`, `tojson`, loop controls, and the
`generation` tag, which marks answers for training and renders as its body.

A template comes with a checkpoint from the internet, so it is not trusted. It is rendered in Jinja's
sandbox, which cannot reach Python's internals, and in a process whose time and memory are limited.
Only templates known to be harmless are rendered in this process, which saves starting another.

Templates disagree on what `message.content` is. Those of processors expect a list of parts,
`{"type": "image"}` and `{"type": "text", "text": ...}`; those of text-only models expect a string.
Each template is tried once with an image to find out which one it expects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from minivlm.errors import UserError, printable
from minivlm.inputs.template_process import ProcessEnded, TemplateProcess
from minivlm.inputs.template_sandbox import Template, TemplateFailure
from minivlm.model.config import VLMConfig

_VICUNA_TURNS = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}USER: {{ m.content }} "
    "{% elif m.role == 'assistant' %}ASSISTANT: {{ m.content }}{{ eos_token }}"
    "{% else %}{{ m.content }} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_VICUNA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)
BUILT_IN = {
    "llava-1.5": _VICUNA_TURNS,
    "vicuna": "{% if messages[0].role != 'system' %}" + _VICUNA_SYSTEM + "{% endif %}" + _VICUNA_TURNS,
    "mistral": (
        "{% for m in messages %}"
        "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
        "{% else %}{{ raise_exception('the mistral template has no role ' ~ m.role) }}{% endif %}"
        "{% endfor %}"
    ),
    "chatml": (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nAnswer the questions.<|im_end|>' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{% for m in messages %}"
        "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ m.content ~ '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
}
_MAX_SOURCE = 1 << 18  # characters; LLaVA's templates have about 1,000
# SHA-256 of the sources of checkpoints' templates that were read and found harmless. Those of the
# hub are as the source of OpenVINO GenAI quotes them, which compares a checkpoint's with them whole.
_HARMLESS = frozenset(
    {
        "29df85936b11d289257f81fba7f7f78346b63c7610263e2fc39d3a639210a45e",  # weights/demo
        "6fef09c05345e88b9f85e80bcb3491003332050750586568bdf91cfa81965d0c",  # llava-1.5-*-hf, llava-v1.6-vicuna-*-hf
        "ac1751256d0e7c19dcbac63d0feebee11bf81b86015276d08ee8b1f9ba0a42bc",  # llava-v1.6-mistral-7b-hf
    }
)


def built_in(config: VLMConfig, vocabulary: Mapping[str, int]) -> str:
    """The name of the built-in template for a checkpoint without a template.

    LLaVA-1.5 has one format. LLaVA-NeXT's depends on the decoder. Llama 3 and Yi-34B are known by
    the special tokens in their vocabulary and Mistral by its model type; any other is Vicuna.
    """
    if not config.is_next:
        return "llava-1.5"
    if "<|start_header_id|>" in vocabulary:
        return "llama3"
    if "<|im_start|>" in vocabulary:
        return "chatml"
    return "mistral" if config.text.model_type == "mistral" else "vicuna"


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str, name: str, image_token: str, special_tokens: Mapping[str, str]) -> None:
        """Compile a template.

        Messages to the user call it `name`. `special_tokens` (bos_token, ...) become its variables.
        Raises `UserError` if the template does not compile or does not render an image placeholder.
        """
        self._name = name
        self._image_token = image_token
        self._variables = dict(special_tokens)
        if len(source) > _MAX_SOURCE:
            raise UserError(
                f"{name}: the chat template has {len(source)} characters, at most {_MAX_SOURCE} are allowed"
            )
        self._template = Template(source) if _is_known(source) else TemplateProcess(source)
        self._wants_parts = self._probe()

    def render(self, messages: Sequence[Mapping], add_generation_prompt: bool = True) -> str:
        """The prompt of messages `{"role": ..., "content": str or list of parts}`.

        Raises `UserError` for a malformed message, and if the template fails.
        """
        try:
            return self._render([_checked(message) for message in messages], self._wants_parts, add_generation_prompt)
        except TemplateFailure as failure:
            raise self._in_words(failure) from None

    def _probe(self) -> bool:
        """Whether the template expects a list of parts as content."""
        word = "minivlm"
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": word}]}
        for wants_parts in (True, False):
            try:
                text = self._render([message], wants_parts, True)
            except TemplateFailure as failure:
                error = self._in_words(failure)
                if isinstance(failure, ProcessEnded):
                    break  # it would only take as long again
                continue
            if text.count(self._image_token) == 1 and text.count(word) == 1:
                return wants_parts
            error = UserError(f"{self._name}: the chat template does not render an image and a text")
        raise error

    def _render(self, messages: Sequence[Mapping], wants_parts: bool, add_generation_prompt: bool) -> str:
        if not wants_parts:
            messages = [{**message, "content": self._as_text(message["content"])} for message in messages]
        return self._template.render(
            {
                "messages": messages,
                "tools": None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                **self._variables,
            }
        )

    def _as_text(self, parts: Sequence[Mapping]) -> str:
        """Parts as the string that a text-only template expects."""
        image = f"{self._image_token}\n"
        return "".join(image if part["type"] == "image" else part["text"] for part in parts)

    def _in_words(self, failure: TemplateFailure) -> UserError:
        reason = printable(" ".join(str(failure).split()), 200)  # a template chooses the words
        return UserError(f"{self._name}: the chat template fails: {reason}")


def _is_known(source: str) -> bool:
    digest = hashlib.sha256(source.encode(errors="surrogatepass")).hexdigest()
    return source in BUILT_IN.values() or digest in _HARMLESS


def _checked(message: Mapping) -> dict:
    """A plain copy of a message, its content a list of parts. Nothing else reaches the template."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, (str, list)) or not isinstance(message.get("role"), str):
        raise UserError(f"a message needs a role and a content (text or a list of parts), got {message!r}")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    plain = []
    for part in parts:
        part_type = part.get("type") if isinstance(part, Mapping) else None
        if part_type == "image":
            plain.append({"type": "image"})
        elif part_type == "text" and isinstance(part.get("text"), str):
            plain.append({"type": "text", "text": str(part["text"])})
        else:
            expected = "{'type': 'image'} or {'type': 'text', 'text': ...}"
            raise UserError(f"a message's part must be {expected}, got {part!r}")
    return {"role": str(message["role"]), "content": plain}
