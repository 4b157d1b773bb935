"""scripts/trace.py: golden traces through the command line, the layout of its file, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import tiny
import weights
from cli_helpers import Ran, call, refused, script, write_pages
from golden_helpers import GOLDEN, load_trace
from minivlm import Sampling
from minivlm.app import trace_command
from minivlm.cache.policies import preset

# A golden trace that uses most parts, and the flags that made it.
CONFIG = "v50_c75_i3_t30_f3_30"
FLAGS = [
    *("--vision_adaptive_attention", "--vision-adaptive-attention-rate", "0.5"),
    *("--vision_adaptive_attention_compute_rate", "0.75", "--vision_adaptive_attention_update_interval", "3"),
    *("--text_pruning_flag", "true", "--text_pruning_rate", "0.3", "--text_init_cache", "{init}"),
    *("--prefill-filter-flag", "1", "--prefill_filter_layer", "3", "--prefill_filter_rate", "0.3"),
]


def run_trace(*arguments: object) -> Ran:
    return call(script("trace").main, *arguments)


def check_layout(out: dict[str, torch.Tensor], steps: int, length: int, config) -> None:
    """Names, dtypes and shapes as tests/golden/README.md has them."""
    text = config.text
    expected = {
        "tokens": (torch.int32, (steps,)),
        "logits": (torch.float32, (steps, text.vocab_size)),
        "fate": (torch.int16, (text.num_hidden_layers, text.num_key_value_heads, length + steps - 1)),
    }
    for name, (dtype, shape) in expected.items():
        assert (out[name].dtype, tuple(out[name].shape)) == (dtype, shape), name
    for name, dtype, dims in (
        ("vision_kept", torch.int16, 2),
        ("core_steps", torch.int32, 1),
        ("core", torch.int16, 3),
    ):
        if name in out:
            assert (out[name].dtype, out[name].ndim) == (dtype, dims), name
    assert ("core" in out) == ("core_steps" in out)
    if "core" in out:
        assert out["core"].shape[:2] == (len(out["core_steps"]), text.num_hidden_layers)
    assert torch.equal(out["tokens"], out["logits"].argmax(dim=-1).int())


@pytest.mark.parametrize("model", ["llava-m", "next-s"])
def test_a_golden_trace_through_flags(model, tmp_path):
    golden, about = load_trace(model, CONFIG)
    flags = [flag.format(init=about["config"]["text_init_cache"]) for flag in FLAGS]
    folder, given = GOLDEN / model / "model", GOLDEN / model / "input.safetensors"
    files = {"free": (), "forced": ("--teacher_forcing", GOLDEN / model / "golden" / f"{CONFIG}.safetensors")}
    for name, forced in files.items():
        out = tmp_path / f"{name}.safetensors"
        ran = run_trace("--model", folder, "--inputs", given, "--steps", 48, "--out", out, *forced, *flags)
        assert (ran.status, ran.out, ran.err) == (0, "", "")
        ours, inputs = load_file(out), load_file(given)
        torch.testing.assert_close(ours["logits"], golden["logits"], atol=1e-3, rtol=0)
        for part in ("tokens", "fate", "vision_kept", "core_steps"):
            assert torch.equal(ours[part], golden[part]), part
        assert torch.equal(ours["core"].sort().values, golden["core"].sort().values)
        check_layout(ours, 48, len(inputs["inputs_embeds"]), weights.load(folder, device="cpu").config)
        for part in ("input_ids", "pixel_values"):
            assert torch.equal(ours[part], inputs[part]), part


def test_teacher_forcing_feeds_other_tokens(tmp_path):
    model, given = GOLDEN / "llava-s" / "model", GOLDEN / "llava-s" / "input.safetensors"
    free, forced, other = (tmp_path / f"{name}.safetensors" for name in ("free", "forced", "other"))
    common = ("--model", model, "--inputs", given, "--steps", 6)
    assert run_trace(*common, "--out", free).status == 0
    save_file({"tokens": torch.tensor([5, 6, 7, 8, 9])}, other)
    assert run_trace(*common, "--out", forced, "--teacher-forcing", other).status == 0
    ours, theirs = load_file(free), load_file(forced)
    assert torch.equal(ours["logits"][0], theirs["logits"][0])
    assert not torch.allclose(ours["logits"][1], theirs["logits"][1])
    assert torch.equal(theirs["tokens"], theirs["logits"].argmax(dim=-1).int())  # its own choices, not what was fed


@pytest.mark.parametrize("model", ["llava-s", "next-s"])
def test_ids_may_be_expanded_already(model, tmp_path):
    given = load_file(GOLDEN / model / "input.safetensors")
    folder = GOLDEN / model / "model"
    token = weights.load(folder, device="cpu").config.image_token_index
    ids = given["input_ids"][0]
    times = torch.where(ids == token, len(given["inputs_embeds"]) - len(ids) + 1, 1)
    expanded = tmp_path / "in.safetensors"
    save_file({**given, "input_ids": ids.repeat_interleave(times)[None]}, expanded)
    outs = []
    for inputs in (GOLDEN / model / "input.safetensors", expanded):
        outs.append(tmp_path / f"{len(outs)}.safetensors")
        flags = ("--steps", 4, "--policy", "avl")
        assert run_trace("--model", folder, "--inputs", inputs, *flags, "--out", outs[-1]).status == 0
    first, second = map(load_file, outs)
    for name in first.keys() - {"input_ids"}:
        assert torch.equal(first[name], second[name]), name
    assert second["input_ids"].shape[1] == len(given["inputs_embeds"]) > first["input_ids"].shape[1]


@pytest.mark.parametrize("family", ["llava-1.5", "next-llama3"])
@pytest.mark.parametrize("policy", ["full", "avl", "h2o"])
def test_images_and_a_prompt(family, policy, tmp_path):
    folder = tiny.write(tmp_path / "model", family, text_config={"eos_token_id": tiny.VOCAB})
    pages = write_pages(tmp_path)
    tiny.dump(folder / "generation_config.json", {})
    out, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    flags = () if policy == "full" else ("--policy", policy)
    common = ("--model", folder, "--steps", 7, *flags)
    assert run_trace(*common, "--image", *pages, "--prompt", "What is this?", "--out", out) == Ran(0, "", "")
    ours, vlm = load_file(out), weights.load(folder, device="cpu")
    check_layout(ours, 7, ours["input_ids"].shape[1], vlm.config)
    assert ("vision_kept" in ours, "core" in ours) == (policy != "h2o", policy == "avl")
    # It is what the answer is made of, and its file is itself an input.
    settings = preset(policy)
    assert ours["tokens"].tolist() == vlm.ask("What is this?", pages, sampling=Sampling(7), settings=settings).token_ids
    assert run_trace(*common, "--inputs", out, "--out", again) == Ran(0, "", "")
    repeated = load_file(again)
    assert repeated.keys() == ours.keys() and all(torch.equal(ours[name], repeated[name]) for name in ours)


def test_a_prompt_without_images(tmp_path):
    folder, out = tiny.write(tmp_path / "model"), tmp_path / "out.safetensors"
    assert run_trace("--model", folder, "--prompt", "Hi?", "--steps", 3, "--policy", "avl", "--out", out).status == 0
    assert load_file(out).keys() == {"tokens", "logits", "fate", "input_ids"}


def test_every_flag_in_both_spellings(tmp_path):
    values = {"teacher_forcing": "t", "steps": "3", "inputs": "i", "out": str(tmp_path / "o"), "seed": "4"}
    for name, value in values.items():
        needed = {"--inputs": "i", "--steps": "3", "--out": str(tmp_path / "o")}
        for spelling in (f"--{name}", "--" + name.replace("_", "-")):
            given = {**needed, spelling: value}
            assert str(getattr(trace_command.parse([word for pair in given.items() for word in pair]), name)) == value


# What is refused

NEXT = GOLDEN / "next-s"


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--steps 0", "--steps is 0"),
        ("--steps 1000", "exceed the model's context of 512"),
        ("--steps three", "--steps"),
        ("--steps 1" + "0" * 18, "exceed the model's context of 512"),
        ("--steps 1" + "0" * 25, "is not an integer of at most 64 bits"),
        ("--inputs a\0b", "null byte"),
        ("--inputs " + "x" * 300, "name too long"),
        ("--out " + "x" * 300, "name too long"),
        ("--teacher_forcing .", ".: is a folder"),
        ("--prompt Hi?", "either --inputs, or --prompt"),
        ("--image page.png", "either --inputs, or --prompt with --image"),
        ("--polcy avl", "--polcy"),
        ("--prefill_filter_flag --prefill_filter_layer 9", "--prefill_filter_layer is 9"),
        ("--teacher_forcing nowhere", "nowhere: no such file"),
        ("--model nowhere", "nowhere: no such folder"),
        ("--inputs nowhere", "nowhere: no such file"),
        ("--out nowhere/out", "there is no folder"),
        ("--out .", "is a folder"),
    ],
)
def test_wrong_flags(flags, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = (
        "--model",
        NEXT / "model",
        "--inputs",
        NEXT / "input.safetensors",
        "--steps",
        3,
        "--out",
        "out.safetensors",
    )
    refused(run_trace(*given, *flags.split()), said)
    assert not list(tmp_path.iterdir())


def test_needs_inputs_and_a_place(tmp_path):
    refused(run_trace("--model", NEXT / "model", "--steps", 3, "--out", tmp_path / "o"), "either --inputs, or --prompt")
    refused(run_trace("--model", NEXT / "model", "--prompt", "x", "--steps", 3), "--out")
    refused(run_trace("--model", NEXT / "model", "--prompt", "x", "--out", tmp_path / "o"), "--steps")
    flags = ("--prompt", "x", "--steps", 3, "--out", tmp_path / "o")
    refused(run_trace("--model", NEXT / "model", *flags), "no tokenizer.json")


def wrong_inputs() -> dict[str, tuple[dict[str, torch.Tensor | None], tuple[str, ...]]]:
    ids, pixels = (load_file(NEXT / "input.safetensors")[name] for name in ("input_ids", "pixel_values"))
    image = json.loads((NEXT / "model" / "config.json").read_text())["image_token_index"]
    return {
        "no ids": (dict(input_ids=None), ("no tensor 'input_ids'",)),
        "flat ids": (dict(input_ids=ids[0]), ("input_ids are I64 [36]", "[1, S]")),
        "no tokens": (dict(input_ids=ids[:, :0]), ("input_ids are I64 [1, 0]",)),
        "real ids": (dict(input_ids=ids.float()), ("input_ids are F32 [1, 36]", "integers")),
        "ids of another model": (dict(input_ids=ids + 1000), ("input_ids", "expected 0 to 159")),
        "no pixels": (dict(pixel_values=None), ("1 image tokens for 0 images",)),
        "no pictures": (dict(pixel_values=pixels[:0]), ("pixel_values are F32 [0, 5, 3, 56, 56]",)),
        "no tiles": (dict(pixel_values=pixels[0]), ("pixel_values have shape [5, 3, 56, 56]", "tiles")),
        "too few tiles": (dict(pixel_values=pixels[:, :2]), ("pixel_values hold 2 tiles",)),
        "no sizes": (dict(image_sizes=None), ("image_sizes name 0 images",)),
        "flat sizes": (dict(image_sizes=torch.tensor([80, 112])), ("image_sizes are I64 [2]",)),
        "an empty size": (dict(image_sizes=torch.tensor([[0, 112]])), ("image_sizes 0 to 112 (expected 1 to 262144)",)),
        "two sizes": (dict(image_sizes=torch.tensor([[80, 112], [80, 112]])), ("image_sizes name 2 images",)),
        "an enormous size": (dict(image_sizes=torch.tensor([[80, 2**62]])), ("expected 1 to 262144",)),
        "a size that is no size": (dict(image_sizes=torch.tensor([[True, True]])), ("image_sizes are BOOL [1, 2]",)),
        "a size without a sign": (
            dict(image_sizes=torch.tensor([[80, 2**64 - 1]], dtype=torch.uint64)),
            ("image_sizes -1 to 80",),
        ),
        "ids without a sign": (
            dict(input_ids=torch.tensor([[1, 2**64 - 1]], dtype=torch.uint64)),
            ("input_ids: ids -1 to 1",),
        ),
        "complex pixels": (dict(pixel_values=pixels.to(torch.complex64)), ("pixel_values are C64", "real numbers")),
        "pixels of truth": (dict(pixel_values=pixels > 0), ("pixel_values are BOOL",)),
        "whole pixels": (dict(pixel_values=pixels.to(torch.int8)), ("pixel_values are I8",)),
        "eight bit pixels": (dict(pixel_values=pixels.to(torch.float8_e4m3fn)), ("pixel_values are F8_E4M3",)),
        "a pixel that is no number": (dict(pixel_values=pixels * float("nan")), ("not all finite",)),
        "an infinite pixel": (dict(pixel_values=pixels * float("inf")), ("not all finite",)),
        "an image too many": (dict(input_ids=torch.cat((ids, ids), dim=1)), ("2 image tokens for 1 images",)),
        "an image at the end": (dict(input_ids=torch.tensor([[1, image]])), ("has to end in text",)),
    }


@pytest.mark.parametrize("fault", wrong_inputs())
def test_wrong_inputs(fault, tmp_path):
    changes, said = wrong_inputs()[fault]
    given = {**load_file(NEXT / "input.safetensors"), **changes}
    save_file({name: tensor for name, tensor in given.items() if tensor is not None}, tmp_path / "in.safetensors")
    flags = ("--inputs", tmp_path / "in.safetensors", "--steps", 3, "--out", tmp_path / "out.safetensors")
    refused(run_trace("--model", NEXT / "model", *flags), *said)
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize(
    "tokens, said",
    [
        (torch.tensor([1]), "teacher forcing has 1 tokens (expected at least 2)"),
        (torch.tensor([1.0, 2.0]), "tokens are F32 [2] (expected integers [T])"),
        (torch.tensor([[1, 2, 3]]), "tokens are I64 [1, 3]"),
        (torch.zeros(0, dtype=torch.int64), "tokens are I64 [0]"),
        (torch.tensor([1, 160]), "ids 1 to 160 (expected 0 to 159)"),
        (torch.tensor([-1, 1]), "ids -1 to 1"),
    ],
)
def test_wrong_tokens_to_feed(tokens, said, tmp_path):
    save_file({"tokens": tokens}, tmp_path / "forced")
    flags = ("--inputs", NEXT / "input.safetensors", "--steps", 3, "--out", tmp_path / "out")
    flags = (*flags, "--teacher_forcing", tmp_path / "forced")
    refused(run_trace("--model", NEXT / "model", *flags), said)


def test_a_file_that_is_not_safetensors(tmp_path):
    path = tmp_path / "in"
    path.write_text("not tensors, but long enough to look like a header")
    common = ("--model", NEXT / "model", "--steps", 3, "--out", tmp_path / "out")
    refused(run_trace(*common, "--inputs", path), path, "not a readable safetensors file")
    refused(run_trace(*common, "--inputs", tmp_path), tmp_path, "is a folder")
    no_trace = ("--inputs", NEXT / "input.safetensors", "--teacher_forcing", NEXT / "input.safetensors")
    refused(run_trace(*common, *no_trace), "no tensor 'tokens'")


@pytest.mark.parametrize("flag", ["--inputs", "--teacher_forcing"])
def test_inputs_that_are_no_files(flag, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    given = {"--inputs": NEXT / "input.safetensors", "--steps": 3, "--out": tmp_path / "out", "--model": NEXT / "model"}
    for name, said in (("fifo", "is a FIFO"), ("loop", "Too many levels"), ("zero", "is a device")):
        flags = {**given, flag: tmp_path / name}
        refused(run_trace(*(word for pair in flags.items() for word in pair)), f"{tmp_path / name}: ", said)
    assert not (tmp_path / "out").exists()


def test_a_trace_that_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    def half(tensors: dict, path: Path) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: No space left on device")

    out = tmp_path / "out"
    out.write_bytes(b"old")
    monkeypatch.setattr(trace_command, "save_file", half)
    ran = run_trace("--model", NEXT / "model", "--inputs", NEXT / "input.safetensors", "--steps", 2, "--out", out)
    assert ran.status == 2
    assert ran.err == f"error: {out}: cannot be written (Error while serializing: No space left on device)\n"
    assert out.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
