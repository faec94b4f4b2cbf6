"""The picture of a run: resident memory of each guest over time, and its page map at the peak and at the end.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which colour-blind readers can tell apart;
lightness tells them apart once more in a grey print: what costs the host memory is dark or saturated, the rest light.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from common.geometry import PAGE_BYTES
from lab.pagemap import OUTSIDE, PageClass
from lab.sampler import Observation, PageSnapshot
from lab.view import mib

if TYPE_CHECKING:
    from matplotlib.gridspec import SubplotSpec

__all__ = ["GuestPicture", "build_figure", "draw"]

_MIB = 1 << 20
_DPI = 150
_WIDTH_IN = 16.0
_BINS = 160  # of a time axis: the sum of the reports in each is one stem
_MAX_GUESTS = 8  # one below the other, beyond that a picture is a wall

_LABELS = {
    PageClass.ALLOCATED: ("allocated", "#0072B2"),
    PageClass.PER_CPU: ("on per-CPU lists", "#CC79A7"),
    PageClass.IN_FLIGHT: ("in flight to the host", "#000000"),
    PageClass.FREE_RESIDENT: ("free but resident", "#E69F00"),
    PageClass.FREE_RETURNED: ("given back, flag lost", "#009E73"),
    PageClass.REPORTED_RETURNED: ("given back, Reported", "#6DC1EA"),
    PageClass.REPORTED_UNTOUCHED: ("never touched, Reported", "#D6EEF8"),
    PageClass.NEVER_TOUCHED: ("never touched", "#E4E4E4"),
    PageClass.UNCLEAR: ("changed while copied", "#FF00FF"),
}
_RARE = {PageClass.UNCLEAR, PageClass.FREE_RETURNED}  # in the legend only if drawn
_RESIDENT, _ALLOCATED, _REPORTS = "#D55E00", "#0072B2", "#000000"


@dataclass(frozen=True)
class GuestPicture:
    """One guest as it is drawn. ``reports``: float64 (n, 2), a row a report, seconds since the start and bytes."""

    name: str
    memory_bytes: int
    observation: Observation
    reports: npt.NDArray[np.float64]


def draw(guests: Sequence[GuestPicture], *, title: str, subtitle: str, suffix: str = "png") -> bytes:
    """The picture as the bytes of a file; ``suffix`` is png, svg or pdf."""
    buffer = io.BytesIO()
    build_figure(guests, title=title, subtitle=subtitle).savefig(buffer, dpi=_DPI, format=suffix)
    return buffer.getvalue()


def build_figure(guests: Sequence[GuestPicture], *, title: str, subtitle: str) -> Figure:
    """A figure with a column of panels a guest (time, map at the peak, map at the end), two guests abreast."""
    drawn = guests[:_MAX_GUESTS]
    abreast = min(2, max(1, len(drawn)))
    bands = max(1, math.ceil(len(drawn) / abreast))
    figure = Figure(figsize=(_WIDTH_IN, 1.9 + 6.9 * bands), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(rect=(0.005, 0.0, 0.99, 1.0 - 0.72 / figure.get_figheight()), hspace=0.03)  # type: ignore[union-attr,call-arg]
    figure.text(0.012, 1 - 0.12 / figure.get_figheight(), title, fontsize=17, fontweight="bold", va="top")
    hidden = len(guests) - len(drawn)
    tail = f"; {hidden} more not drawn" if hidden else ""
    figure.text(0.012, 1 - 0.47 / figure.get_figheight(), subtitle + tail, fontsize=11.5, color="#444444", va="top")
    outer = figure.add_gridspec(bands, abreast)
    end_s = max(
        (float(one.observation.series.time_s[-1]) for one in drawn if len(one.observation.series.time_s)), default=1
    )
    for index, guest in enumerate(drawn):
        _draw_guest(figure, outer[divmod(index, abreast)], guest, end_s)
    figure.legend(handles=_map_legend(drawn), loc="outside lower center", ncols=8, frameon=False, fontsize=11)
    return figure


def _draw_guest(figure: Figure, where: SubplotSpec, guest: GuestPicture, end_s: float) -> None:
    cells = where.subgridspec(3, 1, height_ratios=(2.1, 1.3, 1.3))
    times = figure.add_subplot(cells[0])
    _draw_times(times, guest, end_s)
    seen = guest.observation
    for row, (moment, snapshot) in enumerate((("at its peak", seen.peak_map), ("at the end", seen.last_map)), start=1):
        axes = figure.add_subplot(cells[row])
        _draw_map(axes, guest, moment, snapshot)
        axes.set_xlabel(f"address in {guest.name}, MiB" if row == 2 else "")
        if snapshot is not None:
            times.axvline(snapshot.time_s, color="#888888", linewidth=0.9, linestyle=":", zorder=1)
            times.annotate(
                f"{moment.split()[-1]} map",
                (snapshot.time_s, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(-3, -3),
                textcoords="offset points",
                rotation=90,
                ha="right",
                va="top",
                fontsize=8.5,
                color="#555555",
                bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.0},
                zorder=6,
            )


def _draw_times(axes: Axes, guest: GuestPicture, end_s: float) -> None:
    series = guest.observation.series
    resident = series.resident_bytes / _MIB
    axes.fill_between(series.time_s, resident, step="post", color=_RESIDENT, alpha=0.18, linewidth=0)
    axes.plot(
        series.time_s, resident, color=_RESIDENT, linewidth=2.2, drawstyle="steps-post", label="resident on the host"
    )
    axes.plot(
        series.time_s,
        series.allocated_bytes / _MIB,
        color=_ALLOCATED,
        linewidth=1.2,
        linestyle=(0, (5, 2)),
        drawstyle="steps-post",
        label="allocated",
    )
    if len(guest.reports):
        edges = np.linspace(0, end_s, _BINS + 1)
        sums, _ = np.histogram(guest.reports[:, 0], bins=edges, weights=guest.reports[:, 1] / _MIB)
        centres = (edges[:-1] + edges[1:]) / 2
        drawn = sums > 0
        axes.vlines(centres[drawn], 0, sums[drawn], color=_REPORTS, linewidth=1.6, zorder=4, label="_stems")
        axes.plot(
            centres[drawn],
            sums[drawn],
            linestyle="none",
            marker="v",
            markersize=5,
            color=_REPORTS,
            zorder=5,
            label=f"{_counted(len(guest.reports), 'report')}, MiB per {1000 * end_s / _BINS:.0f} ms",
        )
        rug_top = np.full(len(guest.reports), -0.012)
        axes.vlines(
            guest.reports[:, 0],
            rug_top - 0.03,
            rug_top,
            transform=axes.get_xaxis_transform(),
            color=_REPORTS,
            linewidth=0.8,
            clip_on=False,
            label="_rug",
        )
    axes.set_xlim(0, end_s * 1.005)
    axes.set_ylim(0, guest.memory_bytes / _MIB * 1.04)
    axes.tick_params(axis="x", pad=9)
    axes.set_xlabel(
        "seconds since the start (ticks above: one a report)" if len(guest.reports) else "seconds since the start"
    )
    axes.set_ylabel("MiB")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{guest.name}: {mib(guest.memory_bytes)}", loc="left", fontsize=13, fontweight="bold")
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=3,
        frameon=False,
        fontsize=9.5,
        borderaxespad=0.2,
        handlelength=1.6,
        columnspacing=1.2,
    )


def _draw_map(axes: Axes, guest: GuestPicture, moment: str, snapshot: PageSnapshot | None) -> None:
    axes.set_yticks([])
    if snapshot is None:
        axes.set_xticks([])
        axes.text(0.5, 0.5, f"no page map {moment}", ha="center", va="center", transform=axes.transAxes)
        return
    colours = ListedColormap([_LABELS[page_class][1] for page_class in PageClass])
    cells = np.ma.masked_equal(snapshot.grid.cells, OUTSIDE)
    width_mib = snapshot.grid.cells.shape[1] * snapshot.grid.column_bytes / _MIB
    axes.imshow(
        cells,
        cmap=colours,
        vmin=-0.5,
        vmax=len(PageClass) - 0.5,
        aspect="auto",
        interpolation="nearest",
        extent=(0, width_mib, 0, 1),
    )
    axes.set_xlim(0, guest.memory_bytes / _MIB)
    axes.set_ylabel(f"{snapshot.grid.column_bytes >> 10} KiB a column", fontsize=9)
    axes.set_title(f"{moment} ({snapshot.time_s:.1f} s): {_words(snapshot)}", loc="left", fontsize=10.5)


def _words(snapshot: PageSnapshot) -> str:
    """The three largest classes, those of less than a hundredth of the guest left out."""
    counts = [(count, PageClass(index)) for index, count in enumerate(snapshot.grid.pages)]
    large = sorted((one for one in counts if one[0] * 100 >= snapshot.grid.n_pages), reverse=True)
    return "; ".join(f"{mib(count * PAGE_BYTES)} {_LABELS[page_class][0]}" for count, page_class in large[:3])


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _map_legend(guests: Sequence[GuestPicture]) -> list[Patch]:
    snapshots = [map_ for guest in guests for map_ in (guest.observation.peak_map, guest.observation.last_map) if map_]
    present = {PageClass(index) for map_ in snapshots for index, count in enumerate(map_.grid.pages) if count}
    return [
        Patch(facecolor=colour, edgecolor="#777777", linewidth=0.5, label=label)
        for page_class, (label, colour) in _LABELS.items()
        if page_class in present or page_class not in _RARE
    ]
