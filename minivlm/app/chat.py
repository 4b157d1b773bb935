"""Answers on a terminal: a single one, or a conversation led from standard input."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence

from PIL import Image

from minivlm.app.cli import complain, note
from minivlm.app.report import describe_stats
from minivlm.errors import UserError
from minivlm.files import reason
from minivlm.generation.answers import Stream
from minivlm.generation.vlm import Conversation
from minivlm.inputs.images import load_image

_IMAGE_COMMAND = "/image"
_LONGEST_LINE = 1 << 20  # characters; what never ends is no question


def show(stream: Stream, stats: bool) -> bool:
    """Print an answer while it is generated. Returns whether Ctrl-C ended it early.

    An interrupted answer ends after the token being computed; what was printed so far is kept.
    Standard error gets the statistics, if `stats` asks for them, and a note if the model's context
    was full before the answer was complete.
    """
    previous_handler = signal.signal(signal.SIGINT, lambda *_: stream.stop())
    shown = ""
    try:
        for piece in stream:
            shown = piece
            print(piece, end="", flush=True)
    except UserError:
        if shown:
            print(flush=True)  # the error gets a line of its own
        raise
    finally:
        signal.signal(signal.SIGINT, previous_handler)
    print(flush=True)

    answer, generation = stream.answer, stream.generation
    wanted = generation.sampling.max_new_tokens
    cut_short = answer.finish == "length" and len(answer.token_ids) < wanted
    if cut_short and not generation.stopped:
        context_length = generation.cache.config.context_length
        note(f"the answer ends here: the model's context of {context_length} tokens is full")
    if stats:
        print(describe_stats(answer.stats), file=sys.stderr)
    return generation.stopped


def converse(
    conversation: Conversation,
    images: Sequence[Image.Image],
    first: str | None,
    stats: bool,
) -> None:
    """Answer `first` and each line of standard input, until it ends or the user presses Ctrl-C.

    The line `/image FILE` adds an image to the next question; `/image` alone discards the images
    that wait for it. A mistake in a turn is reported in one line and the conversation goes on.
    Ctrl-C during an answer ends only that turn.
    """
    pending_images = list(images)
    for line in _questions(first):
        command, _, file = line.strip().partition(" ")
        try:
            if command == _IMAGE_COMMAND:
                pending_images = [*pending_images, load_image(file.strip())] if file.strip() else []
                continue
            stream = conversation.ask(line, pending_images)
            pending_images = []
            show(stream, stats)
        except UserError as error:
            complain(error)
        except KeyboardInterrupt:  # during the prefill, before `show` handles Ctrl-C
            print(file=sys.stderr)


def _questions(first: str | None) -> Iterator[str]:
    """Yield `first` and the lines of standard input, without blank ones."""
    if first is not None and first.strip():
        yield first
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else sys.stdin.readline(_LONGEST_LINE + 1)
        except (EOFError, KeyboardInterrupt):
            if sys.stdin.isatty():
                print()
            return
        except OSError as error:
            raise UserError(f"standard input cannot be read ({reason(error)})") from None
        if len(line) > _LONGEST_LINE:
            raise UserError(f"standard input has a line of more than {_LONGEST_LINE} characters")
        if line.strip():
            yield line.removesuffix("\n")
        elif not line and not sys.stdin.isatty():
            return
