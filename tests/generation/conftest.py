"""Fixtures of the tests of generation."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli_helpers import write_pages
from minivlm import VLM
from vlm_helpers import endless_vlm


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> list[Path]:
    """Two images."""
    return write_pages(tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="module")
def vlm(tmp_path_factory) -> VLM:
    """A model whose answers never end by themselves."""
    return endless_vlm(tmp_path_factory.mktemp("model"))
