"""Blocks that a policy keeps out of the allocator: letting go of them, and doing so because memory is short.

Runs with the zone lock held, a bounded number of blocks at a time. Only allocations that are about to dip below the
low watermark, or to fail, look here; no policy that gives its blocks back at once ever has one on this list.
"""

from __future__ import annotations

import numpy as np

from common.faults import NUMBERS
from common.layout import (
    HELD_LIST,
    INTERIOR,
    ORDER_MASK,
    TRIGGER_OFF,
    W_FREE_PAGES,
    W_HELD_BLOCKS,
    W_HELD_PAGES,
    W_HIGH_WATERMARK,
    W_PRESSURE,
    W_RANDOM_STATE,
    W_TRIGGER,
    ZEROED,
)
from common.native import fault_point, kernel
from guest.allocator.buddy import FPI_SKIP_REPORT_NOTIFY, request_run
from guest.allocator.lists import next_node, unlink
from guest.allocator.pageblocks import free_across_pageblocks
from guest.allocator.view import ctl_of, pages_of

__all__ = ["PRESSURE_BLOCKS", "release_held", "relieve_pressure"]

# Held blocks that one hold of the lock gives back under pressure; a quarter of v9's batch of 16.
PRESSURE_BLOCKS = 4
RELEASE_INTERIOR = NUMBERS["release.interior"]


@kernel
def release_held(zone, most, fpi):  # type: ignore[no-untyped-def]
    """Free at most ``most`` held blocks, oldest first, with ``fpi``; returns how many."""
    head = zone.n_pages + HELD_LIST
    released = np.int64(0)
    pfn = next_node(zone, head)
    while pfn != head and released < most:
        state = np.int64(pages_of(zone)[pfn])
        order = state & ORDER_MASK
        unlink(zone, pfn)
        pages_of(zone)[pfn] = INTERIOR
        fault_point(RELEASE_INTERIOR)
        ctl_of(zone)[W_HELD_BLOCKS] -= 1
        ctl_of(zone)[W_HELD_PAGES] -= 1 << order
        free_across_pageblocks(zone, pfn, order, fpi | (state & ZEROED), np.int64(W_RANDOM_STATE))
        released += 1
        pfn = next_node(zone, head)
    return released


@kernel
def relieve_pressure(zone):  # type: ignore[no-untyped-def]
    """An allocation is short of memory: free held blocks, one at least, on until the high watermark, PRESSURE_BLOCKS at
    most; returns how many. Counts the pressure if there was any block to give.

    Stands where kswapd and the shrinker of the balloon stand (virtio_balloon_shrinker_scan), but in the allocating path
    itself, since there is no reclaim here. A policy with a trigger is asked for a run: its reporter then learns of the
    pressure while it is fresh, and begins to cool down.
    """
    released = np.int64(0)
    while released < PRESSURE_BLOCKS and ctl_of(zone)[W_HELD_BLOCKS] > 0:
        if released > 0 and ctl_of(zone)[W_FREE_PAGES] >= ctl_of(zone)[W_HIGH_WATERMARK]:
            break
        released += release_held(zone, 1, FPI_SKIP_REPORT_NOTIFY)
    if released > 0:
        ctl_of(zone)[W_PRESSURE] += 1
        if ctl_of(zone)[W_TRIGGER] != TRIGGER_OFF:
            request_run(zone)
    return released
