"""The model against transformers, stage by stage, in float32: tower, projector, packing, logits, greedy tokens."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from minivlm.model.config import VLMConfig
from parity import CASES, GOLDEN, load_reference, make_prompt, ours, reference, thin
from weights import load_model


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """(family, kv_heads) -> what transformers computes for each case; made once."""
    pytest.importorskip("transformers")

    @cache
    def results(family: str, kv_heads: int) -> dict[str, dict[str, torch.Tensor]]:
        folder = tiny.write(tmp_path_factory.mktemp("oracle"), family, kv_heads=kv_heads, tokenizer=False)
        model, config = load_reference(folder), load_model(folder, device="cpu").config
        return {case: reference(model, make_prompt(config, case)) for case in CASES}

    return results


def compare(results: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert results.keys() == wanted.keys()
    for name in wanted:
        if name == "tokens":
            assert results[name].tolist() == wanted[name].tolist()
        else:
            message = f"{name}: {{}}".format
            torch.testing.assert_close(results[name], wanted[name], rtol=0, atol=1e-4, msg=message)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_against_transformers(tmp_path, oracle, family, kv_heads, layout):
    wanted = oracle(family, kv_heads)
    folder = tiny.write(tmp_path, family, kv_heads=kv_heads, layout=layout, shards=1 + (layout == "b"), tokenizer=False)
    model = load_model(folder, device="cpu")
    prompts = [make_prompt(model.config, case) for case in CASES]
    for prompt, case in zip(prompts, CASES, strict=True):
        compare(ours(model, [prompt])[0], wanted[case])
    for results, case in zip(ours(model, prompts), CASES, strict=True):  # the same three as one ragged batch
        compare(results, wanted[case])


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_against_frozen_answers(tmp_path, family, kv_heads):
    """The same as above, where transformers is not installed."""
    golden = load_file(GOLDEN / f"{family}.safetensors")
    model = load_model(tiny.write(tmp_path, family, kv_heads=kv_heads, tokenizer=False), device="cpu")
    for case in CASES:
        prefix = f"{kv_heads}/{case}/"
        wanted = {name.removeprefix(prefix): tensor for name, tensor in golden.items() if name.startswith(prefix)}
        compare(thin(ours(model, [make_prompt(model.config, case)])[0]), wanted)


@pytest.mark.parametrize("family", ["llava-1.5", "next-vicuna"])
@pytest.mark.parametrize("layers", [-1, 2, [-2], [1, -1], [-2, 0, 3]])  # transformers itself fails on the int 0
def test_vision_feature_layer(tmp_path, family, layers):
    pytest.importorskip("transformers")
    folder = tiny.write(tmp_path, family, vision_feature_layer=layers, tokenizer=False)
    model = load_model(folder, device="cpu")
    prompt = make_prompt(model.config, "one image")
    compare(ours(model, [prompt])[0], reference(load_reference(folder), prompt))


def test_selecting_the_class_token_too(tmp_path):
    pytest.importorskip("transformers")
    folder = tiny.write(tmp_path, "llava-1.5", vision_feature_select_strategy="full", tokenizer=False)
    model = load_model(folder, device="cpu")
    prompt = make_prompt(model.config, "two images")
    compare(ours(model, [prompt])[0], reference(load_reference(folder), prompt))


@pytest.mark.parametrize("family", ["llava-1.5", "next-mistral", "next-llama3"])
@pytest.mark.parametrize("shard_size", ["50GB", "200KB"])
def test_a_folder_saved_by_transformers(tmp_path: Path, family, shard_size):
    pytest.importorskip("transformers")
    saved = load_reference(tiny.write(tmp_path / "ours", family, tokenizer=False))
    saved.save_pretrained(tmp_path / "theirs", max_shard_size=shard_size)
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == (shard_size == "200KB")
    model = load_model(tmp_path / "theirs", device="cpu")
    assert model.config == load_model(tmp_path / "ours", device="cpu").config
    prompt = make_prompt(model.config, "one image")
    compare(ours(model, [prompt])[0], reference(saved, prompt))


@pytest.mark.parametrize("text_type", ["llama", "mistral"])
@pytest.mark.parametrize("model_type", ["llava", "llava_next"])
def test_what_a_sparse_config_leaves_out(model_type, text_type):
    """Hub configs state little; the rest are the defaults of transformers' config classes."""
    transformers = pytest.importorskip("transformers")
    sparse = {
        "model_type": model_type,
        "text_config": {"model_type": text_type, "vocab_size": 32064},
        "vision_config": {"model_type": "clip_vision_model"},
    }
    if model_type == "llava_next":  # the default pinpoints are multiples of 336, the default tile is not
        sparse["vision_config"]["image_size"] = 336
    theirs = transformers.AutoConfig.for_model(**sparse)
    ours = VLMConfig.from_dict(sparse)
    shared = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for field in (*shared, "num_key_value_heads"):
        assert getattr(ours.text, field) == getattr(theirs.text_config, field), field
    assert ours.text.rms_norm_eps == theirs.text_config.rms_norm_eps
    assert ours.text.rope_theta == theirs.text_config.rope_parameters["rope_theta"]
    window = getattr(theirs.text_config, "sliding_window", None) or theirs.text_config.max_position_embeddings
    assert ours.text.context_length == min(window, theirs.text_config.max_position_embeddings)
    for field in (*shared, "image_size", "patch_size", "hidden_act"):
        assert getattr(ours.vision, field) == getattr(theirs.vision_config, field), field
    assert ours.vision.layer_norm_eps == theirs.vision_config.layer_norm_eps
    assert ours.image_token_index == theirs.image_token_index
    assert ours.select_strategy == theirs.vision_feature_select_strategy
    assert ours.vision_feature_layers == (theirs.vision_config.num_hidden_layers + 1 + theirs.vision_feature_layer,)
    pinpoints = [list(pair) for pair in getattr(theirs, "image_grid_pinpoints", [])]
    assert [list(pair) for pair in ours.image_grid_pinpoints] == pinpoints
