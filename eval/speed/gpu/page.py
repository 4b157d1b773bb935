"""The Markdown page of a GPU run: targets met and missed, and what every piece measured, with its command."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.speed.gpu.pieces import Piece
from eval.speed.gpu.targets import TARGETS, NotMeasured, Results, Target
from eval.speed.report import case_table
from minivlm.errors import UserError
from minivlm.files import read_bytes, write_whole

PAGE = "README.md"  # so that a folder shows it
_REHEARSAL = "**A rehearsal of a tiny model on the CPU: no number here says anything about a GPU.**\n"


def read_results(out: Path, pieces: Sequence[Piece]) -> dict[str, dict[str, Any]]:
    """The JSON of each finished piece, by its name. Raises `UserError` for a file that is none."""
    results = {}
    for piece in pieces:
        path = out / f"{piece.name}.json"
        if path.is_file():
            try:
                results[piece.name] = json.loads(read_bytes(path))
            except ValueError as error:
                raise UserError(f"{path}: no JSON ({error}); remove it, or run again with --again") from None
    return results


def write_page(out: Path, pieces: Sequence[Piece], unfinished: Mapping[str, str], rehearsal: bool) -> Path:
    """Write the page of what is in the folder, and return its path. `unfinished` says why a piece has no JSON."""
    text = page(read_results(out, pieces), pieces, unfinished, rehearsal)
    write_whole(out / PAGE, lambda scratch: scratch.write_text(text, encoding="utf-8"))
    return out / PAGE


def page(results: Results, pieces: Sequence[Piece], unfinished: Mapping[str, str], rehearsal: bool) -> str:
    """The page as Markdown."""
    parts = ["# On a GPU\n", *([_REHEARSAL] if rehearsal else []), *_device(results)]
    parts += ["## Targets\n", target_table(results), "## Pieces\n"]
    for piece in pieces:
        parts.append(f"### {piece.name}: {piece.about}\n")
        if piece.name in results:
            parts.append(_piece(results[piece.name], (piece.name if piece.draws else None)))
        else:
            parts.append(f"Not measured: {unfinished.get(piece.name, 'it has not run yet')}.\n")
    return "\n".join(parts)


def _device(results: Results) -> list[str]:
    """The card and the versions, and a warning if not all pieces have them."""
    if "device" not in results:
        return ["The device was not looked at yet.\n"]
    found = results["device"]
    machine, versions = found["machine"], found["versions"]
    memory = f", {machine['memory'] / 2**30:.0f} GiB" if "memory" in machine else ""
    driver = f", driver {found['driver']}" if found["driver"] else ""
    cuda = f", CUDA {machine['cuda']}" if "cuda" in machine else ""
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    copy, read = (f"{found['bandwidth'][how] / 1e9:.0f} GB/s" for how in ("copy", "read"))
    lines = [
        f"{machine['device']}{memory}{driver}{cuda}; {named}.\nIt copies {copy} (bytes read and written) and reads "
        f"{read}.\n\n`{found['command']}`\n"
    ]
    others = sorted(name for name, result in results.items() if result.get("machine", machine) != machine)
    if others:
        lines.append(f"**Measured on another device: {', '.join(others)}.** Run them with `--again`.\n")
    return lines


def target_table(results: Results) -> str:
    """A line for each target. "Limit" is the time that copying the step's bytes takes on this device."""
    lines = ["| target | wanted | measured | limit | | pieces |", "|---|---|---|---|---|---|"]
    lines += [_target_line(target, results) for target in TARGETS]
    return "\n".join(lines) + "\n"


def _target_line(target: Target, results: Results) -> str:
    try:
        judged = target.judge(results)
        cells = f"{judged.measured} | {judged.limit} | {'met' if judged.met else '**missed**'}"
    except NotMeasured:
        cells = "not measured | | "
    return f"| {target.name} | {target.wanted} | {cells} | {', '.join(target.pieces) or 'all'} |"


def _piece(result: Mapping[str, Any], picture: str | None) -> str:
    """What one piece measured, below its command."""
    parts = [f"`{result['command']}` ({result['seconds']:.0f} s)\n"]
    if "said" in result:
        parts.append(f"{result['said']}\n")
    if "largest_batch" in result:
        counts = ", ".join(f"{name} {count}" for name, count in result["largest_batch"].items())
        parts.append(f"Largest batch that fits: {counts}.\n")
    for case in result.get("cases", []):
        parts.append(case_table(case))
        for name, tables in case.get("profile", {}).items():
            parts += [_folded(f"{name}, {part}", table) for part, table in tables.items()]
    if picture is not None:
        parts.append(f"![{picture}]({picture}.png)\n")
    return "\n".join(parts)


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n```\n{text.strip()}\n```\n\n</details>\n"
