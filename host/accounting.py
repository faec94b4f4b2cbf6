"""Counters of the host and of each guest, and the frozen snapshots that terminal, JSON and tests all read.

What a guest's words may grow is bounded: a histogram has a fixed number of bins, and no counter is keyed by anything
that a guest chooses.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from common.geometry import N_ORDERS

__all__ = ["Counters", "GuestStatistics", "Histogram", "HostStatistics", "Percentiles"]

# Log-linear bins, 16 a power of two: a percentile is at most 1/16 too high. The last bin ends beyond 2**40 ns (18 min).
_SUB_BITS = 4
_N_BINS = (40 - _SUB_BITS + 2) << _SUB_BITS


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of a histogram, in ns; p50 and p99 are upper edges of their bins, max is exact. Zeros when it is empty."""

    p50: int
    p99: int
    max: int


class Histogram:
    """Durations in ns. Plain Python on purpose: the host does without compiled code."""

    __slots__ = ("_bins", "_max")

    def __init__(self) -> None:
        self._bins = [0] * _N_BINS
        self._max = 0

    def record(self, value_ns: int) -> None:
        """Count one duration (not negative)."""
        shift = max(0, value_ns.bit_length() - _SUB_BITS - 1)
        self._bins[min((shift << _SUB_BITS) + (value_ns >> shift), _N_BINS - 1)] += 1
        self._max = max(self._max, value_ns)

    def add(self, other: Histogram) -> None:
        """Count everything that ``other`` has counted."""
        self._bins = [mine + its for mine, its in zip(self._bins, other._bins, strict=True)]
        self._max = max(self._max, other._max)

    def percentiles(self) -> Percentiles:
        """Snapshot."""
        return Percentiles(self._at(50), self._at(99), self._max)

    def _at(self, percent: int) -> int:
        wanted = -(-sum(self._bins) * percent // 100)  # rounded up: the p99 of 3 values is the third
        seen = 0
        for index, count in enumerate(self._bins):
            seen += count
            if count and seen >= wanted:
                shift = max(0, (index >> _SUB_BITS) - 1)
                upper_edge = ((index - (shift << _SUB_BITS) + 1) << shift) - 1
                return min(upper_edge, self._max)
        return 0


@dataclass(slots=True)
class Counters:
    """What is counted for each guest and, summed, for the host.

    ``reports`` counts every well-formed report; ``blocks``, ``asked_bytes`` and ``order_histogram`` (blocks by order)
    those that passed the checks and the gate. ``freed_bytes`` is proven, ``modelled_bytes`` its part that the model
    backend claims instead. In blocks: ``failures`` still held data after the discard or could not be discarded,
    ``empty_blocks`` had no data and were never discarded before, ``duplicates`` had no data because they had been
    discarded before, ``invalid_blocks`` broke a rule. In reports: ``rejected``, ``withdrawn``, ``busy``, ``inhibited``,
    ``malformed`` (bytes that are no report). ``acks_dropped``: the guest does not read its queue. ``commands``: those
    that it was sent, to start runs and to end them. ``held_off``: how often it was not read for a while, because it had
    sent more than its rate allows (host/limits.py).
    """

    reports: int = 0
    blocks: int = 0
    asked_bytes: int = 0
    freed_bytes: int = 0
    modelled_bytes: int = 0
    failures: int = 0
    rejected: int = 0
    duplicates: int = 0
    empty_blocks: int = 0
    invalid_blocks: int = 0
    withdrawn: int = 0
    busy: int = 0
    inhibited: int = 0
    malformed: int = 0
    acks_dropped: int = 0
    commands: int = 0
    held_off: int = 0
    order_histogram: list[int] = field(default_factory=lambda: [0] * N_ORDERS)
    discard_ns: Histogram = field(default_factory=Histogram)
    pull_to_ack_ns: Histogram = field(default_factory=Histogram)

    def add(self, other: Counters) -> None:
        """Add every counter of ``other``."""
        for counter in fields(self):
            mine, its = getattr(self, counter.name), getattr(other, counter.name)
            if isinstance(mine, Histogram):
                mine.add(its)
            elif isinstance(mine, list):
                mine[:] = [left + right for left, right in zip(mine, its, strict=True)]
            else:
                setattr(self, counter.name, mine + its)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; only orders that occurred."""
        plain: dict[str, Any] = {}
        for counter in fields(self):
            value = getattr(self, counter.name)
            if isinstance(value, Histogram):
                percentiles = value.percentiles()
                plain[counter.name] = {"p50": percentiles.p50, "p99": percentiles.p99, "max": percentiles.max}
            elif isinstance(value, list):
                plain[counter.name] = {str(order): blocks for order, blocks in enumerate(value) if blocks}
            else:
                plain[counter.name] = value
        return plain

    def copy(self) -> Counters:
        """An independent copy."""
        snapshot = Counters()
        snapshot.add(self)
        return snapshot


@dataclass(frozen=True, slots=True)
class GuestStatistics:
    """Snapshot of one guest. ``peak_resident_bytes`` is looked up before each report: memory shrinks only then.

    ``state``: ``live``, ``left`` (said goodbye) or ``lost`` (died without).
    """

    name: str
    state: str
    backend: str
    memory_bytes: int
    peak_resident_bytes: int
    final_resident_bytes: int
    counters: Counters

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "state": self.state,
            "backend": self.backend,
            "memory_bytes": self.memory_bytes,
            "peak_resident_bytes": self.peak_resident_bytes,
            "final_resident_bytes": self.final_resident_bytes,
            **self.counters.as_dict(),
        }


@dataclass(frozen=True, slots=True)
class HostStatistics:
    """Snapshot of the host: its own counts, the sums over all guests that ever were, and each guest.

    ``counters.malformed`` and ``counters.held_off`` include what came through the control queue, which belongs to no
    guest. ``guests`` holds the live
    ones and as many departed ones as are remembered; the sums forget nobody. ``proof``: how freed bytes are proven.
    ``cpu_s``: processor time, user and system, of the whole process since the host was made.
    """

    duration_s: float
    proof: str
    guests_seen: int
    guests_lost: int
    hellos_refused: int
    counters: Counters
    guests: tuple[GuestStatistics, ...]
    cpu_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON. ``ok``: no discard failed."""
        return {
            "ok": self.counters.failures == 0,
            "duration_s": round(self.duration_s, 3),
            "host": {
                **self.counters.as_dict(),
                "proof": self.proof,
                "guests_seen": self.guests_seen,
                "guests_lost": self.guests_lost,
                "hellos_refused": self.hellos_refused,
                "cpu_s": self.cpu_s,
            },
            "guests": [guest.as_dict() for guest in self.guests],
        }
