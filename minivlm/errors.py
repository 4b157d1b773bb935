"""The one error a user can cause: bad input, a broken checkpoint, contradictory settings."""


class UserError(ValueError):
    """A mistake outside the program, told in one line: what is wrong and what was expected.

    Scripts print it as `error: ...` on stderr and exit with status 2, without a traceback.
    """
