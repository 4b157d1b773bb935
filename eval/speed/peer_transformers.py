"""transformers' `generate` on the decoder of a minivlm model, to be timed beside it.

It uses SDPA attention and the model's own parameters, without a copy. Variant "" is the default of
`generate`, with a cache that grows. Variant "static" has a static cache, and `generate` may
compile, on the CPU too.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.generation import BaseStreamer, CompileConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from eval.speed.contenders import decoder_bytes
from eval.speed.machine import synchronize
from eval.speed.shapes import Prompts
from minivlm.cache.state import StepKind
from minivlm.model.config import TextConfig
from minivlm.model.llava import Llava
from weights.layout import by_canonical_name

VARIANTS = ("", "static")


class Clock(BaseStreamer):
    """Records the times at which `generate` hands over the prompt and each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Peer:
    """See `Contender`.

    Image features are replaced by the embeddings of random tokens, which cost the same.
    """

    def __init__(self, name: str, model: Llava, variant: str) -> None:
        self.name = name
        self.period = 1
        self.static = variant == "static"
        self.device = model.lm_head.weight.device
        self.weight_bytes = decoder_bytes(model)
        self.model = _shared_decoder(model)
        self._cache: Any = None
        self._ids = torch.empty(0, 0, dtype=torch.long)  # [B, S] of the prompt and the answer so far
        self._prompt_length = 0

    def prefill(self, prompts: Prompts, steps: int) -> float:
        config = self.model.config
        if not self.static:
            self._cache = DynamicCache(config=config)
        elif self._cache is None:
            self._cache = StaticCache(config=config, max_cache_len=prompts.length + steps + 1)
        else:
            self._cache.reset()
        generator = torch.Generator().manual_seed(0)
        shape = len(prompts.ids), prompts.length
        self._ids = torch.randint(3, config.vocab_size, shape, generator=generator).to(self.device)
        self._prompt_length = prompts.length
        started = time.perf_counter()
        return self._generate(1)[-1] - started

    def decode(self, steps: int) -> list[tuple[StepKind, float]]:
        synchronize(self.device)
        # The first time is that of the prompt; the step after it feeds the prompt's last token and
        # is not timed.
        times = self._generate(steps + 1)[1:]
        return [("full", after - before) for before, after in pairwise(times)]

    def facts(self) -> dict[str, Any]:
        config = self.model.config
        entry_bytes = (
            2
            * config.num_hidden_layers
            * config.num_key_value_heads
            * config.head_dim
            * self._cache.layers[0].keys.element_size()
        )
        batch, length = self._ids.shape
        entries_read = batch * (self._prompt_length + 1 + length) // 2  # the mean over the steps so far
        kv_bytes = batch * self._prompt_length * entry_bytes
        return {
            "step_bytes": {"full": self.weight_bytes + entries_read * entry_bytes},
            "live_bytes": kv_bytes,
            "full_bytes": kv_bytes,
            "nbytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers),
            "core_replaced": None,
        }

    def _generate(self, tokens: int) -> list[float]:
        """Generate `tokens` tokens.

        Returns when the prompt and each token were handed over, in seconds.
        """
        clock = Clock()
        compile_config = CompileConfig(mode="reduce-overhead" if self.device.type == "cuda" else "default")
        compile_config._compile_all_devices = True
        config = GenerationConfig(
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            compile_config=compile_config,
            disable_compile=not self.static,
        )
        self._ids = self.model.generate(
            self._ids,
            attention_mask=torch.ones_like(self._ids),
            past_key_values=self._cache,
            generation_config=config,
            streamer=clock,
        )
        return clock.times


def _shared_decoder(model: Llava) -> LlamaForCausalLM:
    """transformers' model with the parameters of ours, without a copy."""
    config = _llama_config(model.config.text)
    with torch.device("meta"):
        decoder = LlamaForCausalLM(config)
    parameters = {
        name.replace("language_model.", "model.", 1): parameter
        for name, parameter in by_canonical_name(model.state_dict(), model.config.text).items()
        if name.startswith(("language_model.", "lm_head."))
    }
    decoder.load_state_dict(parameters, assign=True)
    # The state dict does not have this table, so it is still on the meta device.
    decoder.model.rotary_emb = LlamaRotaryEmbedding(config).to(model.lm_head.weight.device)
    return decoder.requires_grad_(False).eval()


def _llama_config(text: TextConfig) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        rms_norm_eps=text.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
        max_position_embeddings=text.context_length,
        attn_implementation="sdpa",
    )
