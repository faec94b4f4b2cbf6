"""Per-CPU lists (struct per_cpu_pages): order 0 to 3 and pageblock order, in front of the zone lock.

A slot belongs to one vCPU thread. Its lock is uncontended but for a drain by somebody else, and comes before the zone
lock. ``count`` and ``pcp_high`` are in pages, as in the kernel.
"""

from __future__ import annotations

import numpy as np

from common.faults import NUMBERS
from common.geometry import PAGEBLOCK_ORDER, PCP_MIGRATETYPES, Migratetype
from common.layout import (
    ALLOCATED,
    C_ALLOCATIONS,
    C_COUNT,
    C_DRAINS,
    C_FREES,
    C_IN_HAND,
    C_LOCK,
    C_RANDOM_STATE,
    C_REFILLS,
    CLAIMED,
    HANDED_OUT,
    INTERIOR,
    MT_SHIFT,
    N_ASKS,
    N_PCP_LISTS,
    ON_PCP,
    ORDER_MASK,
    PCP_LOW_ORDERS,
    TAKEN_IN,
    W_FAILED_ALLOCATIONS,
    W_HELD_BLOCKS,
    W_N_CPUS,
    W_PCP_BATCH,
    W_PCP_HIGH,
    ZEROED,
)
from common.native import (
    barrier,
    exchange_i64,
    fault_point,
    kernel,
    load_i64,
    prefetch,
    sleep_us,
    store_i64,
    thread_is_gone,
)
from guest.allocator.asks import ASK, AWAITED, asks_pending, begin_ask
from guest.allocator.buddy import FPI_NONE, NOT_THERE, is_free_head, pageblock_type
from guest.allocator.install import FULL_WAITS, wait_for_ask, wait_for_install
from guest.allocator.lists import link_after, next_node, previous_node, unlink
from guest.allocator.locked import (
    E_DOUBLE_FREE,
    E_LOCK,
    E_NO_MEMORY,
    E_OUT_OF_RANGE,
    allocated_state,
    buddy_alloc,
    buddy_free,
    claim_block,
    lock_zone,
    take_pages,
    take_under_pressure,
    unlock_zone,
)
from guest.allocator.owners import journal_clear, journal_link, mark_owner
from guest.allocator.pageblocks import free_across_pageblocks
from guest.allocator.repair import rebuild_slot
from guest.allocator.slots import cpu_slot, pcp_list_head, pcp_list_index
from guest.allocator.view import ctl_of, links_of, open_zone, pages_of

__all__ = ["alloc_pages", "cpu_slot", "drain_slot", "free_pages", "lock_slot", "pcp_list_head", "unlock_slot"]

MOVABLE = int(Migratetype.MOVABLE)
PATIENCE = 200  # tries before a waiter looks whether the owner lives, and sleeps
WAIT_US = 50
REFILL_LINKED, REFILL_LISTED = NUMBERS["refill.linked"], NUMBERS["refill.listed"]
OUT_ALLOCATED, OUT_UNLINKED = NUMBERS["hand-out.allocated"], NUMBERS["hand-out.unlinked"]
OUT_OWNED = NUMBERS["hand-out.owned"]
IN_CLAIMED, IN_LINKED, IN_LISTED = NUMBERS["take-in.claimed"], NUMBERS["take-in.linked"], NUMBERS["take-in.listed"]
DRAIN_INTERIOR, DRAIN_UNLINKED = NUMBERS["drain.interior"], NUMBERS["drain.unlinked"]
DRAIN_FREED = NUMBERS["drain.freed"]


@kernel
def has_pcp_list(zone, cpu, order, migratetype):  # type: ignore[no-untyped-def]
    """pcp_allowed_order, and a type that has per-CPU lists, and the lists are on, and the CPU is one."""
    if cpu < 0 or cpu >= ctl_of(zone)[W_N_CPUS] or ctl_of(zone)[W_PCP_BATCH] == 0 or migratetype >= PCP_MIGRATETYPES:
        return False
    return order < PCP_LOW_ORDERS or order == PAGEBLOCK_ORDER


@kernel
def lock_slot(zone, cpu):  # type: ignore[no-untyped-def]
    """Take a slot's lock; when its owner died in it, rebuild the slot's lists first, under the zone lock.

    One word that holds the owner's thread id, taken by one atomic exchange and released by one store: a third of what
    the robust mutex costs, and on the path of every allocation. The slot's own thread takes it uncontended; only a
    drain or a walk by somebody else makes anyone wait, and then for a bounded piece of work.
    """
    address = zone.ctl + 8 * (cpu_slot(cpu) + C_LOCK)
    tries = 0
    while not exchange_i64(address, np.int64(0), zone.thread):
        tries += 1
        if tries % PATIENCE == 0:
            owner = load_i64(address)
            # Nobody waits for himself: a lock in this thread's own name is that of a dead one who had its number.
            gone = owner == zone.thread or (owner != 0 and thread_is_gone(owner))
            if gone and exchange_i64(address, owner, zone.thread):
                # The zone first, where its owner died in both: what it had in its hands may be on the slot's lists.
                sound = lock_zone(zone)
                rebuild_slot(zone, cpu)
                if sound:
                    unlock_zone(zone)
                return
            sleep_us(WAIT_US)


@kernel
def unlock_slot(zone, cpu):  # type: ignore[no-untyped-def]
    """Release a slot's lock."""
    store_i64(zone.ctl + 8 * (cpu_slot(cpu) + C_LOCK), np.int64(0))


@kernel
def refill(zone, slot, head, order, migratetype, flags):  # type: ignore[no-untyped-def]
    """Move a batch of blocks from the zone to a per-CPU list under one hold of the zone lock (rmqueue_bulk).

    Returns how many blocks, E_LOCK, AWAITED, or the code of ``begin_ask`` when the first one is not there. Slot lock
    held.
    """
    wanted = max(ctl_of(zone)[W_PCP_BATCH] >> order, 2)
    if not lock_zone(zone):
        return np.int64(E_LOCK)
    taken = np.int64(0)
    last = previous_node(zone, head)
    while taken < wanted:
        pfn = take_pages(zone, order, migratetype, flags)
        if pfn == E_NO_MEMORY and taken == 0 and ctl_of(zone)[W_HELD_BLOCKS]:
            pfn = take_under_pressure(zone, order, migratetype, flags)
            if pfn == E_LOCK:
                return pfn
        if pfn <= NOT_THERE and taken == 0:
            asked = begin_ask(zone, NOT_THERE - pfn)
            unlock_zone(zone)
            return asked
        if pfn == E_NO_MEMORY and taken == 0 and asks_pending(zone):
            unlock_zone(zone)
            return np.int64(AWAITED)
        if pfn < 0:
            break
        # The forward chain is whole after each block, for rebuild_slot; the head's backward link follows at the end.
        journal_link(zone, pfn, last, head)
        links_of(zone)[2 * pfn] = head
        links_of(zone)[2 * pfn + 1] = last
        barrier()
        links_of(zone)[2 * last] = pfn
        fault_point(REFILL_LINKED)
        barrier()  # on the list first: a block that says so and is on none would be lost
        zeroed = np.int64(pages_of(zone)[pfn]) & ZEROED
        pages_of(zone)[pfn] = ON_PCP | order | (migratetype << MT_SHIFT) | zeroed
        fault_point(REFILL_LISTED)
        last = pfn
        taken += 1
    journal_clear(zone)
    links_of(zone)[2 * head + 1] = last
    if taken == 0:
        ctl_of(zone)[W_FAILED_ALLOCATIONS] += 1
    unlock_zone(zone)
    ctl_of(zone)[slot + C_COUNT] += taken << order
    ctl_of(zone)[slot + C_REFILLS] += 1
    return taken


@kernel
def prefetch_tail(zone, head, blocks):  # type: ignore[no-untyped-def]
    """Ask for the records that draining ``blocks`` blocks from the tail will touch (prefetch_buddy, taken further).

    A block's own record and its buddy's mostly share a line that was written when the block was freed. What misses
    are the neighbours of a buddy that is about to be taken off its list: asked for here, a batch's misses overlap. What
    is read without the zone lock may be stale and serves as a hint only.
    """
    # SAFETY: a prefetch never faults. The slot lock keeps this list as it is; nodes read are in bounds.
    node = previous_node(zone, head)
    while blocks > 0 and node != head:
        order = np.int64(pages_of(zone)[node]) & ORDER_MASK
        buddy = node ^ (1 << order)
        if is_free_head(zone, buddy, order):
            prefetch(zone.link + 8 * next_node(zone, buddy))
            prefetch(zone.link + 8 * previous_node(zone, buddy))
        node = previous_node(zone, node)
        blocks -= 1


@kernel
def drain_blocks(zone, cpu, index, pages):  # type: ignore[no-untyped-def]
    """Give at least ``pages`` pages of a slot back to the zone, coldest first, list by list from ``index`` on, under
    one hold of the zone lock (free_pcppages_bulk). 0 or E_LOCK. Slot lock held.
    """
    slot = cpu_slot(cpu)
    wanted = min(pages, ctl_of(zone)[slot + C_COUNT])
    left = wanted
    prefetch_tail(
        zone,
        pcp_list_head(zone, cpu, index),
        left >> (np.int64(index) // PCP_MIGRATETYPES if index < N_PCP_LISTS - 2 else PAGEBLOCK_ORDER),
    )
    if not lock_zone(zone):
        return E_LOCK
    for step in range(N_PCP_LISTS):
        head = pcp_list_head(zone, cpu, (index + step) % N_PCP_LISTS)
        pfn = previous_node(zone, head)
        while left > 0 and pfn != head:
            state = np.int64(pages_of(zone)[pfn])
            order = state & ORDER_MASK
            before = previous_node(zone, pfn)
            journal_link(zone, pfn, before, head)
            pages_of(zone)[pfn] = INTERIOR  # rebuild_zone takes it off the list, and frees it
            fault_point(DRAIN_INTERIOR)
            barrier()
            links_of(zone)[2 * before] = head
            fault_point(DRAIN_UNLINKED)
            # A block that a refill brought and nobody was handed is as zero as it came (Z2).
            free_across_pageblocks(zone, pfn, order, FPI_NONE | (state & ZEROED), slot + C_RANDOM_STATE)
            fault_point(DRAIN_FREED)
            left -= 1 << order
            pfn = before
        links_of(zone)[2 * head + 1] = pfn
        if left <= 0:
            break
    journal_clear(zone)
    ctl_of(zone)[slot + C_COUNT] -= wanted - left
    ctl_of(zone)[slot + C_DRAINS] += 1
    unlock_zone(zone)
    return 0


@kernel
def alloc_pages(zone, cpu, order, migratetype, flags):  # type: ignore[no-untyped-def]
    """``alloc_there``, and where a host has to populate a block first, wait for that without a lock and try again."""
    pfn = alloc_there(zone, cpu, order, migratetype, flags)
    waits = np.int64(0)
    while pfn <= ASK:
        if pfn == AWAITED and waits >= FULL_WAITS:
            return fail_after_waiting(zone)
        if pfn <= ASK - N_ASKS:
            alive = wait_for_ask(zone, waits)
            waits += 1
        else:
            alive = wait_for_install(zone, ASK - pfn)
        if not alive:
            return np.int64(E_LOCK)
        pfn = alloc_there(zone, cpu, order, migratetype, flags)
    return pfn


@kernel
def fail_after_waiting(zone):  # type: ignore[no-untyped-def]
    """There was no memory for as long as asks are waited for. E_NO_MEMORY or E_LOCK."""
    if not lock_zone(zone):
        return np.int64(E_LOCK)
    ctl_of(zone)[W_FAILED_ALLOCATIONS] += 1
    unlock_zone(zone)
    return np.int64(E_NO_MEMORY)


@kernel
def alloc_there(zone, cpu, order, migratetype, flags):  # type: ignore[no-untyped-def]
    """Allocate 2**order pages, from the per-CPU list where there is one (rmqueue_pcplist). A pfn, a code,
    AWAITED, or that of ``begin_ask``.

    The watermark is checked when a list is refilled, not on each hit.
    """
    if not has_pcp_list(zone, cpu, order, migratetype):
        return buddy_alloc(zone, cpu, order, migratetype, flags)
    lock_slot(zone, cpu)
    slot = cpu_slot(cpu)
    head = pcp_list_head(zone, cpu, pcp_list_index(order, migratetype))
    pfn = next_node(zone, head)
    if pfn == head:
        taken = refill(zone, slot, head, order, migratetype, flags)
        if taken <= 0:
            unlock_slot(zone, cpu)
            return np.int64(E_NO_MEMORY) if taken == 0 else np.int64(taken)
        pfn = next_node(zone, head)
    ctl_of(zone)[slot + C_IN_HAND] = (pfn << 1 | HANDED_OUT) + 1
    barrier()  # from here to the end it is nobody's but the journal's
    zeroed = np.int64(pages_of(zone)[pfn]) & ZEROED  # the owner's first use takes it off (Z3)
    pages_of(zone)[pfn] = ALLOCATED | order | (migratetype << MT_SHIFT) | zeroed
    fault_point(OUT_ALLOCATED)
    barrier()
    unlink(zone, pfn)
    fault_point(OUT_UNLINKED)
    mark_owner(zone, pfn, cpu)
    fault_point(OUT_OWNED)
    ctl_of(zone)[slot + C_COUNT] -= 1 << order
    ctl_of(zone)[slot + C_ALLOCATIONS] += 1
    barrier()
    ctl_of(zone)[slot + C_IN_HAND] = 0
    unlock_slot(zone, cpu)
    return pfn


@kernel
def free_pages(zone, cpu, pfn, order):  # type: ignore[no-untyped-def]
    """Free a block, onto the per-CPU list where there is one (free_unref_page). 0 or a code.

    A block of an isolated pageblock goes straight to the zone, and so does one whose migratetype has no such list. What
    was handed out is not zeroed any more, used or not (Z3).
    """
    state = allocated_state(zone, pfn, order)
    if state < 0:
        return state
    prefetch(zone.link + 8 * pfn)  # written under the slot lock, whose release would wait for the miss
    if not has_pcp_list(zone, cpu, order, pageblock_type(zone, pfn)):
        return buddy_free(zone, pfn, order)
    lock_slot(zone, cpu)
    # Once more: who isolates sets the type first, and drains this slot then. What was read before the lock may be
    # stale, and a block put on a list after that drain would be handed out (S9).
    migratetype = pageblock_type(zone, pfn)
    if not has_pcp_list(zone, cpu, order, migratetype):
        unlock_slot(zone, cpu)
        return buddy_free(zone, pfn, order)
    slot = cpu_slot(cpu)
    ctl_of(zone)[slot + C_IN_HAND] = (pfn << 1 | TAKEN_IN) + 1
    if not claim_block(zone, pfn, state, state | CLAIMED):
        ctl_of(zone)[slot + C_IN_HAND] = 0
        unlock_slot(zone, cpu)
        return np.int64(E_DOUBLE_FREE)
    fault_point(IN_CLAIMED)
    code = np.int64(0)
    index = pcp_list_index(order, migratetype)
    link_after(zone, pfn, pcp_list_head(zone, cpu, index))
    fault_point(IN_LINKED)
    barrier()  # on the list first, as in refill
    pages_of(zone)[pfn] = ON_PCP | order | (migratetype << MT_SHIFT)
    fault_point(IN_LISTED)
    ctl_of(zone)[slot + C_COUNT] += 1 << order
    ctl_of(zone)[slot + C_FREES] += 1
    barrier()
    ctl_of(zone)[slot + C_IN_HAND] = 0
    if ctl_of(zone)[slot + C_COUNT] >= ctl_of(zone)[W_PCP_HIGH]:
        code = np.int64(drain_blocks(zone, cpu, index, ctl_of(zone)[W_PCP_BATCH]))
    unlock_slot(zone, cpu)
    return code


@kernel
def drain_slot(address, cpu):  # type: ignore[no-untyped-def]
    """Give every page of a slot back to the zone (drain_pages). Pages given back, or a code."""
    zone = open_zone(address)
    if cpu < 0 or cpu >= ctl_of(zone)[W_N_CPUS]:
        return np.int64(E_OUT_OF_RANGE)
    lock_slot(zone, cpu)
    pages = ctl_of(zone)[cpu_slot(cpu) + C_COUNT]
    code = 0
    if pages > 0:
        code = drain_blocks(zone, cpu, 0, pages)
    unlock_slot(zone, cpu)
    return pages if code == 0 else np.int64(code)
