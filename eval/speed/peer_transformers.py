"""transformers `generate` on the decoder of a minivlm model, as a contender of `scripts/benchmark.py --peers`.

SDPA attention, the model's own parameters (not a copy).  Variant "" is what `generate` does if nobody asks for more: a
cache that grows; "static" gives it a static cache, and lets it compile, on the CPU too.
"""

from __future__ import annotations

import time

import torch
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.generation import BaseStreamer, CompileConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from eval.speed.shapes import Prompts
from eval.speed.timing import decoder_bytes
from minivlm.model.llava import Llava

VARIANTS = ("", "static")


class Clock(BaseStreamer):
    """The time at which `generate` hands over the prompt and each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Peer:
    """See `eval.speed.timing.Contender`.  Image features are replaced by embeddings of random tokens, which cost the same."""

    def __init__(self, name: str, model: Llava, variant: str) -> None:
        self.name, self.period, self.static = name, 1, variant == "static"
        self.weights = decoder_bytes(model)
        self.device, text = model.lm_head.weight.device, model.config.text
        config = LlamaConfig(
            vocab_size=text.vocab_size, hidden_size=text.hidden_size, intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_hidden_layers, num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads, head_dim=text.head_dim, rms_norm_eps=text.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta}, max_position_embeddings=text.context_length, attn_implementation="sdpa",
        )  # fmt: skip
        with torch.device("meta"):
            self.model = LlamaForCausalLM(config)
        ours = {
            name.replace("language_model.", "model.", 1): p
            for name, p in model.named_parameters()
            if name.startswith(("language_model.", "lm_head."))
        }
        self.model.load_state_dict(ours, assign=True)
        self.model.model.rotary_emb = LlamaRotaryEmbedding(config).to(self.device)
        self.model.requires_grad_(False).eval()

    def prefill(self, prompts: Prompts, steps: int) -> float:
        self._room = prompts.length + steps + 1
        if not self.static:
            self._cache = DynamicCache(config=self.model.config)
        elif getattr(self, "_cache", None) is None:
            self._cache = StaticCache(config=self.model.config, max_cache_len=self._room)
        else:
            self._cache.reset()
        random = torch.Generator().manual_seed(0)
        shape = len(prompts.ids), prompts.length
        self._ids = torch.randint(3, self.model.config.vocab_size, shape, generator=random).to(self.device)
        started = time.perf_counter()
        times = self._generate(1)
        self._first = self._ids.shape[1]
        return times[-1] - started

    def decode(self, steps: int) -> list[tuple[str, float]]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        times = self._generate(
            steps + 1
        )  # the prompt is handed over first, its last token is the step that is not timed
        return [("full", after - before) for before, after in zip(times[1:], times[2:])]

    def facts(self) -> dict:
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers)
        text = self.model.config
        entry = (
            2
            * text.num_hidden_layers
            * text.num_key_value_heads
            * text.head_dim
            * self._cache.layers[0].keys.element_size()
        )
        batch, length = self._ids.shape
        return {
            "step_bytes": {"full": self.weights + batch * (self._first + length) // 2 * entry},
            "live_bytes": batch * (self._first - 1) * entry,
            "full_bytes": batch * (self._first - 1) * entry,
            "nbytes": held,
            "core_replaced": None,
        }

    def _generate(self, tokens: int) -> list[float]:
        clock, compiling = Clock(), CompileConfig(mode="reduce-overhead" if self.device.type == "cuda" else "default")
        compiling._compile_all_devices = True
        config = GenerationConfig(
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            compile_config=compiling,
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
