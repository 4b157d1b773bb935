"""Chat templates turn messages into the text of a prompt.

A template is Jinja source, as Hugging Face writes it. A checkpoint's own template is used if it has
one, and one of the built-in templates below if not. Templates may use the helpers of transformers'
`apply_chat_template`: `raise_exception`, `strftime_now`, `tojson`, loop controls, and the
`generation` tag, which marks answers for training and renders as its body.

A template comes with a checkpoint from the internet, so it is not trusted. It is rendered in a
sandbox that cannot reach Python's internals and that limits the number of steps, the length of the
text and the size of products.

Templates disagree on what `message.content` is. Those of processors expect a list of parts,
`{"type": "image"}` and `{"type": "text", "text": ...}`; those of text-only models expect a string.
Each template is tried once with an image to find out which one it expects.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Undefined, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from minivlm.errors import UserError
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
_MAX_CHARACTERS = 1 << 20  # of rendered text
_MAX_STEPS = 100_000  # passes through bodies of loops and macros in one rendering


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
        self._environment = _Sandbox()
        try:
            self._template = self._environment.from_string(_counted(source, self._environment))
        except Exception as error:  # a source that is not trusted can raise anything
            raise self._failure(error) from None
        self._wants_parts = self._probe()

    def render(self, messages: Sequence[Mapping], add_generation_prompt: bool = True) -> str:
        """The prompt of messages `{"role": ..., "content": str or list of parts}`.

        Raises `UserError` for a malformed message, and if the template fails.
        """
        return self._render([_checked(message) for message in messages], self._wants_parts, add_generation_prompt)

    def _probe(self) -> bool:
        """Whether the template expects a list of parts as content."""
        word = "minivlm"
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": word}]}
        for wants_parts in (True, False):
            try:
                text = self._render([message], wants_parts, True)
            except UserError as error:
                failure = error
                continue
            if text.count(self._image_token) == 1 and text.count(word) == 1:
                return wants_parts
            failure = UserError(f"{self._name}: the chat template does not render an image and a text")
        raise failure

    def _render(self, messages: Sequence[Mapping], wants_parts: bool, add_generation_prompt: bool) -> str:
        if not wants_parts:
            messages = [{**message, "content": self._as_text(message["content"])} for message in messages]
        variables = {
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._variables,
        }
        pieces: list[str] = []
        length = 0
        self._environment.steps_left = _MAX_STEPS
        try:
            for piece in self._template.generate(messages=messages, **variables):
                pieces.append(piece)
                length += len(piece)
                if length > _MAX_CHARACTERS:
                    raise SecurityError(f"it renders more than {_MAX_CHARACTERS} characters")
        except Exception as error:  # a template can make its helpers raise anything
            raise self._failure(error) from None
        return "".join(pieces)

    def _as_text(self, parts: Sequence[Mapping]) -> str:
        """Parts as the string that a text-only template expects."""
        image = f"{self._image_token}\n"
        return "".join(image if part["type"] == "image" else part["text"] for part in parts)

    def _failure(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return UserError(f"{self._name}: the chat template fails: {reason}")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with Hugging Face's helpers and with limits on steps and products."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self.steps_left = 0
        self.filters["tojson"] = _tojson
        self.globals.update(raise_exception=_raise, strftime_now=_now, namespace=_Namespace, dict=_dict)

    def take_step(self) -> None:
        """Called on every pass through the body of a loop or macro; see `_counted`."""
        self.steps_left -= 1
        if self.steps_left < 0:
            raise SecurityError(f"it takes more than {_MAX_STEPS} steps")

    def unsafe_undefined(self, obj: object, attribute: str) -> Undefined:
        # In Jinja's own sandbox, an unsafe attribute renders as nothing and fails only when it is
        # used. Here the attempt is refused.
        raise SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__} is unsafe")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        # `'a' * 10**10` and `9 ** 9 ** 9` are short to write and exhaust memory.
        if operator == "**":
            raise SecurityError("** is not allowed")
        for many, few in ((left, right), (right, left)):
            if hasattr(many, "__len__") and isinstance(few, int) and len(many) * few > _MAX_CHARACTERS:
                raise SecurityError(f"a product is longer than {_MAX_CHARACTERS}")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` renders its body."""

    tags = {"generation"}  # noqa: RUF012  (Jinja declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Namespace(Namespace):
    """`namespace()` without underscore names, through which Python's internals could be reached."""

    def __init__(self, **attributes: object) -> None:
        super().__init__()
        for name, value in attributes.items():
            self[name] = value

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace may not have the attribute {name!r}")
        super().__setitem__(name, value)


def _counted(source: str, environment: _Sandbox) -> nodes.Template:
    """A parsed template, with a call of `take_step` at the beginning of each loop and macro body."""
    tree = environment.parse(source)
    bodies: list[nodes.For | nodes.Macro | nodes.CallBlock] = [
        *tree.find_all(nodes.For),
        *tree.find_all(nodes.Macro),
        *tree.find_all(nodes.CallBlock),
    ]
    for node in bodies:
        # The call goes through an attribute of the environment, because a template can redefine any
        # other name.
        call = nodes.Call(nodes.EnvironmentAttribute("take_step"), [], [], None, None)
        statement = nodes.ExprStmt(call, lineno=node.lineno)
        statement.set_environment(environment)
        node.body.insert(0, statement)
    return tree


def _raise(message: object) -> None:
    raise TemplateError(str(message))


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _dict(*args: object, **kwargs: object) -> dict:
    return dict(*args, **kwargs)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


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
