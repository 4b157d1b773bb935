"""Chat templates: messages -> prompt text, rendered in a sandbox because a template is untrusted input.

A checkpoint's own template (Jinja, as Hugging Face writes them) wins; the built-in ones below serve
checkpoints that have none.  The helpers a template may use are those of transformers'
`apply_chat_template`: `raise_exception`, `strftime_now`, `tojson`, loop controls, and the
`generation` tag, which marks answers for training and renders as its body.

Templates disagree on what `message.content` is: a list of parts (`{"type": "image"}`,
`{"type": "text", "text": ...}`), which the processors' templates expect, or a string, which templates
of text-only models expect.  Each template is tried once with an image to see which one it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime

from jinja2 import Undefined, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
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
_MAX_STEPS = 100_000  # passes through loop bodies and macros, in one rendering


def built_in(config: VLMConfig, vocabulary: Mapping[str, int]) -> str:
    """The name of the built-in template for a checkpoint without one.

    LLaVA-1.5 has one form.  LLaVA-NeXT goes by the decoder: Llama 3 and Yi-34B tokenizers own the special
    tokens of their templates, Mistral says so in its model type, and Vicuna is what is left.
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
        """`name` is the file it came from, for messages; `special_tokens` (bos_token, ...) become variables.

        Raises `UserError` if the template does not compile or renders no image placeholder.
        """
        self._name, self._image_token, self._variables = name, image_token, dict(special_tokens)
        try:
            environment = _Sandbox()
            self._template = environment.from_string(_counted(environment.parse(source)))
        except Exception as error:  # RecursionError and friends too: the source is untrusted
            raise self._failure(error) from None
        self._wants_parts = self._probe()

    def render(self, messages: Sequence[Mapping], add_generation_prompt: bool = True) -> str:
        """Messages `{"role": ..., "content": str or list of parts}` -> prompt; raises `UserError`."""
        return self._render([_checked(message) for message in messages], self._wants_parts, add_generation_prompt)

    def _probe(self) -> bool:
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
        variables = dict(tools=None, documents=None, add_generation_prompt=add_generation_prompt, **self._variables)
        pieces, length = [], 0
        self._template.environment.steps_left = _MAX_STEPS
        try:
            for piece in self._template.generate(messages=messages, **variables):
                pieces.append(piece)
                length += len(piece)
                if length > _MAX_CHARACTERS:
                    raise SecurityError(f"it renders more than {_MAX_CHARACTERS} characters")
        except Exception as error:  # whatever the template makes its helpers raise
            raise self._failure(error) from None
        return "".join(pieces)

    def _as_text(self, parts: Sequence[Mapping]) -> str:
        return "".join(f"{self._image_token}\n" if part["type"] == "image" else part["text"] for part in parts)

    def _failure(self, error: Exception) -> UserError:
        told = " ".join(str(error).split())[:200] or type(error).__name__
        return UserError(f"{self._name}: the chat template fails: {told}")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with the helpers of Hugging Face, a limited number of steps, and bounded products."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self.steps_left = 0
        self.filters["tojson"] = _tojson
        self.globals.update(raise_exception=_raise, strftime_now=_now, namespace=_Namespace, dict=_dict)

    def take_step(self) -> None:
        self.steps_left -= 1
        if self.steps_left < 0:
            raise SecurityError(f"it takes more than {_MAX_STEPS} steps")

    def unsafe_undefined(self, obj: object, attribute: str) -> Undefined:
        # Jinja's own renders as nothing and fails only when it is used: here the attempt is enough.
        raise SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__} is unsafe")

    def call_binop(self, context: object, operator: str, left: object, right: object) -> object:
        if operator == "**":
            raise SecurityError("** is not allowed")
        for many, few in ((left, right), (right, left)):
            if hasattr(many, "__len__") and isinstance(few, int) and len(many) * few > _MAX_CHARACTERS:
                raise SecurityError(f"a product is longer than {_MAX_CHARACTERS}")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    tags = {"generation"}

    def parse(self, parser: object) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Namespace(Namespace):
    """`namespace()` without the underscore names through which Python's internals can be reached."""

    def __init__(self, **attributes: object) -> None:
        super().__init__()
        for name, value in attributes.items():
            self[name] = value

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace may not have the attribute {name!r}")
        super().__setitem__(name, value)


def _counted(tree: nodes.Template) -> nodes.Template:
    """Make every pass through a loop body or a macro take one of the steps a rendering has."""
    for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
        # An attribute of the environment, because a template can give any other name a new meaning.
        call = nodes.Call(nodes.EnvironmentAttribute("take_step"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(call, lineno=node.lineno).set_environment(tree.environment))
    return tree


def _raise(message: object) -> None:
    raise TemplateError(str(message))


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _dict(*args: object, **kwargs: object) -> dict:
    return dict(*args, **kwargs)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _checked(message: Mapping) -> dict:
    """A plain copy of a message, its content a list of parts; nothing else reaches the template."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, (str, list)) or not isinstance(message.get("role"), str):
        raise UserError(f"a message needs a role and a content (text or a list of parts), got {message!r}")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    plain = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            plain.append({"type": "image"})
        elif kind == "text" and isinstance(part.get("text"), str):
            plain.append({"type": "text", "text": str(part["text"])})
        else:
            raise UserError(
                f"a message's part must be {{'type': 'image'}} or {{'type': 'text', 'text': ...}}, got {part!r}"
            )
    return {"role": str(message["role"]), "content": plain}
