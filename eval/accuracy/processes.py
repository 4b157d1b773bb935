"""One process or several: who am I, and the two ways of talking that the evaluator needs.

Under torchrun the environment names rank and world; objects travel over gloo (beside nccl where there is CUDA). Only
rank 0 touches the results folder, so the machines need not share a disk for it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

# A rank may wait this long for the slowest one: for a download, or for a page on a slow machine.
_PATIENCE = timedelta(hours=4)


@dataclass(frozen=True)
class Processes:
    """`rank` of `world` processes; a single process talks to nobody."""

    rank: int = 0
    world: int = 1

    @classmethod
    def join(cls) -> Processes:
        """The processes that torchrun started, or a single one; each takes the GPU of its local rank, if there is one."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        import torch
        import torch.distributed as dist

        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size())

    def leave(self) -> None:
        """Ends the talking; the last call of every rank."""
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value in order of rank; on rank 0 alone, the others get an empty list."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        boxes = [None] * self.world if self.rank == 0 else None
        dist.gather_object(value, boxes, dst=0)
        return boxes or []
