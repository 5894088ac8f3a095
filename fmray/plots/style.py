"""Colours, markers, and the creation and saving of figures.

The colours are Okabe and Ito's palette, which colour-blind readers can distinguish, and each line
has its own marker. matplotlib is imported only when a figure is made.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fmray.runtime.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY, LIGHT = "#555555", "#d9d9d9"
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8a7f00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def new_figure(width: float, height: float, layout: str = "constrained") -> Figure:
    """Return a figure of `width` x `height` inches, without a window and unknown to pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure to `path`, in the format of its suffix (PNG without one)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path, unique=True) as temporary:
        figure.savefig(temporary, format=path.suffix[1:] or "png", facecolor="white")
