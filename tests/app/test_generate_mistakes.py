"""scripts/generate.py and its users' mistakes with flags, checkpoints, images and prompts: each is one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
import weights
from cli_helpers import endless_model, generate, refused, write_pages
from minivlm import Conversation

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return endless_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("sharded"), "next-vicuna", shards=3)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> list[Path]:
    return write_pages(tmp_path_factory.mktemp("pages"))


# Flags


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--polcy avl", "--polcy"),
        ("--max_new 4", "--max_new"),  # no guessing of abbreviations
        ("stray", "stray"),
        ("--stats perhaps", "'perhaps' is neither true nor false"),
        ("--text_pruning_flag None", "'None' is neither true nor false"),
        ("--policy turbo", "'turbo' is unknown (expected full, avl"),
        (
            "--vision_adaptive_attention_rate 1.5",
            "--vision_adaptive_attention_rate is 1.5 (expected a share from 0 to 1)",
        ),
        ("--prefill-filter-rate=-0.1", "--prefill_filter_rate is -0.1"),
        ("--text_pruning_rate nan", "--text-pruning-rate: 'nan' is not a finite number"),
        ("--kv_budget 0 --policy avl", "--kv_budget is 0"),
        ("--kv_budget 0.5", "the full cache holds everything"),
        ("--vision_score_window 0", "--vision_score_window is 0"),
        (
            "--all_use_h2o --text_pruning_flag",
            "--all_use_h2o decides over text and image alike and excludes --text_pruning_flag",
        ),
        ("--policy streaming --vision_adaptive_attention", "--policy streaming"),
        (
            "--text_pruning_flag --compare_text_direct_pruning",
            "--compare_text_direct_pruning needs --text_use_h2o false",
        ),
        ("--prefill_filter_flag --prefill_filter_layer 3", "--prefill_filter_layer is 3, the model has 2 layers"),
        ("--max_new_tokens 0", "max_new_tokens is 0"),
        ("--max_new_tokens many", "max_new_tokens"),
        ("--temperature -1", "temperature is -1"),
        ("--temperature nan", "--temperature: 'nan' is not a finite number"),
        ("--temperature 1e999", "--temperature: '1e999' is not a finite number"),
        ("--top_p inf", "'inf' is not a finite number"),
        ("--max_new_tokens 1.5", "'1.5' is not an integer"),
        ("--seed 9223372036854775808", "is not an integer of at most 64 bits"),
        (f"--seed {'9' * 5000}", "…"),
        ("--overlay_step 1" + "0" * 25, "is not an integer of at most 64 bits"),
        ("--stray\x1b[2J\udcff", "unrecognized arguments: --stray\\x1b[2J\\udcff"),
        ("--device a\x00b", "'a\\x00b'"),
        ("--policy_file .", ".: is a folder"),
        ("--policy_file nowhere.py", "nowhere.py: no such file"),
        ("--top_p 0", "top_p is 0"),
        ("--dtype int8", "'int8'"),
        ("--device tpu", "'tpu'"),
        ("--seed x", "--seed"),
        ("--overlay out.png", "--overlay"),
        ("--overlay_layer 1", "--overlay_layer"),
        ("--prompt \udcff", "not valid Unicode"),
    ],
)
def test_wrong_flags(model, flags, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(generate("--model", model, "--prompt", "Hi?", *flags.split()), said)
    assert not list(tmp_path.iterdir())


def test_a_question_is_needed(model):
    refused(generate("--model", model), "--prompt", "--chat")


# Bad checkpoints, images and prompts


def edit_json(path: Path, **changes: object) -> None:
    raw = json.loads(path.read_text())
    raw.update(changes)
    tiny.dump(path, {key: value for key, value in raw.items() if value is not None})


def edit_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def unmapped(folder: Path) -> None:
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"]["image_newline"] = "../" + SHARD
    tiny.dump(folder / INDEX, content)


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


_ESCAPE = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for m in messages %}{{ m.content }}{% endfor %}"

BAD_CHECKPOINTS = {
    "missing shard": (lambda f: (f / SHARD).unlink(), (SHARD, "missing")),
    "truncated": (lambda f: os.truncate(f / SHARD, (f / SHARD).stat().st_size // 2), (SHARD, "truncated")),
    "flipped header length": (lambda f: flip(f / SHARD, 20), (SHARD, "header")),
    "wrong dtype": (
        lambda f: edit_tensors(shard_of(f, "image_newline"), image_newline=torch.zeros(64, dtype=torch.float64)),
        ("image_newline is F64", "expected F32, F16, BF16"),
    ),
    "wrong shape": (
        lambda f: edit_tensors(shard_of(f, "image_newline"), image_newline=torch.zeros(63)),
        ("image_newline has shape [63]", "[64]"),
    ),
    "key left over": (
        lambda f: edit_tensors(shard_of(f, "image_newline"), surplus=torch.zeros(1)),
        ("unexpected 1: surplus",),
    ),
    "index points outside": (unmapped, (INDEX, "image_newline", "inside the folder")),
    "no config": (lambda f: (f / "config.json").unlink(), ("no config.json",)),
    "field missing": (
        lambda f: edit_json(f / "config.json", text_config=None),
        ("config.json", "text_config is missing"),
    ),
    "model type": (
        lambda f: edit_json(f / "config.json", model_type="paligemma"),
        ("config.json", "'paligemma' is not supported"),
    ),
    "image token": (
        lambda f: edit_json(f / "config.json", image_token_index=17),
        ("<image>", "image_token_index is 17"),
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ("no tokenizer.json",)),
    "damaged tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        ("tokenizer.json", "model is missing"),
    ),
    "escaping template": (
        lambda f: tiny.dump(f / "chat_template.json", {"chat_template": _ESCAPE}),
        ("chat_template.json", "unsafe"),
    ),
    "no image settings": (lambda f: (f / "preprocessor_config.json").unlink(), ("preprocessor_config.json",)),
}


@pytest.mark.parametrize("damage", BAD_CHECKPOINTS)
def test_bad_checkpoints(sharded, tmp_path, damage, pages):
    spoil, said = BAD_CHECKPOINTS[damage]
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    spoil(folder)
    refused(generate("--model", folder, "--image", pages[0], "--prompt", "Why?"), *said)


def test_a_key_that_is_missing(tmp_path):
    folder = tiny.write(tmp_path / "model")
    edit_tensors(folder / SINGLE, image_newline=None)
    refused(generate("--model", folder, "--prompt", "Why?"), folder, "missing 1: image_newline")


@pytest.mark.parametrize("name", ["nowhere", "/no/where", "a/b/c"])
def test_unknown_models(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(generate("--model", name, "--prompt", "Why?"), name, "no such folder")


def bad_image(folder: Path, fault: str) -> Path:
    path = folder / f"{fault}.png"
    if fault == "text":
        path.write_text("not an image")
    elif fault == "cut":
        write_pages(folder)
        path.write_bytes((folder / "wide.png").read_bytes()[:-40])
    elif fault == "bomb":
        # A black PNG of this size is a small file; its header alone is reason to refuse it.
        Image.new("1", (20000, 20000)).save(path)
    elif fault == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    "fault, said",
    [
        ("text", "not an image"),
        ("cut", "cannot be read"),
        ("bomb", "decompression bomb"),
        ("missing", "no such file"),
        ("folder", "is a folder"),
    ],
)
def test_bad_images_are_told_before_loading(tmp_path, monkeypatch, fault, said):
    monkeypatch.setattr(weights, "load", lambda *_, **__: pytest.fail("loading started"))
    path = bad_image(tmp_path, fault)
    refused(generate("--image", path, "--prompt", "Why?"), path, said)


@pytest.mark.parametrize(
    "prompt, images, said",
    [
        ("<image> <image>", 1, "the prompt has 2 <image> placeholders for 1 images"),
        ("<image>", 2, "the prompt has 1 <image> placeholders for 2 images"),
        ("<image>", 0, "the prompt has 1 <image> placeholders for 0 images"),
        ("long " * 2000, 1, "the model's context is 2048"),
    ],
)
def test_prompts_that_do_not_fit(model, pages, prompt, images, said):
    flag = ["--image", *pages[:images]] if images else []
    refused(generate("--model", model, *flag, "--prompt", prompt), said)


def test_a_budget_that_nothing_can_meet(model, pages):
    flags = ("--policy", "avl", "--kv_budget", 0.01)
    refused(generate("--model", model, "--image", pages[0], "--prompt", "Why?", *flags), "kv_budget 0.01 is infeasible")


def test_a_conversation_goes_on_after_a_budget_that_a_turn_cannot_meet(model, pages):
    flags = ("--model", model, "--chat", "--policy", "avl", "--kv_budget", 0.3, "--max_new_tokens", 4)
    plain = generate(*flags, "--image", pages[0], stdin="One?\nTwo?\n")
    lines = ["One?", f"/image {pages[1]}", "why " * 60, "/image", "Two?"]
    ran = generate(*flags, "--image", pages[0], stdin="\n".join(lines) + "\n")
    assert ran.status == 0 and ran.out.count("\n") == 2
    assert ran.out.splitlines()[0] == plain.out.splitlines()[0]
    assert ran.err.startswith("error: kv_budget 0.3 is infeasible") and ran.err.count("\n") == 1


def test_a_mistake_in_a_conversation_is_no_mistake_of_the_model(model, monkeypatch):
    """Only a user's mistake is reported and passed over; a bug still ends the program with a traceback."""
    monkeypatch.setattr(Conversation, "ask", lambda *_: (_ for _ in ()).throw(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        generate("--model", model, "--chat", stdin="Hi?\n")
