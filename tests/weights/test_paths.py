"""Names of checkpoints, and files in them, that are something else: refused at once, and the hub is not asked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import tiny
import weights.find
from minivlm import Sampling, UserError
from weights import find_checkpoint, load, load_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def refused(call, *said: str) -> None:
    """`call` raises a UserError of one line that says all of `said`."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1100
    for part in said:
        assert part in message


NO_FOLDERS = ["nowhere", "./no/where", "/no/where", "../name", "a/b/c", "owner/", "C:\\model", " ", Path("owner/name")]
NO_FOLDERS += ["owner/..", "owner/a--b", "owner/-name", "owner/" + "x" * 200, "~nobody-of-this-name/x", "~nobody-here"]


@pytest.mark.parametrize("model", NO_FOLDERS)
def test_unknown_folder(model, monkeypatch):
    monkeypatch.setattr(weights.find, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    refused(lambda: find_checkpoint(model), str(model), "no such folder")


@pytest.mark.parametrize("model", ["x" * 5000, "owner/" + "x" * 5000, "a\0b", "\udcff/\udcfe", "a\nb", "\x1b[2J/x"])
def test_names_that_no_folder_has(model):
    refused(lambda: find_checkpoint(model), "no such folder")


FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
FILES += ["preprocessor_config.json", "processor_config.json", "chat_template.json", SINGLE, INDEX]


@pytest.mark.parametrize("kind", ["FIFO", "folder", "links", "no such file"])
@pytest.mark.parametrize("file", FILES)
def test_files_that_are_no_files(tmp_path, file, kind):
    single = tiny.write(tmp_path / "single")
    path = single / file
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(file if kind == "links" else "nothing")
    refused(lambda: load(single, device="cpu"), file, kind)


def test_a_shard_that_is_no_file(tmp_path):
    shard = tiny.write(tmp_path / "sharded", shards=3) / "model-00002-of-00003.safetensors"
    shard.unlink()
    os.mkfifo(shard)
    refused(lambda: load_model(shard.parent), shard.name, "is a FIFO")


def test_a_folder_whose_name_is_not_text(tmp_path):
    folder = tiny.write(tmp_path / "model").rename(tmp_path / "model\udcff")
    assert load(folder, device="cpu").ask("What?", sampling=Sampling(max_new_tokens=1)).token_ids


def test_a_file_is_not_a_folder(tmp_path):
    single = tiny.write(tmp_path / "single")
    refused(lambda: find_checkpoint(single / SINGLE), SINGLE, "expected a checkpoint folder")
