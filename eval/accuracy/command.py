"""The flags of `python -m eval` and what they ask for; `sweep` shares them.

The command line is lmms-eval's as the A-VL authors use it: `--model llava_hf --model_args pretrained=…,device_map=auto`
works as it stands. What has no meaning here is accepted with a note.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import weights
from eval.accuracy.processes import Processes
from eval.accuracy.report import summary
from eval.accuracy.results import fingerprint
from eval.accuracy.runner import Run, evaluate
from eval.accuracy.tasks import GROUPS, TASKS, open_tasks
from minivlm.app import policy_flags
from minivlm.app.cli import Parser, note
from minivlm.cache.settings import CacheSettings
from minivlm.errors import UserError
from minivlm.generation.vlm import VLM
from weights.build import read_config

_ADAPTERS = ("llava", "llava_hf")  # lmms-eval's names of model classes: the checkpoint is in --model_args
_MODEL_ARGS = ("pretrained", "device", "dtype", "batch_size")
_SWITCH = dict(type=policy_flags.parse_bool, nargs="?", const=True, default=False, metavar="BOOL")
_WITHOUT_MEANING = ("num_fewshot", "verbosity", "timezone", "wandb_args")


def add_arguments(parser: Parser) -> None:
    """The flags of a run."""
    parser.model_flags()
    parser.flag(
        "model_args",
        default="",
        metavar="NAME=VALUE,…",
        help="pretrained (the model), device, dtype, batch_size; win over the flags",
    )
    parser.flag("tasks", default="demo", metavar="NAME,…", help=f"{', '.join((*GROUPS, *TASKS))}; or list (demo)")
    parser.flag(
        "data", metavar="DIR|FILE|HUB_ID", help="of the tasks' data (each task's own on the hub; the demo draws pages)"
    )
    parser.flag("limit", type=float, metavar="N", help="only the first N samples of a task, or that share of them")
    parser.flag("batch_size", type=int, default=1, metavar="B", help="(1)")
    parser.flag(
        "output_path", type=Path, default=Path("results"), metavar="DIR", help="where the folders of runs are (results)"
    )
    parser.flag("log_samples", **_SWITCH, help="keep prompt, references and token ids of every sample too")
    parser.flag("log_samples_suffix", default="", metavar="S", help="ends the name of the run's folder")
    parser.flag("predict_only", **_SWITCH, help="do not score")
    for name in _WITHOUT_MEANING:
        parser.flag(name, help=argparse.SUPPRESS)
    policy_flags.add_arguments(parser)


def parse(arguments: Sequence[str], parser: Parser) -> argparse.Namespace:
    """Flags -> namespace, with `--model_args` resolved into them and `notes` on what has no meaning here."""
    args = parser.parse_args(arguments)
    args.notes = [f"--{name} has no meaning here" for name in _WITHOUT_MEANING if getattr(args, name) is not None]
    given = {}
    for item in filter(None, args.model_args.split(",")):
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--model_args: {item!r} is not of the form name=value")
        given[name.strip()] = value.strip().strip("'\"")
    args.notes += [
        f"--model_args {name}={given[name]} has no meaning here" for name in given if name not in _MODEL_ARGS
    ]
    if args.model in _ADAPTERS and "pretrained" not in given:
        raise UserError(f"--model {args.model} names no checkpoint (expected --model_args pretrained=DIR|HUB_ID)")
    args.model = given.get("pretrained", args.model)
    args.device, args.dtype = given.get("device", args.device), given.get("dtype", args.dtype)
    try:
        args.batch_size = int(given.get("batch_size", args.batch_size))
    except ValueError:
        raise UserError(f"--model_args: batch_size {given['batch_size']!r} is not a number") from None
    if args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size}: expected at least 1")
    return args


def prepare(args: argparse.Namespace) -> Run:
    """The run that the flags ask for: settings checked, checkpoint found, data opened; nothing loaded yet."""
    settings = policy_flags.from_args(args, args.seed)
    folder = weights.find_checkpoint(args.model)
    device = (
        "cuda" if args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available()) else "cpu"
    )
    dtype = args.dtype if args.dtype != "auto" else "float32" if device == "cpu" else read_config(folder).dtype
    name = "demo" if args.model is None else folder.name if Path(args.model).expanduser().is_dir() else args.model
    tasks, notes = open_tasks(args.tasks, args.data, args.seed, args.limit)
    opened = {task.name for task, _ in tasks}
    asked = {name.strip() for name in args.tasks.split(",")}
    return Run(
        tasks=tasks,
        settings=settings,
        identity={"model": name, "weights": fingerprint(folder), "device": device, "dtype": dtype},
        batch_size=args.batch_size,
        seed=args.seed,
        predict_only=args.predict_only,
        log_samples=args.log_samples,
        suffix=args.log_samples_suffix,
        groups={
            group: [member for member in members if member in opened]
            for group, members in GROUPS.items()
            if group in asked
        },
        notes=[*args.notes, *notes, *(settings.notes() if settings != CacheSettings(seed=args.seed) else ())],
    )


def loader(args: argparse.Namespace) -> Callable[[], VLM]:
    """A function that loads the model of the flags, once."""
    return functools.cache(lambda: weights.load(args.model, device=args.device, dtype=args.dtype))


def main(arguments: Sequence[str]) -> None:
    """`python -m eval …`: one run, its summary on stdout."""
    parser = Parser(__doc__, "python -m eval")
    add_arguments(parser)
    args = parse(arguments, parser)
    if args.tasks == "list":
        print("\n".join((*GROUPS, *TASKS)))
        return
    processes = Processes.join()
    try:
        prepared = prepare(args)
        if processes.rank == 0:
            for line in prepared.notes:
                note(line)
        folder, results = evaluate(prepared, args.output_path, loader(args), processes)
        if processes.rank == 0:
            print(summary(results, folder))
    finally:
        processes.leave()
