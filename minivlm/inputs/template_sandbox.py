"""The sandbox that compiles and renders chat templates, in this process or as a process of its own.

Jinja's sandbox keeps a template away from Python's internals, but does not limit what it computes.
So this file is also a program: started by `template_process`, it limits its own memory and time and
then answers requests to render. It imports nothing of minivlm, because that would load torch.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, BinaryIO

if __name__ == "__main__":
    sys.path += sys.argv[1:]  # where the parent found Jinja; `python -I -S` looks nowhere else

from jinja2 import Undefined, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_CHARACTERS = 1 << 20  # of rendered text
MAX_SECONDS = 1  # of the processor's time for one rendering
_MAX_MEMORY = 256 << 20  # bytes of address space, of which Python and Jinja take about 30 MB
_MAX_REASON = 1000  # characters


class TemplateFailure(Exception):
    """Why a template cannot be rendered, in words that the template may have chosen."""


class Template:
    """A template, compiled in this process."""

    def __init__(self, source: str) -> None:
        """Compile a template. Raises `TemplateFailure`."""
        with _failures():
            self._template = _Sandbox().from_string(source)

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text for these variables. Raises `TemplateFailure`, also if it is too long or not valid Unicode."""
        with _failures():
            text = self._template.render(variables)
            if len(text) > MAX_CHARACTERS:
                raise SecurityError(f"it renders more than {MAX_CHARACTERS} characters")
            text.encode()
            return text


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with Hugging Face's helpers."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self.filters["tojson"] = _tojson
        self.globals.update(raise_exception=_raise, strftime_now=_now, namespace=_Namespace, dict=_dict)

    def unsafe_undefined(self, obj: object, attribute: str) -> Undefined:
        # In Jinja's own sandbox, an unsafe attribute renders as nothing and fails only when it is
        # used. Here the attempt is refused.
        raise SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__} is unsafe")


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


@contextmanager
def _failures() -> Iterator[None]:
    """Turn whatever a template raises, or makes Jinja and the helpers raise, into `TemplateFailure`."""
    try:
        yield
    except MemoryError:
        raise TemplateFailure("it takes too much memory") from None
    except Exception as error:
        raise TemplateFailure(str(error)[:_MAX_REASON] or type(error).__name__) from None


def _limit_resources() -> None:
    """Limits of this process: its memory, and no file written, neither by a template nor as a core dump."""
    if sys.platform != "win32":
        import resource

        for kind, limit in ((resource.RLIMIT_AS, _MAX_MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
            hard = resource.getrlimit(kind)[1]
            limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(kind, (limit, limit))


def _limit_time() -> None:
    """Let the system end this process when it has worked for `MAX_SECONDS` from now on."""
    if sys.platform != "win32":
        import signal

        # Only the processor's time counts, so that neither a loaded machine nor waiting for the
        # next request ends the process. No C code can hold the signal up.
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer each line `[source, variables]` with `[true, text]` or `[false, reason]`, until the requests end."""
    compiled = functools.lru_cache(maxsize=1)(Template)
    for line in requests:
        _limit_time()
        source, variables = json.loads(line)
        try:
            answer = [True, compiled(source).render(variables)]
        except TemplateFailure as failure:
            answer = [False, str(failure).encode(errors="replace").decode()]
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    _limit_resources()
    _serve(sys.stdin.buffer, sys.stdout.buffer)
