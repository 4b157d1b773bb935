"""Matches the names of tensors on disk with the parameters of `minivlm.model.llava.Llava`.

Checkpoints name their tensors in three ways, the key layouts: (a) the hub's, (b) the module names
of transformers since 4.52, and (c) what transformers 5 saves, which is (a) with a shorter prefix
for the vision tower. Without their prefixes, names are called canonical here. They are those of
our parameters, except that some of our matrices hold several of a checkpoint's, one below the other
(`part_rows`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from minivlm.errors import UserError
from minivlm.model.config import TextConfig, VLMConfig
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
    """The canonical name of a tensor on disk."""
    for prefix, ours in _PREFIXES:
        if name.startswith(prefix):
            return ours + name[len(prefix) :]
    return name


def part_rows(name: str, text: TextConfig) -> dict[str, int]:
    """The canonical names of the matrices that one of the model's parameters holds, and the rows of each, in order.

    Empty for a parameter that is a tensor of the checkpoint as it is.
    """
    q, kv = (heads * text.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads))
    fused = {
        "qkv_proj": {"q_proj": q, "k_proj": kv, "v_proj": kv},
        "gate_up_proj": {"gate_proj": text.intermediate_size, "up_proj": text.intermediate_size},
    }
    for module, parts in fused.items():
        if name.endswith(f".{module}.weight"):
            return {name.replace(module, part): rows for part, rows in parts.items()}
    return {}


def by_canonical_name(parameters: Mapping[str, Tensor], text: TextConfig) -> dict[str, Tensor]:
    """The model's parameters, or tensors like them, as a checkpoint has them: views, which share their memory."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if rows := part_rows(name, text):
            tensors |= zip(rows, parameter.split(list(rows.values())), strict=True)
        else:
            tensors[name] = parameter
    return tensors


def match(
    stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], config: VLMConfig, folder: Path
) -> dict[str, StoredTensor]:
    """Find the tensor on disk for each tensor that the model needs.

    `stored` are the tensors on disk, and `expected` the shapes of those that are needed, by
    canonical name, which the result has as well. Buffers, and parts of the vision tower that are
    never used, are left out.

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
