"""The error that a user can cause, with bad input, a broken checkpoint or contradictory settings."""

from __future__ import annotations

import re

# Line breaks, and what a terminal would obey instead of showing it.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_LONGEST = 1000  # characters


class UserError(ValueError):
    """A mistake outside the program. Its message is one line: what is wrong, and what was expected.

    Scripts print it as `error: ...` on stderr and exit with status 2, without a traceback. Messages
    contain names and values from outside: control characters in them are escaped, and the middle of
    a very long message is left out.
    """

    def __init__(self, message: str) -> None:
        message = _CONTROL.sub(lambda character: repr(character[0])[1:-1], message)
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
        super().__init__(message)
