"""Every golden trace of the A-VL authors' code, reproduced by the real cache through the same function as scripts/trace.py."""

from __future__ import annotations

import pytest
import torch

from golden_helpers import TRACES, load_inputs, load_model, load_trace
from minivlm.app.trace import expand, trace
from minivlm.cache.policies.avl import AVLSettings
from minivlm.cache.settings import CacheSettings
from minivlm.generation.vlm import VLM


def settings_of(config: dict) -> CacheSettings:
    text = config["text"]
    return AVLSettings(
        vision=config["vision"], vision_rate=config["vision_rate"], vision_compute_rate=config["vision_compute_rate"],
        vision_interval=config["vision_interval"], filter=config["prefill_filter"], filter_layer=config["filter_layer"],
        filter_rate=config["filter_rate"], text=text is not None, text_rate=config["text_rate"],
        text_init_cache=config["text_init_cache"], text_hh_rate=config["text_hh_rate"], text_h2o=text in (None, "h2o"),
        text_direct=text == "direct", all_h2o=config["all_h2o"],
    )  # fmt: skip


@pytest.mark.parametrize(("model", "config"), TRACES)
def test_trace(model: str, config: str) -> None:
    golden, about = load_trace(model, config)
    vlm, inputs = VLM(load_model(model)), load_inputs(model)
    sizes = inputs.get("image_sizes", torch.zeros(0)).tolist()
    features = vlm.image_features(inputs["pixel_values"], [tuple(size) for size in sizes])
    ids = expand(vlm, inputs["input_ids"][0], features)
    merged = vlm.model.embed(ids[None], features)[0]
    torch.testing.assert_close(merged, inputs["inputs_embeds"], atol=1e-4, rtol=1e-4)
    for forced in (None, golden["tokens"]):
        ours = trace(vlm, ids, features, 48, settings_of(about["config"]), forced)
        torch.testing.assert_close(ours["logits"], golden["logits"], atol=1e-3, rtol=0)
        for name in ("tokens", "fate", "vision_kept", "core_steps", "core"):
            assert (name in ours) == (name in golden), name
            if name in golden:
                assert ours[name].dtype == golden[name].dtype, name
                pair = (ours[name], golden[name])
                assert torch.equal(*(t.sort().values for t in pair) if name == "core" else pair), name
