"""Scenes for the reporting tests: blocks that cannot merge, runs that report everything, reading the Reported flags."""

from __future__ import annotations

import numpy as np

from common.geometry import N_ORDERS, Migratetype
from common.layout import FREE, KIND_MASK, KIND_SHIFT, ORDER_MASK, REPORTED
from guest.allocator.zone import Zone
from guest.reporting.cycle import Batch, Cycle, Outcome
from tests.allocator.arrange import exhaust

__all__ = [
    "IN_FLIGHT_KIND",
    "accept",
    "boundary_cycle",
    "flags_of",
    "free_alternating",
    "kinds_of",
    "reported_heads",
    "unreported_heads",
]

IN_FLIGHT_KIND = 3
MOVABLE = Migratetype.MOVABLE


def boundary_cycle(zone: Zone, *, capacity: int = 16) -> Cycle:
    """The v9 policy over ``zone``."""
    return Cycle(zone, "boundary", capacity=capacity)


def accept(batch: Batch) -> Outcome:
    """A host that discards everything."""
    assert len(batch.pfns) > 0
    return Outcome.DONE


def free_alternating(zone: Zone, count: int, order: int = 9) -> tuple[list[int], list[int]]:
    """Take all memory as blocks of ``order``, free ``count`` that are not buddies; (freed, their buddies)."""
    pfns = exhaust(zone, order)
    freed = pfns[0 : 2 * count : 2]
    for pfn in freed:
        zone.free(pfn, order)
    return freed, pfns[1 : 2 * count : 2]


def flags_of(zone: Zone, order: int = 9, kind: Migratetype = MOVABLE) -> str:
    """One list head to tail: U unreported, R reported."""
    return "".join("R" if reported else "U" for _, reported in zone.free_list(order, kind))


def kinds_of(zone: Zone) -> np.ndarray:
    """Kind of each page (common/layout.py): 0 interior, 1 free, 2 allocated, 3 in flight, 4 per-CPU."""
    kinds: np.ndarray = (zone.page_states() & KIND_MASK) >> KIND_SHIFT
    return kinds


def reported_heads(zone: Zone) -> list[int]:
    """Every page that carries the flag."""
    return [int(pfn) for pfn in np.flatnonzero(zone.page_states() & REPORTED)]


def unreported_heads(zone: Zone, min_order: int = 9) -> list[int]:
    """Free heads of ``min_order`` and above without the flag, isolated ones left out."""
    states = zone.page_states()
    unreported = (states & (KIND_MASK | REPORTED)) == FREE
    heads = [int(pfn) for pfn in np.flatnonzero(unreported & ((states & ORDER_MASK) >= min_order))]
    isolated = {pfn for order in range(N_ORDERS) for pfn, _ in zone.free_list(order, Migratetype.ISOLATE)}
    return [pfn for pfn in heads if pfn not in isolated]
