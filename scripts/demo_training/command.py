"""Train the bundled demo checkpoint from scratch, export it, and measure it on held-out pages.

The pages and questions come from eval/demo/pages.py; the model is minivlm's own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import weights
from demo_training.evaluate import score_by_type, score_table
from demo_training.export import check_target, export
from demo_training.loop import TrainingRun
from minivlm.app.cli import Parser
from minivlm.errors import UserError
from minivlm.files import exists

_MOST = 1 << 16  # pages


def main(arguments: Sequence[str]) -> None:
    """Run one of the commands train, export and evaluate.

    Raises `UserError` for a user's mistake.
    """
    args = _parser().parse_args(arguments)
    try:
        {"train": _train, "export": _export, "evaluate": _evaluate}[args.command](args)
    except KeyboardInterrupt:
        print("interrupted; --resume continues a run from its last saved state", file=sys.stderr)
        raise


def _parser() -> Parser:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = "Train the model, or continue a run."
    _add_train_flags(
        commands.add_parser(
            "train",
            help=train,
            description=f"{train}\n\nRUN/state.pt is written every two minutes. RUN/log.jsonl gets a line every\n"
            "20 seconds: losses, the shares of short and long answers without a mistake, and pages\nper second.",
        )
    )
    export_folder = "Write the trained model as a Hugging Face folder (float16), with example pages."
    _add_export_flags(commands.add_parser("export", help=export_folder, description=export_folder))
    evaluate = "Exact match and ANLS by type of answer on held-out pages, one question each."
    _add_evaluate_flags(commands.add_parser("evaluate", help=evaluate, description=evaluate))
    return parser


def _add_train_flags(parser: Parser) -> None:
    parser.flag("run", type=Path, required=True, help="folder of the run")
    parser.flag("resume", action="store_true", help="continue from RUN/state.pt")
    parser.flag(
        "stage",
        choices=("1", "2", "all"),
        default="all",
        help="1: the vision tower learns to name the characters in each patch; 2: the whole model learns to answer "
        "(all)",
    )
    parser.flag(
        "time_budget",
        type=float,
        default=5940,
        help="seconds of training over all sittings; stage 1 gets an eighteenth of them, and the learning rate falls "
        "to a fiftieth at the end (5940, meant for two CPU cores)",
    )
    parser.flag("pages", type=int, default=8, help="pages per step (8)")
    parser.flag("rate", type=float, default=2e-3, help="learning rate (0.002)")
    parser.flag(
        "tower_rate",
        type=float,
        default=3e-4,
        help="learning rate of the vision tower in stage 2 (0.0003)",
    )
    parser.flag(
        "device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="computes in bfloat16 on either device (auto: CUDA if there is a GPU)",
    )
    parser.flag("seed", type=int, default=0, help="seed of the weights and pages (0)")


def _add_export_flags(parser: Parser) -> None:
    parser.flag("run", type=Path, required=True, help="folder of the run")
    parser.flag(
        "out",
        type=Path,
        required=True,
        help="folder to write; an existing one is replaced, except for its README.md",
    )


def _add_evaluate_flags(parser: Parser) -> None:
    parser.flag("model", help="checkpoint folder (the bundled checkpoint)")
    parser.flag("pages", type=int, default=500, help="number of pages (500)")
    parser.flag("batch_size", type=int, default=8, help="questions asked at once (8)")
    parser.flag("device", default="auto", help="auto, cpu or cuda (auto)")
    parser.flag("dtype", default="auto", help="auto, float32, bfloat16 or float16 (auto)")
    parser.flag("seed", type=int, default=0, help="seed of the pages (0)")
    parser.flag("show_wrong", action="store_true", help="print every answer that is not exact")


def _train(args: argparse.Namespace) -> None:
    cuda = torch.cuda.is_available()
    device = ("cuda" if cuda else "cpu") if args.device == "auto" else args.device
    if device == "cuda" and not cuda:
        raise UserError("--device cuda: no CUDA device is available")
    if args.time_budget <= 0 or args.rate <= 0 or args.tower_rate <= 0:
        raise UserError("--time_budget, --rate and --tower_rate must be positive")
    _check_count(args, "pages")
    if not args.resume and exists(args.run / "state.pt"):
        raise UserError(f"{args.run} already holds a run (expected --resume, or another --run)")
    run = TrainingRun(args.run, torch.device(device), args.seed)
    if args.resume:
        run.resume()
    first_budget = args.time_budget / 18
    if args.stage in ("1", "all"):
        run.train(1, first_budget, args.pages, args.rate, args.rate)
    if args.stage in ("2", "all"):
        run.train(2, args.time_budget - first_budget, args.pages, args.rate, args.tower_rate)


def _check_count(args: argparse.Namespace, name: str) -> None:
    if not 1 <= getattr(args, name) <= _MOST:
        raise UserError(f"--{name} is {getattr(args, name)} (expected 1 to {_MOST})")


def _export(args: argparse.Namespace) -> None:
    check_target(args.out)
    run = TrainingRun(args.run, torch.device("cpu"), 0)
    run.resume()
    export(run.trainer.llava, run.tokenizer, args.out)
    print(args.out)


def _evaluate(args: argparse.Namespace) -> None:
    _check_count(args, "pages")
    _check_count(args, "batch_size")
    vlm = weights.load(args.model, device=args.device, dtype=args.dtype)
    report_wrong = print if args.show_wrong else None
    print(score_table(score_by_type(vlm, args.pages, args.seed, args.batch_size, report_wrong)))
