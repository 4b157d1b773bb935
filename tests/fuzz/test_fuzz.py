"""The fuzzer on this tree: named cases and a few hundred others, with thousands in the slow tests; and on itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fuzzer.named import NAMED

RUN = Path(__file__).with_name("run.py")
CASES = 300
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="cases are forked with limits of Linux")

# What the harness has to say of each planted defect; "" of what is right.
PLANTED = {
    "answer": "",
    "refusal": "",
    "whole file": "",
    "memory": "",  # the limit is reached, and `cli.run` says so in one line
    "traceback": "traceback: ZeroDivisionError",
    "traceback in a thread": "traceback: ZeroDivisionError",
    "crash": "died of signal 11",
    "hang": "hang",
    "spin": "hang",
    "status": "status 1",
    "no word": "a refusal of 0 lines",
    "second line": "a refusal of 2 lines",
    "chatter": "a word on stderr that is no note",
    "answer before a refusal": "a refusal that prints on stdout",
    "stray file": "stray files: ['out/stray']",
    "scratch file": "a refusal that changed files: ['tmp/scratch']",
    "changed input": "stray files: ['in/page']",
    "half a file": "wrong answer: AssertionError",
    "file elsewhere": "touched what is not its own: open",
    "rename elsewhere": "touched what is not its own: os.rename",
    "changed shared input": "changed shared inputs: ['wide.png']",
    "connection": "touched what is not its own: socket.connect",
    "left running": "left a process running",
    "wrong answer": "wrong answer: AssertionError",
    "unexpected answer": "accepted what cannot be meant",
    "unexpected refusal": "refused what is right",
}


def fuzz(folder: Path, *flags: object) -> tuple[dict[str, dict[str, Any]], str]:
    """Run the fuzzer; returns its results by the names of the cases, and what it printed."""
    results = folder / "results.json"
    command = [sys.executable, str(RUN), *map(str, flags), "--results", str(results)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert results.exists(), ran.stdout
    found = {result["name"]: result for result in json.loads(results.read_text())}
    assert ran.returncode == any(result["complaint"] for result in found.values())
    return found, ran.stdout


@pytest.fixture(scope="module")
def named(tmp_path_factory) -> dict[str, dict[str, Any]]:
    return fuzz(tmp_path_factory.mktemp("named"), "--only", "named", "--workers", 2)[0]


@pytest.mark.parametrize("name", NAMED)
def test_named(name, named):
    assert not named[name]["complaint"], named[name]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> tuple[dict[str, dict[str, Any]], str]:
    return fuzz(tmp_path_factory.mktemp("numbered"), "--cases", CASES, "--workers", 2)


def test_a_few_hundred_cases(numbered):
    results, said = numbered
    assert len(results) == CASES
    assert not any(result["complaint"] for result in results.values()), said


def test_every_family_is_accepted_and_refused(numbered):
    """Mutations that are always refused, or never, would not find much."""
    outcomes: dict[str, set[str]] = {}
    for result in numbered[0].values():
        outcomes.setdefault(result["family"], set()).add(result["outcome"])
    assert len(outcomes) == 13
    outcomes["chats"].add("refused")  # where turns are refused, and the conversation goes on
    assert all(found == {"accepted", "refused"} for found in outcomes.values()), outcomes


def test_a_case_depends_on_nothing_but_its_number(numbered, tmp_path):
    again, _ = fuzz(tmp_path, "--cases", 13)
    for name, result in again.items():
        for part in ("family", "outcome", "complaint", "words"):
            assert result[part] == numbered[0][name][part]


def test_another_seed_makes_other_cases(numbered, tmp_path):
    others, _ = fuzz(tmp_path, "--cases", 3, "--seed", "other")
    assert all(result["words"] != numbered[0][name]["words"] for name, result in others.items())


@pytest.mark.slow
def test_a_forked_case_ends_as_a_process_of_its_own_does(tmp_path):
    results, said = fuzz(tmp_path, "--only", "json", "prompts", "chats", "data", "--cases", 8, "--real", "--workers", 2)
    assert len(results) == 8 and not any(result["complaint"] for result in results.values()), said


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> dict[str, dict[str, Any]]:
    return fuzz(tmp_path_factory.mktemp("planted"), "--only", "planted", "--wall", 10, "--workers", 2)[0]


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_defect_is_noticed(fault, planted):
    complaint = planted[fault]["complaint"]
    assert PLANTED[fault] in complaint and bool(complaint) == bool(PLANTED[fault])


def test_all_planted_defects_are_expected(planted):
    assert planted.keys() == PLANTED.keys()


@pytest.mark.slow
@pytest.mark.parametrize("seed", (0, 1))
def test_thousands_of_cases(seed, tmp_path):
    results, said = fuzz(tmp_path, "--cases", 3000, "--seed", seed, "--workers", 2)
    assert len(results) == 3000 and not any(result["complaint"] for result in results.values()), said
