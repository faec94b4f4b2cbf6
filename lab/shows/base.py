"""What a show is: a question, runs or measurements that answer it, and how the answer is presented."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lab.experiment.metrics import RunResult
from lab.experiment.spec import RunSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Context", "Presentation", "Show", "Table", "by_name", "ratio_text", "summary", "value_text"]


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """As a Markdown table with its title above and its note below."""
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else [])]) + "\n"


@dataclass(frozen=True)
class Presentation:
    """The answer: sentences with figures in them, tables, one picture, and the figures for machines."""

    finding: tuple[str, ...]
    tables: tuple[Table, ...]
    figure: Figure
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What a show may use.

    Attributes:
        run: runs specifications and gives their results in the same order; says how far it is.
        say: one line of progress, for measurements that are no runs.
        rounds: how often each case is measured, interleaved.
    """

    run: Callable[[Sequence[RunSpec]], list[RunResult]]
    say: Callable[[str], None]
    rounds: int


class Show(Protocol):
    """One question. ``live``: its runs are real processes, one after the other."""

    name: str
    title: str
    question: str
    live: bool
    rounds: int

    def answer(self, context: Context) -> Presentation:
        """Measure, and say what came of it."""


def summary(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Median and half the distance between the quartiles of what is there; None when nothing is."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    low, middle, high = np.percentile(present, [25, 50, 75])
    return float(middle), float(high - low) / 2


def value_text(values: Sequence[float | None], scale: float = 1.0, digits: int = 2) -> str:
    """Median ± spread of ``values`` times ``scale``, or a dash."""
    found = summary(values)
    if found is None:
        return "-"
    return f"{found[0] * scale:.{digits}f} ± {found[1] * scale:.{digits}f}"


def ratio_text(ratios: Sequence[float | None]) -> str:
    """A ratio to three digits with its spread."""
    return value_text(ratios, 1.0, 3)


def by_name(results: Sequence[RunResult], metric: str) -> dict[str, list[float | None]]:
    """Values of one metric by the name of the run's specification, in the order of the results."""
    values: dict[str, list[float | None]] = {}
    for result in results:
        values.setdefault(result.spec.name, []).append(result.metrics[metric])
    return values
