"""Checkpoints in Hugging Face layout: found on disk or on the hub, checked and loaded. Also the bundled demo."""

from weights.build import load, load_model
from weights.find import DEMO, find_checkpoint

__all__ = ["DEMO", "find_checkpoint", "load", "load_model"]
