"""From a checkpoint folder to a model that answers.

The modules are created on the meta device, which takes no memory. Then every parameter is allocated
once, in its final dtype on its final device, and filled from the files. Peak memory is therefore the
weights in that dtype plus a staging buffer of fixed size.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minivlm.errors import UserError
from minivlm.files import exists
from minivlm.generation.compile import missing_compiler
from minivlm.generation.vlm import VLM
from minivlm.inputs.processor import Processor
from minivlm.model.config import VLMConfig
from minivlm.model.llava import Llava
from minivlm.schema import read_json, read_optional_json
from weights.find import find_checkpoint
from weights.layout import by_canonical_name, match
from weights.read import fill, read_headers

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LARGE = 1 << 30  # bytes on disk above which a progress bar is shown


def load(
    model: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = False,
    pad_to_square: bool | None = None,
    progress: bool = True,
) -> VLM:
    """Load a LLaVA-1.5 or LLaVA-NeXT checkpoint.

    - `model`: a folder, a hub id (`owner/name`), or None for the bundled demo.
    - `device`: auto (CUDA if there is a GPU), cpu, cuda or cuda:N.
    - `dtype`: auto (the checkpoint's dtype on CUDA, float32 on the CPU), float32, bfloat16 or
      float16.
    - `compile`: run decode steps and the blocks of the prefill through torch.compile. Compiling
      takes about a minute, which only long answers or many of them earn back. Without a compiler
      everything runs eagerly, with a note on stderr.
    - `pad_to_square` (LLaVA-1.5 only): pad images with the mean colour, as the original LLaVA does,
      instead of cropping them, as transformers does. With None, the checkpoint decides.
    - `progress`: show a progress bar on stderr, if it is a terminal, for checkpoints larger than 1
      GiB.

    A folder without tokenizer.json makes a model without a processor, which takes ids and pixels
    but no text. Raises `UserError` for anything that is wrong with the checkpoint, and for weights
    that do not fit the device.
    """
    folder = find_checkpoint(model)
    # The small files are read first, so that mistakes in them are reported before gigabytes are
    # read.
    processor = None
    if exists(folder / "tokenizer.json"):
        processor = Processor.from_folder(folder, read_config(folder), pad_to_square=pad_to_square)
    llava = load_model(folder, device=device, dtype=dtype, progress=progress)
    missing = missing_compiler(llava.lm_head.weight.device) if compile else None
    if missing:
        print(f"note: everything runs eagerly: {missing}", file=sys.stderr)
    return VLM(llava, processor, compiled=compile and not missing)


def load_model(folder: Path, *, device: str = "auto", dtype: str = "auto", progress: bool = True) -> Llava:
    """The model alone, without gradients. Arguments and errors are those of `load`."""
    target = _device(device)
    config = read_config(folder)
    final_dtype = _dtype(dtype, config, target)

    # 1) Build the modules without memory, and find on disk what their parameters hold.
    with torch.device("meta"):
        model = Llava(config).to(final_dtype)
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(t.shape) for name, t in by_canonical_name(parameters, config.text).items()}
    stored = match(read_headers(folder), shapes, config, folder)

    # 2) Check that the weights fit. On Linux, allocating too much would not fail; the process would
    #    be killed later.
    needed = sum(parameter.nbytes for parameter in parameters.values())
    free = _free_bytes(target)
    if free is not None and needed > free:
        raise UserError(
            f"{folder}: the weights take {needed / 1e6:,.2f} MB in {str(final_dtype)[6:]}, "
            f"{target} has {free / 1e6:,.2f} MB free"
        )

    # 3) Allocate the parameters, fill them from the files and put them into the modules.
    try:
        filled = {name: torch.empty(p.shape, dtype=p.dtype, device=target) for name, p in parameters.items()}
    except RuntimeError as error:  # a limit on the process, or another process that was faster
        words = str(error).splitlines()[0]
        raise UserError(f"{folder}: the weights take {needed / 1e6:,.2f} MB, {target} has less ({words})") from None
    total = sum(tensor.nbytes for tensor in stored.values())
    quiet = None if progress and total > _LARGE else True  # None: quiet unless stderr is a terminal
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"loading {folder.name}", disable=quiet) as bar:
        fill(((stored[name], t) for name, t in by_canonical_name(filled, config.text).items()), bar.update)
    model.load_state_dict(filled, assign=True)
    return model.requires_grad_(False).eval()


def read_config(folder: Path) -> VLMConfig:
    """The configuration in a folder's `config.json` and `generation_config.json`, if there is one.

    Raises `UserError` if there is no `config.json`, or it describes something that is not
    supported.
    """
    if not exists(folder / "config.json"):
        raise UserError(f"{folder}: no config.json (expected a checkpoint folder in Hugging Face layout)")
    generation = read_optional_json(folder / "generation_config.json", dict[str, Any])
    return VLMConfig.from_dict(read_json(folder / "config.json", dict[str, Any]), generation)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]{0,2}))?", name):
        raise UserError(f"device {name!r} is not supported (expected auto, cpu, cuda or cuda:N)")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"device {name!r}: this machine has {count} CUDA devices that torch can use")
    return device


def _dtype(name: str, config: VLMConfig, device: torch.device) -> torch.dtype:
    if name not in ("auto", *_DTYPES):
        raise UserError(f"dtype {name!r} is not supported (expected auto, {', '.join(_DTYPES)})")
    if name == "auto":
        name = config.dtype if device.type == "cuda" else "float32"
    return _DTYPES[name]


def _free_bytes(device: torch.device) -> int | None:
    """The memory that can still be allocated on `device`, or None if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    available = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(available[0]) * 1024 if available else None
