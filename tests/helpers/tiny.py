"""Tiny random checkpoints in Hugging Face layout, for every family, key layout and config generation.

Written by hand, without transformers, so that the tests also run where it is missing.  The weights are
uniform and come from integers of the generator alone: the same on every machine, which the goldens need.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

FAMILIES = ("llava-1.5", "next-vicuna", "next-mistral", "next-llama3", "next-34b")
LAYOUTS = ("a", "b", "c")  # the three ways in which checkpoints name their tensors; see weights/layout.py
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
VOCAB = 384  # padded, as on the hub, to a multiple of 64
_TEXT = {
    "llava-1.5": dict(model_type="llama", rms_norm_eps=1e-5),
    "next-vicuna": dict(model_type="llama", rms_norm_eps=1e-5),
    "next-mistral": dict(model_type="mistral", rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None),
    "next-llama3": dict(model_type="llama", rms_norm_eps=1e-5, rope_theta=5e5),
    "next-34b": dict(model_type="llama", rms_norm_eps=1e-5, rope_theta=5e6),
}
_PREFIXES = {
    "a": {
        "language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "vision_tower.": "vision_tower.vision_model.",
    },
    "b": {
        "language_model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "image_newline": "model.image_newline",
    },
    "c": {"language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
}
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ ' ' if message['role'] == 'user' else eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def write(
    folder: Path,
    family: str = "next-vicuna",
    *,
    layout: str = "a",
    shards: int = 1,
    generation: str = "old",
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    seed: int = 0,
    **overrides: object,
) -> Path:
    """Write a checkpoint folder and return it.

    `generation`: "old" writes config files as up to transformers 4, "new" as 5 does.  `overrides` replace
    entries of config.json; those of `text_config` and `vision_config` are merged into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(family, generation=generation, kv_heads=kv_heads, dtype=dtype, **overrides)
    tensors = {on_disk(name, layout): tensor for name, tensor in make_tensors(config, seed).items()}
    if layout == "a":  # what old checkpoints also hold, and loading skips
        positions = (config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]) ** 2 + 1
        tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(positions)[None]
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save(folder, {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}, shards)
    dump(folder / "config.json", config)
    dump(
        folder / "generation_config.json",
        {"bos_token_id": 1, "eos_token_id": config["text_config"].get("eos_token_id", 2)},
    )
    if tokenizer:
        write_tokenizer(folder, family, generation)
        write_processor(folder, config, generation)
    return folder


def make_config(
    family: str, *, generation: str = "old", kv_heads: int = 2, dtype: torch.dtype = torch.float32, **overrides
) -> dict:
    """A `config.json` as sparse as the hub's."""
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "vocab_size": VOCAB,
        **_TEXT[family],
    }
    if family == "next-llama3":
        text |= {"bos_token_id": 256, "eos_token_id": [257, 258]}
    if family == "next-34b":
        text |= {"eos_token_id": 7}
    if generation == "new":
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": text.pop("rope_theta", 10000.0)}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    is_next = family != "llava-1.5"
    config = {
        "architectures": ["LlavaNextForConditionalGeneration" if is_next else "LlavaForConditionalGeneration"],
        "model_type": "llava_next" if is_next else "llava",
        "image_token_index": build_tokenizer(family).token_to_id("<image>"),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": text | overrides.pop("text_config", {}),
        "vision_config": vision | overrides.pop("vision_config", {}),
        "dtype" if generation == "new" else "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if is_next:
        config["image_grid_pinpoints"] = PINPOINTS
    return config | overrides


def make_tensors(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor that transformers saves for `config`, by the names of `minivlm.model.llava.Llava`, in float32."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _random(name, shape, generator) for name, shape in shapes(config)}


def on_disk(name: str, layout: str) -> str:
    """The name a tensor has in a key layout."""
    for ours, theirs in _PREFIXES[layout].items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


def save(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """model.safetensors, or `shards` files and their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names, index = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    size = sum(t.nbytes for t in tensors.values())
    dump(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": index})


def build_tokenizer(family: str) -> Tokenizer:
    """A byte-level tokenizer for Llama 3, one with byte fallback for the others; `<image>` comes last but one."""
    if family == "next-llama3":
        vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
        bos = "<|begin_of_text|>"
    else:
        pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
        merges = [
            ("t", "h"),
            ("th", "e"),
            ("▁", "the"),
            ("i", "n"),
            ("▁", "a"),
            ("e", "r"),
            ("▁", "w"),
            ("o", "u"),
            ("h", "a"),
        ]
        pieces += ["".join(pair) for pair in merges]
        tokenizer = Tokenizer(
            models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, unk_token="<unk>", byte_fallback=True)
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special, bos = ["<unk>", "<s>", "</s>"], "<s>"
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in [*special, "<image>", "<pad>"]]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def write_tokenizer(folder: Path, family: str, generation: str = "old") -> None:
    """tokenizer.json, its config, and the chat template where `generation` puts it."""
    build_tokenizer(family).save(str(folder / "tokenizer.json"))
    llama3 = family == "next-llama3"
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast" if llama3 else "LlamaTokenizer",
        "bos_token": "<|begin_of_text|>" if llama3 else "<s>",
        "eos_token": "<|eot_id|>" if llama3 else "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "image_token": "<image>",
    }
    dump(folder / "tokenizer_config.json", settings if llama3 else settings | {"unk_token": "<unk>", "legacy": False})
    if generation == "new":
        (folder / "chat_template.jinja").write_text(_TEMPLATE)
    else:
        dump(folder / "chat_template.json", {"chat_template": _TEMPLATE})


def write_processor(folder: Path, config: dict, generation: str = "old") -> None:
    """The image processor's settings: preprocessor_config.json, or nested in processor_config.json."""
    is_next, side = config["model_type"] == "llava_next", config["vision_config"]["image_size"]
    images = {
        "image_processor_type": "LlavaNextImageProcessor" if is_next else "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
    }
    if is_next:
        images |= {"do_pad": True, "image_grid_pinpoints": config["image_grid_pinpoints"]}
    rest = {
        "processor_class": "LlavaNextProcessor" if is_next else "LlavaProcessor",
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": config["vision_config"]["patch_size"],
        "vision_feature_select_strategy": "default",
    }
    if generation == "new":
        dump(folder / "processor_config.json", {"image_processor": images, **rest})
    else:
        dump(folder / "preprocessor_config.json", images)
        dump(folder / "processor_config.json", rest)


def dump(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2))


def shapes(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name (as `minivlm.model.llava.Llava` has it) and shape of every tensor that transformers saves."""
    text, vision = config["text_config"], config["vision_config"]
    width, inner = vision["hidden_size"], vision["intermediate_size"]

    def linear(name: str, out: int, into: int, bias: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (out, into)
        if bias:
            yield f"{name}.bias", (out,)

    yield "vision_tower.embeddings.class_embedding", (width,)
    yield "vision_tower.embeddings.patch_embedding.weight", (width, 3, vision["patch_size"], vision["patch_size"])
    yield (
        "vision_tower.embeddings.position_embedding.weight",
        ((vision["image_size"] // vision["patch_size"]) ** 2 + 1, width),
    )
    for norm in ("pre_layrnorm", "post_layernorm"):
        yield f"vision_tower.{norm}.weight", (width,)
        yield f"vision_tower.{norm}.bias", (width,)
    for i in range(vision["num_hidden_layers"]):
        layer = f"vision_tower.encoder.layers.{i}"
        for proj in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from linear(f"{layer}.self_attn.{proj}", width, width)
        for norm in ("layer_norm1", "layer_norm2"):
            yield f"{layer}.{norm}.weight", (width,)
            yield f"{layer}.{norm}.bias", (width,)
        yield from linear(f"{layer}.mlp.fc1", inner, width)
        yield from linear(f"{layer}.mlp.fc2", width, inner)

    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    head_dim = text.get("head_dim") or hidden // heads
    kv_size = text["num_key_value_heads"] * head_dim
    layers = config["vision_feature_layer"]
    yield from linear(
        "multi_modal_projector.linear_1", hidden, width * (len(layers) if isinstance(layers, list) else 1)
    )
    yield from linear("multi_modal_projector.linear_2", hidden, hidden)
    if config["model_type"] == "llava_next":
        yield "image_newline", (hidden,)
    yield "language_model.embed_tokens.weight", (text["vocab_size"], hidden)
    for i in range(text["num_hidden_layers"]):
        layer = f"language_model.layers.{i}"
        yield from linear(f"{layer}.self_attn.q_proj", heads * head_dim, hidden, bias=False)
        yield from linear(f"{layer}.self_attn.k_proj", kv_size, hidden, bias=False)
        yield from linear(f"{layer}.self_attn.v_proj", kv_size, hidden, bias=False)
        yield from linear(f"{layer}.self_attn.o_proj", hidden, heads * head_dim, bias=False)
        yield from linear(f"{layer}.mlp.gate_proj", text["intermediate_size"], hidden, bias=False)
        yield from linear(f"{layer}.mlp.up_proj", text["intermediate_size"], hidden, bias=False)
        yield from linear(f"{layer}.mlp.down_proj", hidden, text["intermediate_size"], bias=False)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "language_model.norm.weight", (hidden,)
    yield "lm_head.weight", (text["vocab_size"], hidden)


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Uniform, wide enough that attention is uneven and greedy tokens vary; norms' weights lie around one."""
    noise = (torch.rand(shape, generator=generator) - 0.5) * math.sqrt(12)  # standard deviation 1
    if "norm" in name:
        return 0.2 * noise + (1.0 if name.endswith(".weight") else 0.0)
    if name.endswith(".bias"):
        return 0.1 * noise
    fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
    return noise * (0.5 if ("embed" in name and "patch" not in name) or fan_in == 1 else 1.5 / math.sqrt(fan_in))
