"""What a model attends to while it answers: the attention of every step's last query, in every layer.

Nothing is evicted: the model runs on the full cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from minivlm.cache import attention
from minivlm.cache.decode_pass import DecodePass
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.policy import Policy
from minivlm.cache.prefill_pass import PrefillPass
from minivlm.generation.sampling import Sampling
from minivlm.generation.vlm import VLM
from minivlm.model.config import TextConfig


@dataclass(frozen=True)
class AnswerAttention:
    """The attention of one answer's queries, each the mean over all query heads."""

    attn: list[Tensor]  # per step [L, columns]; each step has one column more. Step 0 is the prompt's last token
    is_vision: Tensor  # bool [S], of the prompt
    answer: str

    @property
    def system(self) -> int:
        """Tokens before the first image token."""
        return int(self.is_vision.nonzero()[0])


class WatchedCache(KVCache):
    """A full cache for one sequence that notes, for every step and layer, the attention of the step's last query.

    It keeps the keys of all layers once more, in the order of the tokens, so that it needs to know nothing of slots.
    """

    def __init__(self, config: TextConfig, device: torch.device) -> None:
        super().__init__(config, Policy("full"), device=device)
        self.prefill_pass, self.decode_pass = _WatchedPrefill, _WatchedDecode
        self.attn: list[list[Tensor]] = []  # per step, and per layer [columns]
        self.keys: list[Tensor] = []  # per layer [H_kv, S + steps, D]

    def note(self, layer_idx: int, q: Tensor, k: Tensor) -> None:
        """Note the attention of the last query of q [1, H, S, D], whose step adds the keys k [1, H_kv, S, D]."""
        if layer_idx == 0:
            self.attn.append([])
        prompt = self.sequences[0].length
        first = len(self.attn) == 1
        start, end = (0, prompt) if first else (prompt + len(self.attn) - 2, prompt + len(self.attn) - 1)
        if first:
            self.keys.append(k.new_empty(k.shape[1], prompt + self.max_steps, k.shape[3]))
        self.keys[layer_idx][:, start:end] = k[0]
        visible = torch.tensor([end], device=q.device)
        weights = attention.weights(q[0, :, -1:], self.keys[layer_idx][:, :end], visible)  # [H_kv, 1, end]
        self.attn[-1].append(weights.sum(dim=0)[0] / q.shape[1])


class _WatchedPrefill(PrefillPass):
    state: WatchedCache

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.state.note(layer_idx, q, k)
        return super().attend(layer_idx, q, k, v)


class _WatchedDecode(DecodePass):
    state: WatchedCache

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.state.note(layer_idx, q, k)
        return super().attend(layer_idx, q, k, v)


def watch_answer(vlm: VLM, prompt: str, image: Image.Image, max_new_tokens: int) -> AnswerAttention:
    """Answer one question about one page, greedily, and return what every step attended to."""
    inputs = vlm.processor([vlm.processor.question(prompt, 1)], [[image]])
    cache = WatchedCache(vlm.config.text, vlm.device)
    generation = vlm.generate(inputs, cache, Sampling(max_new_tokens))
    for _ in generation:
        pass
    steps = 1 + int(cache.stored[0])  # on a GPU one more may have been started
    return AnswerAttention(
        attn=[torch.stack(layers).cpu() for layers in cache.attn[:steps]],
        is_vision=inputs.is_vision[0],
        answer=vlm.processor.decode(generation.tokens[0]),
    )
