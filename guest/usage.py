"""The guest's own record of its memory over time: resident, allocated, reported. Cheap to take and bounded in size.

A stretch in which nothing changes takes two rows, so what is kept is the steps; a record that grows long all the same
is thinned. The moments at which a vCPU goes idle are marked: from there on is measured how fast memory is given back,
so the record is finer for a second behind each.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from common.geometry import N_ORDERS, PAGE_BYTES
from common.layout import (
    C_COUNT,
    C_FIRST_TOUCHES,
    C_REFAULTS,
    W_FREE_PAGES,
    W_HELD_PAGES,
    W_IN_FLIGHT_PAGES,
    W_INSTALLED_PAGES,
    W_ISOLATED_PAGES,
    W_N_CPUS,
    W_N_PAGES,
    W_REPORTED,
    W_RETURNED_PAGES,
)
from common.native import kernel
from guest.allocator.percpu import cpu_slot
from guest.allocator.view import ctl_of, open_zone

__all__ = ["COLUMNS", "UsageRecorder", "read_usage"]

COLUMNS = ("t_ns", "resident_bytes", "allocated_bytes", "reported_bytes")
_MAX_ROWS = 16384
_STEADY_S = 0.02
_FINE_S = 0.002
_FINE_FOR_NS = 1_000_000_000

_Row = tuple[int, int, int, int]


@kernel
def read_usage(address, pages):  # type: ignore[no-untyped-def]
    """Into ``pages`` (int64[3]): allocated, Reported, and resident pages by the zone's counters.

    No lock: each counter is right, together they may be a moment apart.
    """
    ctl = ctl_of(open_zone(address))
    not_allocated = ctl[W_FREE_PAGES] + ctl[W_ISOLATED_PAGES] + ctl[W_IN_FLIGHT_PAGES] + ctl[W_HELD_PAGES]
    resident = ctl[W_INSTALLED_PAGES] - ctl[W_RETURNED_PAGES]
    for cpu in range(ctl[W_N_CPUS]):
        slot = cpu_slot(cpu)
        not_allocated += ctl[slot + C_COUNT]
        resident += ctl[slot + C_FIRST_TOUCHES] + ctl[slot + C_REFAULTS]
    reported = np.int64(0)
    for order in range(N_ORDERS):
        reported += ctl[W_REPORTED + order] << order
    pages[0] = ctl[W_N_PAGES] - not_allocated
    pages[1] = reported
    pages[2] = resident


class UsageRecorder:
    """Rows of ``COLUMNS`` of one zone, times of CLOCK_MONOTONIC ascending. For any thread.

    Args:
        address: of the zone segment, mapped for as long as ``take`` is called.
        resident_bytes: asks the operating system; None takes what the zone's counters say (the model backend).
        max_rows: at most so many rows are kept.
    """

    def __init__(
        self, address: int, resident_bytes: Callable[[], int] | None = None, *, max_rows: int = _MAX_ROWS
    ) -> None:
        self.peak_bytes = 0
        self._address = address
        self._resident_bytes = resident_bytes
        self._max_rows = max_rows
        self._pages = np.zeros(3, dtype=np.int64)
        # Of a fixed size and touched at once: what fills up slowly would look like a leak for hours.
        self._rows = np.full((max_rows, len(COLUMNS)), -1, dtype=np.int64)
        self._marks = np.zeros(max_rows, dtype=np.bool_)  # rows that thinning leaves
        self._count = 0
        self._latest: _Row | None = None
        self._level = False  # the latest row equals the last one kept
        self._stride = 1
        self._skipped = 0
        self._fine_until_ns = 0
        self._lock = threading.Lock()

    @property
    def period_s(self) -> float:
        """When to take the next row: soon after a mark, less often otherwise."""
        return _FINE_S if time.monotonic_ns() < self._fine_until_ns else _STEADY_S

    def take(self, *, mark: bool = False) -> None:
        """Take a row now. A marked one is kept. Raises ``OSError`` of ``resident_bytes``."""
        with self._lock:
            read_usage(self._address, self._pages)
            allocated, reported, counted = (int(pages) * PAGE_BYTES for pages in self._pages)
            resident = counted if self._resident_bytes is None else self._resident_bytes()
            now_ns = time.monotonic_ns()
            if mark:
                self._fine_until_ns = now_ns + _FINE_FOR_NS
            self.peak_bytes = max(self.peak_bytes, resident)
            self._add((now_ns, resident, allocated, reported), mark=mark)

    def columns(self) -> dict[str, list[int]]:
        """By name of ``COLUMNS``, the latest row always the last."""
        with self._lock:
            rows = self._rows[: self._count].tolist()
            if self._latest is not None and rows[-1] != [*self._latest]:
                rows.append(self._latest)
        return {name: [row[column] for row in rows] for column, name in enumerate(COLUMNS)}

    def _add(self, row: _Row, *, mark: bool) -> None:
        previous, self._latest = self._latest, row
        same = self._count > 0 and tuple(self._rows[self._count - 1, 1:].tolist()) == row[1:]
        if same and not mark:
            self._level = True
            return
        if self._level and previous is not None:  # the end of a level stretch; else its step would become a slope
            self._keep(previous, mark=False)
        elif not mark and self._count:
            self._skipped += 1
            if self._skipped < self._stride:
                return
        self._level = False
        self._skipped = 0
        self._keep(row, mark=mark)

    def _keep(self, row: _Row, *, mark: bool) -> None:
        self._rows[self._count] = row
        self._marks[self._count] = mark
        self._count += 1
        if self._count == self._max_rows:
            self._thin()

    def _thin(self) -> None:
        """Every second row goes, marked ones last."""
        kept = np.flatnonzero((np.arange(self._count) % 2 == 0) | self._marks[: self._count])
        if kept.size > self._max_rows * 3 // 4:
            kept = kept[::2]
        self._count = kept.size
        self._rows[: kept.size] = self._rows[kept]
        self._marks[: kept.size] = self._marks[kept]
        self._stride *= 2
