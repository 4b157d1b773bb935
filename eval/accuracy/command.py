"""`python -m eval ...`: answer and score a data set. `sweep` has the same flags.

The command line is that of lmms-eval as the A-VL authors use it: `--model llava_hf
--model_args pretrained=...,device_map=auto` works unchanged. What has no meaning here is accepted
with a note.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

import weights
from eval.accuracy.identity import fingerprint
from eval.accuracy.processes import Processes
from eval.accuracy.report import results_in_words
from eval.accuracy.run_spec import ModelIdentity, RunSpec
from eval.accuracy.runner import evaluate
from eval.accuracy.tasks import GROUPS, TASKS, open_tasks
from minivlm.app import policy_flags
from minivlm.app.cli import Parser
from minivlm.cache.policies import preset
from minivlm.cache.policies.avl import AVLSettings
from minivlm.cache.settings import CacheSettings
from minivlm.errors import UserError, printable
from minivlm.files import is_folder, user_path
from minivlm.generation.compile import missing_compiler
from minivlm.generation.vlm import VLM
from weights.build import read_config

# lmms-eval's names of model classes, with which the checkpoint is in --model_args.
_ADAPTERS = ("llava", "llava_hf")
_MODEL_ARGS = ("pretrained", "device", "dtype", "batch_size")
_WITHOUT_MEANING = ("num_fewshot", "verbosity", "timezone", "wandb_args")


def run_evaluation(arguments: Sequence[str]) -> None:
    """`python -m eval ...`: one run, with its summary on stdout."""
    parser = Parser(__doc__, "python -m eval")
    args = parse_run(parser, arguments)
    if args.tasks == "list":
        print("\n".join((*GROUPS, *TASKS)))
        return
    processes = Processes.join()
    try:
        spec = prepare_run(args)
        folder, results = evaluate(
            spec, args.output_path, model_loader(args), processes, force=args.force, notes=spec.notes
        )
        if results is not None:
            print(results_in_words(results, folder))
    finally:
        processes.leave()


def parse_run(parser: Parser, arguments: Sequence[str], **defaults: object) -> argparse.Namespace:
    """Add the flags of a run to `parser`, with other `defaults` if given, and parse `arguments`.

    In the result, `--model_args` have replaced the flags they stand for, and `notes` names what has
    no meaning here.
    """
    _add_run_flags(parser, arguments)
    parser.set_defaults(**defaults)
    args = parser.parse_args(arguments)
    args.notes = [f"--{name} has no meaning here" for name in _WITHOUT_MEANING if getattr(args, name) is not None]
    _apply_model_args(args)
    if args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size}: expected at least 1")
    return args


def _add_run_flags(parser: Parser, arguments: Sequence[str]) -> None:
    parser.model_flags()
    parser.flag(
        "model_args",
        default="",
        metavar="NAME=VALUE,...",
        help="pretrained (the model), device, dtype, batch_size; these override the flags",
    )
    parser.flag(
        "tasks",
        default="demo",
        metavar="NAME,...",
        help=f"{', '.join((*GROUPS, *TASKS))}; or list (demo)",
    )
    parser.flag(
        "data",
        metavar="DIR|FILE|HUB_ID",
        help="the tasks' data (each task's own data set on the hub; the demo draws pages)",
    )
    parser.flag(
        "limit",
        type=float,
        metavar="N",
        help="only the first N samples of each task, or that share of them (all)",
    )
    parser.switch("compile", help="use torch.compile: slow at first, then faster; pays for long runs in batches")
    parser.flag("batch_size", type=int, default=1, metavar="B", help="questions asked at once (1)")
    parser.flag(
        "output_path",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="folder in which each run gets a folder of its own (results)",
    )
    parser.switch("log_samples", help="also record each sample's prompt, references and token ids")
    parser.flag("log_samples_suffix", default="", metavar="S", help="added to the name of the run's folder")
    parser.switch("predict_only", help="do not score")
    parser.switch("force", help="ask everything anew; earlier answers are put aside")
    for name in _WITHOUT_MEANING:
        parser.flag(name, help=argparse.SUPPRESS)
    policy_flags.add_arguments(parser, arguments)


def _apply_model_args(args: argparse.Namespace) -> None:
    """Replace flags by what `--model_args` says. Raises `UserError` if it is malformed."""
    given: dict[str, str] = {}
    for item in filter(None, args.model_args.split(",")):
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--model_args: {item!r} is not of the form name=value")
        given[name.strip()] = value.strip().strip("'\"")
    without_meaning = [f"{name}={value}" for name, value in given.items() if name not in _MODEL_ARGS]
    args.notes += [f"--model_args {item} has no meaning here" for item in without_meaning]
    if args.model in _ADAPTERS and "pretrained" not in given:
        raise UserError(f"--model {args.model} names no checkpoint (expected --model_args pretrained=DIR|HUB_ID)")
    args.model = given.get("pretrained", args.model)
    args.device = given.get("device", args.device)
    args.dtype = given.get("dtype", args.dtype)
    try:
        args.batch_size = int(given.get("batch_size", args.batch_size))
    except ValueError:
        raise UserError(f"--model_args: batch_size {given['batch_size']!r} is not a number") from None


def prepare_run(args: argparse.Namespace) -> RunSpec:
    """The run that the flags ask for, with its data opened; the model is not loaded yet."""
    settings = policy_settings(args)
    model = _model_identity(args)
    tasks, data_notes = open_tasks(args.tasks, args.data, args.seed, args.limit)
    opened = {task.name for task, _ in tasks}
    asked = {name.strip() for name in args.tasks.split(",")}
    is_default = settings == preset("full", seed=args.seed)
    return RunSpec(
        tasks=tasks,
        model=model,
        settings=settings,
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
        notes=[*args.notes, *data_notes, *policy_flags.without_effect(args), *([] if is_default else settings.notes())],
    )


def policy_settings(args: argparse.Namespace) -> CacheSettings:
    """The policy that the flags ask for.

    Flags of A-VL without `--policy`, as in the authors' command line, ask for `avl` or `h2o`, and
    the run is filed under that name.
    """
    settings = policy_flags.from_args(args, args.seed)
    if type(settings) is AVLSettings and settings.policy == "full":
        if settings.vision or settings.filter or settings.text:
            return replace(settings, policy="avl")
        if settings.all_h2o:
            return replace(settings, policy="h2o")
    return settings


def _model_identity(args: argparse.Namespace) -> ModelIdentity:
    """Which model answers, in which dtype and on what device, as far as that changes answers."""
    folder = weights.find_checkpoint(args.model)
    if args.model is None:
        name = "demo"
    elif is_folder(user_path(args.model)):
        name = folder.name
    else:
        name = args.model
    on_cuda = args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())
    dtype = args.dtype
    if dtype == "auto":
        dtype = read_config(folder).dtype if on_cuda else "float32"
    device = "cuda" if on_cuda else "cpu"
    compiled = args.compile and missing_compiler(torch.device(device)) is None
    return ModelIdentity(printable(name), fingerprint(folder), device, dtype, compiled)


def model_loader(args: argparse.Namespace) -> Callable[[], VLM]:
    """A function that returns the model of the flags, loading it on the first call."""
    return functools.cache(lambda: weights.load(args.model, device=args.device, dtype=args.dtype, compile=args.compile))
