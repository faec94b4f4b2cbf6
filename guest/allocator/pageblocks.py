"""Pageblocks: change of type, stealing from another type, isolation (mm/page_alloc.c, mm/page_isolation.c).

Runs with the zone lock held. Work is bounded by one pageblock (512 pages), twice that for a block of the top order.
"""

from __future__ import annotations

import numpy as np

from common.faults import NUMBERS
from common.geometry import N_ORDERS, PAGEBLOCK_ORDER, PAGEBLOCK_PAGES, Migratetype
from common.layout import (
    ALLOCATED,
    BLOCK_MT_MASK,
    BLOCK_SAVED_SHIFT,
    FREE,
    KIND_MASK,
    MT_SHIFT,
    ORDER_MASK,
    W_CLAIMED_PAGEBLOCKS,
    W_RANDOM_STATE,
    W_STEALS,
)
from common.native import fault_point, kernel
from guest.allocator.buddy import FPI_NONE, account_free, free_one, is_free_head, pageblock_type, take_smallest
from guest.allocator.lists import (
    add_to_free_list,
    del_page_from_free_list,
    free_list_head,
    move_to_free_list,
    next_node,
)
from guest.allocator.view import blocks_of, ctl_of, pages_of

__all__ = [
    "free_across_pageblocks",
    "isolate_pageblock",
    "set_pageblock_type",
    "take_fallback",
    "unisolate_pageblock",
    "write_pageblock_type",
]

UNMOVABLE = int(Migratetype.UNMOVABLE)
MOVABLE = int(Migratetype.MOVABLE)
RECLAIMABLE = int(Migratetype.RECLAIMABLE)
HIGHATOMIC = int(Migratetype.HIGHATOMIC)
CMA = int(Migratetype.CMA)
ISOLATE = int(Migratetype.ISOLATE)
MT_FIELD = 0x7
ISOLATE_TYPED, UNISOLATE_TYPED = NUMBERS["isolate.typed"], NUMBERS["unisolate.typed"]
SPLIT_TOP_LISTED = NUMBERS["split-top.listed"]
STEAL_TYPED, REQUEUE_TAKEN = NUMBERS["steal.typed"], NUMBERS["requeue.taken"]
CANNOT_STEAL = 100  # added to a migratetype that was found but whose block may only be used, not claimed


@kernel
def move_list_entry(zone, pfn, order, migratetype):  # type: ignore[no-untyped-def]
    """Move one free head to the list of ``migratetype`` and keep the two free counts right."""
    old = (np.int64(pages_of(zone)[pfn]) >> MT_SHIFT) & MT_FIELD
    if old != migratetype:
        account_free(zone, -(1 << order), old)
        account_free(zone, 1 << order, migratetype)
    move_to_free_list(zone, pfn, order, migratetype)


@kernel
def move_free_pages(zone, first, migratetype):  # type: ignore[no-untyped-def]
    """Move every free block that starts in the pageblock at ``first``; returns (pages moved, movable pages in use).

    Mirrors move_freepages_block. A free block of the top order that starts in the pageblock is moved whole.
    """
    moved = np.int64(0)
    movable = np.int64(0)
    pfn = first
    while pfn < first + PAGEBLOCK_PAGES:
        state = np.int64(pages_of(zone)[pfn])
        kind = state & KIND_MASK
        order = state & ORDER_MASK
        if kind == FREE:
            move_list_entry(zone, pfn, order, migratetype)
            moved += 1 << order
        elif kind == ALLOCATED and (state >> MT_SHIFT) & MT_FIELD == MOVABLE:
            movable += 1 << order
        pfn += 1 << order
    return moved, movable


@kernel
def write_pageblock_type(zone, pfn, migratetype):  # type: ignore[no-untyped-def]
    """Set the type byte of one pageblock (set_pageblock_migratetype); lists are the caller's business."""
    index = pfn >> PAGEBLOCK_ORDER
    blocks_of(zone)[index] = (np.int64(blocks_of(zone)[index]) & ~BLOCK_MT_MASK) | migratetype


@kernel
def split_top_block(zone, first):  # type: ignore[no-untyped-def]
    """If a free block of the top order covers the pageblock at ``first``, split it: unreported, zeroed as it was."""
    top = PAGEBLOCK_ORDER + 1
    head = first & ~((1 << top) - 1)
    state = np.int64(pages_of(zone)[head])
    if state & (KIND_MASK | ORDER_MASK) == FREE | top:
        migratetype = (state >> MT_SHIFT) & MT_FIELD
        zeroed = del_page_from_free_list(zone, head, top)
        add_to_free_list(zone, head + PAGEBLOCK_PAGES, PAGEBLOCK_ORDER, migratetype, zeroed)
        add_to_free_list(zone, head, PAGEBLOCK_ORDER, migratetype, zeroed)
        fault_point(SPLIT_TOP_LISTED)


@kernel
def set_pageblock_type(zone, pageblock, migratetype):  # type: ignore[no-untyped-def]
    """Change a pageblock's type and move its free blocks to the lists of that type."""
    first = pageblock << PAGEBLOCK_ORDER
    split_top_block(zone, first)
    write_pageblock_type(zone, first, migratetype)
    requeue_free_blocks(zone, first, migratetype)


@kernel
def requeue_free_blocks(zone, first, migratetype):  # type: ignore[no-untyped-def]
    """Move a pageblock's free blocks to ``migratetype``, which its byte says already.

    A wholly free one is freed anew, as the end of isolation does, so that it merges with its buddy. On its way *into*
    isolation only if that buddy is isolated and free: else it is moved, and keeps its flag.
    """
    state = np.int64(pages_of(zone)[first])
    anew = is_free_head(zone, first, PAGEBLOCK_ORDER)
    if anew and migratetype == ISOLATE:
        buddy = first ^ PAGEBLOCK_PAGES
        anew = is_free_head(zone, buddy, PAGEBLOCK_ORDER) and pageblock_type(zone, buddy) == ISOLATE
    if anew:
        zeroed = del_page_from_free_list(zone, first, PAGEBLOCK_ORDER)
        account_free(zone, -PAGEBLOCK_PAGES, (state >> MT_SHIFT) & MT_FIELD)
        fault_point(REQUEUE_TAKEN)
        free_one(zone, first, np.int64(PAGEBLOCK_ORDER), migratetype, FPI_NONE | zeroed, np.int64(W_RANDOM_STATE))
    else:
        move_free_pages(zone, first, migratetype)


@kernel
def isolate_pageblock(zone, pageblock):  # type: ignore[no-untyped-def]
    """Isolate (set_migratetype_isolate): nothing in it is handed out or pulled (S9). False if it is already."""
    first = pageblock << PAGEBLOCK_ORDER
    old = pageblock_type(zone, first)
    if old == ISOLATE:
        return False
    split_top_block(zone, first)
    blocks_of(zone)[pageblock] = ISOLATE | (old << BLOCK_SAVED_SHIFT)
    fault_point(ISOLATE_TYPED)
    requeue_free_blocks(zone, first, ISOLATE)
    return True


@kernel
def unisolate_pageblock(zone, pageblock):  # type: ignore[no-untyped-def]
    """End isolation (unset_migratetype_isolate): free blocks go back to the old type's lists. False if not isolated.

    A wholly free pageblock is freed anew, so that it merges with its buddy, as the kernel does.
    """
    first = pageblock << PAGEBLOCK_ORDER
    if pageblock_type(zone, first) != ISOLATE:
        return False
    split_top_block(zone, first)
    old = np.int64(blocks_of(zone)[pageblock]) >> BLOCK_SAVED_SHIFT
    blocks_of(zone)[pageblock] = old
    fault_point(UNISOLATE_TYPED)
    requeue_free_blocks(zone, first, old)
    return True


@kernel
def free_across_pageblocks(zone, pfn, order, fpi, random_store):  # type: ignore[no-untyped-def]
    """``free_one`` under the type its pageblock has now; returns (pfn, order) of what it became.

    A block of the top order whose pageblocks disagree about isolation goes back as two (split_large_buddy); the
    answer then is that of the first half, of a lower order, so that it is never flagged.
    """
    migratetype = pageblock_type(zone, pfn)
    if order > PAGEBLOCK_ORDER:
        other = pageblock_type(zone, pfn + PAGEBLOCK_PAGES)
        if other != migratetype and (other == ISOLATE or migratetype == ISOLATE):
            free_one(zone, pfn + PAGEBLOCK_PAGES, PAGEBLOCK_ORDER, other, fpi, random_store)
            order = np.int64(PAGEBLOCK_ORDER)
    return free_one(zone, pfn, order, migratetype, fpi, random_store)


@kernel
def fallback_type(migratetype, choice):  # type: ignore[no-untyped-def]
    """The ``choice``-th (0, 1) type that stands in for ``migratetype`` (fallbacks[][])."""
    if migratetype == UNMOVABLE:
        return RECLAIMABLE if choice == 0 else MOVABLE
    if migratetype == MOVABLE:
        return RECLAIMABLE if choice == 0 else UNMOVABLE
    return UNMOVABLE if choice == 0 else MOVABLE


@kernel
def find_suitable_fallback(zone, order, migratetype):  # type: ignore[no-untyped-def]
    """Type to take from at ``order``, plus CANNOT_STEAL where the block may not be claimed; -1 when there is none."""
    for choice in range(2):
        other = fallback_type(migratetype, choice)
        head = free_list_head(zone, order, other)
        if next_node(zone, head) != head:
            if order >= PAGEBLOCK_ORDER // 2 or migratetype == RECLAIMABLE or migratetype == UNMOVABLE:
                return other
            return other + CANNOT_STEAL
    return -1


@kernel
def steal_suitable_fallback(zone, pfn, order, start_type, whole_block):  # type: ignore[no-untyped-def]
    """Bring a free block of another type to the lists of ``start_type``, with its pageblock where that is worth it.

    Mirrors steal_suitable_fallback of Linux 5.3, without the watermark boost.
    """
    ctl_of(zone)[W_STEALS] += 1
    old_type = pageblock_type(zone, pfn)
    if old_type != HIGHATOMIC:
        if order >= PAGEBLOCK_ORDER:
            for index in range(1 << (order - PAGEBLOCK_ORDER)):  # change_pageblock_range
                write_pageblock_type(zone, pfn + (index << PAGEBLOCK_ORDER), start_type)
            ctl_of(zone)[W_CLAIMED_PAGEBLOCKS] += 1
            fault_point(STEAL_TYPED)
        elif whole_block:
            moved, movable = move_free_pages(zone, pfn & ~(PAGEBLOCK_PAGES - 1), start_type)
            alike = np.int64(0)
            if start_type == MOVABLE:
                alike = movable
            elif old_type == MOVABLE:
                alike = PAGEBLOCK_PAGES - (moved + movable)
            if moved + alike >= PAGEBLOCK_PAGES // 2:
                write_pageblock_type(zone, pfn, start_type)
                ctl_of(zone)[W_CLAIMED_PAGEBLOCKS] += 1
            return
    move_list_entry(zone, pfn, order, start_type)


@kernel
def steal_once(zone, order, start_type):  # type: ignore[no-untyped-def]
    """Make a block for ``start_type`` out of another type's lists (__rmqueue_fallback); False when there is none."""
    found = np.int64(-1)
    current = np.int64(N_ORDERS - 1)
    while current >= order:
        found = np.int64(find_suitable_fallback(zone, current, start_type))
        if found >= 0:
            break
        current -= 1
    if found < 0:
        return False
    if found >= CANNOT_STEAL and start_type == MOVABLE and current > order:
        # A movable request that cannot claim the pageblock takes the smallest block, to fragment least.
        current = np.int64(order)
        found = np.int64(find_suitable_fallback(zone, current, start_type))
        while found < 0:
            current += 1
            found = np.int64(find_suitable_fallback(zone, current, start_type))
    whole_block = found < CANNOT_STEAL
    pfn = next_node(zone, free_list_head(zone, current, found % CANNOT_STEAL))
    steal_suitable_fallback(zone, pfn, current, start_type, whole_block)
    return True


@kernel
def take_fallback(zone, order, migratetype):  # type: ignore[no-untyped-def]
    """What __rmqueue does once the own lists are empty: CMA for movable requests, then other types; -1 if none."""
    if migratetype == MOVABLE:
        pfn = take_smallest(zone, order, CMA)
        if pfn != -1:
            return pfn
    if migratetype <= RECLAIMABLE and steal_once(zone, order, migratetype):
        return take_smallest(zone, order, migratetype)
    return np.int64(-1)
