"""Figures with a row of panels, drawn by matplotlib if it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minivlm.app.cli import note
from minivlm.errors import UserError
from minivlm.files import expect_writable, write_whole

_SUFFIXES = ("", ".png", ".pdf", ".svg", ".svgz", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".eps", ".ps")


def can_draw() -> bool:
    """Whether matplotlib is installed; prints a note if it is not."""
    if find_spec("matplotlib") is None:
        note("no picture without matplotlib (pip install 'minivlm[plots]')")
        return False
    return True


def expect_figure(path: Path) -> None:
    """Check that `save_figure` can write `path`. Raises `UserError` if not."""
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(f"{path}: no format of a picture (expected a name like {path.stem}.png)")
    expect_writable(path)


def row_of_panels(count: int) -> tuple[Any, list[Any]]:
    """Return a new matplotlib figure and its `count` axes, side by side. It needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * count, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure completely or not at all. Raises `UserError` if the file cannot be written.

    The suffix of its name decides the format; without one it is PNG.
    """
    expect_figure(path)
    # Without a format, matplotlib appends one to a name that has none, and writes another file.
    kind = path.suffix[1:].lower() or "png"
    write_whole(path, lambda scratch: figure.savefig(scratch, dpi=150, format=kind))
