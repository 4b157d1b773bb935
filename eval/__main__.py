"""`python -m eval …` measures; `python -m eval compare A B …` and `python -m eval sweep …` put runs side by side."""

from collections.abc import Sequence

from minivlm.app import cli


def main(arguments: Sequence[str]) -> None:
    """Runs one of the three commands; raises `UserError` for a user's mistake."""
    name, rest = (arguments[0], arguments[1:]) if arguments[:1] in (["compare"], ["sweep"]) else ("", arguments)
    if name == "compare":
        from eval.accuracy.compare import main as command
    elif name == "sweep":
        from eval.accuracy.sweep import main as command
    else:
        from eval.accuracy.command import main as command
    try:
        command(rest)
    except KeyboardInterrupt:
        cli.note("interrupted; the same command goes on from here")
        raise


if __name__ == "__main__":
    cli.run(main)
