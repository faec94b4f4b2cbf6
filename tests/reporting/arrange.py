"""Scenes for the reporting tests: blocks that cannot merge, runs that report everything, reading the Reported flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from common.geometry import N_ORDERS, Migratetype
from common.layout import FREE, KIND_MASK, KIND_SHIFT, ORDER_MASK, REPORTED
from guest.allocator.zone import Zone
from guest.reporting.cycle import Batch, Cycle, Outcome
from guest.reporting.table import find_policy
from tests.allocator.arrange import MIB, exhaust, make_zone

__all__ = [
    "IN_FLIGHT_KIND",
    "accept",
    "boundary_cycle",
    "flags_of",
    "free_alternating",
    "kinds_of",
    "policy_cycle",
    "policy_zone",
    "report_everything",
    "reported_heads",
    "unreported_heads",
]

IN_FLIGHT_KIND = 3
MOVABLE = Migratetype.MOVABLE


def boundary_cycle(zone: Zone, *, capacity: int = 16) -> Cycle:
    """The v9 policy over ``zone``."""
    return Cycle(zone, "boundary", capacity=capacity)


def policy_zone(policy: str, memory_bytes: int = 64 * MIB, **overrides: Any) -> Zone:
    """A zone as ``make_zone`` makes it, with what asks for a run under ``policy``, at 2 blocks where there is a mark.

    No watermark keeps a block from being reported here, however few are free: that is for the tests of watermarks.
    """
    chosen: dict[str, Any] = {"high_water_mark": 2, "min_watermark": -(1 << 30), "low_watermark": -(1 << 30)}
    return make_zone(memory_bytes, **(chosen | {"trigger": find_policy(policy).trigger} | overrides))


def policy_cycle(zone: Zone, policy: str, *, capacity: int = 16) -> Cycle:
    """``policy`` over ``zone``."""
    return Cycle(zone, policy, capacity=capacity)


def report_everything(cycle: Cycle, report: Callable[[Batch], Outcome] | None = None) -> int:
    """Run until no run is asked for: a policy with a budget needs more than one. Returns the blocks reported."""
    blocks = 0
    for _ in range(200):
        done = cycle.run(report or accept)
        blocks += done.blocks
        if not done.requested:
            return blocks
    raise AssertionError("a run was asked for after each of 200 runs")


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
