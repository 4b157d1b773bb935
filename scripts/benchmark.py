"""How fast KV policies prefill and decode on a shape, and how far from the device's limit.

    python scripts/benchmark.py --shape cpu-268m --policy full avl --batch 1 8 --dtype bfloat16
    python scripts/benchmark.py --shape llava-v1.6-vicuna-7b --dtype bfloat16 --vision_tokens 2880 --batch 1 8 32 \\
        --policy full avl --peers transformers:static --json OUT.json --plot OUT.png
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval.speed.benchmark import main  # noqa: E402
from minivlm.app.cli import run  # noqa: E402

if __name__ == "__main__":
    run(functools.partial(main, peers=ROOT / "eval" / "speed"))
