"""v9 without its boundary: every block is looked for from the tail on, past what is Reported (D7).

All else is v9's: flag, high-water mark, delay, capacity, highest order first, put back at the tail. What differs is
where the search starts. ``boundary`` knows; this one walks the reported run again for each block, so a run over ``n``
blocks looks at O(n^2) nodes, all of them under the lock and without a limit. That cost is what the policy is there to
show, so nothing here shortens the walk. Since it looks at every node, no turned list and no run that ended early can
hide a block from it.

All steps run with the zone lock held.
"""

from __future__ import annotations

import numpy as np

from common.layout import ACTIVE_PLAIN, W_ACTIVE, W_NODES_VISITED, W_RUNS
from common.native import kernel
from guest.allocator.lists import free_list_head, previous_node
from guest.allocator.view import ctl_of
from guest.reporting.blocks import (
    MORE,
    SHORT,
    clear_request,
    count_pulled,
    is_reported,
    list_from_top,
    lists_to_report,
    take_for_report,
)

__all__ = ["begin", "pull"]


@kernel
def begin(zone):  # type: ignore[no-untyped-def]
    """ACTIVE, without boundaries: a tail add goes to the true tail."""
    ctl_of(zone)[W_ACTIVE] = ACTIVE_PLAIN
    ctl_of(zone)[W_RUNS] += 1


@kernel
def find_unreported(zone, order, migratetype):  # type: ignore[no-untyped-def]
    """Last unreported block of one list, or -1 (v9's get_unreported_page, had it no boundary to start from)."""
    head = free_list_head(zone, order, migratetype)
    pfn = previous_node(zone, head)
    visited = np.int64(0)
    while pfn != head:
        visited += 1
        if not is_reported(zone, pfn):
            break
        pfn = previous_node(zone, pfn)
    ctl_of(zone)[W_NODES_VISITED] += visited
    return np.int64(-1) if pfn == head else pfn


@kernel
def pull(zone, pfns, orders, capacity):  # type: ignore[no-untyped-def]
    """Fill ``pfns`` and ``orders`` (int64[capacity]) with unreported free blocks; returns (count, SHORT or MORE).

    Highest order first, last type first, never ISOLATE (S9). SHORT clears REQUESTED (v9's page_reporting_fill).
    """
    count = np.int64(0)
    for index in range(lists_to_report(zone)):
        order, migratetype = list_from_top(index)
        pfn = find_unreported(zone, order, migratetype)
        while pfn >= 0:
            take_for_report(zone, pfn, order, migratetype)
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
