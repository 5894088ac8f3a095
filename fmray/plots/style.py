"""Colours, markers, and writing of figures.

Colours are told apart by the colour-blind too (Okabe and Ito's palette), and every line has a
marker of its own. matplotlib is imported only when a figure is made.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY, LIGHT = "#555555", "#d9d9d9"
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8a7f00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def new_figure(width: float, height: float, layout: str = "constrained") -> Figure:
    """A figure of inches, bound to no window system and not kept by pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write under a temporary name and move; the folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix or '.png'}")
    try:
        figure.savefig(temporary, facecolor="white")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
