"""What the policies share: taking a block for a report, putting it back, and the words of a run.

Everything here runs with the zone lock held.
"""

from __future__ import annotations

import numpy as np

from common.geometry import N_MIGRATETYPES, N_ORDERS
from common.layout import (
    ACTIVE_BOUNDARY,
    ACTIVE_RELEASE,
    HEAD_MASK,
    HELD,
    HELD_LIST,
    IN_FLIGHT,
    INACTIVE,
    INTERIOR,
    MT_SHIFT,
    REPORTED,
    W_ACTIVE,
    W_BOUNDARY,
    W_HELD_BLOCKS,
    W_HELD_PAGES,
    W_IN_FLIGHT_BLOCKS,
    W_IN_FLIGHT_MAX_BLOCKS,
    W_IN_FLIGHT_PAGES,
    W_PULLED_BLOCKS,
    W_RANDOM_STATE,
    W_REFCNT,
    W_REPORTED,
    W_REQUESTED,
)
from common.native import kernel
from guest.allocator.buddy import account_free
from guest.allocator.held import release_held
from guest.allocator.lists import del_page_from_free_list, free_list_head, link_before
from guest.allocator.pageblocks import free_across_pageblocks
from guest.allocator.view import ctl_of, pages_of

__all__ = [
    "MORE",
    "SHORT",
    "clear_request",
    "count_pulled",
    "hold_blocks",
    "is_reported",
    "put_back",
    "release_held",
    "reset_boundaries",
    "take_for_report",
]

MT_FIELD = 0x7

SHORT = 1  # the batch is the last one: nothing more is to be reported in this run (v9's underflow)
MORE = 0


@kernel
def is_reported(zone, pfn):  # type: ignore[no-untyped-def]
    """PageReported."""
    return np.int64(pages_of(zone)[pfn]) & REPORTED != 0


@kernel
def reset_boundaries(zone):  # type: ignore[no-untyped-def]
    """A boundary at its list head says that nothing is reported: for every order and type, ISOLATE too (B5)."""
    for order in range(N_ORDERS):
        for migratetype in range(N_MIGRATETYPES):
            ctl_of(zone)[W_BOUNDARY + migratetype * N_ORDERS + order] = free_list_head(zone, order, migratetype)


@kernel
def clear_request(zone):  # type: ignore[no-untyped-def]
    """REQUESTED := 0 and its reference dropped (B2)."""
    if ctl_of(zone)[W_REQUESTED]:
        ctl_of(zone)[W_REQUESTED] = 0
        ctl_of(zone)[W_REFCNT] -= 1


@kernel
def take_for_report(zone, pfn, order, migratetype):  # type: ignore[no-untyped-def]
    """Take a free block off its list and mark it in flight (S3, S4)."""
    del_page_from_free_list(zone, pfn, order)
    account_free(zone, -(1 << order), migratetype)
    pages_of(zone)[pfn] = IN_FLIGHT | order | (migratetype << MT_SHIFT)
    ctl_of(zone)[W_IN_FLIGHT_BLOCKS] += 1
    ctl_of(zone)[W_IN_FLIGHT_PAGES] += 1 << order


@kernel
def count_pulled(zone, count):  # type: ignore[no-untyped-def]
    """Statistics of one pull of ``count`` blocks."""
    ctl_of(zone)[W_PULLED_BLOCKS] += count
    ctl_of(zone)[W_IN_FLIGHT_MAX_BLOCKS] = max(ctl_of(zone)[W_IN_FLIGHT_MAX_BLOCKS], ctl_of(zone)[W_IN_FLIGHT_BLOCKS])


@kernel
def leave_flight(zone, pfn, order):  # type: ignore[no-untyped-def]
    """True if ``pfn`` was in flight as a block of ``order``: it is interior now, and the caller's."""
    if np.int64(pages_of(zone)[pfn]) & HEAD_MASK != IN_FLIGHT | order:
        return False
    pages_of(zone)[pfn] = INTERIOR
    ctl_of(zone)[W_IN_FLIGHT_BLOCKS] -= 1
    ctl_of(zone)[W_IN_FLIGHT_PAGES] -= 1 << order
    return True


@kernel
def put_back(zone, pfns, orders, count, reported, fpi):  # type: ignore[no-untyped-def]
    """Return ``count`` blocks to their lists, freed with ``fpi``; flag each that did not merge, if ``reported`` and a
    run is active (S7, S8). Where the run keeps boundaries, the flagged block becomes that of its list.

    Blocks that are not in flight are skipped: somebody put them back already. Returns how many were put back.
    """
    returned = np.int64(0)
    for index in range(count):
        pfn = pfns[index]
        order = orders[index]
        if not leave_flight(zone, pfn, order):
            continue
        returned += 1
        became, final_order = free_across_pageblocks(zone, pfn, order, fpi, np.int64(W_RANDOM_STATE))
        active = ctl_of(zone)[W_ACTIVE]
        if reported and active != INACTIVE and final_order == order:
            state = np.int64(pages_of(zone)[became])
            pages_of(zone)[became] = state | REPORTED
            ctl_of(zone)[W_REPORTED + order] += 1
            if active == ACTIVE_BOUNDARY or active == ACTIVE_RELEASE:
                ctl_of(zone)[W_BOUNDARY + ((state >> MT_SHIFT) & MT_FIELD) * N_ORDERS + order] = became
    return returned


@kernel
def hold_blocks(zone, pfns, orders, count):  # type: ignore[no-untyped-def]
    """Keep ``count`` blocks out of the allocator after their report: from in flight to the list of held blocks (S3).

    Returns how many were in flight.
    """
    kept = np.int64(0)
    for index in range(count):
        pfn = pfns[index]
        order = orders[index]
        if np.int64(pages_of(zone)[pfn]) & HEAD_MASK != IN_FLIGHT | order:
            continue
        kept += 1
        pages_of(zone)[pfn] = HELD | order
        ctl_of(zone)[W_IN_FLIGHT_BLOCKS] -= 1
        ctl_of(zone)[W_IN_FLIGHT_PAGES] -= 1 << order
        link_before(zone, pfn, zone.n_pages + HELD_LIST)
        ctl_of(zone)[W_HELD_BLOCKS] += 1
        ctl_of(zone)[W_HELD_PAGES] += 1 << order
    return kept
