"""How the pictures look, and their way to bytes: the same figure gives the same bytes each time.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which colour-blind readers can tell apart; lines
differ by their dashes and points by their shapes as well.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["Look", "bare", "figure_bytes", "literal", "look", "looks", "new_figure"]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
_DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)))
_OFF = "#7F7F7F"  # no reporting is what the others are seen against
_DPI = 130
# Text as outlines: the same on every machine, and nothing in it that a viewer would take for markup.
_SETTINGS: Any = {"svg.hashsalt": "free page reporting laboratory", "svg.fonttype": "path", "axes.unicode_minus": False}
_METADATA: dict[str, dict[str, Any]] = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}

Look = dict[str, Any]  # colour and dashes of one policy, as arguments of Matplotlib


def look(index: int, *, is_off: bool = False) -> Look:
    """Colour and dashes number ``index``; beyond the colours they begin again, with other dashes."""
    if is_off:
        return {"color": _OFF, "linestyle": (0, (1, 1))}
    turn, colour = divmod(index, len(_COLOURS))
    return {"color": _COLOURS[colour], "linestyle": _DASHES[(index + turn) % len(_DASHES)]}


def looks(names: Sequence[tuple[str, bool]]) -> dict[str, Look]:
    """A look for each of ``names``; with each stands whether it is without reporting."""
    found: dict[str, Look] = {}
    index = 0
    for name, is_off in names:
        if name not in found:
            found[name] = look(index, is_off=is_off)
            index += not is_off
    return found


def new_figure(width_in: float, height_in: float) -> Figure:
    """An empty figure of that size, with a layout that keeps labels apart."""
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def figure_bytes(figure: Figure, suffix: str) -> bytes:
    """The figure as a file; ``suffix`` is png or svg."""
    buffer = io.BytesIO()
    with mpl.rc_context(_SETTINGS):
        figure.savefig(buffer, dpi=_DPI, format=suffix, metadata=_METADATA[suffix])
    return buffer.getvalue()


def literal(text: str) -> str:
    """``text`` as it is: Matplotlib would take what stands between dollar signs for mathematics."""
    return text.replace("$", r"\$")


def bare(axes: Axes, grid: str) -> None:
    """No frame but the axes; grid lines along ``grid`` ("x", "y" or "both"), behind all else."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
