"""From a checkpoint folder to a model that answers.

The modules are created on the meta device, which costs nothing; then every parameter is allocated once, in
its final dtype on its final device, and filled from the file.  Peak resident memory is the weights in that
dtype plus a fixed staging buffer.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from minivlm.errors import UserError
from minivlm.files import read_json_object
from minivlm.generation.compile import missing_compiler
from minivlm.generation.vlm import VLM
from minivlm.inputs.processor import Processor
from minivlm.model.config import VLMConfig
from minivlm.model.llava import Llava
from weights.find import find_checkpoint
from weights.layout import match
from weights.read import fill, read_headers

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LARGE = 1 << 30  # bytes on disk from which on a progress bar is worth its line


def load(
    model: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = False,
    pad_to_square: bool | None = None,
    progress: bool = True,
) -> VLM:
    """Load a LLaVA-1.5 or LLaVA-NeXT checkpoint: a folder, a hub id (`owner/name`), or None for the bundled demo.

    - `device`: auto (CUDA where there is one), cpu, cuda or cuda:N.
    - `dtype`: auto (the checkpoint's on CUDA, float32 on the CPU), float32, bfloat16 or float16.
    - `compile`: run decode steps and the blocks of a prefill through torch.compile, which takes a minute or so at first, so
      that only long answers or many earn it back.  Where there is no compiler all runs eagerly, with a line on stderr.
    - `pad_to_square` (LLaVA-1.5): pad images with the mean colour, as the original LLaVA does, where transformers crops
      them; None means what the checkpoint says.
    - `progress`: a bar on a terminal's stderr for what is larger than 1 GiB.

    A folder without tokenizer.json loads with `processor` None: such a model takes ids and pixels, not text.  Raises
    `UserError` for whatever is wrong with the checkpoint or does not fit the device.
    """
    folder = find_checkpoint(model)
    # First what is small, so that a mistake in it is told before gigabytes are read.
    processor = None
    if (folder / "tokenizer.json").is_file():
        processor = Processor.from_folder(folder, read_config(folder), pad_to_square=pad_to_square)
    loaded = load_model(folder, device=device, dtype=dtype, progress=progress)
    where = loaded.lm_head.weight.device
    missing = missing_compiler(where) if compile else None
    if missing:
        print(f"note: all runs eagerly: {missing}", file=sys.stderr)
    return VLM(loaded, processor, compiled=compile and not missing)


def load_model(folder: Path, *, device: str = "auto", dtype: str = "auto", progress: bool = True) -> Llava:
    """The model alone, in evaluation mode and without gradients; arguments and errors as `load`."""
    where = _device(device)
    config = read_config(folder)
    if dtype not in ("auto", *_DTYPES):
        raise UserError(f"dtype {dtype!r} is not supported (expected auto, {', '.join(_DTYPES)})")
    wanted = _DTYPES[dtype if dtype != "auto" else config.dtype if where.type == "cuda" else "float32"]

    with torch.device("meta"):
        model = Llava(config).to(wanted)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    stored = match(read_headers(folder), shapes, config, folder)
    needed, free = sum(p.nbytes for p in model.parameters()), _free_bytes(where)
    if free is not None and needed > free:
        raise UserError(
            f"{folder}: the weights take {needed / 1e6:,.2f} MB in {str(wanted)[6:]}, {where} has {free / 1e6:,.2f} MB free"
        )
    filled = {name: torch.empty(shape, dtype=wanted, device=where) for name, shape in shapes.items()}
    total = sum(tensor.nbytes for tensor in stored.values())
    quiet = None if progress and total > _LARGE else True  # None: shown where stderr is a terminal
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"loading {folder.name}", disable=quiet) as bar:
        fill(((stored[name], filled[name]) for name in shapes), bar.update)
    model.load_state_dict(filled, assign=True)
    return model.requires_grad_(False).eval()


def read_config(folder: Path) -> VLMConfig:
    """The `config.json` of a folder, with the `generation_config.json` beside it if there is one."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json (expected a checkpoint folder in Hugging Face layout)")
    return VLMConfig.from_dict(read_json_object(folder / "config.json"), read_json_object(folder / "generation_config.json"))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"device {name!r} is not supported (expected auto, cpu, cuda or cuda:N)")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices that torch can use"
        )
    return device


def _free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on `device`; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
