"""The training loop: two stages, a time budget, checkpoints, a log line every twenty seconds."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer

from demo_training import optim
from demo_training.batches import Batch, draw_batch
from demo_training.model import DemoTrainer
from demo_training.text import Encoder, build_tokenizer
from minivlm.errors import UserError

WARM_UP, COOL_DOWN = 0.01, 0.35  # shares of a stage's budget
POINTER_FADES, POINTER_GONE = 0.5, 0.75
LOG_SECONDS, SAVE_SECONDS = 20, 120


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16)


def learning_rate(progress: float) -> float:
    """Factor for `progress` in [0, 1]: a short rise, a plateau, a straight fall to a fiftieth."""
    return min(1.0, (progress + 1e-4) / WARM_UP, max(0.02, (1 - progress) / COOL_DOWN))


def pointer_weight(progress: float) -> float:
    """1 at first, then a straight fall to exactly 0: at the end nothing tells the model where to look."""
    return min(1.0, max(0.0, (POINTER_GONE - progress) / (POINTER_GONE - POINTER_FADES)))


class Run:
    """One training run in a folder: `state.pt` (resumable), `tokenizer.json`, `log.jsonl`."""

    def __init__(self, folder: Path, device: torch.device, seed: int) -> None:
        self.folder, self.device, self.seed = folder, device, seed
        torch.manual_seed(seed)
        kept = folder / "tokenizer.json"  # a run keeps its ids, whatever becomes of the pages
        self.tokenizer = Tokenizer.from_file(str(kept)) if kept.is_file() else build_tokenizer()
        self.encoder = Encoder(self.tokenizer)
        self.trainer = DemoTrainer().to(device)
        self.optimisers = optim.build(self.trainer)
        self.stage, self.elapsed, self.steps = 0, 0.0, 0

    def resume(self) -> None:
        """Continue from `state.pt`; raises `UserError` where there is none."""
        path = self.folder / "state.pt"
        if not path.is_file():
            raise UserError(f"{path}: no such file (expected the state of a run)")
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.trainer.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"]):
            optimiser.load_state_dict(saved)
        self.stage, self.elapsed, self.steps = state["stage"], state["elapsed"], state["steps"]

    def save(self) -> None:
        """Write `state.pt`, whole or not at all."""
        self.tokenizer.save(str(self.folder / "tokenizer.json"))
        scratch = self.folder / "state.pt.part"
        torch.save(
            {
                "model": self.trainer.state_dict(),
                "optimisers": [o.state_dict() for o in self.optimisers],
                "stage": self.stage,
                "elapsed": self.elapsed,
                "steps": self.steps,
            },
            scratch,
        )
        os.replace(scratch, self.folder / "state.pt")

    def train(self, stage: int, budget: float, pages: int, rate: float, tower_rate: float) -> None:
        """Train `stage` (1 tower, 2 all) until it has had `budget` seconds in all, over however many sittings."""
        if self.stage > stage:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.stage < stage:
            self.stage, self.elapsed, self.steps = stage, 0.0, 0
            self.optimisers = optim.build(self.trainer)
        rng = random.Random(f"{self.seed} {stage} {self.steps}")
        sums: dict = {}
        logged = saved = last = time.monotonic()
        while self.elapsed < budget:
            progress = self.elapsed / budget
            batch = draw_batch(rng, self.trainer.config, self.encoder, "train", pages)
            self._step(batch, stage, progress, rate, tower_rate, sums)
            now = time.monotonic()
            self.elapsed, self.steps, last = self.elapsed + now - last, self.steps + 1, now
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
        """Shares of short and long answers all right on a few held-out pages, the reference answer being fed."""
        rng, rights = random.Random("held-out"), []
        for _ in range(6):
            batch = draw_batch(rng, self.trainer.config, self.encoder, "heldout", 8).to(self.device)
            with autocast(self.device):
                rights.append(self.trainer.answer_losses(batch, self.encoder.prefix)[1])
        return {f"held_{k}": sum(float(r[k]) for r in rights) / len(rights) for k in ("short", "long")}

    def _step(self, batch: Batch, stage: int, progress: float, rate: float, tower_rate: float, sums: dict) -> None:
        batch = batch.to(self.device)
        with autocast(self.device):
            if stage == 1:
                loss, seen = self.trainer.reading_loss(batch)
            else:
                losses, seen = self.trainer.answer_losses(batch, self.encoder.prefix)
                hint = pointer_weight(progress)
                loss = (
                    losses["answer"]
                    + 0.3 * hint * losses["pointer"]
                    + 0.2 * hint * losses["field"]
                    + 0.2 * losses["read"]
                )
                seen = {**seen, **{f"{k}_loss": v for k, v in losses.items()}}
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(progress) * (tower_rate if group["tower"] else rate)
            optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trainer.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        for key, value in {**seen, "loss": loss, "batches": 1}.items():
            sums[key] = sums.get(key, 0) + (value.detach() if torch.is_tensor(value) else value)

    def _log(self, progress: float, sums: dict, seconds: float) -> None:
        count = sums.pop("batches")
        pages = sums.pop("pages")
        row = {
            "stage": self.stage,
            "step": self.steps,
            "progress": round(progress, 4),
            "pages_per_s": round(pages / seconds, 1),
            **{k: round(float(v) / (1 if k.startswith("held_") else count), 4) for k, v in sums.items()},
        }
        with open(self.folder / "log.jsonl", "a") as log:
            log.write(json.dumps(row) + "\n")
        print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
