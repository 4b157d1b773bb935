"""Tiny random checkpoints in Hugging Face layout, for every family, key layout and config generation.

They are written without transformers, so that the tests also run where it is missing. The weights are uniform and
follow from the integers of the generator alone, so they are the same on every machine, as stored values require.
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
LAYOUTS = ("a", "b", "c")  # the three ways in which checkpoints name their tensors: see weights/layout.py
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
VOCAB = 384  # as on the hub, padded to a multiple of 64
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
_MERGES = [tuple(pair.split()) for pair in ("t h", "th e", "▁ the", "i n", "▁ a", "e r", "▁ w", "o u", "h a")]
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}"
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

    `layout` is one of `LAYOUTS`. `generation` "old" writes the configuration files of transformers up to 4, "new" those
    of 5. `overrides` replace entries of config.json; `text_config` and `vision_config` are merged into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(family, generation=generation, kv_heads=kv_heads, dtype=dtype, **overrides)
    tensors = {on_disk(name, layout): tensor for name, tensor in make_tensors(config, seed).items()}
    if layout == "a":  # old checkpoints also have these buffers, which loading skips
        positions = (config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]) ** 2 + 1
        tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(positions)[None]
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save(folder, {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}, shards)
    dump(folder / "config.json", config)
    eos = config["text_config"].get("eos_token_id", 2)
    dump(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": eos})
    if tokenizer:
        write_tokenizer(folder, family, generation)
        write_processor(folder, config, generation)
    return folder


def make_config(
    family: str, *, generation: str = "old", kv_heads: int = 2, dtype: torch.dtype = torch.float32, **overrides
) -> dict:
    """The content of `config.json`. Like the hub's, it leaves out what has its default value."""
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
    """Every tensor that transformers saves for `config`, in float32, by its canonical name (see weights/layout.py)."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _random(name, shape, generator) for name, shape in shapes(config)}


def on_disk(name: str, layout: str) -> str:
    """The name that the tensor of this canonical name has in a checkpoint of the given layout."""
    for ours, theirs in _PREFIXES[layout].items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


def save(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Write model.safetensors or, for several `shards`, as many files and their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names = list(tensors)
    index: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    size = sum(t.nbytes for t in tensors.values())
    dump(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": index})


def build_tokenizer(family: str) -> Tokenizer:
    """A byte-level tokenizer for Llama 3, one with byte fallback for the others. The last tokens are <image>, <pad>."""
    if family == "next-llama3":
        vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
        bos = "<|begin_of_text|>"
    else:
        pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
        pieces += ["".join(pair) for pair in _MERGES]
        vocab = {piece: i for i, piece in enumerate(pieces)}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_MERGES, unk_token="<unk>", byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special, bos = ["<unk>", "<s>", "</s>"], "<s>"
    special += ["<image>", "<pad>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def write_tokenizer(folder: Path, family: str, generation: str = "old") -> None:
    """Write tokenizer.json, its configuration, and the chat template, in the file where `generation` has it."""
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
    """Write the image processor's settings as preprocessor_config.json, or as a part of processor_config.json."""
    is_next = config["model_type"] == "llava_next"
    side = config["vision_config"]["image_size"]
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
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=2))


Shape = tuple[str, tuple[int, ...]]  # the name of a tensor, and its shape


def shapes(config: dict) -> Iterator[Shape]:
    """The shape of every tensor that transformers saves, with its canonical name."""
    yield from _tower_shapes(config["vision_config"])
    layers = config["vision_feature_layer"]
    num_features = len(layers) if isinstance(layers, list) else 1
    hidden = config["text_config"]["hidden_size"]
    yield from _linear("multi_modal_projector.linear_1", hidden, num_features * config["vision_config"]["hidden_size"])
    yield from _linear("multi_modal_projector.linear_2", hidden, hidden)
    if config["model_type"] == "llava_next":
        yield "image_newline", (hidden,)
    yield from _decoder_shapes(config["text_config"])


def _tower_shapes(vision: dict) -> Iterator[Shape]:
    width = vision["hidden_size"]
    inner = vision["intermediate_size"]
    patch = vision["patch_size"]
    embeddings = "vision_tower.embeddings"
    yield f"{embeddings}.class_embedding", (width,)
    yield f"{embeddings}.patch_embedding.weight", (width, 3, patch, patch)
    yield f"{embeddings}.position_embedding.weight", ((vision["image_size"] // patch) ** 2 + 1, width)
    yield from _norm("vision_tower.pre_layrnorm", width)
    yield from _norm("vision_tower.post_layernorm", width)
    for i in range(vision["num_hidden_layers"]):
        layer = f"vision_tower.encoder.layers.{i}"
        for proj in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{proj}", width, width)
        yield from _norm(f"{layer}.layer_norm1", width)
        yield from _norm(f"{layer}.layer_norm2", width)
        yield from _linear(f"{layer}.mlp.fc1", inner, width)
        yield from _linear(f"{layer}.mlp.fc2", width, inner)


def _decoder_shapes(text: dict) -> Iterator[Shape]:
    hidden = text["hidden_size"]
    inner = text["intermediate_size"]
    head_dim = text.get("head_dim") or hidden // text["num_attention_heads"]
    q_size = text["num_attention_heads"] * head_dim
    kv_size = text["num_key_value_heads"] * head_dim
    yield "language_model.embed_tokens.weight", (text["vocab_size"], hidden)
    for i in range(text["num_hidden_layers"]):
        layer = f"language_model.layers.{i}"
        yield f"{layer}.self_attn.q_proj.weight", (q_size, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (kv_size, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (kv_size, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, q_size)
        yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "language_model.norm.weight", (hidden,)
    yield "lm_head.weight", (text["vocab_size"], hidden)


def _linear(name: str, out: int, into: int) -> Iterator[Shape]:
    yield f"{name}.weight", (out, into)
    yield f"{name}.bias", (out,)


def _norm(name: str, width: int) -> Iterator[Shape]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A uniform tensor, wide enough that attention is uneven and greedy tokens vary."""
    noise = (torch.rand(shape, generator=generator) - 0.5) * math.sqrt(12)  # standard deviation 1
    if "norm" in name:  # scales are around one
        return 0.2 * noise + (1.0 if name.endswith(".weight") else 0.0)
    if name.endswith(".bias"):
        return 0.1 * noise
    fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
    is_embedding = "embed" in name and "patch" not in name
    return noise * (0.5 if is_embedding or fan_in == 1 else 1.5 / math.sqrt(fan_in))
