"""Names on disk -> names of `minivlm.model.llava.Llava`, and the strict comparison of the two.

Three key layouts are in use: (a) the hub's, (b) the module names of transformers since 4.52, and (c) what
transformers 5 saves, which is (a) with a shorter tower prefix.  All are renames of prefixes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from minivlm.errors import UserError
from minivlm.model.config import VLMConfig
from weights.read import DTYPES, StoredTensor

_PREFIXES = (
    ("language_model.model.", "language_model."),  # (a), (c)
    ("language_model.lm_head.", "lm_head."),  # (a), (c)
    ("vision_tower.vision_model.", "vision_tower."),  # (a)
    ("model.language_model.", "language_model."),  # (b)
    ("model.vision_tower.vision_model.", "vision_tower."),  # (b)
    ("model.multi_modal_projector.", "multi_modal_projector."),  # (b)
    ("model.image_newline", "image_newline"),  # (b)
)
_BUFFERS = re.compile(r".*\.(inv_freq|position_ids)")  # recomputed by the model; old checkpoints store them
_SHOWN = 4  # names in an error line


def canonical(name: str) -> str:
    """The model's name for a tensor on disk."""
    for prefix, ours in _PREFIXES:
        if name.startswith(prefix):
            return ours + name[len(prefix) :]
    return name


def match(
    stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], config: VLMConfig, folder: Path
) -> dict[str, StoredTensor]:
    """Assign the tensors on disk to the model's parameters: {parameter name: stored tensor}.

    Buffers, and the parts of the tower behind the last feature layer, are left out.  Raises `UserError`
    naming the tensors that are missing, left over, double, of another shape or of a dtype that is not
    float32, float16 or bfloat16.
    """
    found: dict[str, StoredTensor] = {}
    unexpected = []
    for name, tensor in stored.items():
        ours = canonical(name)
        if ours in found:
            raise UserError(f"{tensor.file}: {name} and {found[ours].name} are the same tensor {ours}")
        if ours in expected:
            found[ours] = tensor
        elif not _BUFFERS.fullmatch(name) and not _unused(ours, config):
            unexpected.append(name)
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"missing {_some(missing)}")
    if unexpected:
        problems.append(f"unexpected {_some(unexpected)}")
    if problems:
        raise UserError(f"{folder}: the tensors do not fit config.json: {'; '.join(problems)}")
    for ours, tensor in found.items():
        if tensor.dtype not in DTYPES:
            raise UserError(f"{tensor.file}: {tensor.name} is {tensor.dtype} (expected {', '.join(DTYPES)})")
        if tensor.shape != tuple(expected[ours]):
            raise UserError(
                f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}, config.json asks for {list(expected[ours])}"
            )
    return found


def _unused(name: str, config: VLMConfig) -> bool:
    """In every checkpoint, but behind the last feature layer of the tower."""
    if name.startswith("vision_tower.post_layernorm."):
        return True
    layer = re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", name)
    return layer is not None and max(config.vision_feature_layers) <= int(layer[1]) < config.vision.num_hidden_layers


def _some(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)}: {', '.join(names[:_SHOWN])}{rest}"
