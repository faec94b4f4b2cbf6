"""The pictures of a report: footprint over time, footprint against throughput, times to give back, and latencies."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from lab.experiment.comparison import Row, Sample
from lab.experiment.metrics import METRICS, RunResult
from lab.experiment.spec import Mode
from lab.experiment.table import number
from lab.report.front import Front, Point, fronts
from lab.report.style import Look, bare, literal, looks, new_figure

__all__ = ["MOST_LINES", "footprint_figure", "latency_figure", "pareto_figure", "returned_figure"]

MOST_LINES = 8  # in one panel; more than that nobody can tell apart
_POINTS = 400  # of a line over time
_GIB = float(1 << 30)
_WIDTH_IN = 9.5
_TIMES = ("t50_s", "t90_s", "t99_s")
_LATENCIES = (
    ("zone lock held", ("hold_p50_ns", "hold_p99_ns", "hold_max_ns")),
    ("allocation while reporting", ("alloc_p50_ns", "alloc_p99_ns", "alloc_p999_ns")),
)
# The middle one is hollow and large, so that another at the same place is seen in it.
_PERCENTILES: tuple[dict[str, Any], ...] = (
    {"marker": "o", "markersize": 6.0},
    {"marker": "s", "markersize": 9.0, "markerfacecolor": "white"},
    {"marker": "^", "markersize": 5.5},
)
# By order, 0 to 10; each a shape of its own.
_ORDER_MARKERS = ("v", "<", ">", "p", "h", "X", "P", "*", "d", "o", "s")
_MOST_NUMBERED = 12  # points of a front that are told one by one


def footprint_figure(samples: Sequence[Sample], *, title: str) -> Figure:
    """Resident memory over time: for each policy the median of its runs, and a band from the least to the most.

    Args:
        samples: of one mode, with their series; one panel a workload.
    """
    workloads = list(dict.fromkeys(sample.result.spec.workload for sample in samples))
    styles = _looks_of(samples)
    figure = new_figure(_WIDTH_IN, 1.0 + 3.0 * len(workloads))
    figure.suptitle(literal(title), fontweight="bold")
    panels = figure.subplots(len(workloads), 1, squeeze=False)[:, 0]
    for axes, workload in zip(panels, workloads, strict=True):
        groups: dict[str, list[RunResult]] = {}
        for sample in samples:
            if sample.result.spec.workload == workload and len(sample.result.series["t_s"]):
                groups.setdefault(sample.name, []).append(sample.result)
        for name, results in groups.items():
            _draw_footprint(axes, results, styles[name])
        axes.set_title(literal(workload), loc="left", fontsize=11)
        axes.set_ylabel("resident [GiB]")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        bare(axes, "both")
    panels[-1].set_xlabel("time since the start of the workload [s]")
    _legend_below(figure, styles)
    return figure


def _draw_footprint(axes: Axes, results: Sequence[RunResult], style: Look) -> None:
    # As far as all runs go: one that ends earlier would otherwise move the median by leaving it.
    end_s = min(float(result.series["t_s"][-1]) for result in results)
    times = np.linspace(0.0, end_s, _POINTS)
    table = np.array([_resident_at(result, times) for result in results]) / _GIB
    axes.plot(times, np.median(table, axis=0), linewidth=1.8, **style)
    if len(results) > 1:
        low, high = table.min(axis=0), table.max(axis=0)
        axes.fill_between(times, low, high, color=style["color"], alpha=0.16, linewidth=0)


def _resident_at(result: RunResult, times: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Resident bytes at ``times``, that of the sample before each; the first sample's before there is one."""
    index = np.searchsorted(result.series["t_s"], times, side="right") - 1
    return result.series["resident_bytes"][np.maximum(index, 0)]


def returned_figure(rows: Sequence[Row], *, title: str) -> Figure:
    """Time until 50, 90 and 99 % are given back, as bars with half the interquartile range; one panel a workload."""
    workloads = list(dict.fromkeys(row.workload for row in rows))
    styles = looks([(row.name, row.spec.policy == "off") for row in rows])
    figure = new_figure(_WIDTH_IN, 1.0 + 3.0 * len(workloads))
    figure.suptitle(literal(title), fontweight="bold")
    panels = figure.subplots(len(workloads), 1, squeeze=False)[:, 0]
    for axes, workload in zip(panels, workloads, strict=True):
        _draw_returned(axes, [row for row in rows if row.workload == workload], styles)
        axes.set_title(literal(workload), loc="left", fontsize=11)
    _legend_below(figure, styles, bars=True)
    return figure


def _draw_returned(axes: Axes, rows: Sequence[Row], styles: dict[str, Look]) -> None:
    width = 0.84 / max(1, len(rows))
    for place, row in enumerate(rows):
        for group, name in enumerate(_TIMES):
            summary = row.figures[name].summary
            x = group + (place - (len(rows) - 1) / 2) * width
            if summary.median is None:
                axes.annotate(
                    "not reached",
                    (x, 0),
                    xytext=(0, 4),
                    textcoords="offset points",
                    rotation=90,
                    ha="center",
                    va="bottom",
                    fontsize=8,
                    color=styles[row.name]["color"],
                )
                continue
            colour = styles[row.name]["color"]
            axes.bar(x, summary.median, width * 0.92, color=colour, yerr=summary.spread, capsize=2.5, ecolor="#222222")
    axes.set_xticks(range(len(_TIMES)), [METRICS[name].title.removesuffix(" after") for name in _TIMES])
    axes.set_xlim(-0.55, len(_TIMES) - 0.45)
    if not any(row.figures[name].summary.median for row in rows for name in _TIMES):
        axes.set_ylim(0, 1)
        axes.set_yticks([])
    axes.set_ylabel("time since idle [s]")
    axes.tick_params(axis="x", length=0)
    bare(axes, "y")


def latency_figure(rows: Sequence[Row], *, title: str) -> Figure:
    """How long the lock was held and how long allocations took while reporting; medians, log scale."""
    workloads = list(dict.fromkeys(row.workload for row in rows))
    styles = looks([(row.name, row.spec.policy == "off") for row in rows])
    told = {workload: _with_latencies(rows, workload) for workload in workloads}
    heights = [max(1, len(told[workload])) for workload in workloads]
    figure = new_figure(_WIDTH_IN, 1.2 + sum(1.0 + 0.34 * height for height in heights))
    figure.suptitle(literal(title), fontweight="bold")
    panels = figure.subplots(
        len(workloads), 2, squeeze=False, gridspec_kw={"height_ratios": [1 + 0.34 * height for height in heights]}
    )
    for line, workload in enumerate(workloads):
        for column, (subject, names) in enumerate(_LATENCIES):
            axes = panels[line, column]
            _draw_latencies(axes, told[workload], names, styles, with_names=not column)
            axes.set_title(literal(f"{workload}: {subject}"), loc="left", fontsize=10.5)
    figure.legend(handles=_percentile_handles(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.get_layout_engine().set(wspace=0.08)  # type: ignore[union-attr,call-arg]  # the ends of two axes' labels
    return figure


def _with_latencies(rows: Sequence[Row], workload: str) -> list[Row]:
    names = [name for _, group in _LATENCIES for name in group]
    return [
        row
        for row in rows
        if row.workload == workload and any(row.figures[name].summary.median is not None for name in names)
    ]


def _percentile_handles() -> list[Line2D]:
    texts = ("p50", "p99", "the longest hold; p99.9 of allocations")
    return [
        Line2D([], [], linestyle="none", color="#444444", label=label, **look_of)
        for look_of, label in zip(_PERCENTILES, texts, strict=True)
    ]


def _draw_latencies(
    axes: Axes, rows: Sequence[Row], names: Sequence[str], styles: dict[str, Look], *, with_names: bool
) -> None:
    drawn = False
    for place, row in enumerate(rows):
        medians = [row.figures[name].summary.median for name in names]
        reached = [(name, median) for name, median in zip(names, medians, strict=True) if median]
        colour = styles[row.name]["color"]
        if reached:
            drawn = True
            axes.plot([reached[0][1], reached[-1][1]], [place, place], color=colour, linewidth=1.2, alpha=0.6)
        for name, median in reached:
            spread = row.figures[name].summary.spread or 0.0
            look_of = _PERCENTILES[names.index(name)]
            # Down to nothing would be without end on a log scale.
            error = [[min(spread, 0.9 * median)], [spread]]
            axes.errorbar(median, place, xerr=error, color=colour, capsize=2.5, **look_of)
    if drawn:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _place: _duration(value)))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda _value, _place: ""))
        low, high = axes.get_xlim()
        axes.set_xlim(10 ** np.floor(np.log10(low)), 10 ** np.ceil(np.log10(high)))
    else:
        axes.set_xticks([])
        axes.text(0.5, 0.5, "nothing was measured", transform=axes.transAxes, ha="center", va="center")
    axes.set_yticks(
        range(len(rows)), [literal(_in_lines(row.name)) for row in rows] if with_names else [""] * len(rows)
    )
    axes.set_ylim(len(rows) - 0.5 if rows else 1, -0.5)
    axes.tick_params(axis="y", length=0)
    bare(axes, "both")


def _in_lines(name: str) -> str:
    """``name`` in lines short enough to leave room for the axes."""
    lines = textwrap.wrap(name.replace(":", ": "), 28, max_lines=3, placeholder="…", break_on_hyphens=False)
    return "\n".join(lines).replace(": ", ":")


def _duration(value_ns: float) -> str:
    """A tick of a log axis: a power of ten in the unit that keeps it short."""
    for unit, factor in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if value_ns >= factor:
            return f"{value_ns / factor:g} {unit}"
    return f"{value_ns:g} ns"


def pareto_figure(results: Sequence[RunResult], *, title: str) -> Figure:
    """Footprint against throughput, a point a configuration (medians over its seeds); one panel a mode and workload.

    Colour tells the policy, shape the smallest order that is reported. The line joins what nothing beats in both; its
    points are numbered and told below the panel, and the knee has a ring. Of jobs the other axis is the time they took.
    """
    found = fronts(results)
    styles = looks([(result.spec.policy, result.spec.policy == "off") for result in results])
    lines = [1 + min(_MOST_NUMBERED + 1, len(front.best)) for front in found]
    heights = [3.9 + 0.2 * count for count in lines]
    figure = new_figure(_WIDTH_IN, 0.9 + sum(heights))
    figure.suptitle(literal(title), fontweight="bold")
    if not found:
        figure.text(0.5, 0.5, "no run has both figures", ha="center")
        return figure
    panels = figure.subplots(len(found), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    several = len({front.mode for front in found}) > 1
    for axes, front in zip(panels, found, strict=True):
        _draw_front(axes, front, styles)
        axes.set_title(literal(f"{front.workload}, {_mode(front.mode)}" if several else front.workload), loc="left")
    orders = sorted({point.spec.min_order for front in found for point in front.points if point.spec.policy != "off"})
    handles: list[Artist] = [Patch(color=style["color"], label=literal(policy)) for policy, style in styles.items()]
    handles += [
        Line2D(
            [],
            [],
            linestyle="none",
            marker=_ORDER_MARKERS[order],
            color="#777777",
            markersize=7,
            label=f"order {order}",
        )
        for order in orders
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(8, len(handles)), frameon=False, fontsize=9)
    return figure


def _mode(mode: Mode) -> str:
    return "live" if mode == "live" else "virtual time"


def _draw_front(axes: Axes, front: Front, styles: dict[str, Look]) -> None:
    best = front.best
    axes.plot([p.x for p in best], [p.y for p in best], color="#999999", linewidth=1.3, zorder=1)
    for point in front.points:
        axes.errorbar(
            point.x,
            point.y,
            xerr=point.footprint.spread,
            yerr=point.work.spread,
            marker=_marker(point),
            markersize=8 if point in best else 6,
            color=styles[point.spec.policy]["color"],
            alpha=1.0 if point in best else 0.55,
            elinewidth=0.8,
            zorder=3,
        )
    if front.knee is not None:
        axes.plot(front.knee.x, front.knee.y, "o", markersize=17, fillstyle="none", color="#222222", zorder=2)
    for place, point in enumerate(best[:_MOST_NUMBERED], start=1):
        axes.annotate(
            str(place), (point.x, point.y), xytext=(-7, 7), textcoords="offset points", ha="right", fontsize=9, zorder=4
        )
    axes.margins(0.09)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _place: number(value)))
    axes.set_ylabel(
        "time to do the work [s], less is better ↓" if front.is_job else "page operations a second, ↑ more is better"
    )
    told = "\n".join(["", *_told(front)])
    axes.set_xlabel(f"← less is better: footprint [GiB·min]\n{literal(told)}", fontsize=9.5, loc="left", ma="left")
    bare(axes, "both")


def _marker(point: Point) -> str:
    return "D" if point.spec.policy == "off" else _ORDER_MARKERS[point.spec.min_order]


def _told(front: Front) -> list[str]:
    """The points of the front in words, those beyond ``_MOST_NUMBERED`` as a count."""
    unit = "s" if front.is_job else "operations/s"
    lines = [
        f"{place}  {point.name}: {number(point.x)} GiB·min, {number(point.y)} {unit}"
        f"{'  (knee, ringed)' if point is front.knee else ''}"
        for place, point in enumerate(front.best[:_MOST_NUMBERED], start=1)
    ]
    rest = len(front.best) - _MOST_NUMBERED
    return [*lines, f"and {rest} more on the line"] if rest > 0 else lines


def _looks_of(samples: Sequence[Sample]) -> dict[str, Look]:
    return looks([(sample.name, sample.result.spec.policy == "off") for sample in samples])


def _legend_below(figure: Figure, styles: dict[str, Look], *, bars: bool = False) -> None:
    handles: list[Artist] = [
        Patch(color=style["color"], label=literal(name))
        if bars
        else Line2D([], [], linewidth=2.2, label=literal(name), **style)
        for name, style in styles.items()
    ]
    longest = max((len(name) for name in styles), default=1)
    columns = max(1, min(len(handles), int(110 / (longest + 8))))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
