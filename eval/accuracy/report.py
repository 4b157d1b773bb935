"""Reporting a run: the content of results.json, and its summary in words."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

from eval.accuracy.anls import mean
from eval.accuracy.outcomes import Outcome, metrics_in, summarise, summarise_by_type
from eval.accuracy.run_spec import Answerer, RunSpec

_PACKAGES = ("minivlm", "torch", "tokenizers", "pillow", "huggingface-hub", "safetensors")


class RunResults(TypedDict):
    """The content of results.json."""

    results: dict[str, dict[str, float]]  # by task or group of tasks: see `summarise`
    by_type: dict[str, dict[str, dict[str, float]]]  # by task and question type
    cost: dict[str, dict[str, float]]  # by task: see `mean_cost`
    failed: list[str]
    settings: dict[str, Any]
    data: dict[str, str]  # by task: where its data came from
    prompts: dict[str, str]  # by task: the first sample's prompt as the model reads it
    template: str | None
    notes: list[str]
    versions: dict[str, str]
    seconds: float
    processes: int


def mean_cost(outcomes: Iterable[Outcome]) -> dict[str, float]:
    """Return what the answered samples cost on average; empty if there are none.

    `prefill_ms` is per page, and `decode_ms_per_token` per token after the first. `kv_bytes_mean`
    is what the policy holds per page after prefill, and `kv_share` is its ratio to the full cache.
    `kv_bytes_peak` is the most memory allocated for a batch, including room for the answer and
    bookkeeping; `kv_full_bytes_peak` counts only the entries of the largest full cache.
    """
    costs = [outcome["cost"] for outcome in outcomes if "cost" in outcome]
    if not costs:
        return {}
    total = {name: math.fsum(cost[name] for cost in costs) for name in costs[0]}
    decoded, full_bytes = total["decoded_tokens"], total["kv_full_bytes"]
    return {
        "prefill_ms": 1000 * total["prefill_s"] / len(costs),
        "decode_ms_per_token": 1000 * total["decode_s"] / decoded if decoded else 0.0,
        "prompt_tokens": total["prompt_tokens"] / len(costs),
        "vision_tokens": total["vision_tokens"] / len(costs),
        "new_tokens": total["new_tokens"] / len(costs),
        "kv_bytes_mean": total["kv_bytes"] / len(costs),
        "kv_full_bytes_mean": full_bytes / len(costs),
        "kv_share": total["kv_bytes"] / full_bytes if full_bytes else 0.0,
        "kv_bytes_peak": max(cost["kv_batch_bytes"] for cost in costs),
        "kv_full_bytes_peak": max(cost["kv_full_batch_bytes"] for cost in costs),
        "entries_attended_per_step": mean(cost["entries_attended"] for cost in costs),
    }


def results_of(
    spec: RunSpec,
    outcomes: Mapping[str, list[Outcome]],
    model: Answerer,
    seconds: float,
    processes: int,
) -> RunResults:
    """Return the content of results.json.

    `outcomes` are those of each task, in the order of its data.
    """
    grouped = {
        group: [outcome for member in members for outcome in outcomes[member]] for group, members in spec.groups.items()
    }
    prompts = {task.name: task.prompt(dataset.samples[0]) for task, dataset in spec.tasks}
    template = None
    if (processor := model.processor) is not None:
        prompts = {name: processor.question(prompt, 1) for name, prompt in prompts.items()}
        template = processor.question("{question}", 1)
    return {
        "results": {name: summarise(members) for name, members in {**outcomes, **grouped}.items()},
        "by_type": {name: summarise_by_type(members) for name, members in outcomes.items()},
        "cost": {name: mean_cost(members) for name, members in outcomes.items()},
        "failed": [
            f"{outcome['task']} {outcome['id']}: {outcome['error']}"
            for members in outcomes.values()
            for outcome in members
            if "error" in outcome
        ],
        "settings": spec.hashed_settings(),
        "data": {task.name: dataset.origin for task, dataset in spec.tasks},
        "prompts": prompts,
        "template": template,
        "notes": list(spec.notes),
        "versions": package_versions(),
        "seconds": seconds,
        "processes": processes,
    }


def package_versions() -> dict[str, str]:
    """The versions of Python and of the installed packages that influence answers."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def results_in_words(results: RunResults, folder: Path) -> str:
    """A finished run for people to read: scores with standard errors, cost and failures."""
    lines = []
    for task, summary in results["results"].items():
        metrics = metrics_in(summary)
        scores = [f"{name} {summary[name]:.4f} ± {summary[f'{name}_stderr']:.4f}" for name in metrics]
        counts = [f"{name} {summary[name]}" for name in ("n", "unscored", "failed") if name == "n" or summary[name]]
        lines.append(f"{task}: " + ", ".join(scores + counts))
        for question_type, part in results["by_type"].get(task, {}).items():
            scores = [f"{name} {part[name]:.4f}" for name in metrics if name in part]
            lines.append(f"  {question_type}: " + ", ".join([*scores, f"n {part['n']}"]))
        if cost := results["cost"].get(task):
            lines.append("  cost: " + _cost_in_words(cost))
    if failed := results["failed"]:
        examples = "; ".join(failed[:3]) + ("; …" if len(failed) > 3 else "")
        lines.append(f"{len(failed)} samples failed and are not in the scores: {examples}")
    return "\n".join([*lines, str(folder / "results.json")])


def _cost_in_words(cost: dict[str, float]) -> str:
    return (
        f"prefill {cost['prefill_ms']:.1f} ms, decode {cost['decode_ms_per_token']:.2f} ms/token, "
        f"{cost['new_tokens']:.1f} of {cost['prompt_tokens'] + cost['new_tokens']:.0f} tokens generated; "
        f"KV {cost['kv_bytes_mean'] / 2**20:.2f} MiB a page, {cost['kv_share']:.1%} of the full cache, "
        f"{cost['kv_bytes_peak'] / 2**20:.2f} MiB at most; "
        f"{cost['entries_attended_per_step']:.0f} entries take part in a step"
    )
