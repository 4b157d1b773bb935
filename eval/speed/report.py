"""What a benchmark measured, as a table and as a picture."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from minivlm.app.cli import note
from minivlm.files import write_whole

COLUMNS = (
    ("prefill ms", lambda row: f"{row['prefill_ms']:.0f} ({row['prefill_speedup']:.2f} x)"),
    ("decode ms/token", lambda row: f"{row['step_ms']:.2f} ({row['speedup']:.2f} x)"),
    ("bytes allow", lambda row: f"{row['bytes_allow']:.2f} x"),
    (
        "by kind of step",
        lambda row: ", ".join(
            f"{kind} {d['median']:.2f} [{d['q1']:.2f}, {d['q3']:.2f}]" for kind, d in row["decode_ms"].items()
        ),
    ),
    ("tokens/s", lambda row: f"{row['tokens_per_s']:.1f}"),
    ("GB/s", lambda row: f"{row['bytes_per_s'] / 1e9:.1f}"),
    ("of limit", lambda row: f"{row['share_of_limit']:.0%}"),
    ("KV held MB", lambda row: f"{row['live_bytes'] / 1e6:.1f} ({row['live_bytes'] / row['full_bytes']:.0%})"),
    ("KV allocated MB", lambda row: f"{row['nbytes'] / 1e6:.1f}"),
    ("prefill peak MB", lambda row: f"{row['peak_bytes'] / 1e6:.0f}"),
)


def table(case: dict) -> str:
    """Markdown: a row for each contender; medians with quartiles in brackets, factors against the first row."""
    lines = [
        f"batch {case['batch']}, {case['vision_tokens']} vision and {case['text_tokens']} text tokens",
        "",
        "| | " + " | ".join(title for title, _ in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for row in case["rows"]:
        lines.append(f"| {row['name']} | " + " | ".join(cell(row) for _, cell in COLUMNS) + " |")
    for row in case["rows"]:
        if any(row["after_warm_up"].values()):
            counts = ", ".join(f"{what} {count}" for what, count in row["after_warm_up"].items() if count)
            lines.append(f"\n{row['name']} compiled after its warm-up: {counts}")
    return "\n".join(lines) + "\n"


def draw(result: dict, path: Path) -> None:
    """Decode milliseconds per token: against vision tokens, a panel per batch; or against the batch, if N is one.

    Dashed: what reading the bytes of a step takes at the bandwidth measured.
    """
    if find_spec("matplotlib") is None:
        note("no picture without matplotlib (pip install 'minivlm[plots]')")
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = result["cases"]
    against, panel = (
        ("vision_tokens", "batch") if len({c["vision_tokens"] for c in cases}) > 1 else ("batch", "vision_tokens")
    )
    panels = sorted({c[panel] for c in cases})
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, value in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        drawn = sorted((c for c in cases if c[panel] == value), key=lambda c: c[against])
        x = [c[against] for c in drawn]
        for i, name in enumerate(row["name"] for row in drawn[0]["rows"]):
            rows = [c["rows"][i] for c in drawn]
            axes.plot(
                x, [row["step_ms"] for row in rows], color=f"C{i}", marker="o", markersize=4, linewidth=1.2, label=name
            )
            axes.plot(x, [row["limit_ms"] for row in rows], color=f"C{i}", linestyle="--", linewidth=0.8)
        axes.set_xlabel(against.replace("_", " "))
        axes.set_ylabel("decode step (ms)")
        axes.set_title(f"{panel.replace('_', ' ')} {value}", fontsize="medium")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.suptitle(
        f"{result['shape']}, {result['dtype']}, {result['machine']['device']}; dashed: the bytes at {result['bandwidth']['copy'] / 1e9:.0f} GB/s"
    )
    write_whole(path, lambda scratch: figure.savefig(scratch, dpi=150))
