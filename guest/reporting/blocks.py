"""What the policies share: taking a block for a report, putting it back, and the words of a run.

Everything here runs with the zone lock held.
"""

from __future__ import annotations

import numpy as np

from common.faults import NUMBERS
from common.geometry import N_MIGRATETYPES, N_ORDERS, PAGEBLOCK_ORDER, PAGEBLOCK_PAGES, TOP_ORDER, Migratetype
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
    W_FREE_PAGES,
    W_HELD_BLOCKS,
    W_HELD_PAGES,
    W_IN_FLIGHT_BLOCKS,
    W_IN_FLIGHT_MAX_BLOCKS,
    W_IN_FLIGHT_PAGES,
    W_MIN_ORDER,
    W_MIN_WATERMARK,
    W_PULLED_BLOCKS,
    W_RANDOM_STATE,
    W_REFCNT,
    W_REPORTED,
    W_REQUESTED,
    W_ROTATED,
    W_ZERO_TRACKING,
    ZEROED,
)
from common.native import fault_point, kernel
from guest.allocator.buddy import account_free, pageblock_type
from guest.allocator.held import release_held
from guest.allocator.lists import del_page_from_free_list, free_list_head, link_before
from guest.allocator.pageblocks import free_across_pageblocks, write_pageblock_type
from guest.allocator.view import ctl_of, pages_of

__all__ = [
    "MORE",
    "SHORT",
    "clear_request",
    "count_pulled",
    "end_plain",
    "hold_blocks",
    "is_reported",
    "isolate_free_page",
    "list_from_top",
    "lists_to_report",
    "mark_zeroed",
    "put_back",
    "release_held",
    "reset_boundaries",
    "take_for_report",
    "watermark_ok",
]

HIGHATOMIC = int(Migratetype.HIGHATOMIC)  # from here on a type is never given away: HIGHATOMIC, CMA, ISOLATE
MOVABLE = int(Migratetype.MOVABLE)
ISOLATE = int(Migratetype.ISOLATE)  # the last one, so that those that are reported count from 0 to ISOLATE - 1
MT_FIELD = 0x7
PULL_TAKEN = NUMBERS["pull.taken"]
PUT_BACK_INTERIOR, PUT_BACK_FREED = NUMBERS["put-back.interior"], NUMBERS["put-back.freed"]
PUT_BACK_FLAGGED, HOLD_HELD = NUMBERS["put-back.flagged"], NUMBERS["hold.held"]
END_INACTIVE = NUMBERS["end.inactive"]

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
    """Take a free block off its list and mark it in flight (S3, S4). What was zeroed stays so: nobody has it (Z2).

    In one store: a host may have it already (walk-locked), so at no instant may repair take it for nobody's (S5).
    """
    in_flight = IN_FLIGHT | order | (migratetype << MT_SHIFT) | (np.int64(pages_of(zone)[pfn]) & ZEROED)
    del_page_from_free_list(zone, pfn, order, in_flight)
    account_free(zone, -(1 << order), migratetype)
    fault_point(PULL_TAKEN)
    ctl_of(zone)[W_IN_FLIGHT_BLOCKS] += 1
    ctl_of(zone)[W_IN_FLIGHT_PAGES] += 1 << order


@kernel
def watermark_ok(zone, mark):  # type: ignore[no-untyped-def]
    """True while more than ``mark`` pages are free (zone_watermark_ok at order 0; nothing is reserved here)."""
    return ctl_of(zone)[W_FREE_PAGES] > mark


@kernel
def isolate_free_page(zone, pfn, order, migratetype):  # type: ignore[no-untyped-def]
    """``take_for_report`` as __isolate_free_page does it; False, with nothing changed, at the min watermark (M4).

    More than min has to be free without the block. From half a pageblock on, the pageblocks that the block covers
    become MOVABLE, unless they are of a type that is never given away; what else is free in half of one stays on its
    list, as in Linux.
    """
    if not watermark_ok(zone, ctl_of(zone)[W_MIN_WATERMARK] + (1 << order)):
        return False
    take_for_report(zone, pfn, order, migratetype)
    if order >= PAGEBLOCK_ORDER - 1:
        for first in range(pfn, pfn + (1 << order), PAGEBLOCK_PAGES):
            if pageblock_type(zone, first) < HIGHATOMIC:
                write_pageblock_type(zone, first, MOVABLE)
    return True


@kernel
def lists_to_report(zone):  # type: ignore[no-untyped-def]
    """How many free lists are reported: those of the minimum order and above, without ISOLATE."""
    return (N_ORDERS - ctl_of(zone)[W_MIN_ORDER]) * ISOLATE


@kernel
def list_from_top(index):  # type: ignore[no-untyped-def]
    """(order, migratetype) of the ``index``-th list in v9's turn: highest order first, last type first."""
    return np.int64(TOP_ORDER - index // ISOLATE), np.int64(ISOLATE - 1 - index % ISOLATE)


@kernel
def end_plain(zone):  # type: ignore[no-untyped-def]
    """ACTIVE := 0, for policies that leave no shape behind which v9's boundary could rely on.

    Every list is marked as turned: should the next run be one of v9, it walks each list once.
    """
    ctl_of(zone)[W_ACTIVE] = INACTIVE
    fault_point(END_INACTIVE)
    for order in range(N_ORDERS):
        ctl_of(zone)[W_ROTATED + order] = (1 << N_MIGRATETYPES) - 1


@kernel
def count_pulled(zone, count):  # type: ignore[no-untyped-def]
    """Statistics of one pull of ``count`` blocks."""
    ctl_of(zone)[W_PULLED_BLOCKS] += count
    ctl_of(zone)[W_IN_FLIGHT_MAX_BLOCKS] = max(ctl_of(zone)[W_IN_FLIGHT_MAX_BLOCKS], ctl_of(zone)[W_IN_FLIGHT_BLOCKS])


@kernel
def mark_zeroed(zone, pfns, orders, count, zeroed):  # type: ignore[no-untyped-def]
    """Mark those blocks in flight that the host confirmed as zero, if this zone keeps track (Z1).

    ``zeroed``: bool[count]. Comes before the policy's own put-back, which passes the mark on whatever it does with the
    block (page_reporting_drain of the 2026 series sets PG_zeroed). A block that is not in flight is somebody else's.
    """
    if not ctl_of(zone)[W_ZERO_TRACKING]:
        return
    for index in range(count):
        if zeroed[index]:
            state = np.int64(pages_of(zone)[pfns[index]])
            if state & HEAD_MASK == IN_FLIGHT | orders[index]:
                pages_of(zone)[pfns[index]] = state | ZEROED


@kernel
def leave_flight(zone, pfn, order):  # type: ignore[no-untyped-def]
    """True if ``pfn`` was in flight as a block of ``order``: it is interior now, and the caller's."""
    if np.int64(pages_of(zone)[pfn]) & HEAD_MASK != IN_FLIGHT | order:
        return False
    pages_of(zone)[pfn] = INTERIOR
    fault_point(PUT_BACK_INTERIOR)
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
        zeroed = np.int64(pages_of(zone)[pfn]) & ZEROED
        if not leave_flight(zone, pfn, order):
            continue
        returned += 1
        became, final_order = free_across_pageblocks(zone, pfn, order, fpi | zeroed, np.int64(W_RANDOM_STATE))
        fault_point(PUT_BACK_FREED)
        active = ctl_of(zone)[W_ACTIVE]
        if reported and active != INACTIVE and final_order == order:
            state = np.int64(pages_of(zone)[became])
            pages_of(zone)[became] = state | REPORTED
            fault_point(PUT_BACK_FLAGGED)
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
        state = np.int64(pages_of(zone)[pfn])
        if state & HEAD_MASK != IN_FLIGHT | order:
            continue
        kept += 1
        pages_of(zone)[pfn] = HELD | order | (state & ZEROED)
        fault_point(HOLD_HELD)
        ctl_of(zone)[W_IN_FLIGHT_BLOCKS] -= 1
        ctl_of(zone)[W_IN_FLIGHT_PAGES] -= 1 << order
        link_before(zone, pfn, zone.n_pages + HELD_LIST)
        ctl_of(zone)[W_HELD_BLOCKS] += 1
        ctl_of(zone)[W_HELD_PAGES] += 1 << order
    return kept
