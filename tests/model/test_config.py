"""config.json and generation_config.json: what real ones say, and hostile ones refused in one line each."""

from __future__ import annotations

import copy
import json

import pytest

import tiny
from minivlm.errors import UserError
from minivlm.model.config import TextConfig, VisionConfig, VLMConfig

CLIP = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
NEXT = {
    "ignore_index": -100,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "model_type": "llava_next",
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_image_newline_parameter": True,
    "vision_config": CLIP,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
VICUNA = {
    "_name_or_path": "lmsys/vicuna-7b-v1.5",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "float16",
    "vocab_size": 32064,
}
LARGER = {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_hidden_layers": 40}
MISTRAL = {
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}
YI = {
    "bos_token_id": 1,
    "eos_token_id": 7,
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 56,
    "num_hidden_layers": 60,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "vocab_size": 64064,
}
LLAMA3 = {
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128009],
    "head_dim": None,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 500000, "rope_type": "default"},
    "vocab_size": 128320,
}
LLAVA_15 = {key: value for key, value in NEXT.items() if key != "image_grid_pinpoints"} | {"model_type": "llava"}
# As on the hub: what each config.json says, and (H, H_kv, D, layers, MLP, theta, context, image token, ends) of it.
REAL = {
    "llava-1.5-7b-hf": (
        {**LLAVA_15, "image_token_index": 32000, "text_config": VICUNA},
        (32, 32, 128, 32, 11008, 1e4, 4096, 32000, (2,)),
    ),
    "llava-1.5-13b-hf": (
        {**LLAVA_15, "image_token_index": 32000, "text_config": VICUNA | LARGER},
        (40, 40, 128, 40, 13824, 1e4, 4096, 32000, (2,)),
    ),
    "llava-v1.6-vicuna-7b-hf": (
        {**NEXT, "image_token_index": 32000, "text_config": VICUNA},
        (32, 32, 128, 32, 11008, 1e4, 4096, 32000, (2,)),
    ),
    "llava-v1.6-mistral-7b-hf": (
        {**NEXT, "image_token_index": 32000, "text_config": MISTRAL},
        (32, 8, 128, 32, 14336, 1e6, 32768, 32000, (2,)),
    ),
    "llava-v1.6-34b-hf": (
        {**NEXT, "image_token_index": 64000, "text_config": YI},
        (56, 8, 128, 60, 20480, 5e6, 4096, 64000, (7,)),
    ),
    "llama3-llava-next-8b-hf": (
        {**NEXT, "image_token_index": 128256, "text_config": LLAMA3},
        (32, 8, 128, 32, 14336, 5e5, 8192, 128256, (128001, 128009)),
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_configs_of_the_hub(name):
    raw, expected = REAL[name]
    config = VLMConfig.from_dict(raw)
    text = config.text
    heads = (text.num_attention_heads, text.num_key_value_heads, text.head_dim)
    sizes = (text.num_hidden_layers, text.intermediate_size, text.rope_theta, text.context_length)
    assert (*heads, *sizes, config.image_token_index, config.eos_token_ids) == expected
    assert config.vision == VisionConfig(1024, 4096, 24, 16, 336, 14, 1e-5, "quick_gelu")
    assert config.image_grid_pinpoints == tuple(map(tuple, raw.get("image_grid_pinpoints", ())))
    assert (config.vision_feature_layers, config.select_strategy, config.dtype) == ((23,), "default", "float16")


def test_ends_of_an_answer_are_collected():
    raw = tiny.make_config("next-34b") | {"eos_token_id": [9, 7]}
    assert VLMConfig.from_dict(raw, {"eos_token_id": [5, 9]}).eos_token_ids == (5, 9, 7)
    # transformers takes these too: such ids never come.
    assert VLMConfig.from_dict(raw, {"eos_token_id": [-1, 10**6]}).eos_token_ids == (-1, 10**6, 7, 9)


def test_null_is_a_value_only_where_transformers_has_one():
    raw = tiny.make_config("next-vicuna", image_grid_pinpoints=None, torch_dtype=None, eos_token_id=None)
    raw["vision_config"] |= {"image_size": 336}
    raw["text_config"] |= dict.fromkeys(
        ("num_key_value_heads", "head_dim", "sliding_window", "rope_scaling", "rope_parameters", "torch_dtype")
    )
    config = VLMConfig.from_dict(raw)
    assert config.text.num_key_value_heads == 4 and config.text.head_dim == 16
    assert len(config.image_grid_pinpoints) == 5 and config.dtype == "float32"
    refused({"text_config": {"hidden_size": None}}, "text_config.hidden_size: expected int, got null")


def refused(changes: dict, said: str, generation: object = None) -> None:
    """A good config with `changes` is refused in one short line that begins with `said` behind the file's name."""
    raw = copy.deepcopy(tiny.make_config("next-mistral"))
    for key, value in changes.items():
        if key in ("text_config", "vision_config") and isinstance(value, dict):
            raw[key] |= value
        else:
            raw[key] = value
    with pytest.raises(UserError) as caught:
        VLMConfig.from_dict(raw, generation)
    message = str(caught.value)
    file = "config.json" if generation is None else "generation_config.json"
    assert message.startswith(f"{file}: {said}") and "\n" not in message and len(message) < 300


HUGE = 10**30
NO_NUMBERS = ["4", [4], {}, None, True, 1.5, float("nan"), float("inf"), 0, -1, HUGE]
COUNTS = {
    "text_config": (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ),
    "vision_config": (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
    ),
}


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("section, key", [(section, key) for section in COUNTS for key in COUNTS[section]])
def test_counts(section, key, value):
    refused({section: {key: value}}, f"{section}.{key}: expected int")


@pytest.mark.parametrize("value", ["x", [1.0], {}, None, True, float("nan"), float("inf"), -1e-6, 0, 1e-300, 1e300])
@pytest.mark.parametrize(
    "section, key",
    [("text_config", "rms_norm_eps"), ("text_config", "rope_theta"), ("vision_config", "layer_norm_eps")],
)
def test_numbers(section, key, value):
    refused({section: {key: value}}, f"{section}.{key}: expected float")


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("text_config", "num_hidden_layers", 10**9),
        ("text_config", "num_hidden_layers", 1000),
        ("text_config", "vocab_size", 10**15),
        ("text_config", "hidden_size", 2**21),
        ("text_config", "num_key_value_heads", 10**6),
        ("text_config", "head_dim", 10**6),
        ("text_config", "sliding_window", 0),
        ("vision_config", "image_size", 10**9),
    ],
)
def test_sizes_that_cannot_be_meant(section, key, value):
    refused({section: {key: value}}, f"{section}.{key}: expected int")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model_type": []}, "model_type: expected str, got array"),
        ({"model_type": None}, "model_type: expected str, got null"),
        ({"model_type": "x" * 10**6}, "model_type: expected str of length <= 64"),
        ({"model_type": "qwen2_vl"}, "model_type 'qwen2_vl' is not supported (expected llava or llava_next)"),
        ({"text_config": []}, "text_config: expected object, got array"),
        ({"text_config": None}, "text_config: expected object, got null"),
        ({"vision_config": "x"}, "vision_config: expected object, got str"),
        ({"text_config": {"model_type": {}}}, "text_config.model_type: expected str, got object"),
        ({"text_config": {"model_type": "gemma"}}, "text_config.model_type 'gemma' is not supported"),
        ({"vision_config": {"model_type": "siglip"}}, "vision_config.model_type 'siglip' is not supported"),
        ({"text_config": {"rope_scaling": 5}}, "text_config.rope_scaling: expected object | null, got int"),
        ({"text_config": {"rope_parameters": []}}, "text_config.rope_parameters: expected object | null"),
        ({"text_config": {"rope_scaling": {"type": []}}}, "text_config.rope_scaling.type: expected str"),
        ({"text_config": {"rope_scaling": {"type": "linear"}}}, "text_config rope type 'linear' is not supported"),
        (
            {"text_config": {"rope_parameters": {"rope_theta": float("nan")}}},
            "text_config.rope_parameters.rope_theta: expected float",
        ),
        ({"text_config": {"hidden_act": ["silu"]}}, "text_config.hidden_act: expected str"),
        ({"text_config": {"hidden_act": "gelu"}}, "text_config.hidden_act 'gelu' is not supported (expected silu)"),
        ({"text_config": {"attention_bias": "no"}}, "text_config.attention_bias: expected bool"),
        ({"text_config": {"mlp_bias": True}}, "text_config.mlp_bias True is not supported (expected False)"),
        ({"text_config": {"num_attention_heads": 3}}, "text_config.num_attention_heads 3 is not a multiple"),
        ({"text_config": {"head_dim": 7}}, "text_config.head_dim 7 is odd"),
        ({"text_config": {"eos_token_id": [[2]]}}, "text_config.eos_token_id[0]: expected int"),
        ({"vision_config": {"num_channels": 4}}, "vision_config.num_channels 4 is not supported (expected 3)"),
        ({"vision_config": {"hidden_act": "relu"}}, "vision_config.hidden_act 'relu' is not supported"),
        ({"vision_config": {"num_attention_heads": 5}}, "vision_config.hidden_size 32 is not a multiple"),
        ({"vision_config": {"patch_size": 57}}, "vision_config.image_size 56 makes 0 patches"),
        ({"vision_config": {"image_size": 4096, "patch_size": 1}}, "vision_config.image_size 4096 makes 4096 patches"),
        ({"image_token_index": "x"}, "image_token_index: expected int"),
        ({"image_token_index": True}, "image_token_index: expected int"),
        ({"image_token_index": -1}, "image_token_index -1 is not a token id below vocab_size 384"),
        ({"image_token_index": HUGE}, f"image_token_index {HUGE} is not a token id"),
        ({"vision_feature_layer": "x"}, "vision_feature_layer: expected int | array"),
        ({"vision_feature_layer": []}, "vision_feature_layer: expected array of length >= 1"),
        ({"vision_feature_layer": [-2] * 1000}, "vision_feature_layer: expected array of length <= 256"),
        ({"vision_feature_layer": [True]}, "vision_feature_layer[0]: expected int, got bool"),
        ({"vision_feature_layer": HUGE}, f"vision_feature_layer {HUGE} does not index the tower's 3 layers"),
        ({"vision_feature_select_strategy": {}}, "vision_feature_select_strategy: expected str"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy 'full' has no meaning"),
        ({"projector_hidden_act": None}, "projector_hidden_act: expected str"),
        ({"multimodal_projector_bias": "false"}, "multimodal_projector_bias: expected bool"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings True is not supported"),
        ({"image_grid_pinpoints": 5}, "image_grid_pinpoints: expected array | null, got int"),
        ({"image_grid_pinpoints": []}, "image_grid_pinpoints: expected array of length >= 1"),
        ({"image_grid_pinpoints": [56, 56]}, "image_grid_pinpoints[0]: expected array, got int"),
        ({"image_grid_pinpoints": [[56]]}, "image_grid_pinpoints[0]: expected array of length 2"),
        ({"image_grid_pinpoints": [[float("inf"), 56]]}, "image_grid_pinpoints[0][0]: expected int"),
        ({"image_grid_pinpoints": [["56", 56]]}, "image_grid_pinpoints[0][0]: expected int, got str"),
        ({"image_grid_pinpoints": [[0, 56]]}, "image_grid_pinpoints[0][0]: expected int >= 1"),
        ({"image_grid_pinpoints": [[56, 57]]}, "image_grid_pinpoints has (56, 57), no (height, width) in multiples"),
        ({"image_grid_pinpoints": [[56, 56 * 10**6]]}, "image_grid_pinpoints[0][1]: expected int <= 65536"),
        ({"image_grid_pinpoints": [[56000, 56000]]}, "image_grid_pinpoints has (56000, 56000), more than"),
        ({"image_grid_pinpoints": [[56, 56]] * 1000}, "image_grid_pinpoints: expected array of length <= 256"),
        ({"eos_token_id": "x"}, "eos_token_id: expected int | array | null, got str"),
        ({"eos_token_id": [True]}, "eos_token_id[0]: expected int, got bool"),
        ({"eos_token_id": HUGE}, "eos_token_id: expected int <"),
        ({"eos_token_id": [2] * 10**5}, "eos_token_id: expected array of length <= 1024"),
        ({"torch_dtype": 16}, "torch_dtype: expected str | null, got int"),
        ({"torch_dtype": "int8"}, "dtype 'int8' is not supported (expected float32 or bfloat16 or float16)"),
    ],
)
def test_what_is_refused(changes, said):
    refused(changes, said)


@pytest.mark.parametrize(
    "generation, said",
    [
        ([], "expected object, got array"),
        ({"eos_token_id": "x"}, "eos_token_id: expected int"),
        ({"eos_token_id": [2, None]}, "eos_token_id[1]: expected int, got null"),
        ({"eos_token_id": 2.0}, "eos_token_id: expected int"),
        ({"eos_token_id": {"2": 2}}, "eos_token_id: expected int"),
    ],
)
def test_generation_config(generation, said):
    refused({}, said, generation)


def test_missing_sections():
    for section in ("text_config", "vision_config"):
        raw = tiny.make_config("llava-1.5")
        del raw[section]
        with pytest.raises(UserError, match=f"^config.json: {section} is missing$"):
            VLMConfig.from_dict(raw)
    with pytest.raises(UserError, match=r"^config\.json: model_type None is not supported"):
        VLMConfig.from_dict({})


def test_unknown_keys_are_ignored():
    raw = json.loads(json.dumps(REAL["llava-v1.6-34b-hf"][0]))
    expected = VLMConfig.from_dict(raw)
    for section in (raw, raw["text_config"], raw["vision_config"]):
        section |= {"id2label": {"0": []}, "transformers_version": None, "temperature": 1.5}
    assert VLMConfig.from_dict(raw) == expected
    assert TextConfig.from_dict({}).hidden_size == 4096 and VisionConfig.from_dict({}).image_size == 224
