"""The bytes that a decode step reads: a table of docs/performance.md.

This is arithmetic; nothing is measured.

python -m eval.speed.step_bytes
"""

from __future__ import annotations

import torch

from eval.speed.contenders import decoder_bytes
from eval.speed.shapes import SHAPES, shape_config
from minivlm.cache.policies import preset
from minivlm.cache.state import StepKind
from minivlm.model.config import TextConfig, VLMConfig
from minivlm.model.llava import Llava

VISION_TOKENS, TEXT_TOKENS = 2880, 70
INTERVAL = 4
BATCHES = (1, 32)
NUMBER_BYTES = 2  # of a weight, and of a number in the cache


def kv_bytes_per_token(config: TextConfig) -> int:
    """KV bytes of one token in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * NUMBER_BYTES


def entries_by_kind() -> dict[StepKind, int]:
    """Entries that a step of each kind reads per layer and head: of the full cache, and the other two of `avl`."""
    settings = preset("avl", vision_interval=INTERVAL).to_dict()
    kept = int((1 - settings["vision_rate"]) * VISION_TOKENS)
    core = int((1 - settings["vision_compute_rate"]) * VISION_TOKENS)
    return {"full": VISION_TOKENS + TEXT_TOKENS, "refresh": kept + TEXT_TOKENS, "core": core + TEXT_TOKENS}


def entries_attended() -> float:
    """Entries that `avl` reads per step, layer and head: the mean over an interval."""
    entries = entries_by_kind()
    return (entries["refresh"] + (INTERVAL - 1) * entries["core"]) / INTERVAL


def weight_bytes(config: VLMConfig) -> int:
    """Bytes of the weights that a step reads."""
    with torch.device("meta"):
        return decoder_bytes(Llava(config).to(torch.bfloat16))


def main() -> None:
    columns = " | ".join(f"batch {batch}: `full` GB | `avl` | allowed" for batch in BATCHES)
    print(f"| shape | weights GB | KV MiB a token | {columns} |")
    print("|---" * (3 + 3 * len(BATCHES)) + "|")
    for name in SHAPES:
        config = shape_config(name)
        if name.startswith("cpu") or not config.is_next:
            continue
        weights = weight_bytes(config)
        token_bytes = kv_bytes_per_token(config.text)
        cells = []
        for batch in BATCHES:
            full = weights + batch * entries_by_kind()["full"] * token_bytes
            avl = weights + batch * entries_attended() * token_bytes
            cells.append(f"{full / 1e9:.1f} | {avl / 1e9:.1f} | {full / avl:.2f} x")
        print(f"| {name} | {weights / 1e9:.1f} | {token_bytes / 2**20:.3f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
