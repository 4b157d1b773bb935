"""The command-line flags of KV policies, made from the fields of their settings classes.

A preset (`--policy avl`) sets several settings at once; flags given explicitly override it. `--policy_file` adds a
policy that lives outside of this tree. Flags keep the spelling of the A-VL authors' code where they come from there.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from minivlm.app.values import READERS
from minivlm.cache.policies import PRESETS, Preset, preset
from minivlm.cache.settings import CacheSettings, flag_names
from minivlm.errors import UserError
from minivlm.files import read_bytes

_DEST = "setting."  # begins the names of these flags in a namespace
_PLACEHOLDERS = {bool: "BOOL", float: "F", int: "N", str: "TEXT"}


def spellings(flag: str) -> list[str]:
    """Both spellings of a flag, `--like_this` and `--like-this`; just one where they are the same."""
    return list(dict.fromkeys(("--" + flag, "--" + flag.replace("_", "-"))))


def add_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str] = ()) -> None:
    """Add `--policy`, `--policy_file` and one flag for each setting, in both spellings.

    The settings of a `--policy_file` among `arguments` become flags as well: that file is run now. A boolean takes
    true/false or stands alone. Raises `UserError` if the file cannot be used.
    """
    file = _value_of("policy_file", arguments)
    presets = dict(PRESETS) if file is None else PRESETS | load_policy_file(Path(file))
    parser.set_defaults(presets=presets)
    group = parser.add_argument_group("KV cache policy (rates are the shares removed)")
    group.add_argument(
        "--policy",
        default=argparse.SUPPRESS,
        metavar="|".join(presets),
        help="a preset; the flags below override it (full, or the policy of --policy_file)",
    )
    group.add_argument(
        *spellings("policy_file"),
        dest="policy_file",
        metavar="FILE.py",
        help="a policy of your own (docs/policies.md); the file is run as Python code",
    )
    for flag, setting in _settings_of(presets).items():
        value_type = setting.metadata["type"]
        default = "" if setting.default is None else f" ({str(setting.default).lower()})"
        options: dict[str, Any] = {"nargs": "?", "const": True} if value_type is bool else {}
        try:
            group.add_argument(
                *spellings(flag),
                dest=_DEST + flag,
                type=READERS[value_type],
                default=argparse.SUPPRESS,  # absent from the namespace unless given, so that a preset's value holds
                help=setting.metadata["help"] + default,
                metavar=_PLACEHOLDERS[value_type],
                **options,
            )
        except argparse.ArgumentError:
            raise UserError(f"--{flag} of --policy_file {file} is a flag already (expected another name)") from None


def from_args(args: argparse.Namespace, seed: int = 0) -> CacheSettings:
    """The settings that the flags of `add_arguments` ask for.

    Numbers of other policies have no effect (see `without_effect`). Raises `UserError` for settings that are out of
    range, and for a switch that is on but belongs to another policy.
    """
    name = _policy_name(args)
    own = {flag: field for field, flag in flag_names(args.presets[name].settings).items()}
    changes = {}
    for flag, value in given(args).items():
        if flag in own:
            changes[own[flag]] = value
        elif value is True:
            expected = ", ".join(f"--{each}" for each in own)
            raise UserError(f"--{flag} is not a setting of --policy {name} (expected {expected})")
    return preset(name, presets=args.presets, **changes, seed=seed)


def without_effect(args: argparse.Namespace) -> list[str]:
    """A line for each setting on the command line that the policy does not have."""
    name = _policy_name(args)
    own = flag_names(args.presets[name].settings).values()
    return [f"--{flag} has no effect on --policy {name}" for flag in given(args) if flag not in own]


def _policy_name(args: argparse.Namespace) -> str:
    """The policy that is asked for; without a word, that of `--policy_file`, or the full cache."""
    default = "full" if args.policy_file is None else list(args.presets)[-1]
    name: str = getattr(args, "policy", default)
    if name not in args.presets:
        preset(name, presets=args.presets)  # refuses the name
    return name


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that stand on the command line, by flag."""
    return {name.removeprefix(_DEST): value for name, value in vars(args).items() if name.startswith(_DEST)}


def load_policy_file(path: Path) -> dict[str, Preset]:
    """Run a user's own file and return the policy that it defines, by its name.

    The file defines one subclass of `CacheSettings`, a dataclass whose field `policy` has the policy's name as its
    default. Raises `UserError` if the file cannot be run or does not do that.
    """
    source = read_bytes(path)
    if path.suffix != ".py":
        raise UserError(f"--policy_file {path}: not a Python file (expected a name that ends in .py)")
    module = ModuleType(f"minivlm_policy_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    try:
        exec(compile(source, path, "exec"), vars(module))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: the file does not decide how the command ends
        raise UserError(f"--policy_file {path}: {type(error).__name__}: {error}") from error
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, CacheSettings) and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise UserError(f"--policy_file {path}: defines {len(classes)} subclasses of CacheSettings (expected one)")
    (settings,) = classes
    if "__dataclass_fields__" not in vars(settings):
        raise UserError(
            f"--policy_file {path}: {settings.__name__} is no dataclass of its own "
            "(expected @dataclass(frozen=True, kw_only=True) before the class)"
        )
    if inspect.isabstract(settings):
        raise UserError(f"--policy_file {path}: {settings.__name__} has no method `build`")
    name = getattr(settings, "policy", None)
    if not isinstance(name, str) or name in PRESETS:
        named = f"is called {name!r}, which is taken" if name in PRESETS else "has no name"
        raise UserError(
            f"--policy_file {path}: the policy {named} "
            f'(expected a field like `policy: str = "{path.stem}"` in {settings.__name__})'
        )
    return {name: Preset(settings)}


def _settings_of(presets: Mapping[str, Preset]) -> dict[str, Field[Any]]:
    """The settings of all policies by flag; raises `UserError` if one flag would mean two things."""
    by_flag: dict[str, Field[Any]] = {}
    for chosen in presets.values():
        names = flag_names(chosen.settings)
        for setting in fields(chosen.settings):
            if setting.name not in names:
                continue
            flag, value_type = names[setting.name], setting.metadata["type"]
            if value_type not in _PLACEHOLDERS:
                where = f"setting {setting.name} of {chosen.settings.__name__}"
                raise UserError(f"{where} has no type of a flag (expected value_type=bool, float, int or str)")
            if by_flag.setdefault(flag, setting).metadata["type"] is not value_type:
                raise UserError(f"--{flag} has another type in {chosen.settings.__name__} than elsewhere")
    return by_flag


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """The value of a flag before anything is parsed; the last one, if it is given more than once."""
    value = None
    for i, word in enumerate(arguments):
        name, equals, rest = word.partition("=")
        if name in spellings(flag):
            value = rest if equals else next(iter(arguments[i + 1 :]), None)
    return value
