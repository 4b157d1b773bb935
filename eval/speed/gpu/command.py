"""Check the GPU, test and time on it, and write a page of what was measured: `python benchmarks/gpu.py`.

The run consists of pieces, each a process of its own that writes a JSON file. A piece that fails is noted and ends no
other; one whose file is there is not run again. So an interrupted run goes on where it was when the same command is
given again.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.json_files import write_json
from eval.speed.gpu.device import expect_gpu
from eval.speed.gpu.page import PAGE, read_results, write_page
from eval.speed.gpu.pieces import Piece, pieces
from minivlm.app.cli import Parser, note
from minivlm.errors import UserError
from minivlm.files import expect_writable, make_folder, user_path

ROOT = Path(__file__).resolve().parents[3]
LONGEST = 480  # seconds that a piece may take
LOGS = "logs"  # the folder of what pieces print, and of results that are not complete


def run_gpu(arguments: Sequence[str]) -> None:
    """Run the pieces that the flags ask for. Raises `UserError` without a GPU, and at the end if a piece failed."""
    parser = Parser(__doc__)
    parser.flag(
        "out", type=Path, metavar="DIR", help="the folder of the results (benchmarks/gpu; a rehearsal has none)"
    )
    parser.flag("pieces", nargs="+", metavar="NAME", help="run these alone; `page` writes only the page (all)")
    parser.switch("again", help="run pieces again whose results are there")
    parser.flag("minutes", type=float, metavar="N", help="begin no piece that would not be done N minutes from now")
    parser.switch("dry_run", help="list the pieces and their commands")
    parser.switch("rehearse", help="run all pieces with a tiny model on the CPU, to see whether they run")
    args = parser.parse_args(arguments)
    started = time.monotonic()
    if args.minutes is not None and args.minutes <= 0:
        raise UserError(f"--minutes is {args.minutes:g} (expected more than 0)")
    if args.rehearse and not args.out and not args.dry_run:
        raise UserError("--rehearse needs a folder of its own (expected --out DIR)")
    out = _seen_from_root(args.out or ROOT / "benchmarks/gpu")
    every = pieces(args.rehearse)
    chosen = _chosen(every, args.pieces)
    if args.dry_run:
        for piece in chosen:
            print(f"{piece.name}: {piece.about}, about {_minutes(piece)}\n    {_command(piece, out)}")
        return
    if not args.rehearse:
        expect_gpu()
    _expect_same_kind(ROOT / out, every, args.rehearse)
    make_folder(ROOT / out / LOGS)
    expect_writable(ROOT / out / PAGE)
    deadline = None if args.minutes is None else started + 60 * args.minutes
    try:
        failed = _run_all(chosen, out, deadline, args.again, args.rehearse)
    except KeyboardInterrupt:
        note("interrupted; run the same command again to continue from here")
        raise
    path = write_page(ROOT / out, every, _unfinished(ROOT / out, every, args.rehearse), args.rehearse)
    print(f"see {os.path.relpath(path)}")
    if failed:
        raise UserError(f"failed: {', '.join(failed)} (see {PAGE} and {LOGS} in {out})")


def _chosen(every: Sequence[Piece], names: Sequence[str] | None) -> list[Piece]:
    known = [piece.name for piece in every]
    for name in names or ():
        if name not in (*known, "page"):
            raise UserError(f"--pieces {name!r} is unknown (expected some of {', '.join(known)}, page)")
    return [piece for piece in every if names is None or piece.name in names]


def _seen_from_root(path: Path) -> Path:
    """A path that holds where the pieces run, which is the repository's folder."""
    absolute = Path(os.path.abspath(user_path(path)))
    return absolute.relative_to(ROOT) if absolute.is_relative_to(ROOT) else absolute


def _command(piece: Piece, out: Path) -> str:
    return shlex.join(["python", *piece.words(out, out)])


def _minutes(piece: Piece) -> str:
    return f"{piece.minutes:g} minutes"


def _expect_same_kind(out: Path, every: Sequence[Piece], rehearsal: bool) -> None:
    """Refuse to mix a rehearsal and measurements in one folder."""
    found = read_results(out, every[:1]).get("device")
    if found is not None and (found["type"] == "cpu") != rehearsal:
        kind = "a rehearsal" if found["type"] == "cpu" else "measurements"
        raise UserError(f"{out}: holds the results of {kind} (expected another --out)")


def _run_all(chosen: Sequence[Piece], out: Path, deadline: float | None, again: bool, rehearsal: bool) -> list[str]:
    """Run pieces one after another until one would be done after the deadline. Returns those that failed."""
    failed = []
    for piece in chosen:
        if (ROOT / out / f"{piece.name}.json").exists() and not again:
            print(f"{piece.name}: has a result", flush=True)
            continue
        if reason := piece.left_out(rehearsal):
            print(f"{piece.name}: left out, {reason}", flush=True)
            continue
        left = float("inf") if deadline is None else deadline - time.monotonic()
        if 60 * piece.minutes > left:
            print(f"stopped before {piece.name}, about {_minutes(piece)}; the same command goes on from here")
            break
        print(f"{piece.name}: {piece.about}, about {_minutes(piece)} ...", flush=True)
        started = time.monotonic()
        if failure := run_piece(piece, out, min(LONGEST, left)):
            print(f"{piece.name}: failed, {failure}", flush=True)
            failed.append(piece.name)
            if piece.name == "device":
                break  # nothing else can run
        else:
            print(f"{piece.name}: done in {time.monotonic() - started:.0f} s", flush=True)
    return failed


def run_piece(piece: Piece, out: Path, seconds: float) -> str | None:
    """Run one piece and keep its result; returns why it failed, or None.

    What it prints goes to logs/NAME.log. Its JSON comes out of that folder only when it is complete.
    """
    folder = ROOT / out
    kept, written, log = folder / f"{piece.name}.json", folder / LOGS / f"{piece.name}.json", _log(folder, piece)
    for old in (written, kept):
        old.unlink(missing_ok=True)
    started = time.monotonic()
    status = _exit_status(piece.words(out / LOGS, out), log, seconds)
    if status is None:
        return f"ended after {seconds:.0f} s, which is all that it may take"
    if status < 0:
        return f"{signal.Signals(-status).name}: {_last_line(log)}"
    if status:
        return _last_line(log) or f"exit status {status}"
    content: dict[str, Any] = read_results(written.parent, [piece]).get(piece.name, {})
    if not piece.writes_json:
        content["said"] = _last_line(log)
    content |= {"command": _command(piece, out), "seconds": time.monotonic() - started}
    write_json(kept, content)
    written.unlink(missing_ok=True)
    return None


def _exit_status(words: Sequence[str], log: Path, seconds: float) -> int | None:
    """Run Python with these words; None if it was not done in time. Nothing goes on when this returns or raises."""
    with open(log, "wb") as printed:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT
        )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        process.kill()
        process.wait()


def _unfinished(out: Path, every: Sequence[Piece], rehearsal: bool) -> Mapping[str, str]:
    """Why pieces have no result, as far as one can tell."""
    reasons = {}
    for piece in every:
        if reason := piece.left_out(rehearsal):
            reasons[piece.name] = reason
        elif _log(out, piece).exists():
            reasons[piece.name] = f"it did not finish ({_last_line(_log(out, piece)) or 'it said nothing'})"
    return reasons


def _log(folder: Path, piece: Piece) -> Path:
    return folder / LOGS / f"{piece.name}.log"


def _last_line(log: Path) -> str:
    """The last line of what a piece printed, which says why it failed."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
