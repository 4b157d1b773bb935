"""Matches the names of tensors on disk with the parameters of `minivlm.model.llava.Llava`.

Checkpoints name their tensors in three ways, the key layouts: (a) the hub's, (b) the module names
of transformers since 4.52, and (c) what transformers 5 saves, which is (a) with a shorter prefix
for the vision tower. They differ from ours in prefixes only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from minivlm.errors import UserError
from minivlm.model.config import VLMConfig
from minivlm.tensor_files import StoredTensor
from weights.read import DTYPES

_PREFIXES = (
    ("language_model.model.", "language_model."),  # (a), (c)
    ("language_model.lm_head.", "lm_head."),  # (a), (c)
    ("vision_tower.vision_model.", "vision_tower."),  # (a)
    ("model.language_model.", "language_model."),  # (b)
    ("model.vision_tower.vision_model.", "vision_tower."),  # (b)
    ("model.multi_modal_projector.", "multi_modal_projector."),  # (b)
    ("model.image_newline", "image_newline"),  # (b)
)
_BUFFERS = re.compile(r".*\.(inv_freq|position_ids)")  # computed here, but old checkpoints store them
_SHOWN = 4  # names that a message lists


def canonical(name: str) -> str:
    """The model's name for a tensor on disk."""
    for prefix, ours in _PREFIXES:
        if name.startswith(prefix):
            return ours + name[len(prefix) :]
    return name


def match(
    stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], config: VLMConfig, folder: Path
) -> dict[str, StoredTensor]:
    """Find the tensor on disk for each of the model's parameters.

    `stored` are the tensors on disk and `expected` the shapes of the parameters, each by name. The
    result has the names of `expected`. Buffers, and parts of the vision tower that are never used,
    are left out.

    Raises `UserError`, naming the tensors, for any that are missing, unexpected or there twice, and
    for a wrong shape or a dtype other than float32, float16 or bfloat16.
    """
    matches: dict[str, StoredTensor] = {}
    unexpected = []
    for name, tensor in stored.items():
        parameter = canonical(name)
        if parameter in matches:
            raise UserError(f"{tensor.file}: {name} and {matches[parameter].name} are the same tensor {parameter}")
        if parameter in expected:
            matches[parameter] = tensor
        elif not _BUFFERS.fullmatch(name) and not _unused(parameter, config):
            unexpected.append(name)
    problems = []
    if missing := [parameter for parameter in expected if parameter not in matches]:
        problems.append(f"missing {_some(missing)}")
    if unexpected:
        problems.append(f"unexpected {_some(unexpected)}")
    if problems:
        raise UserError(f"{folder}: the tensors do not fit config.json: {'; '.join(problems)}")
    for parameter, tensor in matches.items():
        if tensor.dtype not in DTYPES:
            raise UserError(f"{tensor.file}: {tensor.name} is {tensor.dtype} (expected {', '.join(DTYPES)})")
        if tensor.shape != tuple(expected[parameter]):
            raise UserError(
                f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}, "
                f"config.json asks for {list(expected[parameter])}"
            )
    return matches


def _unused(name: str, config: VLMConfig) -> bool:
    """Whether a tensor belongs to the vision tower after the last layer that LLaVA reads."""
    if name.startswith("vision_tower.post_layernorm."):
        return True
    layer = re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", name)
    if layer is None:
        return False
    # Feature layer i is the output of encoder layer i - 1, because layer 0 are the embeddings.
    return max(config.vision_feature_layers) <= int(layer[1]) < config.vision.num_hidden_layers


def _some(names: Sequence[str]) -> str:
    """How many names there are, and the first of them."""
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)}: {', '.join(names[:_SHOWN])}{rest}"
