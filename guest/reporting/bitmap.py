"""The bitmap policy: one bit a block, set on free and scanned later (Nitesh Narayan Lal, v10 to v12).

The free path sets the bit of what a block merged to (``buddy.set_hint_bit``, under the zone lock) and asks for a run at
16 set bits. The worker scans the bits from the first on (for_each_set_bit), clears each it finds, takes the zone lock
for that bit alone, isolates the block if a free one of at least the minimum order begins there, and unlocks: a lock
cycle a bit. Blocks are reported in 16s and go back as any free does, to the head, without a notification.

* No Reported flag: a block is reported again after each free of it.
* Lossy: the bit of a block that was allocated meanwhile, or merged into one that begins lower, is dropped. So is that
  of a block that cannot be isolated without going below the min watermark (__isolate_free_page).
* Memory that was never freed has no bit: unlike all later designs, the first run reports nothing of it.
* His minimum order was MAX_ORDER - 2, which is 9.

Differences: the bit is cleared under the zone lock that follows, not ahead of it, so that count and bits agree. His
zones had holes, which this one has not. The request is taken at the start of a scan, as a work item's pending bit is,
so that bits set behind the scan ask for another one.
"""

from __future__ import annotations

import numpy as np

from common.geometry import Migratetype
from common.layout import (
    ACTIVE_PLAIN,
    FREE,
    INACTIVE,
    KIND_MASK,
    MT_SHIFT,
    ORDER_MASK,
    W_ACTIVE,
    W_MIN_ORDER,
    W_NODES_HOLD_MAX,
    W_NODES_VISITED,
    W_POLICY_WORDS,
    W_RUNS,
)
from common.native import clock_ns, kernel
from common.statistics import record
from guest.allocator.locked import E_LOCK, lock_zone, unlock_zone
from guest.allocator.view import bitmap_of, ctl_of, pages_of
from guest.reporting.blocks import MORE, SHORT, clear_request, count_pulled, isolate_free_page

__all__ = ["W_BITS_SCANNED", "begin", "end", "locked_scan"]

ISOLATE = int(Migratetype.ISOLATE)
MT_FIELD = 0x7

W_BITS_SET = W_POLICY_WORDS  # kept by buddy.set_hint_bit
W_CURSOR = W_POLICY_WORDS + 1  # next bit that the scan looks at
W_BITS_SCANNED = W_POLICY_WORDS + 2  # bits passed by scans, set or not; by the reporter alone, without the lock


@kernel
def begin(zone):  # type: ignore[no-untyped-def]
    """A run without boundaries, its scan at the first bit."""
    ctl_of(zone)[W_ACTIVE] = ACTIVE_PLAIN
    ctl_of(zone)[W_RUNS] += 1
    ctl_of(zone)[W_CURSOR] = 0


@kernel
def next_set_bit(zone, bit, n_bits):  # type: ignore[no-untyped-def]
    """First set bit from ``bit`` on, or ``n_bits`` (find_next_bit). No lock: a bit set just now may be missed."""
    bitmap = bitmap_of(zone)
    while bit < n_bits:
        rest = np.int64(bitmap[bit >> 3]) >> (bit & 7)
        if rest == 0:
            bit = (bit | 7) + 1
        else:
            while rest & 1 == 0:
                rest >>= 1
                bit += 1
            return bit
    return n_bits


@kernel
def clear_bit(zone, bit):  # type: ignore[no-untyped-def]
    """Clear one set bit and count it down. Death between set and count leaves the count low, never negative."""
    bitmap = bitmap_of(zone)
    bitmap[bit >> 3] = np.int64(bitmap[bit >> 3]) & ~(1 << (bit & 7))
    ctl_of(zone)[W_BITS_SET] = max(ctl_of(zone)[W_BITS_SET] - 1, np.int64(0))


@kernel
def isolate_block(zone, pfn):  # type: ignore[no-untyped-def]
    """Take the free block that begins at ``pfn`` in flight; its order, or -1 if there is none to be had.

    Mirrors __isolate_free_page with the worker's own checks ahead of it (PageBuddy, order, not isolated).
    """
    state = np.int64(pages_of(zone)[pfn])
    order = state & ORDER_MASK
    migratetype = (state >> MT_SHIFT) & MT_FIELD
    if state & KIND_MASK != FREE or order < ctl_of(zone)[W_MIN_ORDER] or migratetype == ISOLATE:
        return np.int64(-1)
    return order if isolate_free_page(zone, pfn, order, migratetype) else np.int64(-1)


@kernel
def locked_scan(zone, pfns, orders, holds, scratch):  # type: ignore[no-untyped-def]
    """Scan on and fill ``pfns`` and ``orders`` (int64[capacity]); returns (count or E_LOCK, SHORT or MORE).

    Called without the lock; takes it once for each bit that is set, and each hold goes into ``holds``. SHORT: the scan
    came to the last bit; the next one begins at the first, and is made if somebody asked since this one began.
    """
    count = np.int64(0)
    n_bits = zone.n_pages >> ctl_of(zone)[W_MIN_ORDER]
    if ctl_of(zone)[W_CURSOR] == 0:
        if not lock_zone(zone):
            return np.int64(E_LOCK), SHORT
        clear_request(zone)
        unlock_zone(zone)
    bit = ctl_of(zone)[W_CURSOR]
    first = bit
    while count < pfns.size:
        bit = next_set_bit(zone, bit, n_bits)
        if bit == n_bits:
            break
        if not lock_zone(zone):
            return np.int64(E_LOCK), SHORT
        start = clock_ns(scratch)
        clear_bit(zone, bit)
        pfn = bit << ctl_of(zone)[W_MIN_ORDER]
        order = isolate_block(zone, pfn)
        if order >= 0:
            pfns[count] = pfn
            orders[count] = order
            count += 1
            count_pulled(zone, 1)
        ctl_of(zone)[W_NODES_VISITED] += 1
        ctl_of(zone)[W_NODES_HOLD_MAX] = max(ctl_of(zone)[W_NODES_HOLD_MAX], np.int64(1))
        elapsed = clock_ns(scratch) - start
        unlock_zone(zone)
        record(holds, elapsed)
        bit += 1
    ctl_of(zone)[W_BITS_SCANNED] += bit - first
    if bit < n_bits:
        ctl_of(zone)[W_CURSOR] = bit
        return count, MORE
    ctl_of(zone)[W_CURSOR] = 0
    return count, SHORT


@kernel
def end(zone, abandon):  # type: ignore[no-untyped-def]
    """ACTIVE := 0. Bits that are set stay so, and are found by the next scan."""
    ctl_of(zone)[W_ACTIVE] = INACTIVE
    if abandon:
        clear_request(zone)
