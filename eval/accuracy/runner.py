"""The runner asks the model in fixed batches, and saves each answer before it goes on.

A batch consists of consecutive samples of the whole data set (`index // batch_size`), no matter
what was answered before or how many processes take part. So a resumed run, or one on eight GPUs,
forms the same batches and gets the same answers. Processes take batches in turn, and rank 0 alone
writes. A thread decodes images ahead of the model.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from eval.accuracy.data import Dataset, Sample
from eval.accuracy.outcomes import Outcome, cost_share
from eval.accuracy.processes import Processes
from eval.accuracy.report import RunResults, results_of
from eval.accuracy.run_folder import RunFolder
from eval.accuracy.run_spec import Answerer, RunSpec
from eval.accuracy.tasks import Task
from eval.json_files import write_json
from minivlm.cache.settings import CacheSettings
from minivlm.errors import UserError
from minivlm.generation.answers import Answer, Request
from minivlm.generation.sampling import Sampling
from minivlm.schema import read_json_object

_AHEAD = 2  # batches whose images are decoded, or being decoded, while the model answers

Outcomes = dict[tuple[str, int], Outcome]  # by task and index
PreparedSample = tuple[Sample, Image.Image | UserError]  # a sample with its image, or the reason why there is none


class NothingAnswered(UserError):
    """Every sample of a task failed: the data are broken, or the settings do not suit them."""


def evaluate(
    spec: RunSpec, root: Path, load: Callable[[], Answerer], processes: Processes = Processes()
) -> tuple[Path, RunResults | None]:
    """Answer what is not answered yet.

    Return the run's folder and its results (None on ranks other than 0).

    `load` is called only if something is left to ask. Raises `UserError` for a folder that cannot
    be used, and `NothingAnswered` if not one sample of a task could be answered.
    """
    folder = spec.folder(root)
    outcomes: Outcomes = {}
    finished = None
    if processes.rank == 0:
        outcomes = folder.open()
        if folder.results.exists() and not any("error" in outcome for outcome in outcomes.values()):
            finished = read_json_object(folder.results)
    finished = processes.broadcast(finished)
    if finished is not None:
        return folder.path, finished if processes.rank == 0 else None

    model, started = load(), time.perf_counter()
    for task, dataset in spec.tasks:
        _answer_task(spec, task, dataset, model, folder, outcomes, processes)
    if processes.rank != 0:
        return folder.path, None
    by_task = {task.name: [outcomes[task.name, s.index] for s in dataset.samples] for task, dataset in spec.tasks}
    _write_submissions(spec, by_task, folder)
    results = results_of(spec, by_task, model, time.perf_counter() - started, processes.world)
    folder.finish(results)
    return folder.path, results


def _write_submissions(spec: RunSpec, outcomes: dict[str, list[Outcome]], folder: RunFolder) -> None:
    """Write the official submission file of each task that has one.

    Raises `NothingAnswered` for the first task without an answer; earlier tasks have their file
    then.
    """
    for task, _ in spec.tasks:
        in_task = outcomes[task.name]
        if all("error" in outcome for outcome in in_task):
            reason = f"none of its {len(in_task)} samples could be answered; {in_task[0]['error']}"
            raise NothingAnswered(f"task {task.name}: {reason}")
        if task.submission:
            predictions = [{"questionId": o["id"], "answer": o.get("prediction", "")} for o in in_task]
            write_json(folder.path / f"{task.name}_for_submission.json", predictions)


def _answer_task(
    spec: RunSpec,
    task: Task,
    dataset: Dataset,
    model: Answerer,
    folder: RunFolder,
    outcomes: Outcomes,
    processes: Processes,
) -> None:
    """Ask every batch of a task that has an unanswered sample.

    Adds to `outcomes` and to the folder on rank 0.
    """
    answered = {index: o for (name, index), o in outcomes.items() if name == task.name and "error" not in o}
    done = processes.broadcast(set(answered))
    batches = [dataset.samples[i : i + spec.batch_size] for i in range(0, len(dataset.samples), spec.batch_size)]
    batches = [batch for batch in batches if any(sample.index not in done for sample in batch)]
    own_batches = decoded_ahead(dataset, batches[processes.rank :: processes.world])
    totals = _RunningTotals(task.metric)
    for outcome in answered.values():
        totals.add(outcome)
    bar = tqdm(
        total=len(dataset.samples),
        initial=len(done),
        desc=task.name,
        unit="page",
        disable=processes.rank > 0,
    )
    with bar:
        # Every rank takes part in every round, if only with an empty list: `gather` waits for all
        # of them.
        for _ in range(math.ceil(len(batches) / processes.world)):
            batch = next(own_batches, None)
            gathered = processes.gather(_answer_batch(spec, task, batch, model) if batch else [])
            new = [outcome for by_rank in gathered for outcome in by_rank if outcome["index"] not in done]
            if processes.rank == 0:
                folder.append(new)
            for outcome in new:
                outcomes[task.name, outcome["index"]] = outcome
                totals.add(outcome)
                if "error" in outcome:
                    bar.write(f"failed: {task.name} {outcome['id']}: {outcome['error']}", file=sys.stderr)
            bar.set_postfix_str(str(totals), refresh=False)
            bar.update(len(new))


def decoded_ahead(dataset: Dataset, batches: Iterable[Sequence[Sample]]) -> Iterator[list[PreparedSample]]:
    """Yield the batches with their images, which a thread decodes ahead of the caller."""

    def prepare(batch: Sequence[Sample]) -> list[PreparedSample]:
        return [(sample, _image_or_error(dataset, sample)) for sample in batch]

    with ThreadPoolExecutor(1) as thread:
        waiting: deque[Future[list[PreparedSample]]] = deque()
        for batch in batches:
            waiting.append(thread.submit(prepare, batch))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _image_or_error(dataset: Dataset, sample: Sample) -> Image.Image | UserError:
    try:
        return dataset.image(sample.index)
    except UserError as error:
        return error


def _answer_batch(spec: RunSpec, task: Task, batch: Sequence[PreparedSample], model: Answerer) -> list[Outcome]:
    """Return one outcome per sample, in order.

    A sample without an image, or one that the model refuses, fails.
    """
    requests = [
        Request(task.prompt(sample), [image], sample.index)
        for sample, image in batch
        if not isinstance(image, UserError)
    ]
    sampling = Sampling(max_new_tokens=task.max_new_tokens, seed=spec.seed)
    answers = iter(_ask(model, requests, sampling, spec.settings))
    outcomes = []
    for sample, image in batch:
        answer, asked_together = (image, 0) if isinstance(image, UserError) else next(answers)
        outcomes.append(_outcome(spec, task, sample, answer, asked_together))
    return outcomes


def _ask(
    model: Answerer, requests: Sequence[Request], sampling: Sampling, settings: CacheSettings
) -> list[tuple[Answer | UserError, int]]:
    """Return each answer, and how many requests were asked together with it.

    If the model refuses the batch, every request is asked alone, so that a bad one fails only
    itself.
    """
    if not requests:
        return []
    try:
        return [(answer, len(requests)) for answer in model.ask_batch(requests, sampling=sampling, settings=settings)]
    except UserError as error:
        if len(requests) == 1:
            return [(error, 1)]
    return [answer for request in requests for answer in _ask(model, [request], sampling, settings)]


def _outcome(spec: RunSpec, task: Task, sample: Sample, answer: Answer | UserError, asked_together: int) -> Outcome:
    """The outcome of a sample, scored unless the run is not to be scored."""
    outcome: Outcome = {
        "task": task.name,
        "id": sample.id,
        "index": sample.index,
        "types": sample.types,
    }
    if isinstance(answer, UserError):
        outcome["error"] = str(answer)
        return outcome
    prediction = answer.text.strip()
    outcome["prediction"] = prediction
    outcome["finish"] = answer.finish
    if not spec.predict_only:
        scores = task.scores(prediction, sample)
        outcome["scores"] = {name: score for name, score in scores.items() if not math.isnan(score)}
    if spec.log_samples:
        outcome["prompt"] = task.prompt(sample)
        outcome["answers"] = sample.answers
        outcome["token_ids"] = list(answer.token_ids)
    outcome["cost"] = cost_share(answer.stats, asked_together)
    return outcome


class _RunningTotals:
    """The scores and cache bytes of a task so far, as shown beside the progress bar."""

    def __init__(self, metric: str) -> None:
        self.shown = tuple(dict.fromkeys(("anls", metric)))
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.counts: Counter[str] = Counter()

    def add(self, outcome: Outcome) -> None:
        for name, number in {**outcome.get("scores", {}), **outcome.get("cost", {})}.items():
            self.sums[name] += number
            self.counts[name] += 1

    def __str__(self) -> str:
        parts = [f"{name} {self.sums[name] / self.counts[name]:.3f}" for name in self.shown if self.counts[name]]
        if pages := self.counts["kv_bytes"]:
            share = self.sums["kv_bytes"] / max(self.sums["kv_full_bytes"], 1)
            parts.append(f"KV {self.sums['kv_bytes'] / pages / 2**20:.2f} MiB ({share:.0%})")
        return ", ".join(parts)
