"""Page and demand replay: what the recording allocated and freed, through the per-CPU lists of our own allocator.

In a page replay every allocation is of the very pages that were recorded: from the per-CPU list that has them, else out
of the free block that holds them, and then the list is filled up by a batch as the kernel does. In a demand replay the
allocator chooses. A page in use is recorded as a block of order 0, as in ``lab.replay.kernels``, so that what is freed
need not be what was allocated. The frees are the production ones.
"""

from __future__ import annotations

import numpy as np

from common.geometry import N_ORDERS, PCP_MIGRATETYPES, Migratetype
from common.layout import (
    ALLOCATED,
    C_COUNT,
    FREE,
    INTERIOR,
    KIND_MASK,
    MT_SHIFT,
    ON_PCP,
    ORDER_MASK,
    W_RANDOM_STATE,
    W_REQUESTED,
)
from common.native import kernel
from guest.allocator.buddy import FPI_NONE, free_one, pageblock_type
from guest.allocator.lists import free_list_head, next_node, unlink
from guest.allocator.locked import ALLOC_NO_WATERMARKS
from guest.allocator.percpu import alloc_pages, free_pages, has_pcp_list, refill
from guest.allocator.slots import cpu_slot, pcp_list_head, pcp_list_index
from guest.allocator.view import ctl_of, open_zone, pages_of, residence_of
from lab.replay.kernels import (
    C_FAILED,
    C_NOT_FREE,
    C_NOT_USED,
    MT_FIELD,
    OP_ALLOC,
    containing_block,
    take_pages,
    touch,
)

__all__ = ["NOWHERE", "apply_by_demand", "apply_by_page"]

MOVABLE = int(Migratetype.MOVABLE)
NOWHERE = -1


@kernel
def in_use(zone, pfn, order, migratetype):  # type: ignore[no-untyped-def]
    """These pages are allocated, each by itself."""
    for page in range(pfn, pfn + (1 << order)):
        pages_of(zone)[page] = ALLOCATED | (migratetype << MT_SHIFT)


@kernel
def free_block(zone, cpu, pfn, order):  # type: ignore[no-untyped-def]
    """Free pages that are in use one by one as one block: onto the list of ``cpu``, or to the zone (free_pages)."""
    if order:
        pages_of(zone)[pfn] = np.int64(pages_of(zone)[pfn]) | order
        for page in range(pfn + 1, pfn + (1 << order)):
            pages_of(zone)[page] = INTERIOR
    free_pages(zone, cpu, pfn, order)


@kernel
def listed_block(zone, pfn):  # type: ignore[no-untyped-def]
    """(pfn, order) of the block on a per-CPU list that holds ``pfn``; -1, 0 if none does."""
    current = 0
    while current < N_ORDERS:
        head = pfn & ~((1 << current) - 1)
        state = np.int64(pages_of(zone)[head])
        if state & KIND_MASK == ON_PCP and state & ORDER_MASK >= current:
            return head, state & ORDER_MASK
        current += 1
    return np.int64(-1), np.int64(0)


@kernel
def off_list(zone, slots, head, order):  # type: ignore[no-untyped-def]
    """Take the block at ``head`` off its per-CPU list. ``slots``: int16 a page, whose list a listed block is on."""
    unlink(zone, head)
    ctl_of(zone)[cpu_slot(np.int64(slots[head])) + C_COUNT] -= 1 << order


@kernel
def drain_listed(zone, slots, pfn, order):  # type: ignore[no-untyped-def]
    """Give back to the zone whatever of these pages is on per-CPU lists."""
    page = pfn
    while page < pfn + (1 << order):
        head, listed = listed_block(zone, page)
        if head < 0:
            page += 1
            continue
        off_list(zone, slots, head, listed)
        pages_of(zone)[head] = INTERIOR
        free_one(zone, head, listed, pageblock_type(zone, head), FPI_NONE, np.int64(W_RANDOM_STATE))
        page = head + (1 << listed)


@kernel
def fill_list(zone, slots, cpu, order, migratetype):  # type: ignore[no-untyped-def]
    """Fill an empty per-CPU list by a batch: the recorded CPU has just had to go to the zone (rmqueue_bulk)."""
    head = pcp_list_head(zone, cpu, pcp_list_index(order, migratetype))
    if next_node(zone, head) != head:
        return
    refill(zone, cpu_slot(cpu), head, order, migratetype, 0)
    node = next_node(zone, head)
    while node != head:
        slots[node] = cpu
        node = next_node(zone, node)


@kernel
def next_of_zone(zone, order, migratetype):  # type: ignore[no-untyped-def]
    """The page that the zone would hand out next from the lists of ``migratetype``, -1 if they are empty."""
    current = order
    while current < N_ORDERS:
        head = free_list_head(zone, current, migratetype)
        node = next_node(zone, head)
        if node != head:
            return np.int64(node)
        current += 1
    return np.int64(-1)


@kernel
def take_page(zone, slots, cpu, pfn, order, migratetype, counts):  # type: ignore[no-untyped-def]
    """Allocate exactly these pages, wherever they are free; what of them is in use stays so and is counted.

    If the zone would hand them out next it fills the list, as the kernel does, and they are the first of the batch.
    """
    has_list = has_pcp_list(zone, cpu, order, migratetype)
    if has_list and next_of_zone(zone, order, migratetype) == pfn:
        fill_list(zone, slots, cpu, order, migratetype)
    head, listed = listed_block(zone, pfn)
    if head == pfn and listed == order:
        off_list(zone, slots, head, order)
        in_use(zone, pfn, order, migratetype)
        return
    head, state = containing_block(zone, pfn, order)
    if head < 0 or state & KIND_MASK != FREE:
        drain_listed(zone, slots, pfn, order)
        head, state = containing_block(zone, pfn, order)
    was = pageblock_type(zone, pfn) if head < 0 else (state >> MT_SHIFT) & MT_FIELD
    take_pages(zone, pfn, order, was, counts)
    if has_list:
        fill_list(zone, slots, cpu, order, migratetype)


@kernel
def give_page(zone, slots, cpu, pfn, order, counts):  # type: ignore[no-untyped-def]
    """Free exactly these pages; if some of them are free already, the others one by one."""
    used = 0
    for page in range(pfn, pfn + (1 << order)):
        if np.int64(pages_of(zone)[page]) & KIND_MASK == ALLOCATED:
            used += 1
    if used == 1 << order:
        slots[pfn] = cpu
        free_block(zone, cpu, pfn, order)
        return
    counts[C_NOT_USED] += (1 << order) - used
    for page in range(pfn, pfn + (1 << order)):
        if np.int64(pages_of(zone)[page]) & KIND_MASK == ALLOCATED:
            slots[page] = cpu
            free_block(zone, cpu, page, np.int64(0))


@kernel
def bound_type(migratetype):  # type: ignore[no-untyped-def]
    """A type that can be asked for: MOVABLE where the event tells none that is."""
    return migratetype if 0 <= migratetype < PCP_MIGRATETYPES else np.int64(MOVABLE)


@kernel
def apply_by_page(address, ops, cpus, pfns, orders, types, slots, row, end, stop, repeats, counts):  # type: ignore[no-untyped-def]
    """As ``kernels.apply``, of a plan of OP_ALLOC and OP_FREE.

    Args:
        cpus: column of the plan. slots: as ``off_list``.
        repeats: frees may be told twice; one of pages that are free is not counted.
    """
    zone = open_zone(address)
    residence = residence_of(zone)
    while row < end:
        cpu, pfn, order = np.int64(cpus[row]), np.int64(pfns[row]), np.int64(orders[row])
        allocates, migratetype = ops[row] == OP_ALLOC, np.int64(types[row])
        row += 1
        if allocates:
            take_page(zone, slots, cpu, pfn, order, bound_type(migratetype), counts)
            touch(residence, pfn, order, counts)
            continue
        before = counts[C_NOT_USED]
        give_page(zone, slots, cpu, pfn, order, counts)
        if repeats:
            counts[C_NOT_USED] = before
        if stop and ctl_of(zone)[W_REQUESTED]:
            break
    return row


@kernel
def give_demanded(zone, where, cpu, pfn, order, counts):  # type: ignore[no-untyped-def]
    """Free what stands for these recorded pages, as one block if it is one."""
    ours = np.int64(where[pfn])
    whole = ours >= 0 and ours & ((1 << order) - 1) == 0
    for index in range(1, 1 << order):
        whole = whole and where[pfn + index] == ours + index
    if whole:
        where[pfn : pfn + (1 << order)] = NOWHERE
        free_block(zone, cpu, ours, order)
        return
    for page in range(pfn, pfn + (1 << order)):
        ours = np.int64(where[page])
        if ours < 0:
            counts[C_NOT_USED] += 1
            continue
        where[page] = NOWHERE
        free_block(zone, cpu, ours, np.int64(0))


@kernel
def take_demanded(zone, where, cpu, pfn, order, migratetype, counts):  # type: ignore[no-untyped-def]
    """Allocate as many pages, wherever our allocator has them; the first of them, or a code.

    It must not fail for a watermark: the recorded guest had the memory. What still stood for these pages was freed
    without an event, and is freed now.
    """
    for page in range(pfn, pfn + (1 << order)):
        if where[page] >= 0:
            counts[C_NOT_FREE] += 1
            give_demanded(zone, where, cpu, page, np.int64(0), counts)
    ours = alloc_pages(zone, cpu, order, migratetype, ALLOC_NO_WATERMARKS)
    if ours < 0:
        counts[C_FAILED] += 1 << order
        return ours
    in_use(zone, ours, order, migratetype)
    for index in range(1 << order):
        where[pfn + index] = ours + index
    return ours


@kernel
def apply_by_demand(address, ops, cpus, pfns, orders, types, where, row, end, stop, repeats, counts):  # type: ignore[no-untyped-def]
    """As ``apply_by_page``, with the pages chosen by our allocator.

    Args:
        where: int32, for each recorded page the page of ours that stands for it, NOWHERE while it is free.
    """
    zone = open_zone(address)
    residence = residence_of(zone)
    while row < end:
        cpu, pfn, order = np.int64(cpus[row]), np.int64(pfns[row]), np.int64(orders[row])
        allocates, migratetype = ops[row] == OP_ALLOC, np.int64(types[row])
        row += 1
        if allocates:
            ours = take_demanded(zone, where, cpu, pfn, order, bound_type(migratetype), counts)
            if ours >= 0:
                touch(residence, ours, order, counts)
            continue
        before = counts[C_NOT_USED]
        give_demanded(zone, where, cpu, pfn, order, counts)
        if repeats:
            counts[C_NOT_USED] = before
        if stop and ctl_of(zone)[W_REQUESTED]:
            break
    return row
