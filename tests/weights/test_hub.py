"""Download from the hub, against a small local server that speaks the part of its API that is used.

The client's settings are environment variables that huggingface-hub reads once, so the downloads run in
processes of their own: one with the server up, one offline, one with the server gone.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
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


class Hub(ThreadingHTTPServer):
    """Repositories are folders below `root`; `faults` maps a repository, or a file in one, to a response."""

    daemon_threads = True

    def __init__(self, root: Path, faults: dict[str, tuple]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.faults, self.fetched = root, faults, []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        parts = path.split("/")
        if parts[:2] == ["api", "models"]:
            repo, rest = "/".join(parts[2:4]), parts[4:]
        else:
            repo, rest = "/".join(parts[:2]), parts[2:]
        if repo in self.server.faults:
            return self.answer(*self.server.faults[repo])
        folder = self.server.root / repo
        if not folder.is_dir():
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        if rest[:1] == ["revision"]:
            siblings = [{"rfilename": p.relative_to(folder).as_posix()} for p in files]
            return self.answer(200, body=json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        if rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": p.relative_to(folder).as_posix(), "size": p.stat().st_size, "oid": etag(p)}
                for p in files
            ]
            return self.answer(200, body=json.dumps(tree).encode())
        assert rest[:2] == ["resolve", COMMIT], path
        file = folder / "/".join(rest[2:])
        if not file.is_file():
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        body = file.read_bytes()
        if self.command == "GET":
            self.server.fetched.append(f"{repo}/{file.name}")
            body = body[: self.server.faults.get(f"{repo}/{file.name}", (len(body),))[0]]
        self.answer(200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag(file)}"'}, body)

    do_HEAD = do_GET

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Keep the test output clean."""


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


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
