"""What the device is, what runs it, and how fast it copies.

python -m eval.speed.gpu.device --json OUT.json
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from eval.json_files import write_json
from eval.speed.machine import bandwidth, describe_machine
from minivlm.app.cli import Parser, run
from minivlm.errors import UserError
from minivlm.files import expect_writable

_DRIVER = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def expect_gpu() -> None:
    """Raise `UserError` unless torch can use a GPU."""
    if not torch.cuda.is_available():
        raise UserError(
            "no CUDA device that torch can use (expected an NVIDIA GPU, its driver, and a torch built for CUDA; "
            f"here is torch {torch.__version__})"
        )


def main(arguments: Sequence[str]) -> None:
    parser = Parser(__doc__, "python -m eval.speed.gpu.device")
    parser.flag("device", default="cuda", choices=("cpu", "cuda"), help="(cuda)")
    parser.flag("json", type=Path, required=True, metavar="OUT.json", help="what is written")
    args = parser.parse_args(arguments)
    if args.device == "cuda":
        expect_gpu()
    expect_writable(args.json)
    device = torch.device(args.device)
    write_json(
        args.json,
        {
            "type": device.type,
            "machine": describe_machine(device),
            "driver": driver_version() if device.type == "cuda" else None,
            "versions": versions(),
            "bandwidth": bandwidth(device),
        },
    )


def driver_version() -> str | None:
    """The version of NVIDIA's driver; None where nvidia-smi does not say."""
    if shutil.which(_DRIVER[0]) is None:
        return None
    said = subprocess.run(_DRIVER, capture_output=True, text=True)
    lines = said.stdout.split()
    return lines[0] if said.returncode == 0 and lines else None


def versions() -> dict[str, str]:
    """Of Python, torch and, where they are installed, Triton and transformers."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


if __name__ == "__main__":
    run(main)
