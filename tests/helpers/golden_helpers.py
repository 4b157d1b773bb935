"""Load the golden traces and their models. tests/golden/README.md says what they are."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file
from torch import Tensor

from minivlm.model.config import VLMConfig
from minivlm.model.llava import Llava
from paths import GOLDEN
from weights.layout import by_canonical_name

MODELS = sorted(path.parent.name for path in GOLDEN.glob("*/index.json"))
TRACES = [(model, path.stem) for model in MODELS for path in sorted((GOLDEN / model / "golden").glob("*.json"))]
_PREFIXES = (
    ("language_model.model.", "language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.vision_model.", "vision_tower."),
)
_UNUSED = ("vision_tower.post_layernorm.", "vision_tower.encoder.layers.")


def load_model(name: str) -> Llava:
    """The golden model, in float32."""
    folder = GOLDEN / name / "model"
    model = Llava(VLMConfig.from_dict(json.loads((folder / "config.json").read_text())))
    ours = by_canonical_name(model.state_dict(), model.config.text)
    tensors = {_our_name(key): tensor for key, tensor in load_file(folder / "model.safetensors").items()}
    # The file also has the parts of the tower that come after the feature layer, which our tower does not build.
    assert all(key.startswith(_UNUSED) for key in tensors.keys() - ours)
    for key, tensor in ours.items():
        tensor.copy_(tensors[key])
    return model.eval()


def _our_name(key: str) -> str:
    for theirs, ours in _PREFIXES:
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def load_inputs(name: str) -> dict[str, Tensor]:
    """The model's only prompt: input_ids [1, S], pixel_values, image_sizes and inputs_embeds [L, C].

    The ids have one token for the image; L is the length with the image's features in its place.
    """
    return load_file(GOLDEN / name / "input.safetensors")


def expand_ids(model: Llava, inputs: dict[str, Tensor]) -> Tensor:
    """The ids [L] of the prompt, its only image token repeated once per image feature."""
    ids = inputs["input_ids"][0]
    image_features = len(inputs["inputs_embeds"]) - len(ids) + 1
    return ids.repeat_interleave(torch.where(ids == model.config.image_token_index, image_features, 1))


def load_trace(model: str, config: str) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the metadata of one trace."""
    path = GOLDEN / model / "golden" / config
    return load_file(path.with_suffix(".safetensors")), json.loads(path.with_suffix(".json").read_text())
