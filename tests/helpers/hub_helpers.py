"""A small local server that speaks the part of the hub's API which downloads use."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    """Answers for the repositories of its server: their listing, their tree, and their files."""

    protocol_version = "HTTP/1.1"
    server: Hub

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
        if rest[:1] == ["revision"]:
            return self.answer(200, body=listing(repo, folder))
        if rest[:1] == ["tree"]:
            return self.answer(200, body=tree(folder))
        assert rest[:2] == ["resolve", COMMIT], path
        self.answer_file(repo, folder / "/".join(rest[2:]))

    do_HEAD = do_GET

    def answer_file(self, repo: str, file: Path) -> None:
        if not file.is_file():
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        body = file.read_bytes()
        if self.command == "GET":
            self.server.fetched.append(f"{repo}/{file.name}")
            body = body[: self.server.faults.get(f"{repo}/{file.name}", (len(body),))[0]]
        self.answer(200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag(file)}"'}, body)

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


class Hub(ThreadingHTTPServer):
    """Serves the folders below `root` as repositories, from a free port of this machine, in threads.

    `faults` maps a repository to the arguments of `Handler.answer`, or a file of one to a tuple of the number of bytes
    after which its body is cut off. `fetched` lists the files that were downloaded, in order.
    """

    daemon_threads = True

    def __init__(self, root: Path, faults: dict[str, tuple], handler: type[Handler] = Handler) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.root, self.faults = root, faults
        self.fetched: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def listing(repo: str, folder: Path) -> bytes:
    """What the hub says about a revision of a repository."""
    siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in files_of(folder)]
    return json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()


def tree(folder: Path) -> bytes:
    """The files of a repository, with their sizes and hashes."""
    files = [
        {"type": "file", "path": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "oid": etag(path)}
        for path in files_of(folder)
    ]
    return json.dumps(files).encode()


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
