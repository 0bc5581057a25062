"""What every picture shares: two palettes that read on light and on dark pages, and how a file is written.

matplotlib is imported inside functions: readers of traces need not have it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_trace.errors import UsageError, unknown


@dataclass(frozen=True)
class INK:
    """Colours by meaning. Chosen to differ in lightness too, so that a grey print still tells them apart."""

    page: str
    text: str
    faint: str
    """Grid, guides."""
    used: str
    """Memory that holds tokens."""
    empty: str
    """Memory that is reserved and holds none."""
    empty_line: str
    """The same as a line, which needs more contrast than an area."""
    shared: str
    """Held by several requests."""
    requests: tuple[str, ...]
    """One colour for each of a few requests."""


THEMES = {
    "light": INK(
        page="#ffffff", text="#1f2328", faint="#c8ced6", used="#1f6f8b", empty="#f2c9b0",
        empty_line="#c8602a", shared="#7a4fa3",
        requests=("#1f6f8b", "#c8602a", "#4f8a3c", "#7a4fa3", "#a3862f"),
    ),
    "dark": INK(
        page="#0d1117", text="#e6edf3", faint="#3d444d", used="#4fb3d1", empty="#6b4230",
        empty_line="#f0905a", shared="#b78be0",
        requests=("#4fb3d1", "#f0905a", "#8fcf76", "#b78be0", "#d9be63"),
    ),
}  # fmt: skip


@contextlib.contextmanager
def figure(theme: str) -> Iterator[INK]:
    """matplotlib set to a theme while inside; yields its colours.

    Raises: ``UsageError`` for an unknown theme, or when matplotlib is not installed.
    """
    if theme not in THEMES:
        raise unknown("theme", theme, THEMES)
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError(
            f"pictures need matplotlib, which cannot be imported ({error})",
            hint="pip install matplotlib; tables and --json work without it",
        ) from None
    matplotlib.use("Agg", force=False)
    ink = THEMES[theme]
    settings: Any = {
        "figure.facecolor": ink.page, "savefig.facecolor": ink.page, "axes.facecolor": ink.page,
        "text.color": ink.text, "axes.labelcolor": ink.text, "axes.edgecolor": ink.faint,
        "xtick.color": ink.text, "ytick.color": ink.text, "axes.titlecolor": ink.text,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "axes.grid.axis": "y", "grid.color": ink.faint, "grid.linewidth": 0.6, "grid.alpha": 0.6,
        "axes.axisbelow": True, "legend.frameon": False, "font.size": 10.5,
        "axes.titlesize": 11.5, "axes.titlelocation": "left", "figure.titlesize": 13,
        "font.family": "DejaVu Sans", "svg.hashsalt": "vllm-trace", "figure.dpi": 100,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        yield ink


def new_figure(rows: int, columns: int, size: tuple[float, float], **more: Any) -> tuple[Any, Any]:
    """A figure and its axes, laid out so that nothing overlaps; inside ``figure``."""
    from matplotlib.figure import Figure

    made = Figure(figsize=size, layout="constrained")
    return made, made.subplots(rows, columns, **more)


def save(drawn: Any, path: Path) -> None:
    """Write a figure: PNG or SVG by the name's ending, the same bytes for the same picture.

    Raises: ``UsageError`` for another ending, or when the file cannot be written.
    """
    ending = path.suffix.lower()
    if ending not in (".png", ".svg"):
        raise UsageError(f"{path.name} ends neither in .png nor in .svg")
    stamp = {".svg": {"Date": None, "Creator": None}, ".png": {"Software": None}}[ending]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, dpi=110, metadata=stamp)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
