"""Named cases: checkpoints with numbers that are none, configs that cannot be meant, templates, conversations."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from safetensors.torch import load, save_file

import tiny
from fuzzer import checkpoints, texts
from fuzzer.case import Box, Case, Expect
from fuzzer.child import Ran
from fuzzer.mutate_json import Mutated
from fuzzer.registry import named
from fuzzer.world import LLAVA, NEXT

# Numbers that are none


@named("weights", "nan", "inf", "3e38")
def _(box: Box, number: str) -> Case:
    def change(tensors: checkpoints.Tensors) -> None:
        tensors["language_model.model.layers.1.mlp.down_proj.weight"][3] = float(number)

    return _changed_weights(box, change)


@named("an overflow in float16")
def _(box: Box) -> Case:
    def change(tensors: checkpoints.Tensors) -> None:
        tensors["language_model.model.layers.0.mlp.down_proj.weight"].mul_(1e5)

    return _changed_weights(box, change, "--dtype", "float16")


def _changed_weights(box: Box, change: Callable[[checkpoints.Tensors], object], *more: object) -> Case:
    folder = checkpoints.link_checkpoint(box, NEXT)
    tensors = load((box.shared / NEXT / "model.safetensors").read_bytes())
    change(tensors)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    return Case("generate.py", checkpoints.ask(box, folder, *more), Expect.REFUSAL)


# Configs

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "model_type is a list": ("config.json", {"model_type": []}),
    "rope_scaling is a number": ("config.json", {"text_config": {"rope_scaling": 5}}),
    "pinpoints with infinity": ("config.json", {"image_grid_pinpoints": [[float("inf"), 56]]}),
    "pinpoints of 1e999": ("config.json", {"image_grid_pinpoints": [[1e300, 56]]}),
    "no pinpoints": ("config.json", {"image_grid_pinpoints": []}),
    "pinpoints are huge": ("config.json", {"image_grid_pinpoints": [[56 * 10**6, 56]]}),
    "eos_token_id is a text": ("generation_config.json", {"eos_token_id": "x"}),
    "eos_token_id is huge": ("generation_config.json", {"eos_token_id": [10**25]}),
    "a billion layers": ("config.json", {"text_config": {"num_hidden_layers": 10**9}}),
    "a million layers in the tower": ("config.json", {"vision_config": {"num_hidden_layers": 10**6}}),
    "a trillion words": ("config.json", {"text_config": {"vocab_size": 10**12}}),
    "sizes beyond all memory": ("config.json", {"text_config": {"hidden_size": 2**40}}),
    "huge images": ("config.json", {"vision_config": {"image_size": 14 * 10**7}}),
    "no patches": ("config.json", {"vision_config": {"patch_size": 0}}),
    "negative heads": ("config.json", {"text_config": {"num_attention_heads": -4}}),
    "rms_norm_eps is infinite": ("config.json", {"text_config": {"rms_norm_eps": float("inf")}}),
    "rms_norm_eps is no number": ("config.json", {"text_config": {"rms_norm_eps": float("nan")}}),
    "rms_norm_eps is 1e308": ("config.json", {"text_config": {"rms_norm_eps": 1e308}}),
    "rope_theta is zero": ("config.json", {"text_config": {"rope_theta": 0}}),
    "layers of features": ("config.json", {"vision_feature_layer": [[]]}),
    "text_config is a list": ("config.json", {"text_config": []}),
    "rescale_factor is infinite": ("preprocessor_config.json", {"rescale_factor": float("inf")}),
    "rescale_factor is 1e308": ("preprocessor_config.json", {"rescale_factor": 1e308}),
    "image_std is zero": ("preprocessor_config.json", {"image_std": [0, 0, 0]}),
    "image_mean is no number": ("preprocessor_config.json", {"image_mean": [float("nan")] * 3}),
    "resample is a list": ("preprocessor_config.json", {"resample": []}),
    "crop_size is an object": ("preprocessor_config.json", {"crop_size": {"height": {}, "width": []}}),
    "pinpoints are a number": ("preprocessor_config.json", {"image_grid_pinpoints": 7}),
    "chat_template is a number": ("chat_template.json", {"chat_template": 5}),
    "tokenizer.model is a list": ("tokenizer.json", {"model": []}),
    "added_tokens is a number": ("tokenizer.json", {"added_tokens": 5}),
}


@named("config", *CONFIGS)
def _(box: Box, name: str) -> Case:
    file, fields = CONFIGS[name]
    content = json.loads((box.shared / NEXT / file).read_bytes())
    for key, value in fields.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) and key in content else value
    case = checkpoints.damaged_json(box, NEXT, file, Mutated(json.dumps(content).encode()))
    return replace(case, expect=Expect.REFUSAL)


@named(
    "an index", [], {}, {"weight_map": 5}, *({"weight_map": {"x": name}} for name in ("../x.safetensors", "/dev/zero"))
)
def _(box: Box, content: object) -> Case:
    case = checkpoints.damaged_json(box, LLAVA, checkpoints.INDEX, Mutated(json.dumps(content).encode()))
    return replace(case, expect=Expect.REFUSAL)


# Chat templates


@named("template", *texts.ATTACKS)
def _(box: Box, template: str) -> Case:
    return texts.template_case(box, NEXT, template)


# Conversations


@named("a chat whose answers end in the image token")
def _(box: Box) -> Case:
    folder = checkpoints.link_checkpoint(box, NEXT)
    tensors = load((box.shared / NEXT / "model.safetensors").read_bytes())
    tensors["language_model.model.embed_tokens.weight"][:, 0] = 100  # so that the first number of every state is large
    tensors["multi_modal_projector.linear_2.bias"][0] = 100
    tensors["language_model.model.norm.weight"][0] = 1
    tensors["language_model.lm_head.weight"].zero_()
    tensors["language_model.lm_head.weight"][tiny.build_tokenizer("next-vicuna").token_to_id("<image>"), 0] = 1
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    case = texts.chat_case(box, b"one\ntwo\nthree\n")

    def check(ran: Ran) -> None:
        assert ran.out.count("\n") == 3 and not ran.err, ran

    return Case("generate.py", ["--model", folder, *case.arguments[2:]], Expect.ANSWER, check=check, stdin=case.stdin)


@named("typed into a chat", "</s>", "<s>", "[INST]", "<pad>", "<unk>", "\0", "{{ 7 }}", "\ue000minivlm-answer\ue001")
def _(box: Box, text: str) -> Case:
    return texts.chat_case(box, f"hello\n{text} there\nand then?\n".encode(), expect=Expect.ANSWER)


@named("one <image> too many in a chat")
def _(box: Box) -> Case:
    case = texts.chat_case(box, b"hello\n<image> there\nand then?\n")

    def check(ran: Ran) -> None:
        assert ran.out == box.clean("generate.py", *case.arguments, stdin=b"hello\nand then?\n").out, ran.out
        assert ran.err.count("error: ") == 1

    return Case("generate.py", case.arguments, Expect.ANSWER, check=check, stdin=case.stdin)


@named("a chat with a closed stdin")
def _(box: Box) -> Case:
    return texts.chat_case(box, None)


@named("a chat with bytes that are no text")
def _(box: Box) -> Case:
    return texts.chat_case(box, b"hello\n\xff\xfe\nand then?\n")


@named("/image", "/dev/zero", "a\0b", "n" * 300, "d/" * 3000, "nothing.png", ".", "~", "~nobody/x")
def _(box: Box, name: str) -> Case:
    return texts.chat_case(box, f"hello\n/image {name}\nand then?\n".encode(), expect=Expect.ANSWER)
