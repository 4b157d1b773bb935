"""Train the bundled demo checkpoint from scratch, export it, and measure it on held-out pages.

The logic is in scripts/demo_training; pages and questions come from eval/demo/pages.py, the model is minivlm's own.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Before torch starts its threads: threads that wait asleep make a step several times faster beside other work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "100")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import weights
from demo_training.evaluate import evaluate, table
from demo_training.export import export
from demo_training.loop import Run
from minivlm.app.policy_flags import spellings
from minivlm.errors import UserError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str):
        sub = commands.add_parser(name, help=text, description=text)
        return lambda flag, **options: sub.add_argument(*spellings(flag), dest=flag, **options)

    flag = command(
        "train",
        "Train; writes RUN/state.pt every two minutes and, every 20 seconds, a line to "
        "RUN/log.jsonl: losses, shares of short and long answers without a mistake, pages a second.",
    )
    flag("run", type=Path, required=True, help="folder of the run")
    flag("resume", action="store_true", help="go on from RUN/state.pt")
    flag(
        "stage",
        choices=("1", "2", "all"),
        default="all",
        help="1: the vision tower learns to name the characters in each patch; 2: everything learns to answer (all)",
    )
    flag(
        "time_budget",
        type=float,
        default=5940,
        help="seconds of training over all sittings; stage 1 gets an "
        "eighteenth, the learning rate falls to a fiftieth at the end (5940, meant for two CPU cores)",
    )
    flag("pages", type=int, default=8, help="pages a step (8)")
    flag("rate", type=float, default=2e-3, help="learning rate (0.002)")
    flag("tower_rate", type=float, default=3e-4, help="learning rate of the vision tower in stage 2 (0.0003)")
    flag("device", choices=("auto", "cpu", "cuda"), default="auto", help="computes in bfloat16 on either (auto)")
    flag("seed", type=int, default=0)

    flag = command("export", "Write the trained model as a Hugging Face folder (float16), with example pages.")
    flag("run", type=Path, required=True, help="folder of the run")
    flag("out", type=Path, required=True, help="folder to write; an existing one is replaced, its README.md kept")

    flag = command("evaluate", "Exact match and ANLS by type of answer on held-out pages, one question each.")
    flag("model", default=None, help="checkpoint folder (the bundled one)")
    flag("pages", type=int, default=500)
    flag("batch_size", type=int, default=8)
    flag("device", default="auto", help="auto, cpu or cuda")
    flag("dtype", default="auto", help="auto, float32, bfloat16 or float16")
    flag("seed", type=int, default=0, help="of the pages")
    flag("show_wrong", action="store_true", help="print every answer that is not exact")
    return parser


def _train(args: argparse.Namespace) -> None:
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is available")
    if args.time_budget <= 0 or args.pages < 1:
        raise UserError("--time_budget and --pages must be positive")
    if not args.resume and (args.run / "state.pt").exists():
        raise UserError(f"{args.run} holds a run already (expected --resume, or another --run)")
    run = Run(args.run, torch.device(name), args.seed)
    if args.resume:
        run.resume()
    first = args.time_budget / 18
    if args.stage in ("1", "all"):
        run.train(1, first, args.pages, args.rate, args.rate)
    if args.stage in ("2", "all"):
        run.train(2, args.time_budget - first, args.pages, args.rate, args.tower_rate)


def _export(args: argparse.Namespace) -> None:
    run = Run(args.run, torch.device("cpu"), 0)
    run.resume()
    export(run.trainer.llava, run.tokenizer, args.out)
    print(args.out)


def _evaluate(args: argparse.Namespace) -> None:
    vlm = weights.load(args.model, device=args.device, dtype=args.dtype)
    print(table(evaluate(vlm, args.pages, args.seed, args.batch_size, print if args.show_wrong else None)))


def main() -> int:
    args = _parser().parse_args()
    try:
        {"train": _train, "export": _export, "evaluate": _evaluate}[args.command](args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; a run goes on from its last saved state with --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
