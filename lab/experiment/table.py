"""Figures as people read them, and the tables of a comparison: on a terminal with rules, in a pipe as plain columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from lab.experiment.comparison import CLOSE_PERCENT, COMPARED, TESTED, Comparison, Distance, Figure, Row
from lab.experiment.metrics import Metric
from lab.experiment.statistics import SIGNIFICANT

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = [
    "Scale",
    "distance_texts",
    "figure_text",
    "mark",
    "number",
    "p_text",
    "plus_minus",
    "print_comparison",
    "row_scale",
    "row_title",
    "shown_metrics",
]

_STEPS = {
    "ns": (("s", 1e9), ("ms", 1e6), ("µs", 1e3), ("ns", 1.0)),
    "s": (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)),
    "bytes": (("GiB", float(1 << 30)), ("MiB", float(1 << 20)), ("KiB", float(1 << 10)), ("bytes", 1.0)),
}
Scale = tuple[str, float]  # a unit's name, and how many of the metric's own unit it is
_PIPE_WIDTH = 10_000  # nobody wraps a pipe


def number(value: float) -> str:
    """``value`` with three significant digits, whole numbers whole, thousands apart."""
    if value == 0:
        return "0"
    if abs(value) >= 100 or value == round(value):
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return text if "e" not in text or abs(value) < 1e-4 else f"{value:.5f}"


def plus_minus(median: float, spread: float | None) -> str:
    """Both with the decimals that three significant digits of the median need; ``?`` for a spread that is not there."""
    if spread is None:
        return f"{number(median)} ± ?"
    if not median or (median == round(median) and spread == round(spread)):
        return f"{number(median)} ± {number(spread)}"
    decimals = min(6, max(0, 2 - math.floor(math.log10(abs(median)))))
    return f"{median:,.{decimals}f} ± {spread:,.{decimals}f}"


def row_scale(metric: Metric, medians: Sequence[float | None]) -> Scale:
    """The unit in which all of ``medians`` are shown: the largest in which the largest of them is at least 1."""
    largest = max((abs(median) for median in medians if median is not None), default=0.0)
    steps = _STEPS.get(metric.unit)
    if steps is None or not largest:
        return metric.unit, 1.0
    return next(((unit, factor) for unit, factor in steps if largest >= factor), steps[-1])


def row_title(metric: Metric, scale: Scale) -> str:
    """Title and unit."""
    return f"{metric.title} [{scale[0]}]" if scale[0] else metric.title


def mark(figure: Figure, first: Figure | None, metric: Metric) -> str:
    """``+`` better than the first policy, ``-`` worse, ``~`` other; empty where p does not tell them apart."""
    if figure.p is None or figure.p >= SIGNIFICANT or first is None:
        return ""
    # Not reached is later than all that was.
    ours, theirs = (float("inf") if one.summary.median is None else one.summary.median for one in (figure, first))
    if not metric.better or ours == theirs:
        return "~"
    return "+" if (ours > theirs) == (metric.better > 0) else "-"


def figure_text(figure: Figure, metric: Metric, scale: Scale) -> str:
    """Median and spread; how many of the runs reached it, when not all did."""
    summary = figure.summary
    is_time = metric.name in {"t50_s", "t90_s", "t99_s"}
    missing = len(summary.values) - summary.n
    if summary.median is None:
        return (
            f"not in {len(summary.values)} run{'s' * (len(summary.values) != 1)}"
            if is_time and not summary.n
            else "not in most"
            if is_time
            else "-"
        )
    if len(summary.values) > 1:
        text = plus_minus(summary.median / scale[1], None if summary.spread is None else summary.spread / scale[1])
    else:
        text = number(summary.median / scale[1])
    return f"{text} ({summary.n} of {len(summary.values)})" if missing else text


def p_text(p: float) -> str:
    """``p 0.008``."""
    return "p < 0.001" if p < 0.001 else f"p {p:.2g}"


def print_comparison(comparison: Comparison, stream: TextIO | None) -> None:
    """Print a table a mode and workload, how far virtual time is from live, and what a reader has to know."""
    from rich.console import Console

    if stream is None:  # closed by whoever started us
        return
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        console = Console(file=stream, highlight=False, width=_PIPE_WIDTH)
    for mode, workload, rows in comparison.blocks():
        table = _policies(console, rows, comparison.first)
        _print(console, f"{workload}, {'live' if mode == 'live' else 'virtual time'}", table)
    if comparison.distances:
        _print(console, "Virtual time against live, medians", _distances(console, comparison.distances))
        far = sum(distance.is_far for distance in comparison.distances)
        _line(
            console,
            f"{far} of {len(comparison.distances)} figures are beyond {CLOSE_PERCENT:g} % of the live one (marked !).",
        )
    for note in comparison.notes():
        _line(console, note)


def _print(console: Console, title: str, table: Table) -> None:
    _line(console, title, style="bold")
    console.print(table)
    console.print()


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(text, markup=False, style=style or None)


def _new_table(console: Console) -> Table:
    from rich import box
    from rich.table import Table

    return Table(
        box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False, show_edge=False, header_style="bold"
    )


def _policies(console: Console, rows: Sequence[Row], first: str) -> Table:
    """A column a policy, a row a figure. p goes below the figure where a line is too short for both."""
    cells = [_cells(name, rows, first) for name in shown_metrics(rows)]
    one_line = [[title, *(" ".join(filter(None, parts)) for parts in texts)] for title, texts in cells]
    headers = ["", *(row.name for row in rows)]
    needed = sum(max(len(line[index]) for line in [headers, *one_line]) + 2 for index in range(len(headers)))
    gap = " " if needed <= console.width else "\n"
    table = _new_table(console)
    from rich.text import Text

    for index, header in enumerate(headers):
        table.add_column(Text(header), justify="right" if index else "left", overflow="fold")
    for title, texts in cells:
        table.add_row(Text(title), *(Text(gap.join(filter(None, parts))) for parts in texts))
    return table


def shown_metrics(rows: Sequence[Row]) -> list[str]:
    """Names of the figures that a table has: those that are tested, and the length of a job if it is one."""
    job = ["job_s"] if any(row.figures["job_s"].summary.n for row in rows) else []
    return [TESTED[0], *job, *TESTED[1:]]


def _cells(name: str, rows: Sequence[Row], first: str) -> tuple[str, list[tuple[str, str]]]:
    """Title of one figure; for each policy the figure, and the outcome of its test."""
    metric = COMPARED[name]
    scale = row_scale(metric, [row.figures[name].summary.median for row in rows])
    reference = next((row.figures[name] for row in rows if row.name == first), None)
    texts = []
    for row in rows:
        figure = row.figures[name]
        test = "" if figure.p is None else f"{p_text(figure.p)} {mark(figure, reference, metric)}".rstrip()
        texts.append((figure_text(figure, metric, scale), f"({test})" if test else ""))
    return row_title(metric, scale), texts


def _distances(console: Console, distances: Sequence[Distance]) -> Table:
    from rich.text import Text

    table = _new_table(console)
    for index, header in enumerate(("workload", "policy", "figure", "live", "virtual", "apart", "")):
        table.add_column(header, justify="right" if 3 <= index <= 5 else "left")
    for one in distances:
        table.add_row(*(Text(text) for text in distance_texts(one)))
    return table


def distance_texts(distance: Distance) -> tuple[str, ...]:
    """Workload, policy, figure with its unit, live, virtual, percent, and ``!`` when it is far."""
    metric = COMPARED[distance.metric]
    scale = row_scale(metric, [distance.live, distance.virtual])
    values = ("-" if value is None else number(value / scale[1]) for value in (distance.live, distance.virtual))
    percent = "-" if distance.percent is None else f"{distance.percent:+.1f} %"
    return (
        distance.workload,
        distance.policy,
        row_title(metric, scale),
        *values,
        percent,
        "!" if distance.is_far else "",
    )
