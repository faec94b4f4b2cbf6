"""The pictures of an advice: footprint against cost, and the host's memory over time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure

from lab.advise.advise import Advice
from lab.advise.choose import front, knee
from lab.advise.grid import DEFAULT, OFF
from lab.advise.words import FRONT, GIVES
from lab.report.page import Picture
from lab.report.style import bare, figure_bytes, look, new_figure

__all__ = ["pictures"]

_GIB = float(1 << 30)
_MARKERS = "osD^v<>P"


def pictures(advice: Advice) -> dict[str, Picture]:
    """Both, by the title of the section that each belongs to."""
    return {
        GIVES: _picture(
            "memory",
            "The host's memory over time",
            "What the host holds of the guest's memory: without reporting, under the kernel's default, and as chosen.",
            lambda: _memory(advice),
        ),
        FRONT: _picture(
            "picture",
            "Footprint against cost",
            "A point is a setting; towards the lower left is better in both. The line joins what no other beats.",
            lambda: _front(advice),
        ),
    }


def _picture(name: str, title: str, text: str, draw: Callable[[], Figure]) -> Picture:
    png, svg = (figure_bytes(draw(), suffix) for suffix in ("png", "svg"))  # saving moves what the layout has placed
    return Picture(name, title, text, png, svg)


def _memory(advice: Advice) -> Figure:
    figure = new_figure(9.5, 3.6)
    axes = figure.subplots()
    shown = [("no reporting", advice.row(OFF)), ("the kernel's default", advice.row(DEFAULT))]
    if advice.choice.row.setting != DEFAULT:
        shown.append((f"chosen: {advice.choice.row.setting}", advice.choice.row))
    for at, (name, row) in enumerate(shown):
        found = np.array(row.resident, np.float64).reshape(-1, 2)
        style = look(max(0, at - 1), is_off=row.setting == OFF)
        axes.plot(found[:, 0], found[:, 1] / _GIB, linewidth=1.8, label=name, **style)
    axes.set_xlabel("the recording's clock [s]")
    axes.set_ylabel("the host holds [GiB]")
    axes.set_ylim(bottom=0)
    bare(axes, "both")
    figure.legend(loc="outside lower center", ncols=len(shown), frameon=False, fontsize=9)
    return figure


def _front(advice: Advice) -> Figure:
    figure = new_figure(9.5, 5.6)
    axes = figure.subplots()
    best, bend = front(advice.rows), knee(advice.rows)

    def share(seconds: float) -> float:
        return seconds / advice.span_s * 100

    policies = [name for name in dict.fromkeys(row.setting.policy for row in advice.rows) if name != OFF.policy]
    for at, policy in enumerate([OFF.policy, *policies]):
        rows = [row for row in advice.rows if row.setting.policy == policy]
        axes.scatter(
            [row.gib_min for row in rows],
            [share(row.cost_s()) for row in rows],
            s=26,
            marker=_MARKERS[at % len(_MARKERS)],
            color=look(max(0, at - 1), is_off=not at)["color"],
            label="no reporting" if not at else policy,
            zorder=3 if at else 3.5,  # what reports nothing lies at the same place
        )
    axes.plot(
        [row.gib_min for row in best],
        [share(row.cost_s()) for row in best],
        color="#999999",
        linewidth=1.3,
        label="no other beats these",
        zorder=2,
    )
    marked = [("default", advice.row(DEFAULT), 170, "#222222", "-"), ("chosen", advice.choice.row, 330, "#AA3377", "-")]
    if bend is not None:
        marked.insert(0, ("knee", bend, 90, "#009E73", "--"))
    for name, row, size, colour, dashes in marked:
        axes.scatter(
            [row.gib_min],
            [share(row.cost_s())],
            s=size,
            facecolors="none",
            edgecolors=colour,
            linewidths=1.8,
            linestyles=dashes,
            label=f"{name}: {row.setting}",
            zorder=4,
        )
    axes.set_xlabel("← less is better: footprint, memory that the host holds [GiB·min]")
    axes.set_ylabel("cost [% of one processor], less is better ↓")
    axes.set_ylim(bottom=0)
    axes.margins(0.06)
    bare(axes, "both")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9, labelspacing=0.9)
    return figure
