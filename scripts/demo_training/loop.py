"""The training loop: two stages within a time budget, with checkpoints and a log."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from demo_training.batches import Batch, draw_batch
from demo_training.model import DemoTrainer
from demo_training.optim import build_optimisers
from demo_training.text import Encoder, build_tokenizer
from minivlm.errors import UserError
from minivlm.files import exists, make_folder, open_file, read_bytes, reason, write_whole

WARM_UP, COOL_DOWN = 0.01, 0.35  # shares of a stage's budget
POINTER_FADES, POINTER_GONE = 0.5, 0.75  # shares of stage 2's budget
LOG_SECONDS, SAVE_SECONDS = 20, 120


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16)


def learning_rate(progress: float) -> float:
    """The factor on the learning rate: a short rise, a plateau, a linear fall to a fiftieth."""
    return min(1.0, (progress + 1e-4) / WARM_UP, max(0.02, (1 - progress) / COOL_DOWN))


def pointer_weight(progress: float) -> float:
    """The weight of the auxiliary losses: 1 at first, then a linear fall to exactly 0.

    At the end nothing tells the model where to look.
    """
    return min(1.0, max(0.0, (POINTER_GONE - progress) / (POINTER_GONE - POINTER_FADES)))


class TrainingRun:
    """A training run, in a folder with `state.pt`, `tokenizer.json` and `log.jsonl`."""

    def __init__(self, folder: Path, device: torch.device, seed: int) -> None:
        self.folder, self.device, self.seed = folder, device, seed
        torch.manual_seed(seed)
        stored = folder / "tokenizer.json"  # a run keeps its token ids even if the code that draws pages changes
        try:
            self.tokenizer = Tokenizer.from_buffer(read_bytes(stored)) if exists(stored) else build_tokenizer()
        except ValueError as error:
            raise UserError(f"{stored}: not a tokenizer ({error})") from None
        self.encoder = Encoder(self.tokenizer)
        self.trainer = DemoTrainer().to(device)
        self.optimisers = build_optimisers(self.trainer)
        self.stage = 0
        self.elapsed = 0.0  # seconds of this stage
        self.steps = 0  # of this stage

    def resume(self) -> None:
        """Continue from `state.pt`. Raises `UserError` if there is none, or something else."""
        path = self.folder / "state.pt"
        with open_file(path) as file:
            try:
                state = torch.load(file, map_location=self.device, weights_only=True)
                self.trainer.load_state_dict(state["model"])
                for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
                    optimiser.load_state_dict(saved)
                self.stage = state["stage"]
                self.elapsed = state["elapsed"]
                self.steps = state["steps"]
            except Exception as error:  # what a damaged file raises, only torch knows
                raise UserError(f"{path}: not the state of a run ({reason(error)})") from None

    def save(self) -> None:
        """Write `state.pt` completely or not at all."""
        self.tokenizer.save(str(self.folder / "tokenizer.json"))
        state = {
            "model": self.trainer.state_dict(),
            "optimisers": [o.state_dict() for o in self.optimisers],
            "stage": self.stage,
            "elapsed": self.elapsed,
            "steps": self.steps,
        }
        write_whole(self.folder / "state.pt", lambda scratch: torch.save(state, scratch))

    def train(self, stage: int, budget: float, pages: int, rate: float, tower_rate: float) -> None:
        """Train stage 1 (the tower) or 2 (everything) for `budget` seconds over all sittings."""
        if self.stage > stage:
            return
        make_folder(self.folder)
        if self.stage < stage:
            self.stage = stage
            self.elapsed = 0.0
            self.steps = 0
            self.optimisers = build_optimisers(self.trainer)
        rng = random.Random(f"{self.seed} {stage} {self.steps}")
        sums: dict[str, Any] = {}  # what to log, since the last line of the log
        logged = saved = last = time.monotonic()
        while self.elapsed < budget:
            progress = self.elapsed / budget
            batch = draw_batch(rng, self.trainer.config, self.encoder, "train", pages)
            self._step(batch, stage, progress, rate, tower_rate, sums)
            now = time.monotonic()
            self.elapsed += now - last
            self.steps += 1
            last = now
            sums["pages"] = sums.get("pages", 0) + pages
            if now - logged > LOG_SECONDS:
                self._log(progress, sums, now - logged)
                sums, logged = {}, now
            if now - saved > SAVE_SECONDS:
                self.save()
                if stage == 2:
                    sums.update(self._held_out())
                saved = now
        self.save()

    @torch.no_grad()
    def _held_out(self) -> dict[str, float]:
        """The shares of held-out answers without a mistake, with teacher forcing."""
        rng = random.Random("held-out")
        shares = []
        for _ in range(6):
            batch = draw_batch(rng, self.trainer.config, self.encoder, "heldout", 8).to(self.device)
            with autocast(self.device):
                shares.append(self.trainer.answer_losses(batch, self.encoder.prefix)[1])
        return {f"held_{k}": sum(float(s[k]) for s in shares) / len(shares) for k in ("short", "long")}

    def _loss(self, batch: Batch, stage: int, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and what to log about it."""
        if stage == 1:
            return self.trainer.reading_loss(batch)
        losses, shares = self.trainer.answer_losses(batch, self.encoder.prefix)
        hint = pointer_weight(progress)
        loss = losses["answer"] + 0.3 * hint * losses["pointer"] + 0.2 * hint * losses["field"] + 0.2 * losses["read"]
        return loss, {**shares, **{f"{k}_loss": v for k, v in losses.items()}}

    def _step(
        self,
        batch: Batch,
        stage: int,
        progress: float,
        rate: float,
        tower_rate: float,
        sums: dict[str, Any],
    ) -> None:
        with autocast(self.device):
            loss, measured = self._loss(batch.to(self.device), stage, progress)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(progress) * (tower_rate if group["tower"] else rate)
            optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trainer.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        for key, value in {**measured, "loss": loss, "batches": 1}.items():
            sums[key] = sums.get(key, 0) + (value.detach() if torch.is_tensor(value) else value)

    def _log(self, progress: float, sums: dict[str, Any], seconds: float) -> None:
        """Write and print one line: means over the batches since the last one."""
        count = sums.pop("batches")
        pages = sums.pop("pages")
        line = {
            "stage": self.stage,
            "step": self.steps,
            "progress": round(progress, 4),
            "pages_per_s": round(pages / seconds, 1),
            **{k: round(float(v) / (1 if k.startswith("held_") else count), 4) for k, v in sums.items()},
        }
        with open(self.folder / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
        print(" ".join(f"{k}={v}" for k, v in line.items()), flush=True)
