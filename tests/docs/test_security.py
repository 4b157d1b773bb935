"""SECURITY.md names a test for every promise; here, that these tests exist."""

import re

import pytest

from paths import ROOT

TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
TESTS = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
PROMISES = [line.split("|")[1:3] for line in TEXT.splitlines() if line.startswith("| **")]


@pytest.mark.parametrize("promise, tests", PROMISES, ids=[promise.split("**")[1].strip(".") for promise, _ in PROMISES])
def test_a_promise_has_tests(promise, tests):
    assert re.findall(r"`[^`]+`", tests)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(tests/[\w/]+\.py)`", TEXT))))
def test_a_named_file_exists(name):
    assert (ROOT / name) in TESTS


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+)`", TEXT))))
def test_a_named_test_exists(name):
    assert any(f"\ndef {name}(" in text for text in TESTS.values())
