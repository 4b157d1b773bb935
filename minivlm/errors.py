"""The error that a user can cause, with bad input, a broken checkpoint or contradictory settings."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake outside the program. Its message is one line: what is wrong, and what was expected.

    Scripts print it as `error: ...` on stderr and exit with status 2, without a traceback. Messages
    contain names and values from outside, so that they are made `printable`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str, limit: int = 1000) -> str:
    """`text` as one line of at most `limit` characters, which any terminal shows and any file of text can hold.

    Line breaks, control characters and lone surrogates are escaped. The middle of a long text is
    left out: its end often says why.
    """
    characters = (c if c.isprintable() else ascii(c)[1:-1] for c in _shortened(text, limit))
    return _shortened("".join(characters), limit)


def _shortened(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    start = (limit - 1) // 2
    return f"{text[:start]}…{text[len(text) - (limit - 1 - start) :]}"
