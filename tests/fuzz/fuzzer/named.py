"""The defects of the past, each as a case with a name: what was wrong once must not come back."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load, load_file, save_file

import tiny
from fuzzer import checkpoints, data, flags, paths, pictures, runs, texts
from fuzzer.case import Box, Case, Expect, Family
from fuzzer.child import Ran
from fuzzer.mutate_json import Mutated
from fuzzer.world import LLAVA, NEXT, QUESTION, RECORDS, run_folder

NAMED: dict[str, Family] = {}


def named(name: str, *values: object) -> Callable[[Callable[..., Case]], Callable[..., Case]]:
    """Add a case to `NAMED`; with `values`, one for each of them, which the function gets."""

    def add(make: Callable[..., Case]) -> Callable[..., Case]:
        for value in values:
            NAMED[f"{name}: {_short(value)}"] = lambda box, value=value: make(box, value)
        if not values:
            NAMED[name] = make
        return make

    return add


def _short(value: object) -> str:
    text = value.__name__ if callable(value) else str(value)
    text = "".join(char if " " <= char <= "~" else "?" for char in text)
    return text if len(text) <= 60 else f"{text[:50]}… ({len(text)})"


# 1. Outputs: links, devices, modes


@named("output to a link", *(place.file for place in paths.OUTPUTS[:5]))
def _(box: Box, file: str) -> Case:
    place = next(place for place in paths.OUTPUTS if place.file == file)
    case = paths.output_case(box, place, paths.link)
    kept = box.out / "file"

    def check(ran: Ran) -> None:
        assert (box.out / file).is_symlink() and kept.read_bytes() != b"old", "the link was replaced"

    return Case(case.command, case.arguments, Expect.ANSWER, outputs=[box.out], check=check)


@named("output to a device", *(place.file for place in paths.OUTPUTS[:5]))
def _(box: Box, file: str) -> Case:
    place = next(place for place in paths.OUTPUTS if place.file == file)
    case = paths.output_case(box, place, paths.null_device)
    return Case(case.command, case.arguments, Expect.ANSWER, outputs=[box.out], check=case.check)


@named("output to a FIFO that nobody reads", *(place.file for place in paths.OUTPUTS))
def _(box: Box, file: str) -> Case:
    place = next(place for place in paths.OUTPUTS if place.file == file)
    return Case(*_command(paths.output_case(box, place, paths.fifo)), Expect.REFUSAL)


def _command(case: Case) -> tuple[str, Any]:
    return case.command, case.arguments


@named("an output has the mode of the umask")
def _(box: Box) -> Case:
    out = box.out / "t.safetensors"
    flags_ = ["--model", box.shared / NEXT, "--prompt", QUESTION, "--steps", 2, "--out", out]

    def check(ran: Ran) -> None:
        (box.out / "other").touch()
        assert out.stat().st_mode == (box.out / "other").stat().st_mode

    return Case("trace.py", flags_, Expect.ANSWER, outputs=[box.out], check=check)


# 2. Numbers that are none


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


@named("--limit", "inf", "nan", "1e999", "-1", "0", "1.5", "9" * 5000)
def _(box: Box, value: str) -> Case:
    return _flags(box, flags.COMMANDS[5], f"--limit={value}")


@named("a flag's number", "--temperature=nan", "--temperature=inf", "--top_p=nan", "--kv_budget=nan", "--kv_budget=inf")
def _(box: Box, flag: str) -> Case:
    return _flags(box, flags.COMMANDS[0], flag)


def _flags(box: Box, command: flags.Command, *words: str, expect: Expect = Expect.REFUSAL) -> Case:
    case = flags.flags_case(box, command, [("", list(words), False)])
    return Case(case.command, case.arguments, expect, case.outputs, case.check)


# 3. One bad record


@named("a record's image", "n" * 300, "d/" * 2500, "a\0b", "\ud800", "", "documents", "/etc/passwd", "../../wide.png")
def _(box: Box, name: str) -> Case:
    return _one_bad_record(box, image=name)


@named("a record's id", "9" * 5000, "\ud800", "²", 10**25)
def _(box: Box, value: object) -> Case:
    return _one_bad_record(box, failed=(0, 1), questionId=value)


@named("a record's answer", "\ud800", "9" * 5000, "a\0b")
def _(box: Box, value: str) -> Case:
    return _one_bad_record(box, failed=(0, 1), answers=[value])


@named("a record's question", "\ud800", "<image>" * 3, "x" * 100_000)
def _(box: Box, value: str) -> Case:
    return _one_bad_record(box, question=value)


def _one_bad_record(box: Box, failed: tuple[int, ...] = (1,), **fields: object) -> Case:
    """The others are answered; the bad one fails, or, where `failed` says so, is answered too."""
    content = json.loads((box.shared / "data" / "val_v1.0.json").read_bytes())
    content["data"][1].update(fields)
    case = data.data_case(box, json.dumps(content).encode(), Expect.ANSWER)

    def check(ran: Ran) -> None:
        case.check(ran)
        (path,) = (box.out / "runs").glob("*/results.json")
        summary = flags.strict_json(path)["results"]["docvqa_val"]
        assert summary["failed"] in failed and summary["n"] + summary["failed"] == RECORDS, summary

    return Case(case.command, case.arguments, Expect.ANSWER, case.outputs, check)


# 4. Conversations


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


# 5. Chat templates


@named("template", *texts.ATTACKS)
def _(box: Box, template: str) -> Case:
    return texts.template_case(box, NEXT, template)


# 6. Configs


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
    return Case(*_command(case), Expect.REFUSAL)


@named(
    "an index", [], {}, {"weight_map": 5}, *({"weight_map": {"x": name}} for name in ("../x.safetensors", "/dev/zero"))
)
def _(box: Box, content: object) -> Case:
    case = checkpoints.damaged_json(box, LLAVA, checkpoints.INDEX, Mutated(json.dumps(content).encode()))
    return Case(*_command(case), Expect.REFUSAL)


# 7. Run folders


ROWS: tuple[dict[str, Any], ...] = (
    *({"prediction": 5}, {"prediction": None}, {"finish": 5}, {"error": 5}),
    *({"scores": []}, {"scores": {}}, {"scores": {"anls": "x"}}, {"scores": {"anls": 1e400}}),
    *({"cost": []}, {"cost": {}}, {"cost": {"kv_bytes": "x"}}, {"types": 5}, {"types": [[]]}),
    *({"index": "0"}, {"index": -1}, {"index": 10**25}, {"task": []}, {"task": "x"}, {"id": []}),
)


@named("a row with", *map(json.dumps, ROWS))
def _(box: Box, fields: str) -> Case:
    lines = (run_folder(box.shared) / "samples.jsonl").read_bytes().splitlines(keepends=True)
    lines[1] = json.dumps({**json.loads(lines[1]), **json.loads(fields)}).encode() + b"\n"
    return runs.continued_case(box, {"samples.jsonl": b"".join(lines)}, Expect.ANSWER)


@named("a line", "5", "[]", "null", "{}", "", "{", "\0", '{"task": 5}', f'{{"index": {"9" * 5000}}}', "[" * 100_000)
def _(box: Box, line: str) -> Case:
    rows = (run_folder(box.shared) / "samples.jsonl").read_bytes()
    return runs.continued_case(box, {"samples.jsonl": line.encode() + b"\n" + rows}, Expect.ANSWER)


RESULTS = ("5", "[]", "{}", "", '{"settings": 5}', '{"settings": {"format": 2}, "results": []}', "[" * 100_000)


@named("results", *RESULTS)
def _(box: Box, content: str) -> Case:
    return runs.continued_case(box, {"results.json": content.encode()}, Expect.ANSWER)


@named("to compare", *RESULTS)
def _(box: Box, content: str) -> Case:
    return runs.compare_case(box, {"results.json": content.encode()}, Expect.REFUSAL)


@named("settings", "5", "[]", "{", "", '{"format": []}', "[" * 100_000)
def _(box: Box, content: str) -> Case:
    return runs.continued_case(box, {"settings.json": content.encode()})


@named("a finished run says that nothing is left to do")
def _(box: Box) -> Case:
    case = runs.continued_case(box, {}, Expect.ANSWER)

    def check(ran: Ran) -> None:
        case.check(ran)
        assert f"{RECORDS} of {RECORDS} already answered" in ran.err

    return Case(case.command, case.arguments, Expect.ANSWER, case.outputs, check)


@named("a refused evaluation leaves no folder", "--device=cuda:7", "--policy=avl --kv_budget=0.0001", "--batch_size=0")
def _(box: Box, words: str) -> Case:
    return _flags(box, flags.COMMANDS[5], *words.split())


# 8. Files that are no files


def _input_named(place: paths.Place, make: Callable[[Path], paths.Name]) -> Family:
    return lambda box: paths.input_case(box, place, make)


for _number, _place in enumerate(paths.INPUTS):
    for _make in (paths.fifo, paths.zero_link, paths.zero_device, paths.long_name):
        NAMED[f"in the place of {_place.file} ({_number}): {_make.__name__}"] = _input_named(_place, _make)


@named("an image that is", *paths.NO_FILES)
def _(box: Box, make: Callable[[Path], paths.Name]) -> Case:
    return paths.input_case(box, paths.INPUTS[0], make)


# 9. The rest


@named("stdout is full")
def _(box: Box) -> Case:
    device = box.root / "in" / "full"
    paths.device(device, 7)
    return Case("generate.py", checkpoints.ask(box, box.shared / NEXT), stdout=device)


@named("stdout takes only ASCII", "generate.py", "eval")
def _(box: Box, command: str) -> Case:
    if command == "eval":
        case = _flags(box, flags.COMMANDS[5], expect=Expect.ANSWER)
        return Case(*_command(case), Expect.ANSWER, case.outputs, stdout="ascii")
    return Case("generate.py", checkpoints.ask(box, box.shared / NEXT), Expect.ANSWER, stdout="ascii")


@named("an overlay of step", str(10**25), "9" * 5000)
def _(box: Box, step: str) -> Case:
    case = flags.flags_case(box, flags.COMMANDS[1], [("", ["--overlay_step", step], False)])
    return Case(*_command(case), Expect.EITHER, case.outputs, case.check)


@named("benchmark --policy", '"', "'", "a: '", "", ": ", "full --kv_budget", "full --policy avl", "\\")
def _(box: Box, policy: str) -> Case:
    case = _flags(box, flags.COMMANDS[3], "--policy", policy, expect=Expect.EITHER)
    return Case(*_command(case), Expect.EITHER, case.outputs, case.check)


@named("benchmark", f"--batch={10**25}", f"--vision_tokens={10**12}", f"--new_tokens={10**25}", f"--seed={10**25}")
def _(box: Box, flag: str) -> Case:
    return _flags(box, flags.COMMANDS[3], flag)


@named("attention_stats.py", "--top=nan", "--top=inf", "--top=-1", f"--distances={10**25}", "--max_new_tokens=0")
def _(box: Box, flag: str) -> Case:
    return _flags(box, flags.COMMANDS[4], flag, expect=Expect.EITHER)


@named("a PNG of 1 x 89,000,000 pixels", NEXT, LLAVA)
def _(box: Box, model: str) -> Case:
    header = struct.pack(">IIBBBBB", 1, 89_000_000, 8, 0, 0, 0, 0)
    packed = zlib.compress(bytes(2 * 89_000_000), 1)
    content = pictures.png_of([(b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")])
    return pictures.image_case(box, "thin.png", content, model, compares=False)


@named("grey in", "16 bits, PNG", "16 bits, TIFF", "32 bits, TIFF", "floats, TIFF")
def _(box: Box, kind: str) -> Case:
    """More bits say the same as eight."""
    grey = Image.linear_gradient("L").resize((64, 48))
    grey.save(box.inputs / "grey.png")
    values = torch.tensor(list(grey.getdata())).view(48, 64)
    array = {"16": (values * 257).to(torch.uint16), "32": (values * 257).int(), "fl": (values / 255).float()}[kind[:2]]
    path = box.inputs / f"more.{kind[-4:].strip().lower()}"
    Image.fromarray(array.numpy()).save(path)

    def check(ran: Ran) -> None:
        expected = box.clean("generate.py", *_about(box, box.inputs / "grey.png")).out
        assert ran.out == expected, f"another answer: {ran.out!r} instead of {expected!r}"

    return Case("generate.py", _about(box, path), Expect.ANSWER, check=check)


def _about(box: Box, image: Path) -> tuple[object, ...]:
    return ("--model", box.shared / NEXT, "--image", image, "--prompt", QUESTION, "--max_new_tokens", 8)


INPUTS = (
    *("complex pixel_values", "pixel_values of nan", "ids of bool", "ids below zero", "no image_sizes"),
    "image_sizes of 2**40",
)


@named("inputs", *INPUTS)
def _(box: Box, kind: str) -> Case:
    tensors = load_file(box.shared / "inputs.safetensors")
    pixels, ids = tensors["pixel_values"], tensors["input_ids"]
    tensors |= {
        "complex pixel_values": {"pixel_values": pixels.to(torch.complex64)},
        "pixel_values of nan": {"pixel_values": pixels * float("nan")},
        "ids of bool": {"input_ids": ids > 5},
        "ids below zero": {"input_ids": -ids},
        "image_sizes of 2**40": {"image_sizes": torch.tensor([[2**40, 1]])},
    }.get(kind, {})
    if kind == "no image_sizes":
        del tensors["image_sizes"]
    save_file(tensors, box.inputs / "i.safetensors")
    flags_ = ["--model", box.shared / NEXT, "--inputs", box.inputs / "i.safetensors", "--steps", 2]
    return Case("trace.py", [*flags_, "--out", box.out / "t.safetensors"], Expect.REFUSAL)


@named("a TIFF of which Pillow warns")
def _(box: Box) -> Case:
    content = bytearray((box.shared / "page.tiff").read_bytes())
    (directory,) = struct.unpack_from("<I", content, 4)
    struct.pack_into("<I", content, directory + 2 + 4, 3073)  # the first entry holds so many values
    return pictures.image_case(box, "page.tiff", bytes(content), NEXT, compares=False)


@named("a saved cache with a changed number in", "k", "v", "score", "position", "vision_attn")
def _(box: Box, name: str) -> Case:
    content = (box.shared / "cache.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8 : 8 + length])[f"layers.0.{name}"]["data_offsets"]
    place = 8 + length + (begin + end) // 2
    changed = bytearray(content)
    changed[place] ^= 1
    path = box.write("cache.safetensors", bytes(changed))
    return Case("load_cache", [box.shared / NEXT, path], Expect.REFUSAL)
