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
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import msgspec
from PIL import Image
from tqdm import tqdm

from eval.accuracy.data import Dataset
from eval.accuracy.outcomes import Cost, Outcome
from eval.accuracy.processes import Processes
from eval.accuracy.records import Sample
from eval.accuracy.report import Circumstances, circumstances_of, results_of
from eval.accuracy.run_folder import RunFolder
from eval.accuracy.run_results import RunResults
from eval.accuracy.run_spec import Answerer, RunSpec
from eval.accuracy.tasks import Task
from minivlm.app.cli import note, say_notes
from minivlm.cache.settings import CacheSettings
from minivlm.errors import UserError, printable
from minivlm.generation.answers import Answer, Request
from minivlm.generation.sampling import Sampling

_AHEAD = 2  # batches whose images are decoded, or being decoded, while the model answers

Outcomes = dict[tuple[str, int], Outcome]  # by task and index
PreparedSample = tuple[Sample, Image.Image | UserError]  # a sample with its image, or the reason why there is none


class NothingAnswered(UserError):
    """Every sample of a task failed: the data are broken, or the settings do not suit them."""


def evaluate(
    spec: RunSpec,
    root: Path,
    load: Callable[[], Answerer],
    processes: Processes = Processes(),
    *,
    force: bool = False,
    notes: Sequence[str] = (),
) -> tuple[Path, RunResults | None]:
    """Answer what is not answered yet, or with `force` everything.

    Return the run's folder and its results (None on ranks other than 0). `notes`, and what is
    noteworthy about the folder, are said on stderr with the first answer: a refusal says only why.

    `load` is called only if something is left to ask, or if results.json has to be written without
    an earlier one. Raises `UserError` for a folder that cannot be used, and `NothingAnswered` if
    not one sample of a task could be answered.
    """
    folder = RunFolder(root, spec.label(), spec.settings_record(), spec.code, note)
    outcomes: Outcomes = {}
    if processes.rank == 0:
        for text in notes:
            note(text)
        outcomes = folder.open(spec.problem, force)
    samples = [(task.name, sample.index) for task, dataset in spec.tasks for sample in dataset.samples]
    done = sum(key in outcomes and outcomes[key].answered for key in samples)
    if done and processes.rank == 0:
        note(f"{done} of {len(samples)} already answered in {folder.path}")
    started = time.perf_counter()
    if asked := processes.broadcast(done) < len(samples):
        model = load()
        for task, dataset in spec.tasks:
            _answer_task(spec, task, dataset, model, folder, outcomes, processes)
    if processes.rank != 0:
        return folder.path, None

    by_task = {task.name: [outcomes[task.name, s.index] for s in dataset.samples] for task, dataset in spec.tasks}
    _write_submissions(spec, by_task, folder)
    folder.put_in_order()
    stored = folder.read_results()
    if asked or stored is None:
        circumstances = circumstances_of(spec, load(), time.perf_counter() - started, processes.world)
    else:
        circumstances = _circumstances_in(stored)
    results = results_of(spec, by_task, circumstances)
    if results != stored:
        folder.write(folder.results.name, results)
    return folder.path, results


def _circumstances_in(results: RunResults) -> Circumstances:
    """How the run came about whose results these are: nothing has been asked since."""
    return {
        "prompts": results.prompts,
        "template": results.template,
        "versions": results.versions,
        "seconds": results.seconds,
        "processes": results.processes,
    }


def _write_submissions(spec: RunSpec, outcomes: dict[str, list[Outcome]], folder: RunFolder) -> None:
    """Write the official submission file of each task that has one.

    Raises `NothingAnswered` for the first task without an answer; earlier tasks have their file
    then.
    """
    for task, _ in spec.tasks:
        in_task = outcomes[task.name]
        if not any(outcome.answered for outcome in in_task):
            reason = f"none of its {len(in_task)} samples could be answered; {in_task[0].error}"
            raise NothingAnswered(f"task {task.name}: {reason}")
        if task.submission:
            predictions = [{"questionId": o.id, "answer": o.prediction or ""} for o in in_task]
            folder.write(f"{task.name}_for_submission.json", predictions)


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
    stored = (outcomes.get((task.name, sample.index)) for sample in dataset.samples)
    answered = [outcome for outcome in stored if outcome is not None and outcome.answered]
    done = processes.broadcast({outcome.index for outcome in answered})
    batches = [dataset.samples[i : i + spec.batch_size] for i in range(0, len(dataset.samples), spec.batch_size)]
    batches = [batch for batch in batches if any(sample.index not in done for sample in batch)]
    totals = _RunningTotals(task.metric)
    for outcome in answered:
        totals.add(outcome)
    bar = tqdm(
        total=len(dataset.samples),
        initial=len(done),
        desc=task.name,
        unit="page",
        disable=processes.rank > 0 or not sys.stderr.isatty(),
    )
    failures: list[str] = []  # said with the first answer: of a task without one, the error says enough
    # Closed here, the thread ends here. The garbage collector might wait for it in a place that cannot wait.
    with bar, closing(decoded_ahead(dataset, batches[processes.rank :: processes.world])) as own_batches:
        # Every rank takes part in every round, if only with an empty list: `gather` waits for all
        # of them.
        for _ in range(math.ceil(len(batches) / processes.world)):
            batch = next(own_batches, None)
            gathered = processes.gather(_answer_batch(spec, task, batch, model) if batch else [])
            new = [outcome for by_rank in gathered for outcome in by_rank if outcome.index not in done]
            if processes.rank == 0:
                folder.append(new)
            for outcome in new:
                outcomes[outcome.key] = outcome
                totals.add(outcome)
                if not outcome.answered:
                    failures.append(printable(f"failed: {task.name} {outcome.id}: {outcome.error}"))
            if totals.counts["kv_bytes"]:
                say_notes()
                for line in failures:
                    bar.write(line, file=sys.stderr)
                failures.clear()
            bar.set_postfix_str(str(totals), refresh=False)
            bar.update(len(new))


def decoded_ahead(dataset: Dataset, batches: Iterable[Sequence[Sample]]) -> Generator[list[PreparedSample], None, None]:
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
    if sample.problem:
        return UserError(sample.problem)
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
    types = list(sample.types)
    if isinstance(answer, UserError):
        error = printable(str(answer), 300)
        return Outcome(task=task.name, id=sample.id, index=sample.index, types=types, code=spec.code, error=error)
    prediction = answer.text.strip()
    logged = spec.log_samples
    return Outcome(
        task=task.name,
        id=sample.id,
        index=sample.index,
        types=types,
        code=spec.code,
        prediction=prediction,
        finish=answer.finish,
        scores=None if spec.predict_only else task.known_scores(prediction, sample),
        prompt=task.prompt(sample) if logged else None,
        answers=list(sample.answers) if logged else None,
        token_ids=list(answer.token_ids) if logged else None,
        cost=Cost.share(answer.stats, asked_together),
    )


class _RunningTotals:
    """The scores and cache bytes of a task so far, as shown beside the progress bar."""

    def __init__(self, metric: str) -> None:
        self.shown = tuple(dict.fromkeys(("anls", metric)))
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.counts: Counter[str] = Counter()

    def add(self, outcome: Outcome) -> None:
        cost = {} if outcome.cost is None else msgspec.structs.asdict(outcome.cost)
        for name, number in {**(outcome.scores or {}), **cost}.items():
            self.sums[name] += number
            self.counts[name] += 1

    def __str__(self) -> str:
        parts = [f"{name} {self.sums[name] / self.counts[name]:.3f}" for name in self.shown if self.counts[name]]
        if pages := self.counts["kv_bytes"]:
            share = self.sums["kv_bytes"] / max(self.sums["kv_full_bytes"], 1)
            parts.append(f"KV {self.sums['kv_bytes'] / pages / 2**20:.2f} MiB ({share:.0%})")
        return ", ".join(parts)
