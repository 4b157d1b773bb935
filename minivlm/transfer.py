"""Numbers on their way to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on `device`; one from the CPU, without waiting for the copy.

    An ordinary copy to a GPU waits until the GPU has done everything before it. One from pinned memory does not, and
    torch keeps that memory until the copy has been made.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
