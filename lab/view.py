"""What a person sees while the demo runs: a live table on a terminal, a line a second in a pipe, or nothing.

Everything goes to standard error; standard output belongs to the result.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TextIO

from lab.samples import Reading

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

__all__ = ["GuestRow", "LiveView", "PlainView", "RateMeter", "SilentView", "View", "make_view", "mib"]

_MIB = 1 << 20
_RATE_WINDOW_S = 1.0
_LINE_INTERVAL_S = 1.0
_BAR_WIDTH = 30


@dataclass(frozen=True)
class GuestRow:
    """One guest at one moment. ``reading`` is None until it is there; rates are of the last second."""

    name: str
    memory_bytes: int
    reading: Reading | None
    blocks_per_s: float
    refaults_per_s: float
    ended: bool


class View(Protocol):
    """Where the talk of a run goes."""

    def say(self, text: str) -> None:
        """One line that stays."""

    def show(self, time_s: float, rows: Sequence[GuestRow]) -> None:
        """The state of all guests ``time_s`` after the start."""

    def close(self) -> None:
        """Give the terminal back. May be called twice."""


class RateMeter:
    """Turns counters that only grow into rates over the last second."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, tuple[int, ...]]] = deque()

    def rates(self, time_s: float, *counters: int) -> tuple[float, ...]:
        """Rate of each counter; 0 until two different times were seen."""
        if not self._seen or time_s > self._seen[-1][0]:
            self._seen.append((time_s, counters))
        while len(self._seen) > 2 and self._seen[1][0] <= time_s - _RATE_WINDOW_S:
            self._seen.popleft()
        first_s, first = self._seen[0]
        last_s, last = self._seen[-1]
        if last_s <= first_s:
            return tuple(0.0 for _ in counters)
        return tuple((new - old) / (last_s - first_s) for old, new in zip(first, last, strict=True))


class SilentView:
    """--quiet."""

    def say(self, text: str) -> None:
        """Nothing."""

    def show(self, time_s: float, rows: Sequence[GuestRow]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class PlainView:
    """A line a guest every second, without decoration: for pipes and logs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._next_s = 0.0

    def say(self, text: str) -> None:
        """See ``View``."""
        print(text, file=self._stream, flush=True)

    def show(self, time_s: float, rows: Sequence[GuestRow]) -> None:
        """See ``View``; most calls print nothing."""
        if time_s < self._next_s:
            return
        self._next_s = time_s + _LINE_INTERVAL_S
        for row in rows:
            self.say(f"{time_s:5.1f} s  {row.name}: {_describe(row)}")
        if len(rows) > 1:
            resident, returned = _totals(rows)
            self.say(f"{time_s:5.1f} s  all: resident {mib(resident)}, given back so far {mib(returned)}")

    def close(self) -> None:
        """Nothing to give back."""


class LiveView:
    """A table that is redrawn in place. Vanishes at the end: the summary and the picture take its place."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._console = console
        self._live: Live | None = Live(console=console, auto_refresh=False, transient=True)
        self._live.start()

    def say(self, text: str) -> None:
        """See ``View``; above the table."""
        self._console.print(text, markup=False, highlight=False)

    def show(self, time_s: float, rows: Sequence[GuestRow]) -> None:
        """See ``View``."""
        if self._live is not None:
            self._live.update(_table(time_s, rows), refresh=True)

    def close(self) -> None:
        """See ``View``."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def make_view(*, quiet: bool, stream: TextIO | None = None) -> View:
    """The view that fits ``stream`` (default standard error): live on a terminal, else plain."""
    stream = sys.stderr if stream is None else stream
    if quiet or stream is None:  # None: closed by whoever started us
        return SilentView()
    if not stream.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        return PlainView(stream)
    from rich.console import Console

    return LiveView(Console(file=stream))


def mib(n_bytes: float) -> str:
    """``n_bytes`` in MiB, with a decimal where it would otherwise say little."""
    value = n_bytes / _MIB
    return f"{value:.1f} MiB" if 0 < abs(value) < 9.95 else f"{value:.0f} MiB"


def _describe(row: GuestRow) -> str:
    seen = row.reading
    if seen is None:
        return "starting"
    text = (
        f"allocated {mib(seen.allocated_bytes)}, free {mib(seen.free_bytes)}, reported {mib(seen.reported_bytes)}, "
        f"resident {mib(seen.resident_bytes)}"
    )
    if row.ended:
        return f"{text}, ended"
    return f"{text}, {row.blocks_per_s:.0f} blocks reported/s, {row.refaults_per_s:.0f} refaults/s"


def _totals(rows: Sequence[GuestRow]) -> tuple[int, int]:
    """Resident bytes now and bytes given back so far, of all guests."""
    readings = [row.reading for row in rows if row.reading is not None]
    return sum(reading.resident_bytes for reading in readings), sum(reading.returned_bytes for reading in readings)


def _table(time_s: float, rows: Sequence[GuestRow]) -> Table:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    resident, returned = _totals(rows)
    table = Table(
        box=None,  # every character counts in a terminal of 80 columns
        pad_edge=False,
        title=f"free page reporting, {time_s:.1f} s (memory in MiB, rates a second)",
        caption=f"all guests: {mib(resident)} resident, {mib(returned)} given back to the host so far",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("guest", no_wrap=True)
    for heading in ("allocated", "free", "reported", "resident"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", min_width=4, max_width=_BAR_WIDTH)  # the one column that gives way in a narrow terminal
    table.add_column("blocks/s", justify="right", no_wrap=True)
    table.add_column("refaults/s", justify="right", no_wrap=True)
    for row in rows:
        seen = row.reading
        if seen is None:
            table.add_row(row.name, "", "", "", "starting")
            continue
        memory = (seen.allocated_bytes, seen.free_bytes, seen.reported_bytes, seen.resident_bytes)
        table.add_row(
            row.name,
            *(f"{n_bytes / _MIB:.0f}" for n_bytes in memory),
            ProgressBar(total=row.memory_bytes, completed=seen.resident_bytes),
            "ended" if row.ended else f"{row.blocks_per_s:.0f}",
            "" if row.ended else f"{row.refaults_per_s:.0f}",
        )
    return table
