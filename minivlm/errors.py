"""The error that a user can cause, with bad input, a broken checkpoint or contradictory settings."""


class UserError(ValueError):
    """A mistake outside the program. Its message is one line: what is wrong, and what was expected.

    Scripts print it as `error: ...` on stderr and exit with status 2, without a traceback.
    """
