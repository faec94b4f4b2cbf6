"""What a folder of recordings says of the real guests themselves: their passes by phase, and what stayed behind."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import UsageError
from common.geometry import PAGE_BYTES, PAGEBLOCK_ORDER, TOP_ORDER
from lab.trace.snapshot import Snapshot

__all__ = ["Left", "Run", "Work", "left_in", "left_of", "read_run", "total"]

_MIB = float(1 << 20)
_LIMIT_BYTES = 1 << 26  # of a table
_PHASE_ENDS = re.compile(r"(\w+)\.(begin|end)")


@dataclass(frozen=True)
class Work:
    """What was reported in some time."""

    passes: int
    reports: int
    blocks: int
    mib: float

    def __add__(self, other: Work) -> Work:
        return Work(
            self.passes + other.passes, self.reports + other.reports, self.blocks + other.blocks, self.mib + other.mib
        )


@dataclass(frozen=True)
class Left:
    """Memory that is free in a guest, MiB.

    Attributes:
        held: that the host holds. small: in blocks below order 9, whoever holds it.
    """

    held: float
    small: float


@dataclass(frozen=True)
class Run:
    """One recorded guest.

    Attributes:
        phases: by name, in their order; passes between the marks NAME.begin and NAME.end.
        whole: all passes that reported.
        left: by the label of a snapshot.
        first_report_s: by phase, from when all was freed to the first report, where there was one.
        partial: passes between the two frees of that phase: s after the first, blocks, MiB.
    """

    phases: dict[str, Work]
    whole: Work
    left: dict[str, Left]
    first_report_s: dict[str, float]
    partial: tuple[tuple[float, int, float], ...]


def read_run(folder: Path) -> Run:
    """A folder with cycles.csv, marks.csv, snapshots.csv and episodes.csv.

    Raises:
        UsageError: one of them is missing or is another table.
    """
    cycles = [
        (float(row["t_guest_begin"]), Work(1, int(row["reports"]), int(row["entries"]), int(row["bytes"]) / _MIB))
        for row in _rows(folder / "cycles.csv", "t_guest_begin", "reports", "entries", "bytes")
        if int(row["reports"])
    ]
    marks = [(float(row["t_guest"]), row["text"]) for row in _rows(folder / "marks.csv", "t_guest", "text")]
    phases = {
        name: total(work for when_s, work in cycles if begin_s <= when_s < end_s)
        for name, begin_s, end_s in _phases(marks)
    }
    first_s = {
        row["phase"]: float(row["t_first_report_s"])
        for row in _rows(folder / "episodes.csv", "phase", "mark", "t_first_report_s")
        if row["t_first_report_s"] and row["mark"].startswith("hog.freed ")
    }
    freed_s, again_s = _between(marks, "hog.freed_partial", "hog.freeing ")
    partial = tuple((when_s - freed_s, work.blocks, work.mib) for when_s, work in cycles if freed_s <= when_s < again_s)
    return Run(phases, total(work for _, work in cycles), _left(folder / "snapshots.csv"), first_s, partial)


def left_in(end: Snapshot) -> Left:
    """What a snapshot says that knows what the host holds."""
    return left_of(end.order, int(end.host_allocated_pages.sum()))


def left_of(order: npt.NDArray[Any], held_pages: int) -> Left:
    """Of free blocks of those orders, of whose pages the host holds so many."""
    small = int((np.int64(1) << order[order < PAGEBLOCK_ORDER].astype(np.int64)).sum())
    return Left(held_pages * PAGE_BYTES / _MIB, small * PAGE_BYTES / _MIB)


def total(works: Iterable[Work]) -> Work:
    """All of it together."""
    return sum(works, Work(0, 0, 0, 0.0))


def _phases(marks: Iterable[tuple[float, str]]) -> Iterator[tuple[str, float, float]]:
    begun: dict[str, float] = {}
    for when_s, text in marks:
        told = _PHASE_ENDS.fullmatch(text)
        if told is not None and told[2] == "begin":
            begun[told[1]] = when_s
        elif told is not None and told[1] in begun:
            yield told[1], begun[told[1]], when_s


def _between(marks: Iterable[tuple[float, str]], first: str, then: str) -> tuple[float, float]:
    """When ``first`` is said, and when ``then`` begins a mark behind it; an empty stretch where one is missing."""
    begin_s = None
    for when_s, text in marks:
        if begin_s is None and text == first:
            begin_s = when_s
        elif begin_s is not None and text.startswith(then):
            return begin_s, when_s
    return 0.0, 0.0


def _left(path: Path) -> dict[str, Left]:
    free = [f"free_o{order}" for order in range(TOP_ORDER + 1)]
    found = {}
    for row in _rows(path, "label", "free_and_host_allocated_MiB", *free):
        small = sum(int(row[name]) << order for order, name in enumerate(free[:PAGEBLOCK_ORDER]))
        found[row["label"]] = Left(float(row["free_and_host_allocated_MiB"]), small * PAGE_BYTES / _MIB)
    return found


def _rows(path: Path, *columns: str) -> list[dict[str, str]]:
    """The rows of a table.

    Raises:
        UsageError: it cannot be read, or lacks a column.
    """
    try:
        if os.path.getsize(path) > _LIMIT_BYTES:
            raise UsageError(f"{path}: is above {_LIMIT_BYTES >> 20} MiB; expected a table of a recorded run")
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: {error}; expected a table of a recorded run") from error
    missing = [name for name in columns if rows and rows[0].get(name) is None]
    if missing:
        raise UsageError(f"{path}: has no column {', '.join(missing)}; expected a table of a recorded run")
    return rows
