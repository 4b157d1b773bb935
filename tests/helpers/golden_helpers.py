"""Loading the golden traces and their models (golden/README.md says what they are)."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file
from torch import Tensor

from minivlm.model.config import VLMConfig
from minivlm.model.llava import Llava
from paths import GOLDEN

MODELS = sorted(path.parent.name for path in GOLDEN.glob("*/index.json"))
TRACES = [(model, path.stem) for model in MODELS for path in sorted((GOLDEN / model / "golden").glob("*.json"))]
_PREFIXES = (
    ("language_model.model.", "language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.vision_model.", "vision_tower."),
)


def load_model(name: str) -> Llava:
    """The golden model in float32; tower weights behind the feature layer are left out."""
    folder = GOLDEN / name / "model"
    model = Llava(VLMConfig.from_dict(json.loads((folder / "config.json").read_text())))
    renamed = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        old, new = next(((old, new) for old, new in _PREFIXES if key.startswith(old)), ("", ""))
        renamed[new + key.removeprefix(old)] = tensor
    wanted = model.state_dict().keys()
    unused = {
        key for key in renamed if key.startswith(("vision_tower.post_layernorm.", "vision_tower.encoder.layers."))
    } - wanted
    model.load_state_dict({key: tensor for key, tensor in renamed.items() if key not in unused})
    return model.eval()


def load_inputs(name: str) -> dict[str, Tensor]:
    """The model's one prompt: input_ids (one token per image), pixel_values, image_sizes, inputs_embeds [L, C]."""
    return load_file(GOLDEN / name / "input.safetensors")


def expand_ids(model: Llava, inputs: dict[str, Tensor]) -> Tensor:
    """input_ids [L] with the one image token repeated to fill the merged length."""
    ids, image = inputs["input_ids"][0], model.config.image_token_index
    times = torch.where(ids == image, len(inputs["inputs_embeds"]) - len(ids) + 1, 1)
    return ids.repeat_interleave(times)


def load_trace(model: str, config: str) -> tuple[dict[str, Tensor], dict]:
    """One trace: its tensors and its metadata."""
    path = GOLDEN / model / "golden" / config
    return load_file(path.with_suffix(".safetensors")), json.loads(path.with_suffix(".json").read_text())
