"""A tiny `VLM` whose answers never end by themselves, and the settings to ask it under."""

from __future__ import annotations

from pathlib import Path

import tiny
import weights
from minivlm import VLM, Answer, CacheSettings, Sampling, preset
from minivlm.inputs.processor import ModelInputs

QUESTION = "What is this?"
SETTINGS: dict[str, CacheSettings] = {
    "full": preset("full"),
    "avl": preset("avl", text=True, text_init_cache=4),
    "h2o": preset("h2o"),
    "fastv": preset("fastv"),
}


def endless_vlm(folder: Path, family: str = "next-vicuna", **text: object) -> VLM:
    """Its end-of-sequence id is outside the vocabulary; `text` changes the decoder's configuration."""
    tiny.write(folder, family, text_config={"num_hidden_layers": 3, "eos_token_id": tiny.VOCAB, **text})
    tiny.dump(folder / "generation_config.json", {})
    return weights.load(folder, device="cpu")


def generated(vlm: VLM, inputs: ModelInputs, sampling: Sampling) -> list[int]:
    """The answer's tokens that model inputs yield with a fresh full cache: no text and no conversation."""
    generation = vlm.generate(inputs, vlm.new_cache(SETTINGS["full"]), sampling)
    return [token for (token,) in generation]


def content(answer: Answer) -> tuple[str, list[int], str]:
    """All of an answer but its statistics."""
    return answer.text, answer.token_ids, answer.finish
