"""What was seen of one guest over time: rows at a steady rate, thinned when a run is long."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

__all__ = ["GuestSeries", "Reading", "SeriesRecorder", "total_peak"]

_MAX_ROWS = 8192  # about seven minutes at 20 Hz before the first thinning; far more than a picture has columns


@dataclass(frozen=True)
class Reading:
    """One look at one guest. Bytes are guest memory; the last three only grow."""

    time_s: float  # since the lab started
    resident_bytes: int  # what the machine holds for it: blocks of the RAM object, or the resident map without one
    counted_bytes: int  # what its own counters say: first touches and refaults less what was given back
    allocated_bytes: int
    free_bytes: int
    reported_bytes: int
    in_flight_bytes: int
    returned_bytes: int
    refaults: int
    pulled_blocks: int  # taken off the free lists to be reported


@dataclass(frozen=True)
class GuestSeries:
    """Equally long arrays, a row a reading, times ascending; see ``Reading`` for the columns."""

    time_s: npt.NDArray[np.float64]
    resident_bytes: npt.NDArray[np.int64]
    allocated_bytes: npt.NDArray[np.int64]
    reported_bytes: npt.NDArray[np.int64]


_COLUMNS = tuple(field.name for field in fields(GuestSeries))


class SeriesRecorder:
    """Appends readings and keeps at most ``_MAX_ROWS``: when full, every second row goes and the rate halves.

    The reading with the highest residency is never dropped, so a peak survives thinning. One thread only.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[float, ...]] = []
        self._stride = 1
        self._skipped = 0
        self.latest: Reading | None = None
        self.peak: Reading | None = None

    def append(self, reading: Reading) -> bool:
        """Take one reading; True if it is the new peak of residency."""
        is_peak = self.peak is None or reading.resident_bytes > self.peak.resident_bytes
        if is_peak:
            self.peak = reading
        self.latest = reading
        self._skipped += 1
        if is_peak or self._skipped >= self._stride:
            self._skipped = 0
            self._rows.append(_row(reading))
            if len(self._rows) >= _MAX_ROWS:
                self._thin()
        return is_peak

    def series(self) -> GuestSeries:
        """All rows so far, and the latest reading as the last of them."""
        rows = list(self._rows)
        if self.latest is not None and rows[-1] != _row(self.latest):
            rows.append(_row(self.latest))
        columns = np.array(rows, dtype=np.float64).reshape(-1, len(_COLUMNS)).T
        return GuestSeries(columns[0], *(column.astype(np.int64) for column in columns[1:]))

    def _thin(self) -> None:
        peak = None if self.peak is None else _row(self.peak)
        self._rows = [row for index, row in enumerate(self._rows) if index % 2 == 0 or row == peak]
        self._stride *= 2


def _row(reading: Reading) -> tuple[float, ...]:
    return tuple(getattr(reading, column) for column in _COLUMNS)


def total_peak(series: list[GuestSeries]) -> int:
    """Highest sum of resident bytes over all guests at one time.

    Guests are read one after the other; between its readings a guest counts with its last one.
    """
    present = [one for one in series if len(one.time_s)]
    if not present:
        return 0
    times = np.unique(np.concatenate([one.time_s for one in present]))
    total = np.zeros(len(times), np.int64)
    for one in present:
        rows = np.searchsorted(one.time_s, times, side="right") - 1
        total += np.where(rows >= 0, one.resident_bytes[np.maximum(rows, 0)], 0)
    return int(total.max())
