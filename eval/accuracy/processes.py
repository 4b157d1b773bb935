"""One process or several: which one this is, and how they communicate.

Under torchrun the environment names the rank and the number of processes (the world). Objects
travel over gloo, with nccl beside it on CUDA. Only rank 0 touches the results folder, so the
machines need not share a disk.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

# How long a rank may wait for the slowest one, which may be downloading, or working on a page on a
# slow machine.
_PATIENCE = timedelta(hours=4)


@dataclass(frozen=True)
class Processes:
    """This process's `rank` among `world` processes. A single process communicates with nobody."""

    rank: int = 0
    world: int = 1

    @classmethod
    def join(cls) -> Processes:
        """Join the processes that torchrun started, or return a single one.

        Each process takes the GPU of its local rank, if there is one.
        """
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
        """End the communication: the last call of every rank."""
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, ordered by rank, on rank 0.

        The other ranks get an empty list.
        """
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        boxes = [None] * self.world if self.rank == 0 else None
        dist.gather_object(value, boxes, dst=0)
        return boxes or []
