"""The measurements of a benchmark, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.figures import can_draw, row_of_panels, save_figure

# The columns of the table, made from the summary of one contender.
_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "prefill ms": lambda s: f"{s['prefill_ms']:.0f} ({s['prefill_speedup']:.2f} x)",
    "decode ms/token": lambda s: f"{s['step_ms']:.2f} ({s['speedup']:.2f} x)",
    "bytes allow": lambda s: f"{s['bytes_allow']:.2f} x",
    "by kind of step": lambda s: ", ".join(
        f"{step_kind} {ms['median']:.2f} [{ms['q1']:.2f}, {ms['q3']:.2f}]" for step_kind, ms in s["decode_ms"].items()
    ),
    "tokens/s": lambda s: f"{s['tokens_per_s']:.1f}",
    "GB/s": lambda s: f"{s['bytes_per_s'] / 1e9:.1f}",
    "of limit": lambda s: f"{s['share_of_limit']:.0%}",
    "KV held MB": lambda s: f"{s['live_bytes'] / 1e6:.1f} ({s['live_bytes'] / s['full_bytes']:.0%})",
    "KV allocated MB": lambda s: f"{s['nbytes'] / 1e6:.1f}",
    "prefill peak MB": lambda s: f"{s['peak_bytes'] / 1e6:.0f}",
}


def case_table(case: Mapping[str, Any]) -> str:
    """A Markdown table with a line for each contender.

    Times are medians with quartiles in brackets, and factors are relative to the first contender.
    """
    lines = [
        f"batch {case['batch']}, {case['vision_tokens']} vision and {case['text_tokens']} text tokens",
        "",
        "| | " + " | ".join(_COLUMNS) + " |",
        "|---" * (len(_COLUMNS) + 1) + "|",
    ]
    for summary in case["rows"]:
        lines.append(f"| {summary['name']} | " + " | ".join(cell(summary) for cell in _COLUMNS.values()) + " |")
    for summary in case["rows"]:
        counts = [f"{event} {count}" for event, count in summary["after_warm_up"].items() if count]
        if counts:
            lines.append(f"\n{summary['name']} compiled after its warm-up: {', '.join(counts)}")
    return "\n".join(lines) + "\n"


def draw_decode_times(result: Mapping[str, Any], path: Path) -> None:
    """Draw decode milliseconds per token against vision tokens, with a panel per batch size.

    If all cases have the same number of vision tokens, they are drawn against the batch size
    instead. Dashed lines show the time that reading a step's bytes takes at the measured bandwidth.
    Without matplotlib there is only a note.
    """
    if not can_draw():
        return
    cases = result["cases"]
    x_key, panel_key = "vision_tokens", "batch"
    if len({case["vision_tokens"] for case in cases}) == 1:
        x_key, panel_key = panel_key, x_key
    values = sorted({case[panel_key] for case in cases})
    figure, panels = row_of_panels(len(values))
    for axes, value in zip(panels, values, strict=True):
        in_panel = sorted((case for case in cases if case[panel_key] == value), key=lambda case: case[x_key])
        _draw_panel(axes, in_panel, x_key)
        axes.set_title(f"{panel_key.replace('_', ' ')} {value}", fontsize="medium")
    panels[0].legend(fontsize="small")
    figure.suptitle(
        f"{result['shape']}, {result['dtype']}, {result['machine']['device']}; "
        f"dashed: the bytes at {result['bandwidth']['copy'] / 1e9:.0f} GB/s"
    )
    save_figure(figure, path)


def _draw_panel(axes: Any, cases: Sequence[Mapping[str, Any]], x_key: str) -> None:
    x = [case[x_key] for case in cases]
    for i, name in enumerate(summary["name"] for summary in cases[0]["rows"]):
        summaries = [case["rows"][i] for case in cases]
        color = f"C{i}"
        step_ms = [summary["step_ms"] for summary in summaries]
        limit_ms = [summary["limit_ms"] for summary in summaries]
        axes.plot(x, step_ms, color=color, marker="o", markersize=4, linewidth=1.2, label=name)
        axes.plot(x, limit_ms, color=color, linestyle="--", linewidth=0.8)
    axes.set_xlabel(x_key.replace("_", " "))
    axes.set_ylabel("decode step (ms)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
