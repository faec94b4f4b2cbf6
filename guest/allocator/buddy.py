"""Split and merge: the buddy core (mm/page_alloc.c: expand, __rmqueue_smallest, __free_one_page).

Runs with the zone lock held. ``free_one`` is the one way back onto the lists, for ordinary frees and for blocks that
were reported.
"""

from __future__ import annotations

import numpy as np

from common.faults import NUMBERS
from common.geometry import N_ORDERS, PAGEBLOCK_ORDER, TOP_ORDER, Migratetype
from common.layout import (
    ALLOCATED,
    BLOCK_MT_MASK,
    FREE,
    HEAD_MASK,
    MT_SHIFT,
    NEVER_TOUCHED,
    RETURNED,
    TRIGGER_ANY_FREE,
    TRIGGER_BITMAP,
    TRIGGER_HIGH_WATER_MARK,
    W_ASKING,
    W_FREE_PAGES,
    W_HIGH_WATER_MARK,
    W_ISOLATED_PAGES,
    W_MERGE_LIKELY,
    W_MIN_ORDER,
    W_N_PAGES,
    W_NR_FREE,
    W_POLICY_WORDS,
    W_REFCNT,
    W_REPORTED,
    W_REPORTING_ENABLED,
    W_REQUESTED,
    W_REQUESTS,
    W_SHUFFLE_ORDER,
    W_TRIGGER,
    W_WORK,
    ZEROED,
)
from common.native import fault_point, kernel, semaphore_post, semaphore_try, word_address
from guest.allocator.lists import (
    add_to_free_list,
    add_to_free_list_tail,
    del_page_from_free_list,
    free_list_head,
    next_node,
)
from guest.allocator.owners import journal_take
from guest.allocator.shuffle import random_bit
from guest.allocator.view import bitmap_of, blocks_of, ctl_of, pages_of, residence_of

__all__ = [
    "FPI_NONE",
    "FPI_SKIP_REPORT_NOTIFY",
    "FPI_TO_TAIL",
    "FPI_ZEROED",
    "NOT_THERE",
    "account_free",
    "free_one",
    "is_free_head",
    "notify_free",
    "pageblock_type",
    "request_run",
    "take_smallest",
    "unqueue_work",
]

ISOLATE = int(Migratetype.ISOLATE)
SPLIT_TAKEN, SPLIT_HALF = NUMBERS["split.taken"], NUMBERS["split.half"]
TAKE_ALLOCATED, TAKE_COUNTED = NUMBERS["take.allocated"], NUMBERS["take.counted"]
FREE_COUNTED, MERGE_TAKEN = NUMBERS["free.counted"], NUMBERS["merge.taken"]
REQUEST_POSTED = NUMBERS["request.posted"]

# How a block is freed (fpi_t of mm/page_alloc.c since 5.10; v9's one bool stands for both).
FPI_NONE = 0
FPI_SKIP_REPORT_NOTIFY = 1  # nobody is asked for a run (S15)
FPI_TO_TAIL = 2  # to the tail, whatever shuffling or a likely merge would say
FPI_ZEROED = ZEROED  # all of it is known to be zero (2026); the bit of the page state, so that it is passed on as it is

NOT_THERE = -16  # from here down: minus the pfn of a block that has to be populated before anybody has it


@kernel
def pageblock_type(zone, pfn):  # type: ignore[no-untyped-def]
    """Migratetype of the pageblock of ``pfn`` (get_pageblock_migratetype)."""
    return np.int64(blocks_of(zone)[pfn >> PAGEBLOCK_ORDER]) & BLOCK_MT_MASK


@kernel
def account_free(zone, pages, migratetype):  # type: ignore[no-untyped-def]
    """Add ``pages`` (may be negative) to the free or the isolated count (__mod_zone_freepage_state)."""
    if migratetype == ISOLATE:
        ctl_of(zone)[W_ISOLATED_PAGES] += pages
    else:
        ctl_of(zone)[W_FREE_PAGES] += pages


@kernel
def request_run(zone):  # type: ignore[no-untyped-def]
    """Set REQUESTED and, when it is the first, queue the work (__page_reporting_request, B2).

    The work is queued first: should this process die in between, a run too many is made, and none is missed.
    """
    if ctl_of(zone)[W_REQUESTED] or not ctl_of(zone)[W_REPORTING_ENABLED]:
        return
    if ctl_of(zone)[W_REFCNT] == 0:
        # SAFETY: the semaphore lies in the mapped header; posting never blocks.
        semaphore_post(word_address(zone.ctl, W_WORK))
        fault_point(REQUEST_POSTED)
    ctl_of(zone)[W_REQUESTS] += 1
    ctl_of(zone)[W_REFCNT] += 1
    ctl_of(zone)[W_REQUESTED] = 1


@kernel
def unqueue_work(zone):  # type: ignore[no-untyped-def]
    """Take back every post for which REQUESTED is no longer set: a run has answered them (P2). Zone lock held."""
    if ctl_of(zone)[W_REQUESTED]:
        return
    # SAFETY: as above; with the lock held nobody posts.
    while semaphore_try(word_address(zone.ctl, W_WORK)) == 0:
        pass


@kernel
def set_hint_bit(zone, pfn):  # type: ignore[no-untyped-def]
    """Set the bit of the block of the minimum order at ``pfn`` (Nitesh Lal, v10 to v12); returns how many are set.

    The count is the first of the policy's words.
    """
    bit = pfn >> ctl_of(zone)[W_MIN_ORDER]
    bitmap = bitmap_of(zone)
    mask = 1 << (bit & 7)
    value = np.int64(bitmap[bit >> 3])
    if not value & mask:
        bitmap[bit >> 3] = value | mask
        ctl_of(zone)[W_POLICY_WORDS] += 1
    return ctl_of(zone)[W_POLICY_WORDS]


@kernel
def notify_free(zone, pfn, order):  # type: ignore[no-untyped-def]
    """Is a run due? Asked after each ordinary free, with what it merged to (B3, P3, S15)."""
    if not ctl_of(zone)[W_REPORTING_ENABLED] or order < ctl_of(zone)[W_MIN_ORDER]:
        return
    trigger = ctl_of(zone)[W_TRIGGER]
    if trigger == TRIGGER_BITMAP:
        if set_hint_bit(zone, pfn) >= ctl_of(zone)[W_HIGH_WATER_MARK]:
            request_run(zone)
        return
    if ctl_of(zone)[W_REQUESTED]:
        return
    if trigger == TRIGGER_HIGH_WATER_MARK:
        if ctl_of(zone)[W_NR_FREE + order] >= ctl_of(zone)[W_REPORTED + order] + ctl_of(zone)[W_HIGH_WATER_MARK]:
            request_run(zone)
    elif trigger == TRIGGER_ANY_FREE:
        request_run(zone)


@kernel
def is_missing(zone, pfn, order):  # type: ignore[no-untyped-def]
    """True when some page of a free block is not there: it was given back, or never touched."""
    residence = residence_of(zone)
    for page in range(pfn, pfn + (1 << order)):
        if residence[page] == NEVER_TOUCHED or residence[page] == RETURNED:
            return True
    return False


@kernel
def take_smallest(zone, order, migratetype):  # type: ignore[no-untyped-def]
    """Allocate 2**order pages from the smallest block of ``migratetype`` that holds them, or -1.

    Mirrors __rmqueue_smallest and expand: the front entry is taken, the lower half is kept, each upper half goes to
    the front of its list, unreported (S7). Both halves of a zeroed block are zeroed (Z2). While a host is asked for
    what is not there, such a block stays where it is: the answer is NOT_THERE less its pfn.

    The block is noted as in hand (``owners``); whoever finds a place for it closes the journal.
    """
    current = order
    while current < N_ORDERS:
        head = free_list_head(zone, current, migratetype)
        pfn = next_node(zone, head)
        if pfn != head:
            if ctl_of(zone)[W_ASKING] and is_missing(zone, pfn, current):
                return np.int64(NOT_THERE) - pfn
            zeroed = del_page_from_free_list(zone, pfn, current)
            fault_point(SPLIT_TAKEN)
            while current > order:
                current -= 1
                add_to_free_list(zone, pfn + (1 << current), current, migratetype, zeroed)
                fault_point(SPLIT_HALF)
            journal_take(zone, pfn)
            pages_of(zone)[pfn] = ALLOCATED | order | (migratetype << MT_SHIFT) | zeroed
            fault_point(TAKE_ALLOCATED)
            account_free(zone, -(1 << order), migratetype)
            fault_point(TAKE_COUNTED)
            return pfn
        current += 1
    return np.int64(-1)


@kernel
def is_free_head(zone, pfn, order):  # type: ignore[no-untyped-def]
    """True when ``pfn`` heads a free block of exactly ``order`` (page_is_buddy)."""
    return pfn < ctl_of(zone)[W_N_PAGES] and np.int64(pages_of(zone)[pfn]) & HEAD_MASK == FREE | order


@kernel
def merge_is_likely(zone, pfn, order):  # type: ignore[no-untyped-def]
    """True when the buddy of the block that ``pfn`` would merge into is free itself (buddy_merge_likely).

    Never for the two top orders.
    """
    if order >= TOP_ORDER - 1 or not ctl_of(zone)[W_MERGE_LIKELY]:
        return False
    merged = pfn & ~(1 << order)
    return is_free_head(zone, merged ^ (1 << (order + 1)), order + 1)


@kernel
def free_one(zone, pfn, order, migratetype, fpi, random_store):  # type: ignore[no-untyped-def]
    """Put a block back on the free lists, merged as far as it goes; returns (pfn, order) of what it became.

    Mirrors __free_one_page. ``migratetype`` is that of the pageblock now. ``fpi``: FPI_ flags. Merging drops the flag
    of a Reported buddy (S7), and ZEROED unless both have it (Z2); a block in isolation never merges with one outside.
    The caller made ``pfn`` interior.
    """
    zeroed = fpi & FPI_ZEROED
    account_free(zone, 1 << order, migratetype)
    fault_point(FREE_COUNTED)
    while order < TOP_ORDER:
        buddy = pfn ^ (1 << order)
        if not is_free_head(zone, buddy, order):
            break
        if order >= PAGEBLOCK_ORDER:
            buddy_type = pageblock_type(zone, buddy)
            if buddy_type != migratetype and (buddy_type == ISOLATE or migratetype == ISOLATE):
                break
        zeroed &= del_page_from_free_list(zone, buddy, order)
        fault_point(MERGE_TAKEN)
        pfn &= buddy
        order += 1
    if fpi & FPI_TO_TAIL:
        to_tail = True
    elif order >= ctl_of(zone)[W_SHUFFLE_ORDER]:
        to_tail = random_bit(ctl_of(zone), random_store) == 1
    else:
        to_tail = merge_is_likely(zone, pfn, order)
    if to_tail:
        add_to_free_list_tail(zone, pfn, order, migratetype, zeroed)
    else:
        add_to_free_list(zone, pfn, order, migratetype, zeroed)
    if not fpi & FPI_SKIP_REPORT_NOTIFY:
        notify_free(zone, pfn, order)
    return pfn, order
