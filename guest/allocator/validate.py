"""The validating walker: every list, every record, every counter, checked against the contract.

``find_breaches`` looks at a zone whose locks are held (or that nobody else uses). It trusts no link: nodes are checked
before they are followed, and walks are bounded.
"""

from __future__ import annotations

import numpy as np

from common.geometry import N_MIGRATETYPES, N_ORDERS, PAGEBLOCK_ORDER, TOP_ORDER, Migratetype
from common.layout import (
    ACTIVE_BOUNDARY,
    ACTIVE_RELEASE,
    BLOCK_MT_MASK,
    C_COUNT,
    CPU_WORDS,
    FREE,
    FREE_HEAD_NODES,
    HEAD_MASK,
    HEADER_WORDS,
    HELD,
    HELD_LIST,
    IN_FLIGHT,
    INTERIOR,
    KIND_MASK,
    MT_SHIFT,
    N_PCP_LISTS,
    ON_PCP,
    ORDER_MASK,
    PCP_HEAD_NODES,
    REPORTED,
    W_ACTIVE,
    W_BOUNDARY,
    W_FREE_PAGES,
    W_HELD_BLOCKS,
    W_HELD_PAGES,
    W_IN_FLIGHT_BLOCKS,
    W_IN_FLIGHT_PAGES,
    W_ISOLATED_PAGES,
    W_MIN_ORDER,
    W_N_CPUS,
    W_N_PAGES,
    W_NR_FREE,
    W_POISON,
    W_REFCNT,
    W_REPORTED,
    W_REQUESTED,
    W_ZERO_TRACKING,
    ZEROED,
)
from common.native import kernel
from guest.allocator.lists import free_list_head, next_node, previous_node
from guest.allocator.locked import lock_zone, unlock_zone
from guest.allocator.percpu import lock_slot, unlock_slot
from guest.allocator.view import blocks_of, ctl_of, open_zone, pages_of

__all__ = ["BREACHES", "MAX_BREACHES", "find_breaches", "locked_find_breaches"]

ISOLATE = int(Migratetype.ISOLATE)
MT_FIELD = 0x7
MAX_BREACHES = 16

# Code -> identifier of the contract and what is wrong; {0} and {1} are the two numbers that come with it.
BREACHES = {
    1: "S1: node {0} on a free list of order {1} is not a free head of that order and type",
    2: "S1: node {0}: its neighbour {1} does not link back",
    3: "S1: the records hold {0} free blocks, the lists {1}",
    4: "S1: Reported block {0} has order {1}, below the minimum order",
    5: "S4: page {0} belongs to no block (found a state of {1:#x})",
    6: "S4: free_pages is {0}, the lists hold {1}",
    7: "S4: isolated_pages is {0}, the ISOLATE lists hold {1}",
    8: "S4: in-flight pages are {0}, the records say {1}",
    9: "B1: reported[{1}] does not match the list, off by {0}",
    10: "B1: nr_free[{1}] does not match the lists, off by {0}",
    11: "B2: REQUESTED and refcnt disagree ({0}, {1})",
    12: "D1: the boundary of order {1} is node {0}, which is not on its list",
    13: "D2: unreported block {0} of order {1} lies behind the boundary",
    14: "S3: free buddies {0} of order {1} are not merged",
    15: "S9: free block {0} in an isolated pageblock is on the list of type {1}",
    16: "S4: per-CPU slot {0} counts {1} pages, its lists differ",
    17: "S1: per-CPU list node {0} of slot {1} is not on a per-CPU list",
    18: "S4: blocks on per-CPU lists hold {0} pages, the records say {1}",
    19: "S4: held pages are {0}, the records say {1}",
    20: "S3: node {0} on the list of held blocks is not a held block",
    21: "S4: held blocks are {0}, their list has {1}",
    22: "Z4: block {0} is marked zeroed (state {1:#x}) in a zone that tracks none, or poisons",
}


@kernel
def note(found, code, first, second):  # type: ignore[no-untyped-def]
    """Record a breach in ``found`` (int64[1 + 3 * MAX_BREACHES], [0] counts)."""
    count = found[0]
    if count < MAX_BREACHES:
        found[1 + 3 * count] = code
        found[2 + 3 * count] = first
        found[3 + 3 * count] = second
    found[0] = count + 1


@kernel
def walk_free_list(zone, order, migratetype, found):  # type: ignore[no-untyped-def]
    """Check one free list; returns (blocks, reported blocks). Stops at the first node that cannot be trusted."""
    head = free_list_head(zone, order, migratetype)
    boundary = ctl_of(zone)[W_BOUNDARY + migratetype * N_ORDERS + order]
    active = ctl_of(zone)[W_ACTIVE]
    check_boundary = (active == ACTIVE_BOUNDARY or active == ACTIVE_RELEASE) and order >= ctl_of(zone)[W_MIN_ORDER]
    blocks = np.int64(0)
    reported = np.int64(0)
    seen_boundary = boundary == head
    behind_boundary = False
    node = next_node(zone, head)
    before = head
    while node != head:
        sound = node < ctl_of(zone)[W_N_PAGES] and blocks <= ctl_of(zone)[W_N_PAGES]
        state = np.int64(0)
        if sound:
            state = np.int64(pages_of(zone)[node])
            sound = state & HEAD_MASK == FREE | order and (state >> MT_SHIFT) & MT_FIELD == migratetype
        if not sound:
            note(found, 1, node, order)
            return blocks, reported
        if previous_node(zone, node) != before:
            note(found, 2, node, before)
        if node == boundary:
            seen_boundary = True
            behind_boundary = True
        if state & REPORTED:
            reported += 1
            if order < ctl_of(zone)[W_MIN_ORDER]:
                note(found, 4, node, order)
        elif behind_boundary and check_boundary:
            note(found, 13, node, order)
        blocks += 1
        before = node
        node = next_node(zone, node)
    if previous_node(zone, head) != before:
        note(found, 2, head, before)
    if check_boundary and not seen_boundary:
        note(found, 12, boundary, order)
    return blocks, reported


@kernel
def check_lists(zone, found):  # type: ignore[no-untyped-def]
    """Walk all free lists and compare the counters; returns the number of blocks on them."""
    total_blocks = np.int64(0)
    free_pages = np.int64(0)
    isolated_pages = np.int64(0)
    for order in range(N_ORDERS):
        nr_free = np.int64(0)
        reported = np.int64(0)
        for migratetype in range(N_MIGRATETYPES):
            blocks, flagged = walk_free_list(zone, order, migratetype, found)
            nr_free += blocks
            reported += flagged
            if migratetype == ISOLATE:
                isolated_pages += blocks << order
            else:
                free_pages += blocks << order
        total_blocks += nr_free
        if reported != ctl_of(zone)[W_REPORTED + order]:
            note(found, 9, ctl_of(zone)[W_REPORTED + order] - reported, order)
        if nr_free != ctl_of(zone)[W_NR_FREE + order]:
            note(found, 10, ctl_of(zone)[W_NR_FREE + order] - nr_free, order)
    if free_pages != ctl_of(zone)[W_FREE_PAGES]:
        note(found, 6, ctl_of(zone)[W_FREE_PAGES], free_pages)
    if isolated_pages != ctl_of(zone)[W_ISOLATED_PAGES]:
        note(found, 7, ctl_of(zone)[W_ISOLATED_PAGES], isolated_pages)
    return total_blocks


@kernel
def check_free_head(zone, pfn, state, found):  # type: ignore[no-untyped-def]
    """Check one free head: merged as far as it goes, on an ISOLATE list exactly when its pageblock is isolated."""
    order = state & ORDER_MASK
    migratetype = (state >> MT_SHIFT) & MT_FIELD
    isolated = np.int64(blocks_of(zone)[pfn >> PAGEBLOCK_ORDER]) & BLOCK_MT_MASK == ISOLATE
    if isolated != (migratetype == ISOLATE):
        note(found, 15, pfn, migratetype)
    buddy = pfn ^ (1 << order)
    if order < TOP_ORDER and pfn < buddy < ctl_of(zone)[W_N_PAGES]:
        other = np.int64(pages_of(zone)[buddy])
        other_isolated = np.int64(blocks_of(zone)[buddy >> PAGEBLOCK_ORDER]) & BLOCK_MT_MASK == ISOLATE
        if other & HEAD_MASK == FREE | order and (order < PAGEBLOCK_ORDER or other_isolated == isolated):
            note(found, 14, pfn, order)


@kernel
def check_records(zone, found, on_pcp_lists):  # type: ignore[no-untyped-def]
    """Walk the tiling of blocks; returns the number of free heads. ``on_pcp_lists``: pages on per-CPU lists."""
    n_pages = ctl_of(zone)[W_N_PAGES]
    free_heads = np.int64(0)
    in_flight_pages = np.int64(0)
    in_flight_blocks = np.int64(0)
    pcp_pages = np.int64(0)
    held_pages = np.int64(0)
    pfn = np.int64(0)
    while pfn < n_pages:
        state = np.int64(pages_of(zone)[pfn])
        kind = state & KIND_MASK
        order = state & ORDER_MASK
        size = 1 << order
        if kind == INTERIOR or kind > HELD or order > TOP_ORDER or pfn & (size - 1) or pfn + size > n_pages:
            note(found, 5, pfn, state)
            pfn += 1
            continue
        if state & ZEROED and (not ctl_of(zone)[W_ZERO_TRACKING] or ctl_of(zone)[W_POISON] != 0):
            note(found, 22, pfn, state)
        if kind == FREE:
            free_heads += 1
            check_free_head(zone, pfn, state, found)
        elif kind == IN_FLIGHT:
            in_flight_blocks += 1
            in_flight_pages += size
        elif kind == ON_PCP:
            pcp_pages += size
        elif kind == HELD:
            held_pages += size
        for inner in range(pfn + 1, pfn + size):
            if pages_of(zone)[inner] != INTERIOR:
                note(found, 5, inner, np.int64(pages_of(zone)[inner]))
                break
        pfn += size
    if in_flight_pages != ctl_of(zone)[W_IN_FLIGHT_PAGES] or in_flight_blocks != ctl_of(zone)[W_IN_FLIGHT_BLOCKS]:
        note(found, 8, ctl_of(zone)[W_IN_FLIGHT_PAGES], in_flight_pages)
    if pcp_pages != on_pcp_lists:
        note(found, 18, on_pcp_lists, pcp_pages)
    if held_pages != ctl_of(zone)[W_HELD_PAGES]:
        note(found, 19, ctl_of(zone)[W_HELD_PAGES], held_pages)
    return free_heads


@kernel
def check_slots(zone, found):  # type: ignore[no-untyped-def]
    """Walk the per-CPU lists of every slot; returns the pages on them."""
    total = np.int64(0)
    for cpu in range(ctl_of(zone)[W_N_CPUS]):
        pages = np.int64(0)
        for index in range(N_PCP_LISTS):
            head = ctl_of(zone)[W_N_PAGES] + FREE_HEAD_NODES + cpu * PCP_HEAD_NODES + index
            before = head
            node = next_node(zone, head)
            while node != head:
                if node >= ctl_of(zone)[W_N_PAGES] or np.int64(pages_of(zone)[node]) & KIND_MASK != ON_PCP:
                    note(found, 17, node, cpu)
                    break
                if previous_node(zone, node) != before or pages > ctl_of(zone)[W_N_PAGES]:
                    note(found, 2, node, before)
                    break
                pages += 1 << (np.int64(pages_of(zone)[node]) & ORDER_MASK)
                before = node
                node = next_node(zone, node)
        if pages != ctl_of(zone)[HEADER_WORDS + cpu * CPU_WORDS + C_COUNT]:
            note(found, 16, cpu, ctl_of(zone)[HEADER_WORDS + cpu * CPU_WORDS + C_COUNT])
        total += pages
    return total


@kernel
def check_held(zone, found):  # type: ignore[no-untyped-def]
    """Walk the list of held blocks."""
    head = zone.n_pages + HELD_LIST
    blocks = np.int64(0)
    before = head
    node = next_node(zone, head)
    while node != head:
        if node >= zone.n_pages or np.int64(pages_of(zone)[node]) & KIND_MASK != HELD or blocks > zone.n_pages:
            note(found, 20, node, blocks)
            return
        if previous_node(zone, node) != before:
            note(found, 2, node, before)
        blocks += 1
        before = node
        node = next_node(zone, node)
    if blocks != ctl_of(zone)[W_HELD_BLOCKS]:
        note(found, 21, ctl_of(zone)[W_HELD_BLOCKS], blocks)


@kernel
def find_breaches(zone, found):  # type: ignore[no-untyped-def]
    """Fill ``found`` with every breach; returns how many there are. All locks are held, or nobody else is there."""
    found[0] = 0
    on_lists = check_lists(zone, found)
    free_heads = check_records(zone, found, check_slots(zone, found))
    check_held(zone, found)
    if free_heads != on_lists:
        note(found, 3, free_heads, on_lists)
    if ctl_of(zone)[W_REFCNT] != ctl_of(zone)[W_REQUESTED]:
        note(found, 11, ctl_of(zone)[W_REQUESTED], ctl_of(zone)[W_REFCNT])
    return found[0]


@kernel
def locked_find_breaches(address, found):  # type: ignore[no-untyped-def]
    """Take every slot lock, then the zone lock, and look. Returns the number of breaches, or -1 if a lock is lost."""
    zone = open_zone(address)
    for cpu in range(ctl_of(zone)[W_N_CPUS]):
        lock_slot(zone, cpu)
    count = np.int64(-1)
    if lock_zone(zone):
        count = find_breaches(zone, found)
        unlock_zone(zone)
    for cpu in range(ctl_of(zone)[W_N_CPUS]):
        unlock_slot(zone, cpu)
    return count
