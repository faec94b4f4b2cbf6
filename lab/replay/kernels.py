"""Exact moves: a zone whose pages are taken and freed by number, as a recording says, through the buddy core.

A page in use is recorded as a block of order 0, whatever it was allocated as: what is freed is not always what was
allocated (a huge page comes back split), and the free lists do not depend on it. Every kernel runs on a zone that
nobody else uses, so no lock is taken.
"""

from __future__ import annotations

import numpy as np

from common.geometry import N_ORDERS, PAGEBLOCK_ORDER, PAGEBLOCK_PAGES, Migratetype
from common.layout import (
    ALLOCATED,
    FREE,
    HELD,
    IN_FLIGHT,
    INTERIOR,
    KIND_MASK,
    MT_SHIFT,
    ORDER_MASK,
    REPORTED,
    RESIDENT,
    RETURNED,
    W_N_PAGES,
    W_PRESSURE,
    W_RANDOM_STATE,
    W_REPORTED,
    W_REQUESTED,
)
from common.native import kernel
from guest.allocator.buddy import (
    FPI_NONE,
    FPI_SKIP_REPORT_NOTIFY,
    FPI_TO_TAIL,
    account_free,
    free_one,
    pageblock_type,
)
from guest.allocator.held import release_held
from guest.allocator.lists import add_to_free_list, add_to_free_list_tail, del_page_from_free_list
from guest.allocator.pageblocks import move_free_pages, move_list_entry, write_pageblock_type
from guest.allocator.repair import empty_lists
from guest.allocator.view import ctl_of, open_zone, pages_of, residence_of
from guest.reporting.blocks import leave_flight
from lab.trace.events import Event

__all__ = [
    "COUNTS",
    "C_CONFLICTS",
    "C_FAILED",
    "C_FIRST_TOUCHES",
    "C_NOT_FREE",
    "C_NOT_USED",
    "C_REFAULTS",
    "C_RESIDENT",
    "FREED_FIRST",
    "MT_FIELD",
    "OF_PAGEBLOCK",
    "OP_ALLOC",
    "OP_CONVERT",
    "OP_FREE",
    "OP_GIVE",
    "OP_MOVE",
    "OP_STEAL",
    "OP_TAKE",
    "OP_TOUCH",
    "WAS_LISTED",
    "WAS_OFF",
    "apply",
    "containing_block",
    "discard",
    "mark_first",
    "pages_held",
    "seed",
    "set_resident",
    "take_exact",
    "take_pages",
    "touch",
    "touch_all",
    "write_types",
]

MT_FIELD = 0x7
TAKEN, FREED = int(Event.mm_page_alloc_zone_locked), int(Event.mm_page_free)

# What a page's first event says of it at the start.
WAS_LISTED = 1  # on the buddy lists
WAS_OFF = 2  # not on them
FREED_FIRST = 3  # not on them either, unless somebody took it without an event
MOVABLE = int(Migratetype.MOVABLE)

# What a row of a plan does.
OP_TAKE = 0  # a block leaves the buddy lists
OP_GIVE = 1  # a block comes to them
OP_TOUCH = 2  # a block is handed out, and used
OP_STEAL = 3  # a free block goes to another type's list
OP_MOVE = 4  # and what else is free in its pageblock with it
OP_CONVERT = 5  # and its pageblocks' types too
OP_ALLOC = 6  # pages are allocated, and used
OP_FREE = 7  # and freed, through per-CPU lists
OF_PAGEBLOCK = -1  # in place of a migratetype: that of the pageblock

# Counts of a replay.
C_NOT_FREE = 0  # pages to be taken that were not free
C_NOT_USED = 1  # pages to be freed that were free
C_CONFLICTS = 2  # blocks that were being reported, or held, as the recording took them
C_REFAULTS = 3  # pages touched after they were returned
C_FIRST_TOUCHES = 4  # pages touched that had never been there
C_RESIDENT = 5  # pages the host holds, now
C_FAILED = 6  # pages of allocations for which there was no room
COUNTS = 7


@kernel
def seed(address, pfns, orders, types, reported):  # type: ignore[no-untyped-def]
    """Fill a new zone: these blocks are free, in the order in which their lists hold them; every other page is in use.

    Args:
        pfns, orders, types: int64[]; reported: bool[].
    """
    zone = open_zone(address)
    empty_lists(zone)
    pages = pages_of(zone)
    for pfn in range(ctl_of(zone)[W_N_PAGES]):
        pages[pfn] = ALLOCATED | (MOVABLE << MT_SHIFT)
    for index in range(pfns.size):
        pfn, order = pfns[index], orders[index]
        for page in range(pfn, pfn + (1 << order)):
            pages[page] = INTERIOR
        add_to_free_list_tail(zone, pfn, order, types[index])
        account_free(zone, 1 << order, types[index])
        if reported[index]:
            pages[pfn] = np.int64(pages[pfn]) | REPORTED
            ctl_of(zone)[W_REPORTED + order] += 1


@kernel
def write_types(address, types):  # type: ignore[no-untyped-def]
    """Set the type of every pageblock: int64[pageblocks]."""
    zone = open_zone(address)
    for index in range(types.size):
        write_pageblock_type(zone, index << PAGEBLOCK_ORDER, types[index])


@kernel
def set_resident(address, resident):  # type: ignore[no-untyped-def]
    """Write the map of what the host holds: uint8[n_pages]."""
    residence_of(open_zone(address))[:] = resident


@kernel
def containing_block(zone, pfn, order):  # type: ignore[no-untyped-def]
    """(pfn, state) of the block of ``order`` or above that holds ``pfn`` and is free, in flight or held; else -1, 0."""
    current = order
    while current < N_ORDERS:
        head = pfn & ~((1 << current) - 1)
        state = np.int64(pages_of(zone)[head])
        kind = state & KIND_MASK
        if (kind == FREE or kind == IN_FLIGHT or kind == HELD) and state & ORDER_MASK >= current:
            return head, state
        current += 1
    return np.int64(-1), np.int64(0)


@kernel
def take_exact(zone, pfn, order, migratetype):  # type: ignore[no-untyped-def]
    """Take 2**order pages at ``pfn`` out of the free block that holds them; False, with nothing changed, if none does.

    Mirrors del_page_from_free_list and expand, with the halves chosen by where ``pfn`` lies: each half that is left
    over goes to the front of the list of ``migratetype``, the one that the kernel took from, unreported (S7).
    """
    head, state = containing_block(zone, pfn, order)
    if head < 0 or state & KIND_MASK != FREE:
        return False
    current = state & ORDER_MASK
    zeroed = del_page_from_free_list(zone, head, current)
    was = (state >> MT_SHIFT) & MT_FIELD
    account_free(zone, -(1 << current), was)
    while current > order:
        current -= 1
        upper = head + (1 << current)
        if pfn >= upper:
            add_to_free_list(zone, head, current, migratetype, zeroed)
            head = upper
        else:
            add_to_free_list(zone, upper, current, migratetype, zeroed)
        account_free(zone, 1 << current, migratetype)
    for page in range(pfn, pfn + (1 << order)):
        pages_of(zone)[page] = ALLOCATED | (migratetype << MT_SHIFT)
    return True


@kernel
def give_up(zone, pfn, order):  # type: ignore[no-untyped-def]
    """Free the block that holds ``pfn`` if a policy has it: the recording takes it. False if no policy has it."""
    head, state = containing_block(zone, pfn, order)
    kind = state & KIND_MASK
    if head < 0 or kind == FREE:
        return False
    if kind == HELD:
        ctl_of(zone)[W_PRESSURE] += 1
        return release_held(zone, ctl_of(zone)[W_N_PAGES], FPI_SKIP_REPORT_NOTIFY) > 0
    block_order = state & ORDER_MASK
    if leave_flight(zone, head, block_order):
        fpi = FPI_SKIP_REPORT_NOTIFY | FPI_TO_TAIL
        free_one(zone, head, block_order, pageblock_type(zone, head), fpi, np.int64(W_RANDOM_STATE))
    return True


@kernel
def take_pages(zone, pfn, order, migratetype, counts):  # type: ignore[no-untyped-def]
    """``take_exact``; what of the block is not free as a whole is taken page by page, as far as it is free."""
    if take_exact(zone, pfn, order, migratetype):
        return
    if give_up(zone, pfn, order):
        counts[C_CONFLICTS] += 1
        if take_exact(zone, pfn, order, migratetype):
            return
    if order == 0:
        counts[C_NOT_FREE] += 1
        return
    for page in range(pfn, pfn + (1 << order)):
        if not take_exact(zone, page, 0, migratetype):
            if give_up(zone, page, 0):
                counts[C_CONFLICTS] += 1
            if not take_exact(zone, page, 0, migratetype):
                counts[C_NOT_FREE] += 1


@kernel
def give_pages(zone, pfn, order, migratetype, counts):  # type: ignore[no-untyped-def]
    """Free 2**order pages at ``pfn`` by ``free_one``; if some of them are free already, the others one by one."""
    free = 0
    for page in range(pfn, pfn + (1 << order)):
        if np.int64(pages_of(zone)[page]) & KIND_MASK != ALLOCATED:
            free += 1
    store = np.int64(W_RANDOM_STATE)
    if free == 0:
        for page in range(pfn, pfn + (1 << order)):
            pages_of(zone)[page] = INTERIOR
        free_one(zone, pfn, order, migratetype, FPI_NONE, store)
        return
    counts[C_NOT_USED] += free
    for page in range(pfn, pfn + (1 << order)):
        if np.int64(pages_of(zone)[page]) & KIND_MASK == ALLOCATED:
            pages_of(zone)[page] = INTERIOR
            free_one(zone, page, np.int64(0), migratetype, FPI_NONE, store)


@kernel
def steal(zone, pfn, migratetype, op):  # type: ignore[no-untyped-def]
    """Bring the free block at ``pfn`` to the list of ``migratetype``, and what goes with it by ``op``.

    Mirrors steal_suitable_fallback, whose outcome the event mm_page_alloc_extfrag tells.
    """
    head, state = containing_block(zone, pfn, np.int64(0))
    if head < 0 or state & KIND_MASK != FREE:
        return
    order = state & ORDER_MASK
    if order >= PAGEBLOCK_ORDER:
        if op == OP_CONVERT:
            for first in range(head, head + (1 << order), PAGEBLOCK_PAGES):
                write_pageblock_type(zone, first, migratetype)
    elif op != OP_STEAL:
        move_free_pages(zone, head & ~(PAGEBLOCK_PAGES - 1), migratetype)
        if op == OP_CONVERT:
            write_pageblock_type(zone, head, migratetype)
        return
    move_list_entry(zone, head, order, migratetype)


@kernel
def touch(residence, pfn, order, counts):  # type: ignore[no-untyped-def]
    """A block is used: its pages are resident from now on. ``residence``: uint8[]."""
    for page in range(pfn, pfn + (1 << order)):
        was = residence[page]
        if was != RESIDENT:
            residence[page] = RESIDENT
            counts[C_RESIDENT] += 1
            if was == RETURNED:
                counts[C_REFAULTS] += 1
            else:
                counts[C_FIRST_TOUCHES] += 1


@kernel
def touch_all(residence, pfns, orders, row, end, counts):  # type: ignore[no-untyped-def]
    """``touch`` rows ``row`` to ``end``."""
    for index in range(row, end):
        touch(residence, np.int64(pfns[index]), np.int64(orders[index]), counts)


@kernel
def discard(residence, pfns, orders, counts):  # type: ignore[no-untyped-def]
    """The host gives these blocks' pages back; how many it held."""
    returned = np.int64(0)
    for index in range(pfns.size):
        for page in range(pfns[index], pfns[index] + (1 << orders[index])):
            if residence[page] == RESIDENT:
                residence[page] = RETURNED
                returned += 1
    counts[C_RESIDENT] -= returned
    return returned


@kernel
def pages_held(address, pfns, orders, counts):  # type: ignore[no-untyped-def]
    """``discard`` on the map of the zone at ``address``."""
    return discard(residence_of(open_zone(address)), pfns, orders, counts)


@kernel
def apply(address, ops, pfns, orders, types, row, end, stop, counts):  # type: ignore[no-untyped-def]
    """Apply rows ``row`` to ``end`` of a plan; the first that is left.

    Args:
        ops, pfns, orders, types: columns of the plan, pfns counted from the start of the zone.
        stop: end behind the row that sets REQUESTED.
        counts: int64[COUNTS], added to.
    """
    zone = open_zone(address)
    residence = residence_of(zone)
    while row < end:
        op = np.int64(ops[row])
        pfn, order, migratetype = np.int64(pfns[row]), np.int64(orders[row]), np.int64(types[row])
        row += 1
        if op == OP_TOUCH:
            touch(residence, pfn, order, counts)
        elif op == OP_TAKE:
            if migratetype == OF_PAGEBLOCK:
                migratetype = pageblock_type(zone, pfn)
            take_pages(zone, pfn, order, migratetype, counts)
        elif op == OP_GIVE:
            if migratetype == OF_PAGEBLOCK:
                migratetype = pageblock_type(zone, pfn)
            give_pages(zone, pfn, order, migratetype, counts)
            if stop and ctl_of(zone)[W_REQUESTED]:
                break
        else:
            steal(zone, pfn, migratetype, op)
    return row


@kernel
def mark_first(first, events, pfns, orders):  # type: ignore[no-untyped-def]
    """Write down what each page's first event is: uint8[], WAS_LISTED, WAS_OFF or FREED_FIRST, 0 for none.

    ``events``: the number of a page event, -1 for rows that say nothing.
    """
    for row in range(events.size):
        event = np.int64(events[row])
        if event < 0:
            continue
        for page in range(np.int64(pfns[row]), np.int64(pfns[row]) + (1 << np.int64(orders[row]))):
            if first[page] == 0:
                first[page] = WAS_LISTED if event == TAKEN else (FREED_FIRST if event == FREED else WAS_OFF)
