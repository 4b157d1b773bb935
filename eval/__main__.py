"""`python -m eval …` measures; `python -m eval compare A B …` and `python -m eval sweep …` put runs side by side."""

import sys

from minivlm.errors import UserError


def main(arguments: list[str]) -> int:
    """Runs the command -> exit status: 2 for a user's mistake, 130 when interrupted."""
    try:
        if arguments[:1] == ["compare"]:
            from . import compare as command
        elif arguments[:1] == ["sweep"]:
            from . import sweep as command
        else:
            from . import command
            arguments = ["", *arguments]
        command.main(arguments[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
