"""Reporting a run: the content of results.json, and its summary in words."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TypedDict

from eval.accuracy.anls import mean
from eval.accuracy.outcomes import Outcome, Summary, metrics_in, summarise, summarise_by_type
from eval.accuracy.run_results import MeanCost, RunResults
from eval.accuracy.run_spec import Answerer, RunSpec
from minivlm.errors import UserError, printable
from minivlm.inputs.processor import Processor

_PACKAGES = ("minivlm", "torch", "tokenizers", "pillow", "huggingface-hub", "safetensors")


class Circumstances(TypedDict):
    """What results.json says about a run beside its outcomes: how it came about."""

    prompts: dict[str, str]
    template: str | None
    versions: dict[str, str]
    seconds: float
    processes: int


class Figures(TypedDict):
    """What results.json says about the outcomes: it follows from the rows alone."""

    results: dict[str, Summary]
    by_type: dict[str, dict[str, Summary]]
    cost: dict[str, MeanCost]


def mean_cost(outcomes: Iterable[Outcome]) -> MeanCost:
    """What the answered samples cost on average. Raises ValueError if there are none."""
    costs = [outcome.cost for outcome in outcomes if outcome.cost is not None]
    if not costs:
        raise ValueError("no sample was answered")

    def total(name: str) -> float:
        return math.fsum(getattr(cost, name) for cost in costs)

    def ratio(numerator: float, denominator: float) -> float:
        return numerator / denominator if denominator > 1e-6 else 0.0  # finite, whatever stands in the rows

    full_bytes = total("kv_full_bytes")
    return MeanCost(
        prefill_ms=1000 * total("prefill_s") / len(costs),
        decode_ms_per_token=ratio(1000 * total("decode_s"), total("decoded_tokens")),
        prompt_tokens=total("prompt_tokens") / len(costs),
        vision_tokens=total("vision_tokens") / len(costs),
        new_tokens=total("new_tokens") / len(costs),
        kv_bytes_mean=total("kv_bytes") / len(costs),
        kv_full_bytes_mean=full_bytes / len(costs),
        kv_share=ratio(total("kv_bytes"), full_bytes),
        kv_bytes_peak=max(cost.kv_batch_bytes for cost in costs),
        kv_full_bytes_peak=max(cost.kv_full_batch_bytes for cost in costs),
        entries_attended_per_step=mean(cost.entries_attended for cost in costs),
    )


def figures_of(outcomes: Mapping[str, Sequence[Outcome]], groups: Mapping[str, Sequence[str]] = {}) -> Figures:
    """The figures of each task's outcomes, and of `groups` of tasks."""
    grouped = {
        group: [outcome for member in members for outcome in outcomes[member]] for group, members in groups.items()
    }
    return {
        "results": {name: summarise(members) for name, members in {**outcomes, **grouped}.items()},
        "by_type": {name: summarise_by_type(members) for name, members in outcomes.items()},
        "cost": {name: mean_cost(members) for name, members in outcomes.items()},
    }


def circumstances_of(spec: RunSpec, model: Answerer, seconds: float, processes: int) -> Circumstances:
    """How a run that ends now came about."""
    prompts = {task.name: task.prompt(dataset.samples[0]) for task, dataset in spec.tasks}
    template = None
    if (processor := model.processor) is not None:
        prompts = {name: _rendered(processor, prompt) for name, prompt in prompts.items()}
        template = processor.question("{question}", 1)
    return {
        "prompts": prompts,
        "template": template,
        "versions": package_versions(),
        "seconds": seconds,
        "processes": processes,
    }


def _rendered(processor: Processor, prompt: str) -> str:
    """A prompt as the model reads it, or the beginning of one that is refused: its sample has failed."""
    try:
        return processor.question(prompt, 1)
    except UserError:
        return printable(prompt, 200)


def results_of(spec: RunSpec, outcomes: Mapping[str, list[Outcome]], circumstances: Circumstances) -> RunResults:
    """Return the content of results.json.

    `outcomes` are those of each task, in the order of its data.
    """
    return RunResults(
        **figures_of(outcomes, spec.groups),
        samples={name: len(members) for name, members in outcomes.items()},
        failed=[
            f"{outcome.task} {printable(str(outcome.id), 60)}: {outcome.error}"
            for members in outcomes.values()
            for outcome in members
            if not outcome.answered
        ],
        settings=spec.settings_record(),
        code=spec.code,
        data={task.name: dataset.origin for task, dataset in spec.tasks},
        notes=list(spec.notes),
        **circumstances,
    )


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
    for task, summary in results.results.items():
        metrics = metrics_in(summary)
        scores = [f"{name} {summary[name]:.4f} ± {summary[f'{name}_stderr']:.4f}" for name in metrics]
        counts = [f"{name} {summary[name]}" for name in ("n", "unscored", "failed") if name == "n" or summary[name]]
        lines.append(f"{task}: " + ", ".join(scores + counts))
        for question_type, part in results.by_type.get(task, {}).items():
            scores = [f"{name} {part[name]:.4f}" for name in metrics if name in part]
            lines.append(f"  {question_type}: " + ", ".join([*scores, f"n {part['n']}"]))
        if cost := results.cost.get(task):
            lines.append("  cost: " + _cost_in_words(cost))
    if failed := results.failed:
        examples = "; ".join(failed[:3]) + ("; …" if len(failed) > 3 else "")
        lines.append(f"{len(failed)} samples failed and are not in the scores: {examples}")
    return "\n".join([*lines, printable(str(folder / "results.json"), 5000)])


def _cost_in_words(cost: MeanCost) -> str:
    return (
        f"prefill {cost.prefill_ms:.1f} ms, decode {cost.decode_ms_per_token:.2f} ms/token, "
        f"{cost.new_tokens:.1f} of {cost.prompt_tokens + cost.new_tokens:.0f} tokens generated; "
        f"KV {cost.kv_bytes_mean / 2**20:.2f} MiB a page, {cost.kv_share:.1%} of the full cache, "
        f"{cost.kv_bytes_peak / 2**20:.2f} MiB at most; "
        f"{cost.entries_attended_per_step:.0f} entries take part in a step"
    )
