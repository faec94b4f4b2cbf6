"""What one guest shows of itself while it runs: a live line on a terminal, a plain line a second in a pipe."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from common.geometry import PAGE_BYTES
from common.units import format_size
from guest.machine import Machine

__all__ = ["open_view"]

_PLAIN_PERIOD_S = 1.0


@contextlib.contextmanager
def open_view(machine: Machine, *, quiet: bool, period_s: float) -> Iterator[None]:
    """Show ``machine`` on standard error while the block runs; nothing when ``quiet`` or that is closed."""
    if quiet or sys.stderr is None:
        yield
        return
    done = threading.Event()
    live = sys.stderr.isatty()
    thread = threading.Thread(
        target=_show,
        args=(machine, done, period_s if live else _PLAIN_PERIOD_S),
        kwargs={"live": live},
        name="view",
        daemon=True,
    )
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _show(machine: Machine, done: threading.Event, period_s: float, *, live: bool) -> None:
    started = before = time.monotonic()
    reports_before = refaults_before = 0
    while not done.wait(period_s):
        statistics, reporter, _link, resident = machine.sample()
        now = time.monotonic()
        reports = 0 if reporter is None else reporter.batches
        rate = (reports - reports_before) / (now - before)
        refault_rate = (statistics.refaults - refaults_before) / (now - before)
        before, reports_before, refaults_before = now, reports, statistics.refaults
        host = "host here" if machine.link.connected else "waiting for a host"
        line = (
            f"{now - started:6.1f} s  {machine.name}  "
            f"allocated {format_size(statistics.allocated_pages * PAGE_BYTES)}  "
            f"free {format_size((statistics.free_pages + statistics.pcp_pages) * PAGE_BYTES)}  "
            f"reported {format_size(statistics.reported_pages * PAGE_BYTES)}  "
            f"resident {format_size(resident)}  "
            f"{rate:.0f} reports/s  {refault_rate:.0f} refaults/s  {host}"
        )
        # A terminal gets one line that is written over; a pipe gets lines.
        sys.stderr.write(f"\r\x1b[K{line}" if live else f"{line}\n")
        sys.stderr.flush()
    if live:
        sys.stderr.write("\n")
