"""minivlm: LLaVA-1.5 and LLaVA-NeXT in plain PyTorch, with A-VL in an explicit KV cache."""

from minivlm.cache.settings import CacheSettings
from minivlm.errors import UserError
from minivlm.generation.generate import Sampling
from minivlm.generation.vlm import VLM, Answer, Conversation, Request, Stats, Stream

__all__ = ["VLM", "Answer", "CacheSettings", "Conversation", "Request", "Sampling", "Stats", "Stream", "UserError"]
