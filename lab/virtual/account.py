"""The books of a virtual run: residence and its integral, the series, episodes, holds, allocation latencies."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import numpy.typing as npt

from common.geometry import PAGE_BYTES
from common.statistics import new_histogram, record

__all__ = ["Books", "Episodes", "Latencies", "Series"]

_FIRST_INTERVAL_NS = 1e6
_MOST_POINTS = 768  # thinned to half of it when reached: 384 to 768 points, about 500


class Series:
    """Samples on a steady grid whose interval doubles as the run goes on."""

    def __init__(self, columns: int) -> None:
        self.due = 0.0  # ns: the moment of the next sample
        self._interval = _FIRST_INTERVAL_NS
        self._times: list[float] = []
        self._rows: list[tuple[float, ...]] = []
        self._columns = columns

    def take(self, until: float, row: tuple[float, ...]) -> None:
        """Everything since the last sample was as ``row`` says: write what is due up to ``until``, inclusive."""
        while self.due <= until:
            self._times.append(self.due)
            self._rows.append(row)
            if len(self._times) == _MOST_POINTS:
                del self._times[1::2], self._rows[1::2]
                self._interval *= 2
            self.due = self._times[-1] + self._interval

    def columns(self) -> tuple[npt.NDArray[np.float64], ...]:
        """Times in ns, then each column."""
        rows = np.array(self._rows, dtype=np.float64).reshape(len(self._rows), self._columns)
        return np.array(self._times, dtype=np.float64), *rows.T


class Episodes:
    """How soon free memory goes back once all vCPUs are idle or done.

    A rest in which nothing was allocated or freed since the last one goes on with it (as ``derive.joined``).
    """

    SHARES = (0.5, 0.9, 0.99)

    def __init__(self) -> None:
        self.count = 0
        self._times: dict[float, list[float]] = {share: [] for share in self.SHARES}
        self._since = 0.0
        self._pages = 0
        self._returned = 0
        self._done = (-1, -1)
        self._open: list[float] = []
        self._resting = False

    def begin(self, now: float, pages: int, returned: int, done: tuple[int, int]) -> None:
        """All came to rest, with ``pages`` free and resident, and ``returned`` given back so far. None: no episode.

        Args:
            done: page operations so far, and pages that are allocated; the same as before: nothing was freed.
        """
        self._resting = True
        if done == self._done:
            self.progress(now, returned)
            return
        self._close()
        self._done = done
        if pages > 0:
            self.count += 1
            self._since, self._pages, self._returned = now, pages, returned
            self._open = list(self.SHARES)

    def progress(self, now: float, returned: int) -> None:
        """``returned`` pages have been given back by now."""
        while self._resting and self._open and returned - self._returned >= self._open[0] * self._pages:
            self._times[self._open.pop(0)].append(now - self._since)

    def end(self) -> None:
        """Somebody works again."""
        self._resting = False

    def finish(self, now: float, least_ns: float = 0.0) -> None:
        """All is over. An episode that this cuts off before ``least_ns`` counts for nothing."""
        if now - self._since < least_ns:
            self._open = []
        self._close()

    def _close(self) -> None:
        """What was not reached is infinitely far."""
        for share in self._open:
            self._times[share].append(math.inf)
        self._open = []

    def seconds(self, share: float) -> float | None:
        """Median over the episodes; None when most did not reach ``share`` (as ``derive.times_to_return``)."""
        middle = median(self._times[share] or [math.inf])
        return None if math.isinf(middle) else middle / 1e9


class Latencies:
    """Allocation latencies, counted by value in whole ns."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def add(self, value: float, count: int) -> None:
        """``count`` allocations took ``value`` ns each; a negative count takes them back."""
        if count:
            key = round(value)
            self._counts[key] = self._counts.get(key, 0) + count

    def quantile(self, share: float) -> float | None:
        """The smallest latency that ``share`` of the allocations did not exceed; None without allocations."""
        values = sorted((value, count) for value, count in self._counts.items() if count > 0)
        wanted = share * sum(count for _, count in values)
        seen = 0
        for value, count in values:
            seen += count
            if seen >= wanted:
                return float(value)
        return None


@dataclass
class Books:
    """All that is counted besides the zone's own counters. Pages and ns.

    Args:
        look: allocated and reported pages, for the series.
    """

    look: Callable[[], tuple[int, int]]
    resident: int = 0
    peak: int = 0
    resident_ns: float = 0.0  # pages times ns
    now: float = 0.0
    series: Series = field(default_factory=lambda: Series(3))
    episodes: Episodes = field(default_factory=Episodes)
    latencies: Latencies = field(default_factory=Latencies)
    holds: npt.NDArray[np.int64] = field(default_factory=new_histogram)
    reports: int = 0
    blocks: int = 0
    duplicates: int = 0
    runs: int = 0

    def pass_time(self, moment: float) -> None:
        """Nothing has changed from the last moment to this one."""
        self.resident_ns += self.resident * (moment - self.now)
        if self.series.due <= moment:
            self.sample(moment)
        self.now = moment

    def sample(self, moment: float) -> None:
        """Write what is due in the series."""
        allocated, reported = self.look()
        self.series.take(moment, (self.resident, allocated, reported))

    def set_resident(self, pages: int) -> None:
        """``pages`` are resident from now on."""
        self.resident = pages
        self.peak = max(self.peak, pages)

    def hold(self, duration_ns: float) -> None:
        """The zone lock was held for reporting."""
        record(self.holds, round(duration_ns))

    @staticmethod
    def gib_minutes(page_ns: float) -> float:
        """Pages times ns as GiB times minutes."""
        return page_ns * PAGE_BYTES / (1 << 30) / 60e9
