"""Answers on a terminal: one streamed answer, and a conversation whose questions come from standard input."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence

from PIL import Image

from minivlm.app.cli import complain, note
from minivlm.app.report import describe
from minivlm.errors import UserError
from minivlm.generation.vlm import Conversation, Stream
from minivlm.inputs.images import load_image

_IMAGE = "/image"


def show(stream: Stream, stats: bool) -> bool:
    """Print an answer as it comes -> whether Ctrl-C ended it; what was said until then stays.

    On standard error: the statistics, and that the context is full where that ended the answer.
    """
    before = signal.signal(signal.SIGINT, lambda *_: stream.stop())
    try:
        for piece in stream:
            print(piece, end="", flush=True)
    finally:
        signal.signal(signal.SIGINT, before)
    print(flush=True)
    answer, generation = stream.answer, stream.generation
    if (
        answer.finish == "length"
        and not generation.stopped
        and len(answer.token_ids) < generation.sampling.max_new_tokens
    ):
        note(f"the answer ends here: the model's context of {generation.cache.config.context_length} tokens is full")
    if stats:
        print(describe(answer.stats), file=sys.stderr)
    return generation.stopped


def converse(conversation: Conversation, images: Sequence[Image.Image], first: str | None, stats: bool) -> None:
    """Answer `first`, then every line of standard input, until its end or Ctrl-C at the prompt.

    The line `/image FILE` adds an image to the next question, `/image` alone takes back those that wait for it.  What
    is wrong with a turn is told in one line, and the conversation goes on; Ctrl-C ends a turn.
    """
    waiting = list(images)
    for line in _lines(first):
        command, _, file = line.strip().partition(" ")
        try:
            if command == _IMAGE:
                waiting = [*waiting, load_image(file.strip())] if file.strip() else []
                continue
            stream = conversation.ask(line, waiting)
            waiting = []
            show(stream, stats)
        except UserError as error:
            complain(error)
        except KeyboardInterrupt:  # before the answer began
            print(file=sys.stderr)


def _lines(first: str | None) -> Iterator[str]:
    """Questions, blank ones left out."""
    if first is not None and first.strip():
        yield first
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            if sys.stdin.isatty():
                print()
            return
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not text in {error.encoding}") from None
        if line.strip():
            yield line
