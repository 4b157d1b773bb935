"""Checkpoints in Hugging Face layout: found, checked and loaded; and the bundled demo."""

from weights.build import load, load_model
from weights.find import DEMO, find_checkpoint

__all__ = ["DEMO", "find_checkpoint", "load", "load_model"]
