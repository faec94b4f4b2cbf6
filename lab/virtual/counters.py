"""What a step or a hold did, read from the zone's control words: differences between two looks.

Plain Python integers through ctypes: a look costs less than a microsecond, a snapshot object twenty.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from common.geometry import N_ORDERS
from common.layout import (
    C_ALLOCATIONS,
    C_COUNT,
    C_FIRST_TOUCHES,
    C_ZEROING_SKIPPED,
    CPU_WORDS,
    HEADER_WORDS,
    W_ACTIVE,
    W_ALLOCATIONS,
    W_FAILED_ALLOCATIONS,
    W_FREES,
    W_HELD_BLOCKS,
    W_INSTALLED_PAGES,
    W_INSTALLS,
    W_NODES_VISITED,
    W_PULLED_BLOCKS,
    W_REPORTED,
    W_REQUESTED,
    W_RETURNED_PAGES,
)
from guest.allocator.zone import Zone

__all__ = ["SlotCounts", "ZoneWords"]

_SLOT_WORDS = C_FIRST_TOUCHES - C_ALLOCATIONS + 1


class SlotCounts(NamedTuple):
    """Words of one per-CPU slot and of the zone, cumulative. The first six lie side by side in the slot."""

    allocations: int
    frees: int
    refills: int
    drains: int
    refaults: int
    first_touches: int
    zone_allocations: int
    zone_frees: int
    failures: int
    zeroed_pages: int
    installs: int
    installed_pages: int


class ZoneWords:
    """The control words of a zone, read without a lock: one thread drives everything here."""

    def __init__(self, zone: Zone) -> None:
        self.zone = zone  # keeps the mapping
        count = HEADER_WORDS + zone.n_cpus * CPU_WORDS
        # SAFETY: header and slots are mapped for as long as the zone is open, and self.zone holds it.
        self._words = (ctypes.c_int64 * count).from_address(zone.address)

    def slot(self, cpu: int) -> SlotCounts:
        """The counters that a step of the vCPU in slot ``cpu`` moves."""
        words = self._words
        start = HEADER_WORDS + cpu * CPU_WORDS + C_ALLOCATIONS
        allocations, frees, refills, drains, refaults, first_touches = words[start : start + _SLOT_WORDS]
        return SlotCounts(
            allocations,
            frees,
            refills,
            drains,
            refaults,
            first_touches,
            words[W_ALLOCATIONS],
            words[W_FREES],
            words[W_FAILED_ALLOCATIONS],
            words[HEADER_WORDS + cpu * CPU_WORDS + C_ZEROING_SKIPPED],
            words[W_INSTALLS],
            words[W_INSTALLED_PAGES],
        )

    def listed_pages(self, cpu: int) -> int:
        """Pages on the lists of slot ``cpu``."""
        return self._words[HEADER_WORDS + cpu * CPU_WORDS + C_COUNT]

    @property
    def requested(self) -> bool:
        """REQUESTED: a run is wanted."""
        return self._words[W_REQUESTED] != 0

    @property
    def active(self) -> bool:
        """Between begin and end of a run."""
        return self._words[W_ACTIVE] != 0

    @property
    def nodes_visited(self) -> int:
        """List nodes that pulls looked at."""
        return self._words[W_NODES_VISITED]

    @property
    def pulled_blocks(self) -> int:
        """Blocks that were taken in flight."""
        return self._words[W_PULLED_BLOCKS]

    @property
    def held_blocks(self) -> int:
        """Blocks that a policy keeps out of the allocator."""
        return self._words[W_HELD_BLOCKS]

    @property
    def returned_pages(self) -> int:
        """Pages given back, cumulative."""
        return self._words[W_RETURNED_PAGES]

    @property
    def failed_allocations(self) -> int:
        """Allocations and refills that got nothing."""
        return self._words[W_FAILED_ALLOCATIONS]

    @property
    def reported_pages(self) -> int:
        """Pages of blocks that carry the flag now."""
        return sum(count << order for order, count in enumerate(self._words[W_REPORTED : W_REPORTED + N_ORDERS]))
