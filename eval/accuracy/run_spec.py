"""What a run is: its tasks and settings, and what it needs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from eval.accuracy.data import Dataset
from eval.accuracy.run_folder import RunFolder
from eval.accuracy.tasks import Task
from minivlm.cache.policies import preset
from minivlm.cache.settings import CacheSettings
from minivlm.generation.answers import Answer, Request
from minivlm.generation.sampling import Sampling
from minivlm.inputs.processor import Processor

FORMAT = 2  # the format of a run's folder; a run in another format is not continued or compared


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
class RunSpec:
    """What to run.

    `identity` says which model answers, in which dtype and on what device. `groups` maps the name
    of a group of tasks to its members, which are also summarised together. `notes` are copied into
    the results.
    """

    tasks: Sequence[tuple[Task, Dataset]]
    settings: CacheSettings = preset("full")
    identity: dict[str, str] = field(default_factory=dict)
    batch_size: int = 1
    seed: int = 0
    predict_only: bool = False
    log_samples: bool = False
    suffix: str = ""
    groups: dict[str, list[str]] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def hashed_settings(self) -> dict[str, Any]:
        """Everything that changes answers; the folder's name contains its hash."""
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
        label = "_".join((*names, self.settings.policy, *filter(None, (self.suffix,))))
        return RunFolder(root, label, self.hashed_settings())
