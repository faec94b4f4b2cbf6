"""Tables of a report: as cells that Markdown and the page share, and as CSV with every figure of every run."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from lab.experiment.comparison import CLOSE_PERCENT, COMPARED, Comparison, Row, Sample
from lab.experiment.metrics import METRICS
from lab.experiment.spec import RunSpec
from lab.experiment.table import distance_texts, figure_text, mark, p_text, row_scale, row_title, shown_metrics

__all__ = ["TableData", "comparison_tables", "markdown", "runs_csv", "summary_csv"]

_MOST_COLUMNS = 6  # policies side by side; more of them stand below each other, with fewer figures
_FEW = ("throughput_vs_off", "page_ops_per_s", "gib_min", "t90_s", "refaults", "reports", "hold_p99_ns", "alloc_p99_ns")


@dataclass(frozen=True)
class TableData:
    """A table as text. ``marks``: for each cell ``+``, ``-``, ``~``, ``!`` or nothing, as on the terminal.

    Attributes:
        words: how many columns, from the first on, hold words; they stand to the left, figures to the right.
    """

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marks: tuple[tuple[str, ...], ...]
    words: int = 1


def comparison_tables(comparison: Comparison) -> list[TableData]:
    """A table a mode and workload, then how far virtual time is from live if both were run."""
    tables = []
    for mode, workload, rows in comparison.blocks():
        title = f"{workload}, {'live' if mode == 'live' else 'virtual time'}"
        if len(rows) <= _MOST_COLUMNS:
            tables.append(_side_by_side(title, rows, comparison.first))
        else:
            tables.append(_below_each_other(title, rows))
    if comparison.distances:
        texts = tuple(distance_texts(one)[:-1] for one in comparison.distances)
        marks = tuple(("",) * 5 + (distance_texts(one)[-1],) for one in comparison.distances)
        headers = ("workload", "policy", "figure", "live", "virtual", "apart")
        title = f"Virtual time against live (! beyond {CLOSE_PERCENT:g} %)"
        tables.append(TableData(title, headers, texts, marks, words=3))
    return tables


def _side_by_side(title: str, rows: Sequence[Row], first: str) -> TableData:
    """A column a policy."""
    reference = next((row for row in rows if row.name == first), None)
    texts, marks = [], []
    for name in shown_metrics(rows):
        metric = COMPARED[name]
        scale = row_scale(metric, [row.figures[name].summary.median for row in rows])
        line, signs = [row_title(metric, scale)], [""]
        for row in rows:
            figure = row.figures[name]
            signs.append(mark(figure, reference.figures[name] if reference else None, metric))
            test = "" if figure.p is None else f" ({p_text(figure.p)})"
            line.append(f"{figure_text(figure, metric, scale)}{test}")
        texts.append(tuple(line))
        marks.append(tuple(signs))
    return TableData(title, ("", *(row.name for row in rows)), tuple(texts), tuple(marks))


def _below_each_other(title: str, rows: Sequence[Row]) -> TableData:
    """A row a configuration, without tests."""
    job = ["job_s"] if any(row.figures["job_s"].summary.n for row in rows) else []
    shown = [COMPARED[name] for name in (*job, *_FEW) if any(row.figures[name].summary.n for row in rows)]
    scales = [row_scale(metric, [row.figures[metric.name].summary.median for row in rows]) for metric in shown]
    headers = ("settings", *(row_title(metric, scale) for metric, scale in zip(shown, scales, strict=True)))
    texts = tuple(
        (
            row.name,
            *(
                figure_text(row.figures[metric.name], metric, scale)
                for metric, scale in zip(shown, scales, strict=True)
            ),
        )
        for row in rows
    )
    return TableData(title, headers, texts, tuple(("",) * len(headers) for _ in rows))


def markdown(title: str, findings: Sequence[str], tables: Sequence[TableData], notes: Sequence[str]) -> str:
    """All tables as one Markdown document."""
    parts = [f"# {_escaped(title)}", "", *(f"- {_escaped(text)}" for text in findings)]
    for table in tables:
        parts += ["", f"## {_escaped(table.title)}", ""]
        parts.append(_line(table.headers))
        rules = ["---" if index < table.words else "---:" for index in range(len(table.headers))]
        parts.append(f"|{'|'.join(rules)}|")
        for texts, marks in zip(table.rows, table.marks, strict=True):
            parts.append(_line([f"{text} {sign}".rstrip() for text, sign in zip(texts, marks, strict=True)]))
    return "\n".join([*parts, "", *(f"- {_escaped(note)}" for note in notes), ""])


def summary_csv(comparison: Comparison) -> str:
    """One line a mode, workload, policy and figure, in the figure's own unit; values with semicolons between."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["mode", "workload", "policy", "figure", "unit", "better", "median", "spread", "n", "p", "values"])
    for row in comparison.rows:
        for name, figure in row.figures.items():
            metric, summary = COMPARED[name], figure.summary
            values = ";".join(_plain(value) for value in summary.values)
            writer.writerow([
                row.mode, row.workload, row.name, name, metric.unit, metric.better,
                _plain(summary.median), _plain(summary.spread), summary.n, _plain(figure.p), values,
            ])  # fmt: skip
    return text.getvalue()


def runs_csv(samples: Sequence[Sample]) -> str:
    """One line a run: its name and settings, then every figure in its own unit; empty where the run cannot tell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    settings = sorted(RunSpec().as_dict())
    writer.writerow(["name", "repeat", "key", *settings, *METRICS])
    for sample in samples:
        spec = sample.result.spec.as_dict()
        figures = (_plain(sample.result.metrics.get(name)) for name in METRICS)
        values = ("" if spec[name] is None else spec[name] for name in settings)
        writer.writerow([sample.name, sample.repeat, sample.result.spec.key(), *values, *figures])
    return text.getvalue()


def _plain(value: float | None) -> str:
    return "" if value is None else repr(float(value)).removesuffix(".0")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_escaped(cell) for cell in cells)} |"


def _escaped(text: str) -> str:
    """``text`` where Markdown would take it for markup, a table's border or HTML."""
    for character in "\\`*_[]<>|":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
