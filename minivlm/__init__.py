"""minivlm: LLaVA-1.5 and LLaVA-NeXT in plain PyTorch, with A-VL in an explicit KV cache."""

from minivlm.cache.policies import preset
from minivlm.cache.settings import CacheSettings
from minivlm.errors import UserError
from minivlm.generation.answers import Answer, Request, Stats, Stream
from minivlm.generation.sampling import Sampling
from minivlm.generation.vlm import VLM, Conversation

__all__ = [
    "VLM",
    "Answer",
    "CacheSettings",
    "Conversation",
    "Request",
    "Sampling",
    "Stats",
    "Stream",
    "UserError",
    "preset",
]
