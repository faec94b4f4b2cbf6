"""The limits as a table: on a terminal with colours, in a pipe as plain columns; and as one JSON object."""

from __future__ import annotations

import sys
from typing import Any

from lab.doctor.leftovers import Leftover
from lab.doctor.limit import Limit, Plan, Verdict

__all__ = ["as_json", "show"]

_COLOURS = {Verdict.OK: "green", Verdict.SHORT: "bold red", Verdict.UNKNOWN: "yellow"}
_HEADINGS = ("limit", "value", "needed", "verdict")


def show(limits: list[Limit]) -> None:
    """Print all limits to standard output, then the commands that mend what is short, then notes and advice."""
    if sys.stdout.isatty():
        _show_table(limits)
    else:
        _show_lines(limits)
    sys.stdout.write(_remarks(limits))


def as_json(plan: Plan, limits: list[Limit], leftovers: list[Leftover], removed: list[str]) -> dict[str, Any]:
    """Everything, as plain values."""
    return {
        "ok": all(limit.verdict is not Verdict.SHORT for limit in limits),
        "plan": {
            "guests": plan.guests,
            "memory_bytes": plan.memory_bytes,
            "capacity": plan.capacity,
            "backend": plan.backend,
        },
        "limits": [limit.as_dict() for limit in limits],
        "leftovers": [leftover.as_dict() for leftover in leftovers],
        "removed": removed,
    }


def _cells(limit: Limit) -> tuple[str, str, str, str]:
    return limit.name, limit.value, limit.needed, str(limit.verdict)


def _show_lines(limits: list[Limit]) -> None:
    rows = [_HEADINGS, *(_cells(limit) for limit in limits)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write(f"{line.rstrip()}\n")


def _show_table(limits: list[Limit]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in _HEADINGS:
        table.add_column(heading, overflow="fold")
    for limit in limits:
        *cells, _verdict = _cells(limit)
        table.add_row(*map(Text, cells), Text(str(limit.verdict), style=_COLOURS[limit.verdict]))
    Console().print(table)


def _remarks(limits: list[Limit]) -> str:
    """What mends what is short, then what else there is to say."""
    short = [limit for limit in limits if limit.verdict is Verdict.SHORT]
    lines = ["", *(f"mend   {limit.name}: {limit.fix}" for limit in short)]
    for limit in limits:
        remark = "; ".join(part for part in (limit.note, limit.fix if limit not in short else "") if part)
        if remark:
            lines.append(f"note   {limit.name}: {remark}")
    lines.append(f"{len(short)} of {len(limits)} limits are short" if short else f"all {len(limits)} limits suffice")
    return "\n".join(lines) + "\n"
