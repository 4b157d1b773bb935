"""scripts/generate.py as its users meet it: flags, streams, overlays, conversations, Ctrl-C."""

from __future__ import annotations

import builtins
import os
import re
import select
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

import tiny
import weights
from cli_helpers import Ran, endless_model, generate, refused, start, write_pages
from minivlm import Sampling
from minivlm.app import generate_command, policy_flags
from minivlm.app.report import describe_stats
from minivlm.cache.policies import PRESETS, preset
from minivlm.cache.policies.avl import AVLSettings
from minivlm.cache.settings import flag_names

FLAGS = {  # every flag of the script, with a value that is not its default
    "model": ("somewhere", "somewhere"), "device": ("cpu", "cpu"), "dtype": ("bfloat16", "bfloat16"), "seed": ("7", 7),
    "image": ("a.png", [Path("a.png")]), "prompt": ("Why?", "Why?"), "chat": (None, True), "max_new_tokens": ("5", 5),
    "temperature": ("0.5", 0.5), "top_p": ("0.25", 0.25), "compile": ("true", True), "pad_to_square": (None, True),
    "stats": (None, True), "overlay": ("out.png", Path("out.png")), "overlay_layer": ("1", 1), "overlay_step": ("2", 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return endless_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> list[Path]:
    return write_pages(tmp_path_factory.mktemp("pages"))


# Flags


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_in_both_spellings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value, parsed = FLAGS[name]
    needed = ["--image", "x.png"] if name.startswith("overlay") else []
    needed += ["--overlay", "o.png"] if name.startswith("overlay_") else []
    for spelling in (f"--{name}", "--" + name.replace("_", "-")):
        args = generate_command.parse(["--prompt", "x", *needed, spelling, *([] if value is None else [value])])
        assert getattr(args, name) == parsed
    assert getattr(generate_command.parse(["--prompt", "y"]), name) != parsed


def test_every_policy_flag_in_both_spellings():
    values = {bool: ("true", True), float: ("0.125", 0.125), int: ("6", 6), type(None): ("1", 1)}
    for name, flag in flag_names(AVLSettings).items():
        text, parsed = values[type(getattr(AVLSettings(), name))]
        for spelling in (f"--{flag}", "--" + flag.replace("_", "-")):
            args = generate_command.parse(["--prompt", "x", spelling, text])
            assert policy_flags.given(args) == {flag: parsed}


def test_the_help_names_no_other_flags():
    ran = generate("--help")
    assert ran.status == 0
    of_policies = [flag for chosen in PRESETS.values() for flag in flag_names(chosen.settings).values()]
    known = {*FLAGS, "no_compile", "policy", "policy_file", "help", *of_policies}
    options = ran.out[ran.out.index("\noptions:") :]
    assert {option[2:].replace("-", "_") for option in re.findall(r"--[a-z0-9_-]+", options)} == known


@pytest.mark.parametrize("flag", ["chat", "stats", "compile"])
def test_a_boolean_stands_alone_or_takes_a_word(flag):
    for words in ([], ["true"], ["1"], ["Yes"]):
        assert getattr(generate_command.parse(["--prompt", "x", f"--{flag}", *words]), flag) is True
    for words in (["false"], ["0"]):
        assert getattr(generate_command.parse(["--prompt", "x", f"--{flag}", *words]), flag) is False
    assert generate_command.parse(["--prompt", "x", "--no-compile"]).compile is False


# Answers


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_streamed_is_the_answer(tmp_path, family, pages):
    folder = tiny.write(tmp_path / "model", family)
    vlm = weights.load(folder, device="cpu")
    for dtype, images in (("float32", pages), ("float32", []), ("bfloat16", pages[:1])):
        flag = ["--image", *images] if images else []
        ran = generate(
            *("--model", folder, *flag, "--prompt", "What is this?"),
            *("--max_new_tokens", 30, "--dtype", dtype, "--device", "cpu"),
        )
        assert (ran.status, ran.err) == (0, "")
        if dtype == "float32":
            assert ran.out == vlm.ask("What is this?", images, sampling=Sampling(30)).text + "\n"


def test_images_one_by_one_and_where_the_prompt_wants_them(model, pages):
    common = ("--model", model, "--max_new_tokens", 12)
    asked = generate(*common, "--image", *pages, "--prompt", "<image> or <image> ?")
    assert asked == generate(*common, "--image", pages[0], "--image", pages[1], "--prompt", "<image> or <image> ?")
    assert asked.out != generate(*common, "--image", *reversed(pages), "--prompt", "<image> or <image> ?").out


def timeless(text: str) -> list[str]:
    """Statistics without what differs from run to run."""
    return [re.sub(r"[\d.]+ (ms|tokens/s)", r"- \1", line) for line in text.splitlines()]


@pytest.mark.parametrize("policy", PRESETS)
def test_stats(tmp_path, pages, policy):
    folder = tiny.write(tmp_path / "model", text_config={"num_hidden_layers": 4})
    flags = () if policy == "full" else ("--policy", policy)
    ran = generate("--model", folder, "--image", pages[0], "--prompt", "Why?", "--max_new_tokens", 9, "--stats", *flags)
    answer = weights.load(folder, device="cpu").ask("Why?", [pages[0]], sampling=Sampling(9), settings=preset(policy))
    assert ran.out == answer.text + "\n"
    assert timeless(ran.err) == timeless(describe_stats(answer.stats))
    share = float(re.search(r"([\d.]+)% of the full cache's", ran.err)[1])
    assert share == 100 if policy == "full" else share < 100
    assert re.search(r"^prefill [\d.]+ ms for \d+ tokens \(70 of images\)$", ran.err, re.M)
    assert re.search(r"^decode [\d.]+ tokens/s", ran.err, re.M)


def test_sampling_goes_by_the_seed(model):
    def ask(*flags: object) -> str:
        ran = generate("--model", model, "--prompt", "Hi?", "--max_new_tokens", 20, *flags)
        assert (ran.status, ran.err) == (0, "")
        return ran.out

    warm = ("--temperature", 1.5)
    greedy = ask()
    assert ask(*warm) == ask(*warm, "--seed", 0) != ask(*warm, "--seed", 1) == ask(*warm, "--seed", 1)
    assert ask(*warm, "--seed", 10**15) != ask(*warm, "--seed", -(10**15))
    assert greedy not in (ask(*warm), ask(*warm, "--seed", 1))
    assert ask(*warm, "--top_p", 1e-9) == greedy == ask("--temperature", 1e-30) == ask("--seed", 5)


def test_a_note_on_what_a_chosen_policy_does_not_do(model):
    common = ("--model", model, "--prompt", "Hi?", "--max_new_tokens", 2)
    assert generate(*common).err == ""
    assert generate(*common, "--policy", "full").err == "note: policy 'full' saves no bytes\n"
    ran = generate(*common, "--policy", "avl", "--text_pruning_interval", 4)
    assert "note: --text_pruning_interval has no effect" in ran.err
    ran = generate(*common, "--policy", "avl", "--kv_budget", 0.5)
    assert "note: --kv_budget has no effect on a prompt without images" in ran.err


def test_an_answer_that_fills_the_context_says_so(tmp_path):
    folder = tiny.write(tmp_path / "model", text_config={"max_position_embeddings": 40, "eos_token_id": tiny.VOCAB})
    tiny.dump(folder / "generation_config.json", {})
    ran = generate("--model", folder, "--prompt", "Hi?", "--max_new_tokens", 100)
    assert (ran.status, ran.err) == (0, "note: the answer ends here: the model's context of 40 tokens is full\n")
    assert generate("--model", folder, "--prompt", "Hi?", "--max_new_tokens", 3).err == ""


# Overlays


def test_an_overlay_is_a_picture(model, pages, tmp_path):
    out = tmp_path / "out.png"
    ran = generate(
        *("--model", model, "--image", *pages, "--prompt", "Why?"),
        *("--policy", "avl", "--max_new_tokens", 5, "--overlay", out),
    )
    assert (ran.status, ran.err) == (0, "")
    with Image.open(out) as picture:
        assert picture.format == "PNG" and picture.width >= 900
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.parametrize("where, said", [("nowhere/out.png", "no folder"), (".", "is a folder")])
def test_an_overlay_that_cannot_be_written_is_told_before_loading(pages, tmp_path, monkeypatch, where, said):
    monkeypatch.setattr(weights, "load", lambda *_, **__: pytest.fail("loading started"))
    refused(generate("--image", pages[0], "--prompt", "Why?", "--overlay", tmp_path / where), tmp_path / where, said)
    assert not list(tmp_path.iterdir())


def test_an_overlay_that_fails_half_way_leaves_the_old_file(model, pages, tmp_path, monkeypatch):
    class Half:
        def save(self, path: Path, format: str) -> None:
            path.write_bytes(b"half of a picture")
            raise OSError(28, "No space left on device")

    out = tmp_path / "out.png"
    out.write_bytes(b"old")
    monkeypatch.setattr(generate_command, "draw_overlay", lambda *_, **__: Half())
    ran = generate("--model", model, "--image", pages[0], "--prompt", "Why?", "--max_new_tokens", 1, "--overlay", out)
    assert ran.status == 2 and ran.err == f"error: {out}: cannot be written (No space left on device)\n"
    assert out.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_an_overlay_of_a_layer_that_is_not_there(model, pages, tmp_path):
    flags = ("--overlay", tmp_path / "out.png", "--overlay_layer", 2)
    ran = generate("--model", model, "--image", pages[0], "--prompt", "Why?", "--max_new_tokens", 1, *flags)
    assert (ran.status, ran.err) == (2, "error: --overlay_layer is 2, the model has layers 0 to 1\n")
    assert not list(tmp_path.iterdir())


# Conversations


def prefilled(err: str) -> list[tuple[int, int]]:
    """(tokens, tokens of images) of each turn's prefill, from its statistics."""
    return [
        (int(tokens), int(images)) for tokens, images in re.findall(r"ms for (\d+) tokens \((\d+) of images\)", err)
    ]


def test_a_later_turn_computes_only_what_is_new(model, pages):
    flags = ("--model", model, "--image", pages[0], "--chat", "--stats", "--max_new_tokens", 6)
    ran = generate(*flags, stdin="First?\n\n  \nSecond?\n")
    assert ran.status == 0 and ran.out.count("\n") == 2
    (first, vision), (second, none) = prefilled(ran.err)
    assert (vision, none) == (70, 0) and second < 40 < first
    kib = [float(size) for size in re.findall(r"KV cache ([\d.]+) KiB after prefill, 100.0%", ran.err)]
    entry = 2 * 2 * 2 * 16 * 4 / 1024  # KiB: layers, keys and values, key/value heads, dimensions, bytes
    assert kib == [first * entry, (first + 5 + second) * entry]  # the answer's last token is among the second turn's
    assert generate(*flags, "--prompt", "First?", stdin="Second?\n").out == ran.out


def test_images_may_come_in_later_turns(model, pages):
    flags = ("--model", model, "--chat", "--stats", "--max_new_tokens", 4)
    ran = generate(*flags, stdin=f"Hi?\n/image {pages[0]}\n/image {pages[1]}\nTwo?\nMore?\n")
    assert ran.status == 0 and [images for _, images in prefilled(ran.err)] == [0, 136, 0]
    taken_back = generate(*flags, stdin=f"Hi?\n/image {pages[0]}\n/image\nTwo?\n")
    assert [images for _, images in prefilled(taken_back.err)] == [0, 0]


def test_what_is_wrong_with_a_turn_ends_only_the_turn(model, pages, tmp_path):
    flags = ("--model", model, "--image", pages[0], "--chat", "--max_new_tokens", 4)
    plain = generate(*flags, stdin="One?\nTwo?\n")
    missing = tmp_path / "no such.png"
    ran = generate(*flags, stdin=f"<image> and <image>?\nOne?\n/image {missing}\n<image>?\nTwo?\n")
    assert (ran.status, ran.out) == (0, plain.out)
    assert ran.err.splitlines() == [
        "error: the prompt has 2 <image> placeholders for 1 images",
        f"error: {missing}: no such file",
        "error: the prompt has 1 <image> placeholders for 0 images",
    ]


def test_a_conversation_at_the_end_of_the_context(tmp_path):
    folder = tiny.write(tmp_path / "model", text_config={"max_position_embeddings": 64, "eos_token_id": tiny.VOCAB})
    tiny.dump(folder / "generation_config.json", {})
    flags = ("--model", folder, "--chat", "--max_new_tokens", 12)
    ran = generate(*flags, stdin="Hi?\n" + "long " * 9 + "\nOk?\nNow?\n")
    assert ran.status == 0 and ran.out.count("\n") == 2
    hint = "the model's context is 64 (expected a shorter turn, or a new conversation)"
    assert ran.err.splitlines() == [
        f"error: the conversation is 33 tokens long and this turn takes 64, {hint}",
        "note: the answer ends here: the model's context of 64 tokens is full",
        f"error: the conversation is 64 tokens long and this turn takes 23, {hint}",
    ]


def test_ctrl_c_at_the_prompt_ends_the_conversation(model, monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert generate("--model", model, "--chat", "--prompt", "Hi?", "--max_new_tokens", 1).status == 0


def test_ctrl_c_before_an_answer_ends_the_turn(model, monkeypatch):
    flags = ("--model", model, "--chat", "--max_new_tokens", 4)
    plain = generate(*flags, stdin="One?\nTwo?\n")
    attend, calls = torch.nn.functional.scaled_dot_product_attention, []

    def interrupt(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:  # the second layer of the first prefill
            raise KeyboardInterrupt
        return attend(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", interrupt)
    ran = generate(*flags, stdin="Zero?\nOne?\nTwo?\n")
    assert (ran.status, ran.out, ran.err) == (0, plain.out, "\n") and len(calls) > 2


# As a process


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    """An answer of this model takes minutes."""
    folder = tiny.write(
        tmp_path_factory.mktemp("endless"), text_config={"max_position_embeddings": 65536, "eos_token_id": tiny.VOCAB}
    )
    tiny.dump(folder / "generation_config.json", {})
    return folder


def test_ctrl_c_ends_an_answer(endless):
    process = start("generate", "--model", endless, "--prompt", "Hi?", "--max_new_tokens", 60000, "--stats")
    said = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert said and out.endswith(b"\n")
    assert b"Traceback" not in err and b"tokens/s" in err


def some_bytes(pipe: int) -> bytes:
    data = os.read(pipe, 1 << 16)
    assert data, "the process has ended"
    return data


def rest_of_a_turn(process: subprocess.Popen, lines: int) -> str:
    """Read both streams until stderr has so many lines, which come last; then nothing of the turn is left in a pipe."""
    out, err = process.stdout.fileno(), process.stderr.fileno()
    said = b""
    while said.count(b"\n") < lines:
        ready, _, _ = select.select([out, err], [], [], 120)
        assert ready, "the turn does not end"
        if err in ready:
            said += some_bytes(err)
        if out in ready:
            some_bytes(out)
    while select.select([out], [], [], 0)[0]:
        os.read(out, 1 << 16)
    return said.decode()


def test_ctrl_c_ends_a_turn_and_the_conversation_goes_on(endless):
    process = start("generate", "--model", endless, "--chat", "--max_new_tokens", 60000, "--stats")
    turns = []
    for _ in range(2):
        process.stdin.write(b"Hi?\n")
        process.stdin.flush()
        begun = 0
        while begun < 64:  # characters, of more than one token: then the statistics have their line about steps
            begun += len(some_bytes(process.stdout.fileno()))
        process.send_signal(signal.SIGINT)
        turns.append(rest_of_a_turn(process, lines=4))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (0, b"", b"")
    (first, _), (second, _) = prefilled("".join(turns))
    assert second < first + 4  # only the new turn, although the answer before it was cut


def test_status_and_stderr_of_a_process(tmp_path):
    process = start("generate", "--model", tmp_path / "nowhere", "--prompt", "Hi?")
    out, err = process.communicate(timeout=120)
    refused(Ran(process.returncode, out.decode(), err.decode()), tmp_path / "nowhere", "no such folder")


def test_a_reader_that_goes_away(endless):
    process = start("generate", "--model", endless, "--prompt", "Hi?", "--max_new_tokens", 60000)
    process.stdout.read(1)
    process.stdout.close()
    process.stdin.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(timeout=120) == 1
