"""Commands whose standard streams are closed, full, endless, ASCII only, or not text."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cli_helpers import Ran, call, endless_model, generate, refused
from minivlm.app import chat, cli
from minivlm.app.cli import Parser
from minivlm.errors import UserError
from paths import ROOT, SCRIPTS


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return endless_model(tmp_path_factory.mktemp("model"))


# Each is run by a shell in a folder that has a device `full`, as generate.py with these flags and streams.
ASK = "--prompt Hi? --max_new_tokens 3"
PROCESSES = {
    "stdout closed": (f"{ASK} >&-", {}),
    "stdout full": (f"{ASK} >full", {}),
    "stdout full, unbuffered": (f"{ASK} >full", {"PYTHONUNBUFFERED": "1"}),
    "stdout of a chat full": (f"--chat {ASK} >full", {}),
    "help on a full stdout": ("--help >full", {}),
    "stderr closed": (f"{ASK} --policy full 2>&-", {}),
    "stderr closed, and a mistake": ("--prompt Hi? --seed x 2>&-", {}),
    "stderr full": (f"{ASK} --stats 2>full", {}),
    "stderr full, and a mistake": ("--prompt Hi? --seed x 2>full", {}),
    "stdin closed": ("--chat --max_new_tokens 3 --prompt Hi? <&-", {}),
    "stdin not text": ("--chat --max_new_tokens 3", {}),
    "stdin a file to write": ("--chat --max_new_tokens 3 0>some", {}),
    "all closed": (f"{ASK} <&- >&- 2>&-", {}),
    "ASCII": ("--polic\udce9 \udcc3\udca9", {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}),
}


@pytest.fixture(scope="module")
def ran(model, tmp_path_factory) -> dict[str, Ran]:
    """All processes at once: most of their time goes into importing torch."""
    folder = tmp_path_factory.mktemp("streams")
    try:
        os.mknod(folder / "full", 0o666 | stat.S_IFCHR, os.makedev(1, 7))
        os.close(os.open(folder / "full", os.O_WRONLY))
    except OSError as error:
        pytest.skip(f"no device nodes here: {error}")
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    processes = {
        name: subprocess.Popen(
            ["sh", "-c", f"exec {sys.executable} {SCRIPTS}/generate.py --model {model} {words}"],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
            **pipes,
        )
        for name, (words, environment) in PROCESSES.items()
    }
    results = {}
    for name, process in processes.items():
        out, err = process.communicate(b"\xff\xfe?\nHi?\n", timeout=300)
        results[name] = Ran(process.returncode, out.decode(), err.decode())
    return results


@pytest.mark.parametrize(
    "name", ["stdout full", "stdout full, unbuffered", "stdout of a chat full", "help on a full stdout"]
)
def test_a_full_standard_output_is_one_error(ran, name):
    assert ran[name] == Ran(2, "", "error: standard output cannot be written (No space left on device)\n")


def test_a_closed_standard_output_is_one_error(ran):
    assert ran["stdout closed"] == Ran(2, "", "error: standard output cannot be written (it is closed)\n")
    assert ran["all closed"] == Ran(2, "", "")


@pytest.mark.parametrize("name", ["stderr closed", "stderr full"])
def test_what_standard_error_cannot_take_is_lost_and_never_among_the_answers(ran, name):
    assert (ran[name].status, ran[name].err) == (0, "")
    assert ran[name].out == ran["stdin closed"].out != ""
    assert ran[f"{name}, and a mistake"] == Ran(2, "", "")


def test_a_closed_standard_input_ends_a_conversation(ran):
    assert (ran["stdin closed"].status, ran["stdin closed"].err) == (0, "")


def test_standard_input_that_cannot_be_read(ran):
    refused(ran["stdin a file to write"], "standard input cannot be read")


def test_a_line_that_is_not_text_ends_only_its_turn(ran):
    expected = "error: the prompt is not valid Unicode (character 1)\n"
    assert ran["stdin not text"] == Ran(0, ran["stdin closed"].out, expected)


def test_a_terminal_of_ascii(ran):
    refused(ran["ASCII"], "\\udce9")


class Narrow(io.TextIOWrapper):
    """A terminal that knows only ASCII."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii")


def test_an_answer_that_the_terminal_cannot_show_is_escaped(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Narrow())
    cli.run(lambda _: print("a 5 € note\udcff"), [])
    assert sys.stdout.buffer.getvalue() == b"a 5 \\u20ac note\\udcff\n"


def test_the_streams_are_put_back():
    before = sys.stdin, sys.stdout, sys.stderr
    call(lambda _: print("x"))
    assert before == (sys.stdin, sys.stdout, sys.stderr)


def test_a_refusal_is_alone_and_notes_come_before_an_answer(capfd):
    def refuse(_: object) -> None:
        cli.note("by the way")
        raise UserError("no")

    def answer(_: object) -> None:
        cli.note("by\nthe way")
        os.write(1, b"work")
        print("yes")
        cli.note("at the end")

    assert call(refuse) == Ran(2, "", "error: no\n")
    assert call(answer) == Ran(0, "yes\n", "note: by\\nthe way\nnote: at the end\n")
    cli.run(answer, [])
    assert capfd.readouterr() == ("workworkyes\n", "note: by\\nthe way\nnote: at the end\n")


def test_notes_come_before_other_lines_of_standard_error():
    def talk(_: object) -> None:
        cli.note("first")
        print("progress", file=sys.stderr)

    assert call(talk) == Ran(0, "", "note: first\nprogress\n")


def test_an_error_is_one_line_of_moderate_length():
    def fail(_: object) -> None:
        raise UserError("a\nb\r\x1b[31m\0\u2028\ud800 é " + "x" * 10_000)

    ran = call(fail)
    assert ran.status == 2 and ran.out == ""
    assert ran.err.startswith("error: a\\nb\\r\\x1b[31m\\x00\\u2028\\ud800 é xxx") and ran.err.count("\n") == 1
    assert len(ran.err) < 2000


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_too_little_memory_is_one_line(error):
    def fail(_: object) -> None:
        raise error

    refused(call(fail), "out of memory")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ZeroDivisionError(), OSError(5, "a bug"), RecursionError()])
def test_a_bug_keeps_its_traceback(error):
    def fail(_: object) -> None:
        raise error

    with pytest.raises(type(error)):
        call(fail)


def test_an_endless_line_is_refused(model, monkeypatch):
    monkeypatch.setattr(chat, "_LONGEST_LINE", 1000)
    ran = generate("--model", model, "--chat", "--max_new_tokens", 1, stdin="Hi?\n" + "x" * 1001)
    assert ran.status == 2 and ran.out.count("\n") == 1
    assert ran.err == "error: standard input has a line of more than 1000 characters\n"
    longest = generate("--model", model, "--chat", "--max_new_tokens", 1, stdin="x" * 1000)
    assert (longest.status, longest.err.count("\n")) == (0, longest.err.count("error: "))


def test_the_last_line_may_have_no_end(model):
    flags = ("--model", model, "--chat", "--max_new_tokens", 3)
    assert generate(*flags, stdin="Hi?") == generate(*flags, stdin="Hi?\n") != generate(*flags, stdin="")


@pytest.mark.parametrize("name", ["a\0b.png", "x" * 300, "\ud800.png", ".", "\x1b[2J"])
def test_images_of_a_turn_that_are_no_files(model, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = generate("--model", model, "--chat", "--max_new_tokens", 1, stdin=f"/image {name}\nHi?\n")
    assert ran.status == 0 and ran.out.count("\n") == 1
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1
    assert not set("\x1b\0") & set(ran.err)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "x", "", "٣x", "9" * 5000, "0x10", "1e3" * 2, "True"])
def test_flags_take_numbers_alone(text):
    parser = Parser("")
    parser.flag("count", type=int)
    parser.flag("share", type=float)
    for flag in ("--count", "--share"):
        with pytest.raises(UserError, match=flag):
            parser.parse_args([f"{flag}={text}"])
    assert parser.parse_args(["--count", "-9223372036854775807"]).count == -(2**63) + 1
    assert parser.parse_args(["--share", "1e300"]).share == 1e300
