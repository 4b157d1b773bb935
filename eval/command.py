"""The flags of `python -m eval` and what they ask for; `sweep` shares them.

The command line is lmms-eval's as the A-VL authors use it: `--model llava_hf --model_args pretrained=…,device_map=auto`
works as it stands. What has no meaning here is accepted with a note.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import weights
from minivlm.cache import settings as cache
from minivlm.cache.settings import parse_bool, spellings
from minivlm.errors import UserError

from .processes import Processes
from .report import summary
from .results import fingerprint
from .runner import Run, run
from .tasks import GROUPS, TASKS, open_tasks

_ADAPTERS = ("llava", "llava_hf")  # lmms-eval's names of model classes: the checkpoint is in --model_args
_MODEL_ARGS = ("pretrained", "device", "dtype", "batch_size")
_WITHOUT_MEANING = ("num_fewshot", "verbosity", "timezone", "wandb_args")


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are `UserError`s: one line, as everywhere."""

    def error(self, message: str):
        raise UserError(message)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a run, each in both spellings."""

    def flag(name: str, **options) -> None:
        parser.add_argument(*spellings(name), dest=name, **options)

    flag("model", help="checkpoint folder or hub id (the bundled demo checkpoint)")
    flag("model_args", default="", help="pretrained=MODEL,device=…,dtype=…,batch_size=…; wins over the flags")
    flag("tasks", default="demo", help=f"comma-separated: {', '.join((*GROUPS, *TASKS))}")
    flag("data", help="folder, JSON file or hub id of the data (the task's own on the hub)")
    flag("limit", type=float, help="only the first N samples of a task, or that share of them")
    flag("batch_size", type=int, default=1)
    flag("device", default="auto", help="auto, cpu, cuda or cuda:N")
    flag("dtype", default="auto", help="auto, float32, bfloat16 or float16")
    flag("seed", type=int, default=0, help="of the demo's pages and of random eviction (0)")
    flag("output_path", type=Path, default=Path("results"), help="where the folders of runs are (results)")
    flag("log_samples", type=parse_bool, nargs="?", const=True, default=False, metavar="BOOL",
         help="keep prompt, references and token ids of every sample too")
    flag("log_samples_suffix", default="", help="ends the folder's name")
    flag("predict_only", type=parse_bool, nargs="?", const=True, default=False, metavar="BOOL", help="do not score")
    for name in _WITHOUT_MEANING:
        flag(name, help=argparse.SUPPRESS)
    cache.add_arguments(parser)


def parse(arguments: Sequence[str], parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Flags -> namespace, with `--model_args` resolved into them and `notes` on what has no meaning here."""
    if parser is None:
        parser = Parser("python -m eval", description="Measures a checkpoint with a KV policy on a data set.", allow_abbrev=False)
        add_arguments(parser)
    args = parser.parse_args(arguments)
    args.notes = [f"--{name} has no meaning here" for name in _WITHOUT_MEANING if getattr(args, name) is not None]
    given = {}
    for item in filter(None, args.model_args.split(",")):
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--model_args: {item!r} is not of the form name=value")
        given[name.strip()] = value.strip().strip("'\"")
    args.notes += [f"--model_args {name}={given[name]} has no meaning here" for name in given if name not in _MODEL_ARGS]
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
    settings = cache.from_args(args, args.seed)
    folder = weights.find_checkpoint(args.model)
    device = "cuda" if args.device.startswith("cuda") or args.device == "auto" and torch.cuda.is_available() else "cpu"
    name = "demo" if args.model is None else folder.name if Path(args.model).expanduser().is_dir() else args.model
    tasks, notes = open_tasks(args.tasks, args.data, args.seed, args.limit)
    opened = {task.name for task, _ in tasks}
    asked = {name.strip() for name in args.tasks.split(",")}
    return Run(
        tasks=tasks,
        settings=settings,
        identity={"model": name, "weights": fingerprint(folder), "device": device, "dtype": args.dtype},
        batch_size=args.batch_size,
        seed=args.seed,
        predict_only=args.predict_only,
        log_samples=args.log_samples,
        suffix=args.log_samples_suffix,
        groups={group: [member for member in members if member in opened] for group, members in GROUPS.items() if group in asked},
        notes=[*args.notes, *notes, *settings.notes()],
    )


def loader(args: argparse.Namespace):
    """A function that loads the model of the flags, once."""
    return functools.cache(lambda: weights.load(args.model, device=args.device, dtype=args.dtype))


def main(arguments: Sequence[str]) -> None:
    """`python -m eval …`: one run, its summary on stdout."""
    args = parse(arguments)
    if args.tasks == "list":
        print("\n".join((*GROUPS, *TASKS)))
        return
    processes = Processes.join()
    try:
        prepared = prepare(args)
        if processes.rank == 0:
            for note in prepared.notes:
                print(f"note: {note}", file=sys.stderr)
        folder, results = run(prepared, args.output_path, loader(args), processes)
        if processes.rank == 0:
            print(summary(results, folder))
    finally:
        processes.leave()
