"""The real cache reproduces every golden trace of the A-VL authors' code, through the function that trace.py calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from golden_helpers import TRACES, load_inputs, load_model, load_trace
from minivlm.app.trace import expand, trace
from minivlm.cache.policies.avl import AVLSettings
from minivlm.cache.settings import CacheSettings
from minivlm.generation.vlm import VLM


def settings_of_trace(config: dict[str, Any]) -> CacheSettings:
    """The settings that the metadata of a trace describes."""
    same_name = (
        "vision",
        "vision_rate",
        "vision_compute_rate",
        "vision_interval",
        "filter_layer",
        "filter_rate",
        "text_rate",
        "text_init_cache",
        "text_hh_rate",
        "all_h2o",
    )
    return AVLSettings(
        **{name: config[name] for name in same_name},
        filter=config["prefill_filter"],
        text=config["text"] is not None,
        text_h2o=config["text"] in (None, "h2o"),
        text_direct=config["text"] == "direct",
    )


@pytest.mark.parametrize(("model", "config"), TRACES)
def test_trace(model: str, config: str) -> None:
    golden, metadata = load_trace(model, config)
    vlm, inputs = VLM(load_model(model)), load_inputs(model)
    sizes = inputs.get("image_sizes", torch.zeros(0)).tolist()
    features = vlm.image_features(inputs["pixel_values"], [tuple(size) for size in sizes])
    ids = expand(vlm, inputs["input_ids"][0], features)
    merged = vlm.model.embed(ids[None], features)[0]
    torch.testing.assert_close(merged, inputs["inputs_embeds"], atol=1e-4, rtol=1e-4)
    for forced in (None, golden["tokens"]):
        ours = trace(vlm, ids, features, 48, settings_of_trace(metadata["config"]), forced)
        torch.testing.assert_close(ours["logits"], golden["logits"], atol=1e-3, rtol=0)
        for name in ("tokens", "fate", "vision_kept", "core_steps", "core"):
            assert (name in ours) == (name in golden), name
            if name not in golden:
                continue
            traced, expected = ours[name], golden[name]
            assert traced.dtype == expected.dtype, name
            if name == "core":  # in any order
                traced, expected = traced.sort().values, expected.sort().values
            assert torch.equal(traced, expected), name
