"""The table of docs/performance.md: what a decode step of each LLaVA-NeXT shape has to read, and what A-VL leaves of it.

python benchmarks/step_bytes.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval.speed.shapes import SHAPES, shape_config
from eval.speed.timing import decoder_bytes
from minivlm.cache.settings import CacheSettings
from minivlm.model.config import TextConfig
from minivlm.model.llava import Llava

VISION, TEXT, INTERVAL, BATCHES = 2880, 70, 4, (1, 32)
BYTES = 2  # of a weight, and of a number in the cache


def token_bytes(config: TextConfig) -> int:
    """KV bytes of one token in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * BYTES


def attended() -> float:
    """Entries that `avl` reads per step, layer and head, on average over an interval."""
    settings = CacheSettings.preset("avl", vision_interval=INTERVAL)
    kept, core = int((1 - settings.vision_rate) * VISION), int((1 - settings.vision_compute_rate) * VISION)
    return (kept + (INTERVAL - 1) * core) / INTERVAL + TEXT


def main() -> None:
    columns = " | ".join(f"batch {batch}: `full` GB | `avl` | allowed" for batch in BATCHES)
    print(f"| shape | weights GB | KV MiB a token | {columns} |")
    print("|---" * (3 + 3 * len(BATCHES)) + "|")
    for name in SHAPES:
        config = shape_config(name)
        if name.startswith("cpu") or not config.is_next:
            continue
        with torch.device("meta"):
            weights = decoder_bytes(Llava(config).to(torch.bfloat16))
        entry = token_bytes(config.text)
        cells = []
        for batch in BATCHES:
            full, avl = (weights + batch * entries * entry for entries in (VISION + TEXT, attended()))
            cells.append(f"{full / 1e9:.1f} | {avl / 1e9:.1f} | {full / avl:.2f} x")
        print(f"| {name} | {weights / 1e9:.1f} | {entry / 2**20:.3f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
