"""Download from the hub, against a small local server that speaks the part of its API that is used.

The client's settings are environment variables that huggingface-hub reads once, so the downloads run in
processes of their own: one with the server up, one offline, one with the server gone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from hub_helpers import COMMIT, Hub
from paths import ROOT

# Loads each repository named on the command line and prints {name: outcome} as JSON.
CLIENT = """
import json, sys
from minivlm.errors import UserError
from weights import find_checkpoint, load_model
outcomes = {}
for name in sys.argv[1:]:
    try:
        folder = find_checkpoint(name)
        outcomes[name] = [sum(p.numel() for p in load_model(folder, device="cpu").parameters()), str(folder)]
    except UserError as error:
        outcomes[name] = str(error)
print(json.dumps(outcomes))
"""


def client(home: Path, endpoint: str, *repos: str, offline: bool = False) -> dict[str, object]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    if offline:
        environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, *repos], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Outcomes of the three processes, and the files that were fetched."""
    root, home = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("home")
    good = tiny.write(root / "tiny/good", layout="b", shards=3)
    for extra in ("README.md", "pytorch_model.bin", "model.fp16.safetensors", "onnx/config.json"):
        (good / extra).parent.mkdir(exist_ok=True)
        (good / extra).write_text("not needed")
    tiny.write(root / "tiny/single", "llava-1.5", generation="new", tokenizer=False)
    (tiny.write(root / "tiny/lost-shard", shards=3) / "model-00002-of-00003.safetensors").unlink()
    (tiny.write(root / "tiny/no-weights") / "model.safetensors").unlink()
    (tiny.write(root / "tiny/no-config") / "config.json").unlink()
    outside = tiny.write(root / "tiny/outside", shards=2)
    index = json.loads((outside / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../good/model-00001-of-00003.safetensors"
    tiny.dump(outside / "model.safetensors.index.json", index)
    tiny.write(root / "tiny/short")
    faults = {
        "tiny/private": (401, {"X-Error-Code": "RepoNotFound"}),
        "tiny/token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
        "tiny/forbidden": (403, {"X-Error-Message": "no permission"}),
        "tiny/gated": (403, {"X-Error-Code": "GatedRepo"}),
        "tiny/down": (500,),
        "tiny/short/model.safetensors": (5000,),
    }
    hub = Hub(root, faults)
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    broken = [
        *(name for name in faults if name.count("/") == 1),
        "tiny/short",
        "tiny/none",
        "tiny/lost-shard",
        "tiny/no-weights",
    ]
    online = client(home, endpoint, "tiny/good", "tiny/single", *broken, "tiny/no-config", "tiny/outside")
    fetched = list(hub.fetched)
    offline = client(home, endpoint, "tiny/good", "tiny/short", "tiny/never", offline=True)
    assert hub.fetched == fetched
    hub.shutdown()
    hub.server_close()
    gone = client(home, endpoint, "tiny/good", "tiny/never")
    return {"online": online, "offline": offline, "gone": gone, "fetched": fetched}


def test_first_download(runs):
    size, folder = runs["online"]["tiny/good"]
    assert size > 100_000 and Path(folder).name == COMMIT
    assert runs["online"]["tiny/single"][0] > 100_000


def test_only_what_is_needed_is_fetched_and_only_once(runs):
    fetched = sorted(name.removeprefix("tiny/good/") for name in runs["fetched"] if name.startswith("tiny/good/"))
    assert fetched == [
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize("run", ["offline", "gone"])
def test_the_cache_serves_without_the_hub(runs, run):
    assert runs[run]["tiny/good"] == runs["online"]["tiny/good"]


@pytest.mark.parametrize(
    "run, repo, said",
    [
        ("online", "tiny/none", "no such repository on the hub"),
        ("online", "tiny/private", "HF_TOKEN"),
        ("online", "tiny/token", "401 (check HF_TOKEN"),
        ("online", "tiny/forbidden", "403 (check HF_TOKEN"),
        ("online", "tiny/gated", "gated on the hub"),
        ("online", "tiny/down", "the hub answered 500"),
        ("online", "tiny/short", "model.safetensors"),
        ("online", "tiny/lost-shard", "has no model-00002-of-00003.safetensors"),
        ("online", "tiny/no-weights", "has no model.safetensors"),
        ("online", "tiny/no-config", "has no config.json"),
        ("online", "tiny/outside", "'../good/model-00001-of-00003.safetensors'"),
        ("offline", "tiny/short", "HF_HUB_OFFLINE"),
        ("offline", "tiny/never", "offline mode is on (HF_HUB_OFFLINE)"),
        ("gone", "tiny/never", "the hub cannot be reached"),
    ],
)
def test_a_failure_is_one_line(runs, run, repo, said):
    message = runs[run][repo]
    assert isinstance(message, str), f"loaded {message}"
    assert repo.split("/")[1] in message and said in message and "\n" not in message
