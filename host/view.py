"""What a host shows while it runs, on standard error: a live table on a terminal, plain lines in a pipe, or nothing."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from common.units import format_size
from host.accounting import GuestStatistics, HostStatistics

if TYPE_CHECKING:  # rich takes 0.1 s to import, which a piped host need not pay
    from rich.live import Live
    from rich.table import Table

__all__ = ["LineView", "SilentView", "TableView", "ViewOnStream", "make_view"]

_LINE_INTERVAL_S = 1.0
_TABLE_INTERVAL_S = 0.5


class ViewOnStream(Protocol):
    """A view that is entered and left."""

    interval_s: float | None
    always: bool

    def show(self, statistics: HostStatistics) -> None:
        """Draw or print."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *details: object) -> None: ...


@dataclass
class _Rates:
    """Reports per second by guest since the last look."""

    reports: dict[str, int]
    looked_s: float

    def update(self, guests: tuple[GuestStatistics, ...]) -> dict[str, float]:
        """Rates up to now, by name."""
        now = time.monotonic()
        elapsed_s = max(now - self.looked_s, 1e-3)
        rates = {
            guest.name: max(0, guest.counters.reports - self.reports.get(guest.name, 0)) / elapsed_s for guest in guests
        }
        self.reports = {guest.name: guest.counters.reports for guest in guests}
        self.looked_s = now
        return rates


class SilentView:
    """Shows nothing."""

    interval_s: float | None = None
    always = False

    def show(self, statistics: HostStatistics) -> None:
        """Nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        return


class LineView:
    """At most one line a second, and only when something happened."""

    interval_s: float | None = _LINE_INTERVAL_S
    always = False

    def __init__(self, lab: str, stream: TextIO) -> None:
        self._lab = lab
        self._stream = stream
        self._last = ""
        self._rates = _Rates({}, time.monotonic())

    def show(self, statistics: HostStatistics) -> None:
        """One line: sums, then each live guest."""
        rates = self._rates.update(statistics.guests)
        counters = statistics.counters
        live = [guest for guest in statistics.guests if guest.state == "live"]
        freed = f"asked {format_size(counters.asked_bytes)}, freed {format_size(counters.freed_bytes)}"
        parts = [f"host {self._lab}: {len(live)} guests, {counters.reports} reports, {freed}"]
        parts += [f"failures {counters.failures}"] if counters.failures else []
        parts += [f"rejected {counters.rejected}"] if counters.rejected else []
        parts += [f"held off {counters.held_off}"] if counters.held_off else []
        parts += [
            f"{guest.name}: resident {format_size(guest.final_resident_bytes)}, {rates[guest.name]:.1f} reports/s"
            for guest in live
        ]
        line = "; ".join(parts) + "\n"
        if line != self._last:
            self._stream.write(line)
            self._stream.flush()
        self._last = line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        return


class TableView:
    """A table that is redrawn in place. Resident memory changes without a word from the guest, so it looks always."""

    interval_s: float | None = _TABLE_INTERVAL_S
    always = True

    def __init__(self, lab: str) -> None:
        self._lab = lab
        self._live: Live | None = None
        self._rates = _Rates({}, time.monotonic())

    def show(self, statistics: HostStatistics) -> None:
        """Redraw."""
        if self._live is not None:
            self._live.update(self._table(statistics), refresh=True)

    def _table(self, statistics: HostStatistics) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        rates = self._rates.update(statistics.guests)
        title = f"host {self._lab}, freed bytes proven by {statistics.proof}"
        # Narrow enough for a terminal of 80 columns; what was asked for is in the JSON.
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        table.add_column("guest", overflow="fold", no_wrap=False)
        for heading in ("memory", "resident", "freed", "reports", "per s", "refused", "failed"):
            table.add_column(heading, justify="right", no_wrap=True)
        for guest in statistics.guests[-32:]:  # a screenful; the JSON has all
            counters = guest.counters
            table.add_row(
                _label(guest),
                format_size(guest.memory_bytes),
                format_size(guest.final_resident_bytes) if guest.state == "live" else "gone",
                format_size(counters.freed_bytes),
                str(counters.reports),
                f"{rates[guest.name]:.1f}",
                str(counters.rejected + counters.malformed),
                str(counters.failures),
            )
        return table

    def __enter__(self) -> Self:
        from rich.console import Console
        from rich.live import Live

        # No refresh thread: the event loop says when.
        self._live = Live(console=Console(stderr=True), auto_refresh=False)
        self._live.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self._live = None


def _label(guest: GuestStatistics) -> str:
    """Its name, and what is to be said of it."""
    if guest.state != "live":
        return f"{guest.name} ({guest.state})"
    return f"{guest.name} (held off {guest.counters.held_off} times)" if guest.counters.held_off else guest.name


def make_view(lab: str, *, quiet: bool) -> ViewOnStream:
    """The view that fits standard error."""
    if quiet or sys.stderr is None:  # None: closed by whoever started us
        return SilentView()
    if sys.stderr.isatty():
        return TableView(lab)
    return LineView(lab, sys.stderr)
