"""The command line of the evaluator.

`python -m eval ...` answers and scores a data set. `python -m eval compare A B ...` puts finished
runs side by side, and `python -m eval sweep ...` runs a grid of policies and KV budgets.
"""

from collections.abc import Sequence

from minivlm.app import cli


def main(arguments: Sequence[str]) -> None:
    """Run one of the three commands. Raises `UserError` for a user's mistake."""
    # Each command is imported only when it is asked for: loading all three would slow down every
    # one of them.
    name = arguments[0] if arguments else ""
    try:
        if name == "compare":
            from eval.accuracy.compare import compare_runs

            compare_runs(arguments[1:])
        elif name == "sweep":
            from eval.accuracy.sweep import run_sweep

            run_sweep(arguments[1:])
        else:
            from eval.accuracy.command import run_evaluation

            run_evaluation(arguments)
    except KeyboardInterrupt:
        cli.note("interrupted; run the same command again to continue from here")
        raise


if __name__ == "__main__":
    cli.run(main)
