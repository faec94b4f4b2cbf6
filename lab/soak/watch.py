"""The zones and RAM of guests, looked at from outside without a lock, while they run and once after they have ended."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from common.errors import LabError
from common.geometry import PAGE_BYTES
from common.ramobject import RamObject
from guest.allocator.zone import Zone, ZoneStatistics

__all__ = ["GuestWatch", "Totals", "page_operations"]


@dataclass(frozen=True)
class Totals:
    """Sums over guests. Page operations are pages allocated plus pages freed, by vCPUs of every process.

    ``stamped_operations``: those of them on real memory, where each page is stamped and checked.
    """

    page_operations: int = 0
    stamped_operations: int = 0
    returned_bytes: int = 0
    refaults: int = 0
    violations: int = 0
    repairs: int = 0

    def plus(self, other: Totals) -> Totals:
        """Both together."""
        return Totals(
            self.page_operations + other.page_operations,
            self.stamped_operations + other.stamped_operations,
            self.returned_bytes + other.returned_bytes,
            self.refaults + other.refaults,
            self.violations + other.violations,
            self.repairs + other.repairs,
        )


def page_operations(statistics: ZoneStatistics) -> int:
    """Pages allocated plus pages freed since the zone was made."""
    return (statistics.allocated_bytes + statistics.freed_bytes) // PAGE_BYTES


class GuestWatch:
    """One guest. The mapping and the descriptor outlive its names, so it can be looked at after its end."""

    def __init__(self, lab: str, guest: str) -> None:
        self._lab, self._guest = lab, guest
        self._zone: Zone | None = None
        self._ram: RamObject | None = None

    def statistics(self) -> ZoneStatistics | None:
        """Its counters; None while it is not there yet."""
        if self._zone is None:
            with contextlib.suppress(LabError, FileNotFoundError):
                zone = Zone.attach(self._lab, self._guest, read_only=True)
                try:
                    self._ram = RamObject.open(self._lab, self._guest, ram_bytes=zone.ram_bytes)
                except BaseException:
                    zone.close()
                    raise
                self._zone = zone
        return None if self._zone is None else self._zone.statistics()

    def totals(self) -> Totals:
        """Its part of the sums so far."""
        seen = self.statistics()
        if seen is None or self._zone is None:
            return Totals()
        done = page_operations(seen)
        return Totals(
            page_operations=done,
            stamped_operations=done if self._zone.ram_bytes else 0,
            returned_bytes=seen.returned_pages * PAGE_BYTES,
            refaults=seen.refaults,
            violations=seen.violations,
            repairs=seen.repairs,
        )

    def resident_bytes(self) -> int | None:
        """What the machine holds of its RAM; None without RAM (the model backend)."""
        if self._zone is None or self._ram is None or not self._zone.ram_bytes:
            return None
        return self._ram.resident_bytes()

    def close(self) -> None:
        """Drop the mapping and the descriptor: only then is the memory of an ended guest free."""
        if self._zone is not None:
            self._zone.close()
            self._zone = None
        if self._ram is not None:
            self._ram.close()
            self._ram = None
