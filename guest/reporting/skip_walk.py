"""v10 to v13: a walk back from the boundary over what is Reported, and isolation that obeys the min watermark.

Mirrors page_reporting_cycle, page_reporting_fill and get_unreported_page of those versions. Against v9:

* A pull walks back from the boundary, skips Reported blocks and remembers how far it came as the new boundary; v12:
  only if it skipped any. So nothing depends on the shape of the list, and no turned list hides a block (D6).
* A block leaves its list through ``__isolate_free_page``: not below the min watermark, and with its pageblocks turned
  MOVABLE (``blocks.isolate_free_page``). Where that fails the walk of this list ends (v12); what is left there waits
  for the next request.
* A Reported block that moves to another list goes to its head and keeps its flag, and whoever turns a list gives up
  its boundary (``ACTIVE_RELEASE`` and ``mark_rotated``).

The boundary starts at the list head in each run, so the first pull of a run walks over the whole reported run of each
list, once and under one hold of the lock; v10 to v13 set no limit to that, nor does this.

All steps run with the zone lock held.
"""

from __future__ import annotations

import numpy as np

from common.geometry import N_ORDERS
from common.layout import ACTIVE_RELEASE, W_ACTIVE, W_BOUNDARY, W_NODES_VISITED, W_RUNS
from common.native import kernel
from guest.allocator.lists import free_list_head, previous_node
from guest.allocator.view import ctl_of
from guest.reporting.blocks import (
    MORE,
    SHORT,
    clear_request,
    count_pulled,
    is_reported,
    isolate_free_page,
    list_from_top,
    lists_to_report,
    reset_boundaries,
)

__all__ = ["begin", "pull"]


@kernel
def begin(zone):  # type: ignore[no-untyped-def]
    """Fresh boundaries for every order and type (B5), then ACTIVE."""
    reset_boundaries(zone)
    ctl_of(zone)[W_ACTIVE] = ACTIVE_RELEASE
    ctl_of(zone)[W_RUNS] += 1


@kernel
def find_unreported(zone, order, migratetype):  # type: ignore[no-untyped-def]
    """First unreported block ahead of the boundary of one list, or -1; what it skipped lies behind the boundary now."""
    head = free_list_head(zone, order, migratetype)
    word = W_BOUNDARY + migratetype * N_ORDERS + order
    skipped = np.int64(-1)
    pfn = previous_node(zone, ctl_of(zone)[word])
    visited = np.int64(1)
    while pfn != head and is_reported(zone, pfn):
        skipped = pfn
        pfn = previous_node(zone, pfn)
        visited += 1
    ctl_of(zone)[W_NODES_VISITED] += visited
    if skipped >= 0:
        ctl_of(zone)[word] = skipped
    return np.int64(-1) if pfn == head else pfn


@kernel
def pull(zone, pfns, orders, capacity):  # type: ignore[no-untyped-def]
    """Fill ``pfns`` and ``orders`` (int64[capacity]) with unreported free blocks; returns (count, SHORT or MORE).

    Highest order first, last type first, never ISOLATE (S9). SHORT clears REQUESTED.
    """
    count = np.int64(0)
    for index in range(lists_to_report(zone)):
        order, migratetype = list_from_top(index)
        pfn = find_unreported(zone, order, migratetype)
        while pfn >= 0 and isolate_free_page(zone, pfn, order, migratetype):
            pfns[count] = pfn
            orders[count] = order
            count += 1
            if count == capacity:
                count_pulled(zone, count)
                return count, MORE
            pfn = find_unreported(zone, order, migratetype)
    count_pulled(zone, count)
    clear_request(zone)
    return count, SHORT
