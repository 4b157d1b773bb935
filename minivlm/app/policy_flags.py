"""The command-line flags of a KV policy, generated from the fields of `CacheSettings`.

A preset (`--policy avl`) sets several fields at once; flags given explicitly override it. The flags keep the spelling of
the A-VL authors' code, which stands in each field's metadata.
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace

from minivlm.cache.settings import REGISTRY, CacheSettings


def parse_bool(text: str) -> bool:
    """Read true/false, yes/no or 1/0. Anything else is an error, where `bool(text)` would make it true."""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def spellings(flag: str) -> list[str]:
    """Both spellings of a flag, `--like_this` and `--like-this`; just one where they are the same."""
    return list(dict.fromkeys(("--" + flag, "--" + flag.replace("_", "-"))))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--policy` and one flag per setting, in both spellings. A boolean takes true/false or stands alone."""
    group = parser.add_argument_group("KV cache policy (rates are the shares removed)")
    group.add_argument(
        "--policy",
        default=argparse.SUPPRESS,
        metavar="|".join(REGISTRY),
        help="a preset; the flags below override it (full)",
    )
    for setting in fields(CacheSettings):
        if "flag" not in setting.metadata:
            continue
        value_type = setting.metadata["kind"]
        default = "" if setting.default is None else f" ({str(setting.default).lower()})"
        group.add_argument(
            *spellings(setting.metadata["flag"]),
            dest=f"cache.{setting.name}",
            type=parse_bool if value_type is bool else value_type,
            default=argparse.SUPPRESS,  # absent from the namespace unless given, so that a preset's value holds
            help=setting.metadata["help"] + default,
            metavar={bool: "BOOL", float: "F", int: "N"}[value_type],
            **(dict(nargs="?", const=True) if value_type is bool else {}),
        )


def from_args(args: argparse.Namespace, seed: int = 0) -> CacheSettings:
    """The settings that the flags of `add_arguments` ask for. Raises `UserError` if they are out of range."""
    given = {name.removeprefix("cache."): value for name, value in vars(args).items() if name.startswith("cache.")}
    return replace(CacheSettings.preset(getattr(args, "policy", "full"), **given), seed=seed)
