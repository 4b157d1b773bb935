"""The statistics of attention as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.attention.statistics import TOKEN_CLASSES


def draw_statistics(stats: dict[str, Any], path: Path) -> None:
    """Draw heat maps of the layers' concordance and, below them, continuity, decay and mass as lines.

    Needs matplotlib. `stats` is what `mean_statistics` returns.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
    panels = above.subplots(1, len(stats["concordance"]), squeeze=False)[0]
    for axes, each in zip(panels, stats["concordance"], strict=True):
        image = axes.imshow(each["between_layers"], vmin=0, vmax=1, cmap="viridis")
        axes.set_title(f"top {each['share']:.0%}, mean {each['between_layers_mean'] or 0:.2f}")
        axes.set_xlabel("layer")
    above.axes[0].set_ylabel("layer")
    above.colorbar(image, ax=above.axes, label="concordance between layers")

    steps, decay, mass = below.subplots(1, 3).flat
    for i, each in enumerate(stats["concordance"]):
        values = [value for value in each["between_steps_mean"] if value is not None]
        label = f"top {each['share']:.0%}"
        steps.plot(range(1, len(values) + 1), values, marker="o", markersize=3, color=f"C{i}", label=label)
        steps.axhline(each["share"], color=f"C{i}", linestyle=":", linewidth=1)
    steps.set(xlabel="steps apart", ylabel="concordance between steps", ylim=(0, 1.02))
    steps.legend(title="dotted: by chance")
    decay.plot(stats["text_decay"]["mean"])
    decay.set(xlabel="age of a text token (text tokens)", ylabel="attention it gets", yscale="log")
    for name in TOKEN_CLASSES:
        mass.plot(stats["mass"][name]["by_step"], label=name)
    mass.set(xlabel="step (0: the prompt's last token)", ylabel="share of attention", ylim=(0, 1.02))
    mass.legend()
    for axes in below.axes:
        axes.grid(alpha=0.3)
    figure.suptitle(f"{stats['pages']} pages, {stats['layers']} layers")
    figure.savefig(path, dpi=150, format="png")
