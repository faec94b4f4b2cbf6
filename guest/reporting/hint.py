"""The hint policy: free page hinting for migration, Wei Wang's v37 (merged in 2018 as VIRTIO_BALLOON_F_FREE_PAGE_HINT).

One-shot and started by the host: it sends a command, and the guest *allocates* blocks of the top order until it gets no
more (get_free_page_and_send of drivers/virtio/virtio_balloon.c), sends each batch, and keeps every block until the host
says DONE (return_free_pages_to_mm). No free asks for a run, and registering does not either.

* Only blocks of the top order (VIRTIO_BALLOON_HINT_BLOCK_ORDER), whatever the zone's minimum order is: a lower
  ``min_order`` changes nothing here, and what is free in smaller blocks is never hinted.
* The allocation is that of __GFP_NORETRY | __GFP_NOWARN | __GFP_NOMEMALLOC: no reserves, the min watermark obeyed, no
  reclaim. Without __GFP_MOVABLE it is an unmovable one, so pageblocks are claimed from the other types as the pass
  goes, and are claimed back by whoever allocates next. The kernel does the same.
* Nothing is flagged Reported. The bound of S10 holds for what is in flight; what is *held* is bounded by the min
  watermark alone: at most everything above it.

Differences: the kernel sends block by block, here a batch of ``capacity`` at a time. An allocation that falls short
takes held blocks back directly (there: the shrinker), and ends the pass, which would otherwise allocate them again.
"""

from __future__ import annotations

import numpy as np

from common.geometry import TOP_ORDER, Migratetype
from common.layout import (
    ACTIVE_PLAIN,
    IN_FLIGHT,
    INACTIVE,
    MT_SHIFT,
    W_ACTIVE,
    W_FREE_PAGES,
    W_IN_FLIGHT_BLOCKS,
    W_IN_FLIGHT_PAGES,
    W_MIN_WATERMARK,
    W_NODES_VISITED,
    W_POLICY_WORDS,
    W_PRESSURE,
    W_RUNS,
)
from common.native import kernel
from guest.allocator.buddy import take_smallest
from guest.allocator.owners import journal_clear
from guest.allocator.pageblocks import take_fallback
from guest.allocator.view import ctl_of, pages_of
from guest.reporting.blocks import MORE, SHORT, clear_request, count_pulled

__all__ = ["begin", "end", "pull"]

UNMOVABLE = int(Migratetype.UNMOVABLE)

W_PRESSURE_BEFORE = W_POLICY_WORDS  # what W_PRESSURE was when the pass began


@kernel
def begin(zone):  # type: ignore[no-untyped-def]
    """A run without boundaries; from here on the first pressure ends the pass."""
    ctl_of(zone)[W_ACTIVE] = ACTIVE_PLAIN
    ctl_of(zone)[W_RUNS] += 1
    ctl_of(zone)[W_PRESSURE_BEFORE] = ctl_of(zone)[W_PRESSURE]


@kernel
def allocate_top_block(zone):  # type: ignore[no-untyped-def]
    """alloc_pages of one block of the top order as the hint flags have it; a pfn or -1. Takes nothing that is held."""
    if ctl_of(zone)[W_FREE_PAGES] - (1 << TOP_ORDER) < ctl_of(zone)[W_MIN_WATERMARK]:
        return np.int64(-1)
    pfn = take_smallest(zone, np.int64(TOP_ORDER), np.int64(UNMOVABLE))
    if pfn < 0:
        pfn = take_fallback(zone, np.int64(TOP_ORDER), np.int64(UNMOVABLE))
    return pfn


@kernel
def pull(zone, pfns, orders, capacity):  # type: ignore[no-untyped-def]
    """Fill ``pfns`` and ``orders`` (int64[capacity]) with blocks just allocated; returns (count, SHORT or MORE).

    SHORT: an allocation failed, so the pass is over. Clears REQUESTED then.
    """
    count = np.int64(0)
    pressed = ctl_of(zone)[W_PRESSURE] != ctl_of(zone)[W_PRESSURE_BEFORE]
    while count < capacity and not pressed:
        pfn = allocate_top_block(zone)
        if pfn < 0:
            break
        pages_of(zone)[pfn] = IN_FLIGHT | TOP_ORDER | (UNMOVABLE << MT_SHIFT)
        ctl_of(zone)[W_IN_FLIGHT_BLOCKS] += 1
        ctl_of(zone)[W_IN_FLIGHT_PAGES] += 1 << TOP_ORDER
        journal_clear(zone)
        pfns[count] = pfn
        orders[count] = TOP_ORDER
        count += 1
    ctl_of(zone)[W_NODES_VISITED] += count
    count_pulled(zone, count)
    if count == capacity:
        return count, MORE
    clear_request(zone)
    return count, SHORT


@kernel
def end(zone):  # type: ignore[no-untyped-def]
    """ACTIVE and REQUESTED := 0. What is held is released beforehand, in chunks (``Cycle.end``)."""
    ctl_of(zone)[W_ACTIVE] = INACTIVE
    clear_request(zone)
