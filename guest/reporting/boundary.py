"""The v9 policy: a Reported flag, a boundary a list, and a lock held only to pull and to put back (patch 6/8).

The four steps mirror mm/page_reporting.c of v9: *begin* is the head of page_reporting_cycle, *pull* is
page_reporting_fill over get_unreported_page, *end* its tail; *put back* (page_reporting_drain over
free_reported_page) is shared with others, in ``blocks``. All run with the zone lock held, on one batch of at most
``capacity`` blocks.

Where v9 was wrong this does what is right; docs/divergences.md tells each.

* The ISOLATE boundaries are reset with the others.
* A list that compaction turned is marked, and a pull walks past its Reported blocks (as v10 does) instead of taking
  the list to be empty; the walk is remembered by the boundary, so it is made once a run.
* A batch whose report failed goes back unflagged (as v15 does) and ends the run.
* The counters are part of the segment, so there is no allocation to fail and nothing to spin on.
"""

from __future__ import annotations

import numpy as np

from common.faults import NUMBERS
from common.geometry import N_MIGRATETYPES, N_ORDERS, TOP_ORDER, Migratetype
from common.layout import (
    ACTIVE_BOUNDARY,
    INACTIVE,
    W_ACTIVE,
    W_BOUNDARY,
    W_MIN_ORDER,
    W_NODES_VISITED,
    W_ROTATED,
    W_RUNS,
)
from common.native import fault_point, kernel, prefetch
from guest.allocator.lists import free_list_head, next_node, previous_node
from guest.allocator.view import ctl_of
from guest.reporting.blocks import (
    MORE,
    SHORT,
    clear_request,
    count_pulled,
    is_reported,
    reset_boundaries,
    take_for_report,
)

__all__ = ["begin", "end", "prefetch_pull", "pull"]

ISOLATE = int(Migratetype.ISOLATE)
BEGIN_ACTIVE = NUMBERS["begin.active"]

# Nodes looked at under one hold of the lock. Only a turned list can need more than three a block; when a walk over
# its Reported blocks reaches this, the pull returns with what it has and the next one goes on from there.
VISIT_LIMIT = 256


@kernel
def begin(zone):  # type: ignore[no-untyped-def]
    """Fresh boundaries for every order and type (B5), then ACTIVE."""
    reset_boundaries(zone)
    ctl_of(zone)[W_ACTIVE] = ACTIVE_BOUNDARY
    fault_point(BEGIN_ACTIVE)
    ctl_of(zone)[W_RUNS] += 1


@kernel
def walk_turned_list(zone, order, migratetype, head, limit):  # type: ignore[no-untyped-def]
    """Next unreported block of a list whose order somebody changed, or -1; the boundary remembers how far it came.

    Answers -2 when the nodes visited so far reach ``limit``, that of this hold.
    """
    word = W_BOUNDARY + migratetype * N_ORDERS + order
    pfn = previous_node(zone, ctl_of(zone)[word])
    visited = np.int64(1)
    while pfn != head and is_reported(zone, pfn):
        ctl_of(zone)[word] = pfn
        if ctl_of(zone)[W_NODES_VISITED] + visited >= limit:
            ctl_of(zone)[W_NODES_VISITED] += visited
            return np.int64(-2)
        pfn = previous_node(zone, pfn)
        visited += 1
    ctl_of(zone)[W_NODES_VISITED] += visited
    if pfn == head:
        ctl_of(zone)[W_ROTATED + order] &= ~(1 << migratetype)  # all of it is Reported: the shape is ours again
        return np.int64(-1)
    return pfn


@kernel
def find_unreported(zone, order, migratetype, limit):  # type: ignore[no-untyped-def]
    """Block to pull next from one list, or -1 when it holds none (get_unreported_page); -2 see ``walk_turned_list``.

    Looks just ahead of the boundary, then at the front: an idle list has the shape U* R* U* (D5).
    """
    head = free_list_head(zone, order, migratetype)
    if ctl_of(zone)[W_ROTATED + order] >> migratetype & 1:
        return walk_turned_list(zone, order, migratetype, head, limit)
    word = W_BOUNDARY + migratetype * N_ORDERS + order
    pfn = previous_node(zone, ctl_of(zone)[word])
    ctl_of(zone)[W_NODES_VISITED] += 1
    if pfn == head:
        return np.int64(-1)
    if is_reported(zone, pfn):
        pfn = next_node(zone, head)
        ctl_of(zone)[W_NODES_VISITED] += 1
        if is_reported(zone, pfn):
            ctl_of(zone)[word] = pfn
            return np.int64(-1)
    return pfn


@kernel
def prefetch_pull(zone, capacity):  # type: ignore[no-untyped-def]
    """Ask, before the lock is taken, for the records that a pull will touch, so that the hold does not wait for memory.

    Walks back from where each boundary is now. Without the lock the links may change underfoot: every node is checked
    before it is followed, and what is read serves as a hint only.
    """
    # SAFETY: nodes stay below n_pages, so every load is inside the segment; a prefetch never faults.
    left = capacity
    order = np.int64(TOP_ORDER)
    while order >= ctl_of(zone)[W_MIN_ORDER] and left > 0:
        for migratetype in range(ISOLATE):
            node = ctl_of(zone)[W_BOUNDARY + migratetype * N_ORDERS + order]
            if node < zone.n_pages:
                node = previous_node(zone, node)
            else:
                node = previous_node(zone, free_list_head(zone, order, migratetype))
            while node < zone.n_pages and left > 0 and not is_reported(zone, node):
                prefetch(zone.link + 8 * node)
                prefetch(zone.page + 2 * node)
                node = previous_node(zone, node)
                left -= 1
        order -= 1


@kernel
def pull(zone, pfns, orders, capacity):  # type: ignore[no-untyped-def]
    """Fill ``pfns`` and ``orders`` (int64[capacity]) with unreported free blocks; returns (count, SHORT or MORE).

    Highest order first, last type first, never ISOLATE (S9). SHORT clears REQUESTED.
    """
    count = np.int64(0)
    order = np.int64(TOP_ORDER)
    limit = ctl_of(zone)[W_NODES_VISITED] + VISIT_LIMIT
    limit_reached = False
    while order >= ctl_of(zone)[W_MIN_ORDER] and not limit_reached:
        for back in range(N_MIGRATETYPES):
            migratetype = N_MIGRATETYPES - 1 - back
            if migratetype == ISOLATE:
                continue
            pfn = find_unreported(zone, order, migratetype, limit)
            while pfn >= 0:
                take_for_report(zone, pfn, order, migratetype)
                pfns[count] = pfn
                orders[count] = order
                count += 1
                if count == capacity:
                    break
                pfn = find_unreported(zone, order, migratetype, limit)
            if count == capacity or pfn == -2:
                limit_reached = True
                break
        order -= 1
    count_pulled(zone, count)
    if limit_reached:
        return count, MORE
    clear_request(zone)
    return count, SHORT


@kernel
def end(zone, early):  # type: ignore[no-untyped-def]
    """ACTIVE := 0. Nothing touches a boundary from here to the next begin.

    ``early``: before a pull came up short. That leaves unreported blocks between two reported runs (U R U R), which the
    shape U* R* U* does not allow: every list is marked as turned, and walked once by the next run.
    """
    ctl_of(zone)[W_ACTIVE] = INACTIVE
    if early:
        for order in range(N_ORDERS):
            ctl_of(zone)[W_ROTATED + order] = (1 << N_MIGRATETYPES) - 1
