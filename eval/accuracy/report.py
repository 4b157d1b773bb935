"""What a run comes to: the content of results.json, and its summary in words."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.accuracy.anls import mean
from eval.accuracy.results import by_type, summarise

if TYPE_CHECKING:
    from eval.accuracy.runner import Model, Run

_PACKAGES = ("minivlm", "torch", "tokenizers", "pillow", "huggingface-hub", "safetensors")


def share_of(stats: Any, samples: int) -> dict[str, float]:
    """One sample's share of what its batch took, so that costs add up over rows however they were asked."""
    return {
        "prefill_s": stats.prefill_s / samples,
        "decode_s": stats.decode_s / samples,
        "decoded_tokens": stats.decoded_tokens / samples,
        "prompt_tokens": stats.prompt_tokens / samples,
        "vision_tokens": stats.vision_tokens / samples,
        "new_tokens": stats.new_tokens / samples,
        "kv_bytes": stats.live_bytes / samples,
        "kv_full_bytes": stats.full_bytes / samples,
        "kv_batch_bytes": stats.nbytes,
        "kv_full_batch_bytes": stats.full_bytes,
        "entries_attended": sum(stats.entries_attended_per_step.values()),
    }


def cost(rows: Iterable[dict]) -> dict[str, float]:
    """What the answered samples took: milliseconds, tokens, and the bytes of the cache against the full one.

    `prefill_ms` is per page and `decode_ms_per_token` per token after the first; `kv_bytes_mean` is what the policy
    holds per page after prefill, `kv_share` that against the full cache; `kv_bytes_peak` is the most that was allocated
    for a batch, room for the answer and bookkeeping included, beside the entries of the largest full cache.
    """
    shares = [row["cost"] for row in rows if "cost" in row]
    if not shares:
        return {}
    total = {name: math.fsum(share[name] for share in shares) for name in shares[0]}
    return {
        "prefill_ms": 1000 * total["prefill_s"] / len(shares),
        "decode_ms_per_token": 1000 * total["decode_s"] / total["decoded_tokens"] if total["decoded_tokens"] else 0.0,
        "prompt_tokens": total["prompt_tokens"] / len(shares),
        "vision_tokens": total["vision_tokens"] / len(shares),
        "new_tokens": total["new_tokens"] / len(shares),
        "kv_bytes_mean": total["kv_bytes"] / len(shares),
        "kv_full_bytes_mean": total["kv_full_bytes"] / len(shares),
        "kv_share": total["kv_bytes"] / total["kv_full_bytes"] if total["kv_full_bytes"] else 0.0,
        "kv_bytes_peak": max(share["kv_batch_bytes"] for share in shares),
        "kv_full_bytes_peak": max(share["kv_full_batch_bytes"] for share in shares),
        "entries_attended_per_step": mean(share["entries_attended"] for share in shares),
    }


def document(run: Run, rows: Mapping[str, list[dict]], model: Model, seconds: float, processes: int) -> dict:
    """The content of results.json, from the rows of each task in the order of its data."""
    merged = {name: [row for member in members for row in rows[member]] for name, members in run.groups.items()}
    processor = model.processor
    return {
        "results": {name: summarise(found) for name, found in {**rows, **merged}.items()},
        "by_type": {name: by_type(found) for name, found in rows.items()},
        "cost": {name: cost(found) for name, found in rows.items()},
        "failed": [
            f"{row['task']} {row['id']}: {row['error']}" for found in rows.values() for row in found if "error" in row
        ],
        "settings": run.keyed(),
        "data": {task.name: dataset.origin for task, dataset in run.tasks},
        "prompts": {
            task.name: processor.question(task.prompt(dataset.samples[0]), 1)
            if processor
            else task.prompt(dataset.samples[0])
            for task, dataset in run.tasks
        },
        "template": processor.question("{question}", 1) if processor else None,
        "notes": list(run.notes),
        "versions": versions(),
        "seconds": seconds,
        "processes": processes,
    }


def versions() -> dict[str, str]:
    """Python and the packages that decide about answers; what is not installed as a package is left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def summary(results: dict, folder: Path) -> str:
    """A finished run for people: metrics with standard errors, by type, cost, and what failed."""
    lines = []
    for task, numbers in results["results"].items():
        metrics = [name for name in numbers if f"{name}_stderr" in numbers]
        scores = [f"{name} {numbers[name]:.4f} ± {numbers[f'{name}_stderr']:.4f}" for name in metrics]
        counts = [f"n {numbers['n']}"] + [f"{name} {numbers[name]}" for name in ("unscored", "failed") if numbers[name]]
        lines.append(f"{task}: " + ", ".join(scores + counts))
        for kind, part in results["by_type"].get(task, {}).items():
            lines.append(
                f"  {kind}: "
                + ", ".join([f"{name} {part[name]:.4f}" for name in metrics if name in part] + [f"n {part['n']}"])
            )
        if spent := results["cost"].get(task):
            lines.append(
                f"  cost: prefill {spent['prefill_ms']:.1f} ms, decode {spent['decode_ms_per_token']:.2f} ms/token, "
                f"{spent['new_tokens']:.1f} of {spent['prompt_tokens'] + spent['new_tokens']:.0f} tokens generated; KV "
                f"{spent['kv_bytes_mean'] / 2**20:.2f} MiB a page, {spent['kv_share']:.1%} of the full cache, "
                f"{spent['kv_bytes_peak'] / 2**20:.2f} MiB at most; {spent['entries_attended_per_step']:.0f} entries take part in a step"
            )
    if results["failed"]:
        lines.append(
            f"{len(results['failed'])} samples failed and are not in the scores: "
            + "; ".join(results["failed"][:3])
            + ("; …" if len(results["failed"]) > 3 else "")
        )
    return "\n".join([*lines, str(folder / "results.json")])
