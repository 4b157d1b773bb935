"""The runner: samples through the model in fixed batches, each answer on disk before the next is asked for.

A batch is made of consecutive samples of the whole data set, `index // batch_size`, whatever was answered before and
however many processes take part; so a resumed run, or one on eight GPUs, forms the same batches and gets the same
answers. Batches go round-robin over the processes, rank 0 alone writes. A thread decodes images ahead of the model.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from PIL import Image
from tqdm import tqdm

from eval.accuracy.data import Dataset, Sample
from eval.accuracy.processes import Processes
from eval.accuracy.report import document, share_of
from eval.accuracy.results import RunFolder, read_json, write_json
from eval.accuracy.tasks import Task
from minivlm.cache.settings import CacheSettings
from minivlm.errors import UserError
from minivlm.generation.vlm import Answer, Request, Sampling
from minivlm.inputs.processor import Processor

FORMAT = 2  # of the rows and results in a folder; a run of another format is not continued
_AHEAD = 2  # batches whose images are decoded, or being decoded, while the model answers


class NothingAnswered(UserError):
    """Every sample of a task failed: the data are broken, or the settings do not fit them."""


class Model(Protocol):
    """What the runner needs of a model; `minivlm.VLM` has it."""

    processor: Processor | None  # only to record the chat template and the rendered prompt

    def ask_batch(
        self, requests: Sequence[Request], *, sampling: Sampling, settings: CacheSettings
    ) -> list[Answer]: ...


@dataclass(frozen=True)
class Run:
    """What to run. `identity` says which model answers, and where; `notes` end up in the results."""

    tasks: Sequence[tuple[Task, Dataset]]
    settings: CacheSettings = CacheSettings()
    identity: dict = field(default_factory=dict)
    batch_size: int = 1
    seed: int = 0
    predict_only: bool = False
    log_samples: bool = False
    suffix: str = ""
    groups: dict[str, list[str]] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def keyed(self) -> dict:
        """Everything that changes answers: what the folder's name is a hash of."""
        tasks = {
            task.name: {
                "prompt": task.suffix,
                "max_new_tokens": task.max_new_tokens,
                "split": task.split,
                "samples": len(dataset.samples),
                "data": dataset.identity(),
            }
            for task, dataset in self.tasks
        }
        return {
            **self.identity,
            "format": FORMAT,
            "tasks": tasks,
            "cache": self.settings.to_dict(),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "predict_only": self.predict_only,
        }

    def folder(self, root: Path) -> RunFolder:
        """The run's folder under `root`, not yet opened."""
        names = list(self.groups) or [task.name for task, _ in self.tasks]
        return RunFolder(root, "_".join((*names, self.settings.policy, *filter(None, (self.suffix,)))), self.keyed())


def evaluate(run: Run, root: Path, load: Callable[[], Model], processes: Processes = Processes()) -> tuple[Path, dict]:
    """Answers what is not answered yet -> (folder, content of its results.json; empty on ranks other than 0).

    `load` is called only if something is left to ask. Raises `UserError` for a folder that cannot be used, and
    `NothingAnswered` where not one sample of a task could be answered.
    """
    folder = run.folder(root)
    rows = folder.open() if processes.rank == 0 else {}
    if processes.rank == 0 and folder.results.exists() and not any("error" in row for row in rows.values()):
        stored = read_json(folder.results)
    else:
        stored = None
    stored = processes.broadcast(stored)
    if stored is not None:
        return folder.path, stored if processes.rank == 0 else {}

    model, started = load(), time.perf_counter()
    for task, dataset in run.tasks:
        _answer_all(run, task, dataset, model, folder, rows, processes)
    if processes.rank:
        return folder.path, {}
    answered: dict[str, list[dict]] = {}
    for task, dataset in run.tasks:
        found = [rows[task.name, sample.index] for sample in dataset.samples]
        answered[task.name] = found
        if all("error" in row for row in found):
            raise NothingAnswered(
                f"task {task.name}: none of its {len(found)} samples could be answered; {found[0]['error']}"
            )
        if task.submission:
            predictions = [{"questionId": row["id"], "answer": row.get("prediction", "")} for row in found]
            write_json(folder.path / f"{task.name}_for_submission.json", predictions)
    results = document(run, answered, model, time.perf_counter() - started, processes.world)
    folder.finish(results)
    return folder.path, results


def _answer_all(
    run: Run, task: Task, dataset: Dataset, model: Model, folder: RunFolder, rows: dict, processes: Processes
) -> None:
    """Asks every batch of a task that has an unanswered sample; `rows` grows on rank 0."""
    answered = {index: row for (name, index), row in rows.items() if name == task.name and "error" not in row}
    done = processes.broadcast(set(answered))
    batches = [dataset.samples[i : i + run.batch_size] for i in range(0, len(dataset.samples), run.batch_size)]
    batches = [batch for batch in batches if any(sample.index not in done for sample in batch)]
    mine = decoded_ahead(dataset, batches[processes.rank :: processes.world])
    totals, text = Counter(), ""
    for row in answered.values():
        text = _count(totals, task.metric, row)
    bar = tqdm(total=len(dataset.samples), initial=len(done), desc=task.name, unit="page", disable=processes.rank > 0)
    with bar:
        for _ in range(math.ceil(len(batches) / processes.world)):
            batch = next(mine, None)
            new = [
                row
                for each in processes.gather(_answer_batch(run, task, batch, model) if batch else [])
                for row in each
            ]
            new = [row for row in new if row["index"] not in done]
            if processes.rank == 0:
                folder.append(new)
            for row in new:
                rows[task.name, row["index"]] = row
                text = _count(totals, task.metric, row)
                if "error" in row:
                    bar.write(f"failed: {task.name} {row['id']}: {row['error']}", file=sys.stderr)
            bar.set_postfix_str(text, refresh=False)
            bar.update(len(new))


def decoded_ahead(
    dataset: Dataset, batches: Iterable[Sequence[Sample]]
) -> Iterator[list[tuple[Sample, Image.Image | UserError]]]:
    """The batches with their images, or why there is none, decoded by one thread while the caller works."""

    def decode(batch: Sequence[Sample]) -> list[tuple[Sample, Image.Image | UserError]]:
        found = []
        for sample in batch:
            try:
                found.append((sample, dataset.image(sample.index)))
            except UserError as error:
                found.append((sample, error))
        return found

    with ThreadPoolExecutor(1) as thread:
        waiting = deque()
        for batch in batches:
            waiting.append(thread.submit(decode, batch))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _answer_batch(
    run: Run, task: Task, batch: Sequence[tuple[Sample, Image.Image | UserError]], model: Model
) -> list[dict]:
    """One row per sample, in order. A sample without an image, or that the model refuses, becomes a failed row."""
    asked = [(sample, image) for sample, image in batch if not isinstance(image, UserError)]
    requests = [Request(task.prompt(sample), [image], sample.index) for sample, image in asked]
    sampling = Sampling(max_new_tokens=task.max_new_tokens, seed=run.seed)
    answers = iter(_ask(model, requests, sampling, run.settings))
    rows = []
    for sample, image in batch:
        answer, together = (image, 0) if isinstance(image, UserError) else next(answers)
        row = {"task": task.name, "id": sample.id, "index": sample.index, "types": sample.types}
        if isinstance(answer, UserError):
            rows.append({**row, "error": str(answer)})
            continue
        prediction = answer.text.strip()
        row |= {"prediction": prediction, "finish": answer.finish}
        if not run.predict_only:
            scores = task.scores(prediction, sample)
            row["scores"] = {name: score for name, score in scores.items() if not math.isnan(score)}
        if run.log_samples:
            row |= {"prompt": task.prompt(sample), "answers": sample.answers, "token_ids": list(answer.token_ids)}
        rows.append({**row, "cost": share_of(answer.stats, together)})
    return rows


def _ask(
    model: Model, requests: Sequence[Request], sampling: Sampling, settings: CacheSettings
) -> list[tuple[Answer | UserError, int]]:
    """Each answer, and how many were asked together. Where the model refuses the batch, every request is asked alone,
    so that a bad one fails only itself."""
    if not requests:
        return []
    try:
        return [(answer, len(requests)) for answer in model.ask_batch(requests, sampling=sampling, settings=settings)]
    except UserError as error:
        if len(requests) == 1:
            return [(error, 1)]
    return [found for request in requests for found in _ask(model, [request], sampling, settings)]


def _count(totals: Counter, metric: str, row: dict) -> str:
    """Adds a row to the running totals of a task -> its scores and cache bytes so far, for the bar."""
    for name, score in row.get("scores", {}).items():
        totals[name] += score
        totals[name, "n"] += 1
    for name, amount in row.get("cost", {}).items():
        totals[name] += amount
        totals["pages"] += name == "kv_bytes"
    parts = [
        f"{name} {totals[name] / totals[name, 'n']:.3f}"
        for name in dict.fromkeys(("anls", metric))
        if totals[name, "n"]
    ]
    if totals["pages"]:
        share = totals["kv_bytes"] / max(totals["kv_full_bytes"], 1)
        parts.append(f"KV {totals['kv_bytes'] / totals['pages'] / 2**20:.2f} MiB ({share:.0%})")
    return ", ".join(parts)
