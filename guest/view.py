"""What one guest shows of itself while it runs: a live table on a terminal, a plain line a second in a pipe."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.geometry import PAGE_BYTES
from common.units import format_size
from guest.machine import Machine

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["open_view"]

_PLAIN_PERIOD_S = 1.0


@dataclass(frozen=True)
class _Look:
    """What there is to see at one moment: headings and values, in order."""

    title: str
    values: dict[str, str]

    def line(self) -> str:
        """For a pipe."""
        return f"{self.title}  " + "  ".join(f"{name} {value}" for name, value in self.values.items())

    def table(self) -> Table:
        """For a terminal, of 80 columns or more."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        for name in self.values:
            table.add_column(name, justify="right", no_wrap=True)
        table.add_row(*self.values.values())
        return table


class _Watch:
    """Looks at a machine and turns its counters into rates."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._started = self._before = time.monotonic()
        self._reports = self._refaults = 0

    def look(self) -> _Look:
        """The machine now; rates since the look before."""
        machine = self._machine
        statistics, reporter, link, resident = machine.sample()
        now = time.monotonic()
        reports = 0 if reporter is None else reporter.batches
        elapsed_s = max(now - self._before, 1e-3)
        report_rate = (reports - self._reports) / elapsed_s
        refault_rate = (statistics.refaults - self._refaults) / elapsed_s
        self._before, self._reports, self._refaults = now, reports, statistics.refaults
        host = "host here" if machine.link.connected else "waiting for a host"
        return _Look(
            title=f"{now - self._started:6.1f} s  guest {machine.name}  {host}  {link.withdrawn} withdrawn",
            values={
                "allocated": format_size(statistics.allocated_pages * PAGE_BYTES),
                "free": format_size((statistics.free_pages + statistics.pcp_pages) * PAGE_BYTES),
                "reported": format_size(statistics.reported_pages * PAGE_BYTES),
                "resident": format_size(resident),
                "reports/s": f"{report_rate:.0f}",
                "refaults/s": f"{refault_rate:.0f}",
            },
        )


@contextlib.contextmanager
def open_view(machine: Machine, *, quiet: bool, period_s: float) -> Iterator[None]:
    """Show ``machine`` on standard error while the block runs; nothing when ``quiet``."""
    if quiet or sys.stderr is None:  # None: closed by whoever started us
        yield
        return
    done = threading.Event()
    live = sys.stderr.isatty()
    thread = threading.Thread(
        target=_show_table if live else _show_lines,
        args=(_Watch(machine), done, period_s if live else _PLAIN_PERIOD_S),
        name="view",
        daemon=True,
    )
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _show_lines(watch: _Watch, done: threading.Event, period_s: float) -> None:
    while not done.wait(period_s):
        sys.stderr.write(f"{watch.look().line()}\n")
        sys.stderr.flush()


def _show_table(watch: _Watch, done: threading.Event, period_s: float) -> None:
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), auto_refresh=False) as screen:
        while not done.wait(period_s):
            screen.update(watch.look().table(), refresh=True)
