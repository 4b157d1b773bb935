"""Text from outside in a form that any terminal and any JSON file can hold."""

from __future__ import annotations


def printable(text: str, limit: int = 300) -> str:
    """`text` as one line of at most `limit` characters.

    White space is collapsed, what cannot be printed (control characters, lone surrogates) is
    escaped, and the middle of a long text is left out: its end often says why.
    """
    text = _shortened(text, 4 * limit)
    characters = (c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
    return _shortened("".join(characters), limit)


def _shortened(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    start = (limit - 1) // 2
    return f"{text[:start]}…{text[len(text) - (limit - 1 - start) :]}"
