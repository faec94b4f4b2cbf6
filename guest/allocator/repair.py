"""Repair after the owner of a lock died: lists and counters are rebuilt from the page records.

The records are written in an order that keeps them a tiling at every instant: a block taken off a list is interior
until its parts have heads of their own. Pages that belong to no block are therefore what the dead owner had in its
hands, and are freed. List links are written so that the *forward* chain is whole at every instant.

One block may be between two owners: it looks allocated and nobody has it, or it is on a per-CPU list that is about to
lose it. Journals of one record name it (``owners``): under the zone lock in the header, under a slot's in the slot.
What was being handed out goes back; what was being given back is.
"""

from __future__ import annotations

import numpy as np

from common.geometry import N_MIGRATETYPES, N_ORDERS, PCP_MIGRATETYPES, TOP_ORDER, Migratetype
from common.layout import (
    ALLOCATED,
    C_COUNT,
    C_IN_HAND,
    CLAIMED,
    FREE,
    HANDED,
    HANDED_OUT,
    HELD,
    HELD_LIST,
    IN_FLIGHT,
    INTERIOR,
    KIND_MASK,
    MT_MASK,
    MT_SHIFT,
    N_PCP_LISTS,
    ON_PCP,
    ORDER_MASK,
    REPORTED,
    TRIGGER_BITMAP,
    W_BOUNDARY,
    W_FREE_PAGES,
    W_HELD_BLOCKS,
    W_HELD_PAGES,
    W_IN_FLIGHT_BLOCKS,
    W_IN_FLIGHT_PAGES,
    W_IN_HAND,
    W_IN_HAND_BEFORE,
    W_IN_HAND_HEAD,
    W_ISOLATED_PAGES,
    W_MIN_ORDER,
    W_N_PAGES,
    W_NR_FREE,
    W_POLICY_WORDS,
    W_RANDOM_STATE,
    W_REFCNT,
    W_REPAIRS,
    W_REPORTED,
    W_REQUESTED,
    W_ROTATED,
    W_TRIGGER,
    W_WORK,
    ZEROED,
)
from common.native import barrier, kernel, semaphore_post, word_address
from guest.allocator.asks import drop_lost_asks
from guest.allocator.buddy import FPI_NONE, account_free, free_one, is_free_head, pageblock_type
from guest.allocator.lists import del_page_from_free_list, free_list_head, link_after, link_before, next_node
from guest.allocator.owners import journal_clear
from guest.allocator.slots import cpu_slot, pcp_list_head, pcp_list_index
from guest.allocator.view import bitmap_of, ctl_of, links_of, pages_of

__all__ = ["empty_lists", "rebuild_slot", "rebuild_zone", "recount_hint_bits"]

MOVABLE = int(Migratetype.MOVABLE)
ISOLATE = int(Migratetype.ISOLATE)
MT_FIELD = 0x7


@kernel
def empty_lists(zone):  # type: ignore[no-untyped-def]
    """Make every free list empty, with its boundary at its head, and zero the counters that follow from the lists."""
    for order in range(N_ORDERS):
        ctl_of(zone)[W_NR_FREE + order] = 0
        ctl_of(zone)[W_REPORTED + order] = 0
        ctl_of(zone)[W_ROTATED + order] = 0
        for migratetype in range(N_MIGRATETYPES):
            head = free_list_head(zone, order, migratetype)
            links_of(zone)[2 * head] = head
            links_of(zone)[2 * head + 1] = head
            ctl_of(zone)[W_BOUNDARY + migratetype * N_ORDERS + order] = head
    held = ctl_of(zone)[W_N_PAGES] + HELD_LIST
    links_of(zone)[2 * held] = held
    links_of(zone)[2 * held + 1] = held
    ctl_of(zone)[W_HELD_PAGES] = 0
    ctl_of(zone)[W_HELD_BLOCKS] = 0
    ctl_of(zone)[W_FREE_PAGES] = 0
    ctl_of(zone)[W_ISOLATED_PAGES] = 0
    ctl_of(zone)[W_IN_FLIGHT_PAGES] = 0
    ctl_of(zone)[W_IN_FLIGHT_BLOCKS] = 0


@kernel
def relink_free_block(zone, pfn, state):  # type: ignore[no-untyped-def]
    """Put a free head back on the list that its state names: unreported in front, Reported at the boundary.

    Death in the midst of an isolation leaves heads whose state disagrees with their pageblock: the pageblock is right.
    """
    order = state & ORDER_MASK
    migratetype = (state >> MT_SHIFT) & MT_FIELD
    block_type = pageblock_type(zone, pfn)
    if (migratetype == ISOLATE) != (block_type == ISOLATE):
        migratetype = block_type
        state = FREE | order | (migratetype << MT_SHIFT) | (state & ZEROED)
        pages_of(zone)[pfn] = state
    head = free_list_head(zone, order, migratetype)
    if state & REPORTED:
        word = W_BOUNDARY + migratetype * N_ORDERS + order
        link_before(zone, pfn, ctl_of(zone)[word])
        ctl_of(zone)[word] = pfn
        ctl_of(zone)[W_REPORTED + order] += 1
    else:
        link_after(zone, pfn, head)
    ctl_of(zone)[W_NR_FREE + order] += 1
    account_free(zone, 1 << order, migratetype)


@kernel
def rebuild_zone(zone):  # type: ignore[no-untyped-def]
    """Rebuild all free lists and counters from the page records; zone lock held (EOWNERDEAD). Walks every page.

    Every list has the shape U* R* afterwards, so a run in progress goes on with its boundaries at the first R. Should
    the repairer die as well, the next one begins anew: nothing here is done that cannot be done twice.
    """
    drop_from_hand(zone)
    empty_lists(zone)
    n_pages = ctl_of(zone)[W_N_PAGES]
    orphans = False
    pfn = np.int64(0)
    while pfn < n_pages:
        state = np.int64(pages_of(zone)[pfn])
        kind = state & KIND_MASK
        if kind == FREE and state & HANDED:  # the host may be discarding it: it is nobody's until that is over (S5)
            pages_of(zone)[pfn] = IN_FLIGHT | (state & (ORDER_MASK | MT_MASK | ZEROED))
            kind = np.int64(IN_FLIGHT)
        if kind == FREE:
            relink_free_block(zone, pfn, state)
        elif kind == IN_FLIGHT:
            ctl_of(zone)[W_IN_FLIGHT_BLOCKS] += 1
            ctl_of(zone)[W_IN_FLIGHT_PAGES] += 1 << (state & ORDER_MASK)
        elif kind == HELD:
            link_before(zone, pfn, n_pages + HELD_LIST)
            ctl_of(zone)[W_HELD_BLOCKS] += 1
            ctl_of(zone)[W_HELD_PAGES] += 1 << (state & ORDER_MASK)
        elif kind == INTERIOR:
            orphans = True
        pfn += 1 << (state & ORDER_MASK)
    drop_lost_asks(zone)
    if orphans:
        free_orphans(zone)
    merge_buddies(zone)
    if ctl_of(zone)[W_TRIGGER] == TRIGGER_BITMAP:
        recount_hint_bits(zone)
    ctl_of(zone)[W_REFCNT] = ctl_of(zone)[W_REQUESTED]
    if ctl_of(zone)[W_REQUESTED]:
        # SAFETY: the semaphore lies in the mapped header. One post too many is taken back when a run ends.
        semaphore_post(word_address(zone.ctl, W_WORK))
    journal_clear(zone)
    ctl_of(zone)[W_REPAIRS] += 1


@kernel
def drop_from_hand(zone):  # type: ignore[no-untyped-def]
    """What the dead owner had in its hands becomes nobody's, and no per-CPU list leads to it. Zone lock held.

    The list is that of a slot which is locked by the dead one too, so nobody else follows it now.
    """
    pfn = ctl_of(zone)[W_IN_HAND] - 1
    if pfn < 0 or pfn >= zone.n_pages:
        return
    kind = np.int64(pages_of(zone)[pfn]) & KIND_MASK
    before = ctl_of(zone)[W_IN_HAND_BEFORE]
    if kind != ON_PCP and before >= 0 and next_node(zone, before) == pfn:
        links_of(zone)[2 * before] = ctl_of(zone)[W_IN_HAND_HEAD]
    if kind == ALLOCATED:
        pages_of(zone)[pfn] = INTERIOR


@kernel
def recount_hint_bits(zone):  # type: ignore[no-untyped-def]
    """Count the set bits of the reporting bitmap anew: the first of its policy's words. Zone lock held."""
    bitmap = bitmap_of(zone)
    n_bits = zone.n_pages >> ctl_of(zone)[W_MIN_ORDER]
    count = np.int64(0)
    for index in range((n_bits + 7) >> 3):
        rest = np.int64(bitmap[index])
        while rest:
            count += rest & 1
            rest >>= 1
    ctl_of(zone)[W_POLICY_WORDS] = count


@kernel
def free_orphans(zone):  # type: ignore[no-untyped-def]
    """Free each page that no block covers; merging makes whole blocks of them again. Zone lock held.

    Nobody knows what the dead owner did with them: none is zeroed (Z1).
    """
    n_pages = ctl_of(zone)[W_N_PAGES]
    pfn = np.int64(0)
    while pfn < n_pages:
        state = np.int64(pages_of(zone)[pfn])
        if state & KIND_MASK == INTERIOR:
            became, order = free_one(
                zone, pfn, np.int64(0), pageblock_type(zone, pfn), FPI_NONE, np.int64(W_RANDOM_STATE)
            )
            pfn = became + (1 << order)
        else:
            pfn += 1 << (state & ORDER_MASK)


@kernel
def merge_buddies(zone):  # type: ignore[no-untyped-def]
    """Merge free buddies that death kept apart (between a split and the end of what it was for). Zone lock held."""
    pfn = np.int64(0)
    while pfn < zone.n_pages:
        state = np.int64(pages_of(zone)[pfn])
        order = state & ORDER_MASK
        buddy = pfn ^ (1 << order)
        if state & KIND_MASK == FREE and order < TOP_ORDER and is_free_head(zone, buddy, order):
            migratetype = pageblock_type(zone, pfn)
            if (migratetype == ISOLATE) == (pageblock_type(zone, buddy) == ISOLATE):
                zeroed = del_page_from_free_list(zone, pfn, order)
                account_free(zone, -(1 << order), (state >> MT_SHIFT) & MT_FIELD)
                free_one(zone, pfn, order, migratetype, FPI_NONE | zeroed, np.int64(W_RANDOM_STATE))
        pfn += 1 << order


@kernel
def rebuild_slot(zone, cpu):  # type: ignore[no-untyped-def]
    """Mend a per-CPU slot whose owner died in it: backward links and count follow from the forward chains.

    Slot lock held, and the zone lock, so that a death in both has been repaired there before. A block on the chain that
    is still claimed was being freed: it is one of the list. One that is allocated was being handed out: the journal
    names it, and it goes back. Any other ends the chain.
    """
    slot = cpu_slot(cpu)
    count = np.int64(0)
    for index in range(N_PCP_LISTS):
        head = pcp_list_head(zone, cpu, index)
        last = head
        node = next_node(zone, head)
        while node < ctl_of(zone)[W_N_PAGES]:
            state = np.int64(pages_of(zone)[node])
            if state & (KIND_MASK | CLAIMED) == ALLOCATED | CLAIMED:
                state = ON_PCP | (state & (ORDER_MASK | MT_MASK))
                pages_of(zone)[node] = state
            if state & KIND_MASK == ON_PCP:
                links_of(zone)[2 * last] = node
                links_of(zone)[2 * node + 1] = last
                count += 1 << (state & ORDER_MASK)
                last = node
            elif state & KIND_MASK != ALLOCATED:
                break
            node = next_node(zone, node)
        links_of(zone)[2 * last] = head
        links_of(zone)[2 * head + 1] = last
    count += put_hand_back(zone, cpu, ctl_of(zone)[slot + C_IN_HAND] - 1)
    ctl_of(zone)[slot + C_COUNT] = count
    barrier()
    ctl_of(zone)[slot + C_IN_HAND] = 0


@kernel
def put_hand_back(zone, cpu, record):  # type: ignore[no-untyped-def]
    """List the block of a slot's journal if no list has it: nobody got it, or its owner had given it up. Its pages."""
    pfn = record >> 1
    if record < 0 or pfn >= zone.n_pages:
        return np.int64(0)
    state = np.int64(pages_of(zone)[pfn])
    left_over = state & (KIND_MASK | CLAIMED) == ALLOCATED | CLAIMED
    if record & 1 == HANDED_OUT:
        left_over = state & (KIND_MASK | CLAIMED) == ALLOCATED
    if not left_over:
        return np.int64(0)
    order = state & ORDER_MASK
    migratetype = pageblock_type(zone, pfn)  # as free_pages; what it was allocated for may have no such list
    if migratetype >= PCP_MIGRATETYPES:
        migratetype = np.int64(MOVABLE)
    kept = state & ZEROED if record & 1 == HANDED_OUT else np.int64(0)  # what its owner had has lost it (Z3)
    link_after(zone, pfn, pcp_list_head(zone, cpu, pcp_list_index(order, migratetype)))
    barrier()
    pages_of(zone)[pfn] = ON_PCP | order | (migratetype << MT_SHIFT) | kept
    return np.int64(1) << order
