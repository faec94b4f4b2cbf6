"""The zone lock around the allocator: each kernel here locks, works, unlocks, and cannot raise in between.

Answers are codes: a pfn or an order where that is the result, 0 for done, or one of the negative ``E_`` values.
"""

from __future__ import annotations

import numpy as np

from common.faults import NUMBERS
from common.geometry import PAGEBLOCK_ORDER, TOP_ORDER
from common.layout import (
    ALLOCATED,
    CLAIMED,
    FREE,
    HEAD_MASK,
    INTERIOR,
    MT_SHIFT,
    N_FREE_LISTS,
    ORDER_MASK,
    W_ALLOCATIONS,
    W_BOUNDARY,
    W_FAILED_ALLOCATIONS,
    W_FREE_PAGES,
    W_FREES,
    W_HELD_BLOCKS,
    W_LOW_WATERMARK,
    W_MIN_WATERMARK,
    W_N_PAGES,
    W_RANDOM_STATE,
    W_ROTATED,
    W_ZONE_LOCK,
)
from common.mutex import EOWNERDEAD
from common.native import (
    exchange_u16,
    fault_point,
    kernel,
    mutex_consistent,
    mutex_lock,
    mutex_unlock,
    prefetch,
    word_address,
)
from guest.allocator.asks import AWAITED, asks_pending, begin_ask
from guest.allocator.buddy import FPI_NONE, NOT_THERE, take_smallest
from guest.allocator.held import relieve_pressure
from guest.allocator.lists import free_list_head, splice_to_front
from guest.allocator.owners import hand_over_block
from guest.allocator.pageblocks import (
    free_across_pageblocks,
    isolate_pageblock,
    set_pageblock_type,
    take_fallback,
    unisolate_pageblock,
)
from guest.allocator.repair import rebuild_zone
from guest.allocator.view import ctl_of, links_of, open_zone, pages_of

__all__ = [
    "ALLOC_HIGH",
    "ALLOC_NO_WATERMARKS",
    "E_DOUBLE_FREE",
    "E_LOCK",
    "E_NOT_ISOLATED",
    "E_NO_MEMORY",
    "E_OUT_OF_RANGE",
    "E_WRONG_ORDER",
    "allocated_state",
    "buddy_alloc",
    "buddy_free",
    "claim_block",
    "lock_zone",
    "locked_isolate",
    "locked_rotate",
    "locked_set_type",
    "locked_unisolate",
    "take_pages",
    "take_under_pressure",
    "unlock_zone",
]

E_NO_MEMORY = -1
E_OUT_OF_RANGE = -2
E_DOUBLE_FREE = -3
E_WRONG_ORDER = -4
E_LOCK = -5
E_NOT_ISOLATED = -6

BUDDY_FREE_CLAIMED = NUMBERS["buddy-free.claimed"]

ALLOC_NO_WATERMARKS = 1  # mm/internal.h: may go below every watermark
ALLOC_HIGH = 2  # __GFP_HIGH: may use half of what min keeps


@kernel
def lock_zone(zone):  # type: ignore[no-untyped-def]
    """Take the zone lock; when its owner died, repair the zone first. False: the mutex is beyond recovery."""
    address = word_address(zone.ctl, W_ZONE_LOCK)
    code = mutex_lock(address)
    if code == 0:
        return True
    if code == EOWNERDEAD:
        rebuild_zone(zone)
        mutex_consistent(address)
        return True
    return False


@kernel
def unlock_zone(zone):  # type: ignore[no-untyped-def]
    """Release the zone lock."""
    mutex_unlock(word_address(zone.ctl, W_ZONE_LOCK))


@kernel
def take_pages(zone, order, migratetype, flags):  # type: ignore[no-untyped-def]
    """Allocate from the lists, lock held: watermarks, own lists, CMA, other types (rmqueue).

    A pfn, E_NO_MEMORY, or NOT_THERE less the pfn of a block that a host has to populate first. As in the kernel the low
    watermark is looked at first; only what would go below it looks further. Where kswapd is woken then, held blocks
    come back (``relieve_pressure``), one chunk a call.
    """
    if ctl_of(zone)[W_FREE_PAGES] - (1 << order) < ctl_of(zone)[W_LOW_WATERMARK]:  # never below min
        if ctl_of(zone)[W_HELD_BLOCKS]:
            relieve_pressure(zone)
        if not above_min(zone, order, flags):
            return np.int64(E_NO_MEMORY)
    return take_from_lists(zone, order, migratetype)


@kernel
def above_min(zone, order, flags):  # type: ignore[no-untyped-def]
    """True when what 2**order pages leave is not below min, as ``flags`` lower it (__zone_watermark_ok)."""
    if flags & ALLOC_NO_WATERMARKS:
        return True
    mark = ctl_of(zone)[W_MIN_WATERMARK]
    if flags & ALLOC_HIGH:
        mark -= mark // 2
    return ctl_of(zone)[W_FREE_PAGES] - (1 << order) >= mark


@kernel
def take_from_lists(zone, order, migratetype):  # type: ignore[no-untyped-def]
    """Own lists, CMA, other types, whatever the watermarks (__rmqueue). As ``take_pages``."""
    pfn = take_smallest(zone, order, migratetype)
    if pfn == E_NO_MEMORY:
        pfn = take_fallback(zone, order, migratetype)
    return pfn


@kernel
def take_under_pressure(zone, order, migratetype, flags):  # type: ignore[no-untyped-def]
    """``take_pages`` failed: try once more with each chunk of held blocks, until it succeeds or none is held.

    Lock held at entry and at the end, and released between chunks. As ``take_pages``, or E_LOCK with the lock lost.
    """
    pfn = np.int64(E_NO_MEMORY)
    while pfn == E_NO_MEMORY and ctl_of(zone)[W_HELD_BLOCKS]:
        unlock_zone(zone)
        if not lock_zone(zone):
            return np.int64(E_LOCK)
        relieve_pressure(zone)
        if above_min(zone, order, flags):
            pfn = take_from_lists(zone, order, migratetype)
    return pfn


@kernel
def buddy_alloc(zone, cpu, order, migratetype, flags):  # type: ignore[no-untyped-def]
    """Lock, allocate 2**order pages past the per-CPU lists, unlock. A pfn, E_NO_MEMORY, E_LOCK, AWAITED, or that of
    ``begin_ask``. The block is that of slot ``cpu`` (NOBODY: of none).
    """
    if not lock_zone(zone):
        return np.int64(E_LOCK)
    pfn = take_pages(zone, order, migratetype, flags)
    if pfn == E_NO_MEMORY and ctl_of(zone)[W_HELD_BLOCKS]:
        pfn = take_under_pressure(zone, order, migratetype, flags)
        if pfn == E_LOCK:
            return pfn
    if pfn >= 0:
        ctl_of(zone)[W_ALLOCATIONS] += 1
        hand_over_block(zone, pfn, cpu)
    elif pfn <= NOT_THERE:
        pfn = begin_ask(zone, NOT_THERE - pfn)
    elif asks_pending(zone):
        pfn = np.int64(AWAITED)
    else:
        ctl_of(zone)[W_FAILED_ALLOCATIONS] += 1
    unlock_zone(zone)
    return pfn


@kernel
def allocated_state(zone, pfn, order):  # type: ignore[no-untyped-def]
    """State of ``pfn`` if it heads an allocated block of ``order``, else the code that says what is wrong."""
    if order < 0 or order > TOP_ORDER or pfn < 0 or pfn + (1 << order) > zone.n_pages:
        return np.int64(E_OUT_OF_RANGE)
    if pfn & ((1 << order) - 1):
        return np.int64(E_OUT_OF_RANGE)
    state = np.int64(pages_of(zone)[pfn])
    if state & (HEAD_MASK | CLAIMED) == ALLOCATED | order:
        return state
    if state & (HEAD_MASK & ~ORDER_MASK | CLAIMED) == ALLOCATED:
        return np.int64(E_WRONG_ORDER)
    return np.int64(E_DOUBLE_FREE)


@kernel
def claim_block(zone, pfn, state, replacement):  # type: ignore[no-untyped-def]
    """Take a block in ``state`` (from ``allocated_state``) from its owner in one atomic step; False if it is gone.

    Of two threads that free the same block at the same moment, each under a lock of its own, one is refused.
    """
    # SAFETY: allocated_state found pfn in bounds.
    return exchange_u16(zone.page + 2 * pfn, np.int64(state), np.int64(replacement))


@kernel
def prefetch_merge(zone, pfn, order):  # type: ignore[no-untyped-def]
    """Ask for the records that a free is about to touch, ahead of the lock, so that the misses overlap.

    Reads without the lock: what it sees may be stale, and is used for nothing but the hint.
    """
    # SAFETY: a prefetch never faults; the buddy's state is read in bounds.
    prefetch(zone.link + 8 * pfn)
    buddy = pfn ^ (1 << order)
    if buddy < ctl_of(zone)[W_N_PAGES] and np.int64(pages_of(zone)[buddy]) & HEAD_MASK == FREE | order:
        prefetch(zone.link + 8 * np.int64(links_of(zone)[2 * buddy]))
        prefetch(zone.link + 8 * np.int64(links_of(zone)[2 * buddy + 1]))


@kernel
def buddy_free(zone, pfn, order):  # type: ignore[no-untyped-def]
    """Lock, free past the per-CPU lists, unlock. 0, a code of ``allocated_state``, or E_LOCK."""
    if order < TOP_ORDER and pfn >= 0 and pfn < ctl_of(zone)[W_N_PAGES] and order >= 0:
        prefetch_merge(zone, pfn, order)
    if not lock_zone(zone):
        return np.int64(E_LOCK)
    code = allocated_state(zone, pfn, order)
    if code >= 0:
        if claim_block(zone, pfn, code, INTERIOR):
            fault_point(BUDDY_FREE_CLAIMED)
            free_across_pageblocks(zone, pfn, order, FPI_NONE, np.int64(W_RANDOM_STATE))
            ctl_of(zone)[W_FREES] += 1
            code = np.int64(0)
        else:
            code = np.int64(E_DOUBLE_FREE)
    unlock_zone(zone)
    return code


@kernel
def locked_isolate(address, pageblock):  # type: ignore[no-untyped-def]
    """Isolate a pageblock under the lock. 0, E_NOT_ISOLATED (it is isolated already), E_OUT_OF_RANGE or E_LOCK."""
    zone = open_zone(address)
    if pageblock < 0 or pageblock >= ctl_of(zone)[W_N_PAGES] >> PAGEBLOCK_ORDER:
        return E_OUT_OF_RANGE
    if not lock_zone(zone):
        return E_LOCK
    done = isolate_pageblock(zone, pageblock)
    unlock_zone(zone)
    return 0 if done else E_NOT_ISOLATED


@kernel
def locked_unisolate(address, pageblock):  # type: ignore[no-untyped-def]
    """End the isolation of a pageblock under the lock. 0, E_NOT_ISOLATED, E_OUT_OF_RANGE or E_LOCK."""
    zone = open_zone(address)
    if pageblock < 0 or pageblock >= ctl_of(zone)[W_N_PAGES] >> PAGEBLOCK_ORDER:
        return E_OUT_OF_RANGE
    if not lock_zone(zone):
        return E_LOCK
    done = unisolate_pageblock(zone, pageblock)
    unlock_zone(zone)
    return 0 if done else E_NOT_ISOLATED


@kernel
def locked_set_type(address, pageblock, migratetype):  # type: ignore[no-untyped-def]
    """Change a pageblock's type under the lock. 0, E_OUT_OF_RANGE or E_LOCK."""
    zone = open_zone(address)
    if pageblock < 0 or pageblock >= ctl_of(zone)[W_N_PAGES] >> PAGEBLOCK_ORDER:
        return E_OUT_OF_RANGE
    if not lock_zone(zone):
        return E_LOCK
    set_pageblock_type(zone, pageblock, migratetype)
    unlock_zone(zone)
    return 0


@kernel
def locked_rotate(address, order, migratetype, pfn):  # type: ignore[no-untyped-def]
    """Turn a free list so that ``pfn`` comes first, as compaction does (fast_isolate_freepages). 0 or a code.

    Marks the list, so that a pull walks past Reported blocks instead of relying on its shape (D6).
    """
    zone = open_zone(address)
    if order < 0 or order > TOP_ORDER or migratetype < 0 or migratetype * (TOP_ORDER + 1) >= N_FREE_LISTS:
        return E_OUT_OF_RANGE
    if pfn < 0 or pfn >= ctl_of(zone)[W_N_PAGES]:
        return E_OUT_OF_RANGE
    if not lock_zone(zone):
        return E_LOCK
    state = np.int64(pages_of(zone)[pfn])
    on_list = state & HEAD_MASK == FREE | order and (state >> MT_SHIFT) & 0x7 == migratetype
    if on_list:
        head = free_list_head(zone, order, migratetype)
        splice_to_front(zone, pfn, head)
        mark_rotated(zone, order, migratetype, head)
    unlock_zone(zone)
    return 0 if on_list else E_OUT_OF_RANGE


@kernel
def mark_rotated(zone, order, migratetype, head):  # type: ignore[no-untyped-def]
    """The list's order is no longer ours: forget its boundary (v10's release) and walk it at the next pull."""
    ctl_of(zone)[W_ROTATED + order] |= 1 << migratetype
    ctl_of(zone)[W_BOUNDARY + migratetype * (TOP_ORDER + 1) + order] = head
