"""What a run is: its tasks and settings, and what it needs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from eval.accuracy.data import Dataset
from eval.accuracy.identity import code_hash
from eval.accuracy.outcomes import Outcome
from eval.accuracy.rows import misfit
from eval.accuracy.run_names import run_label
from eval.accuracy.run_settings import RunSettings, TaskSettings
from eval.accuracy.tasks import Task
from minivlm.cache.policies import preset
from minivlm.cache.settings import CacheSettings
from minivlm.generation.answers import Answer, Request
from minivlm.generation.sampling import Sampling
from minivlm.inputs.processor import Processor


class Answerer(Protocol):
    """What the runner needs of a model; `minivlm.VLM` has it."""

    @property
    def processor(self) -> Processor | None:
        """Records the chat template and a rendered prompt in the results.

        None if there is no template.
        """

    def ask_batch(
        self, requests: Sequence[Request], *, sampling: Sampling, settings: CacheSettings
    ) -> list[Answer]: ...


@dataclass(frozen=True)
class ModelIdentity:
    """Which model answers, in which dtype and on what device, as far as that changes answers."""

    model: str  # its name, for people
    weights: str  # the checkpoint's fingerprint
    device: str
    dtype: str
    compiled: bool = False


@dataclass(frozen=True)
class RunSpec:
    """What to run.

    `groups` maps the name of a group of tasks to its members, which are also summarised together.
    `notes` are copied into the results.
    """

    tasks: Sequence[tuple[Task, Dataset]]
    model: ModelIdentity
    settings: CacheSettings = preset("full")
    batch_size: int = 1
    seed: int = 0
    predict_only: bool = False
    log_samples: bool = False
    suffix: str = ""
    groups: dict[str, list[str]] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def code(self) -> str:
        """The hash of the code that answers."""
        return code_hash(type(self.settings))

    def settings_record(self) -> RunSettings:
        """Everything else that changes answers; the folder's name contains its hash."""
        return RunSettings(
            model=self.model.model,
            weights=self.model.weights,
            device=self.model.device,
            dtype=self.model.dtype,
            compiled=self.model.compiled,
            tasks={
                task.name: TaskSettings(task.suffix, task.max_new_tokens, task.split, dataset.identity)
                for task, dataset in self.tasks
            },
            cache=msgspec.to_builtins(self.settings.to_dict()),
            batch_size=self.batch_size,
            seed=self.seed,
            predict_only=self.predict_only,
        )

    def label(self) -> str:
        """The readable part of the folder's name: groups, tasks of no group, the policy."""
        grouped = {member for members in self.groups.values() for member in members}
        names = [*self.groups, *(task.name for task, _ in self.tasks if task.name not in grouped)]
        return run_label(names, self.settings, self.suffix)

    def problem(self, outcome: Outcome) -> str:
        """Why a stored outcome cannot be one of this run's; empty if it can.

        Of samples beyond the limit only the index is checked.
        """
        if reason := misfit(outcome, self.settings_record()):
            return reason
        task, dataset = next(pair for pair in self.tasks if pair[0].name == outcome.task)
        if outcome.index >= dataset.total:
            return f"index {outcome.index} of {dataset.total} samples"
        if outcome.index >= len(dataset.samples):
            return ""
        sample = dataset.samples[outcome.index]
        if outcome.id != sample.id:
            return f"id {outcome.id!r} where the data have {sample.id!r}"
        if outcome.scores is not None and outcome.scores != task.known_scores(outcome.prediction or "", sample):
            return "scores that its prediction does not get"
        return ""
