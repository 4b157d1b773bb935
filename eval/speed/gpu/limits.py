"""The least time of a decode step on two cards, beside the targets: a table of docs/performance.md.

This is arithmetic: bytes, divided by the bandwidth in the cards' data sheets. A copy reaches less, so the page of a
run on a card divides by what was measured there.

python -m eval.speed.gpu.limits
"""

from __future__ import annotations

from eval.speed.gpu.pieces import SHAPE
from eval.speed.gpu.targets import WANTED
from eval.speed.shapes import shape_config
from eval.speed.step_bytes import entries_attended, entries_by_kind, kv_bytes_per_token, weight_bytes

BANDWIDTHS = {"H100": 3.35e12, "A100": 2.0e12}  # bytes per second, of the modules with 80 GB
_MISSING = "not measured yet"


def step_limits() -> dict[str, float]:
    """Bytes of a step by batch and kind."""
    config = shape_config(SHAPE)
    weights, token = weight_bytes(config), kv_bytes_per_token(config.text)
    entries: dict[str, float] = {"avl": entries_attended()}
    entries.update(entries_by_kind().items())
    return {
        f"batch {batch}, {kind}": weights + batch * entries[kind] * token
        for batch, kind in ((1, "full"), (32, "full"), (32, "avl"), (32, "core"))
    }


def main() -> None:
    step, entries = step_limits(), entries_by_kind()
    allowed = step["batch 32, full"] / step["batch 32, avl"]
    held = entries["full"] / entries["refresh"]
    rows = [
        ("batch 1, `full`", f"≥ {WANTED['batch 1']:.0%} of the copy bandwidth", "batch 1, full", ""),
        ("batch 1, `full`", f"≥ {WANTED['transformers']} x transformers, static and compiled", "batch 1, full", ""),
        ("batch 32, `full`", f"≥ {WANTED['batch 32']:.0%} of the copy bandwidth", "batch 32, full", ""),
        ("batch 32, `full`", "not slower than transformers", "batch 32, full", ""),
        ("batch 32, `avl`", f"≥ {WANTED['avl']:.0%} of what its bytes allow", "batch 32, avl", f"{allowed:.2f} x"),
        (
            "batch 32, core step",
            f"beyond weights, its share of the entries within {WANTED['core'] - 1:.0%}",
            "batch 32, core",
            f"{entries['core'] / entries['full']:.3f} of the entries",
        ),
    ]
    print("| | target | GB | " + " | ".join(BANDWIDTHS) + " | measured |")
    print("|---" * (4 + len(BANDWIDTHS)) + "|")
    for name, target, kind, relative in rows:
        limits = [f"{1e3 * step[kind] / bandwidth:.2f} ms" for bandwidth in BANDWIDTHS.values()]
        cells = [f"{limit}, {relative}" if relative else limit for limit in limits]
        print(f"| {name} | {target} | {step[kind] / 1e9:.1f} | {' | '.join(cells)} | {_MISSING} |")
    cells = [f"{held:.2f} x"] * len(BANDWIDTHS)
    target = f"≥ {WANTED['largest batch']} x that of `full`"
    print(f"| largest batch, `avl` | {target} | | {' | '.join(cells)} | {_MISSING} |")


if __name__ == "__main__":
    main()
