"""The advice as Markdown that reads well on a terminal too."""

from __future__ import annotations

from collections.abc import Sequence

from lab.advise.advise import Advice
from lab.advise.words import TITLE, Part, lead, sections
from lab.report.tables import TableData

__all__ = ["markdown"]


def markdown(advice: Advice, pictures: dict[str, Sequence[tuple[str, str]]] | None = None) -> str:
    """All of it.

    Args:
        pictures: of each section's title, name of the file and what it shows; none on a terminal.
    """
    parts = [f"# {TITLE}", lead(advice)]
    for section in sections(advice):
        parts += [f"## {section.title}", *(_text(part) for part in section.parts)]
        parts += [f"![{shown}]({name})" for name, shown in (pictures or {}).get(section.title, ())]
    return "\n\n".join(parts) + "\n"


def _text(part: Part) -> str:
    if isinstance(part, TableData):
        return _table(part)
    return part if isinstance(part, str) else "\n".join(f"* {line}" for line in part)


def _table(table: TableData) -> str:
    """A table with its columns in line."""
    lines = [table.headers, *table.rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(table.headers))]
    rule = ["-" * width if not at else "-" * (width - 1) + ":" for at, width in enumerate(widths)]
    return "\n".join(_line(cells, widths) for cells in (table.headers, rule, *table.rows))


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """The names to the left, the figures to the right."""
    first, *others = (
        cell.ljust(width) if not at else cell.rjust(width)
        for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return f"| {' | '.join([first, *others])} |"
