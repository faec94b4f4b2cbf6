"""Mainline as of 2026: three states, a budget a list, and rotation in place of a boundary (M1 to M6).

Mirrors mm/page_reporting.c: *begin* is the head of page_reporting_process, *pull* is page_reporting_process_zone over
page_reporting_cycle, *end* the tail of the former. A run is one pass over the lists.

The three states of ``prdev->state`` are two words here. IDLE: neither is set. REQUESTED: W_REQUESTED is. ACTIVE:
W_ACTIVE alone. A free during the run makes ACTIVE into REQUESTED (both words are set), which posts the reporter's
semaphore: it runs again, after the delay (M1). Both words change under the zone lock, so no request can come between
the last look and the clearing.

Two things are not as they are there:

* The kernel's 32 (PAGE_REPORTING_CAPACITY) is the capacity of the batch: in the budget and in the gate too. With the
  policy's own capacity of 32 that is the kernel's arithmetic.
* The kernel drains a reported batch and walks on under one hold of the lock. Put back and pull are two holds here, and
  between them somebody may allocate, free or turn the list. That is harmless: the walk restarts from the first entry
  in either case, so what a pass remembers from pull to pull is which list it is at and what is left of the budget,
  never a node; and the lock was given up for the report a moment before, with the same consequences.
"""

from __future__ import annotations

import numpy as np

from common.faults import NUMBERS
from common.geometry import Migratetype
from common.layout import (
    ACTIVE_PLAIN,
    W_ACTIVE,
    W_LOW_WATERMARK,
    W_MIN_ORDER,
    W_NODES_VISITED,
    W_NR_FREE,
    W_POLICY_WORDS,
    W_RUNS,
)
from common.native import fault_point, kernel
from guest.allocator.buddy import request_run
from guest.allocator.lists import free_list_head, next_node, splice_to_front
from guest.allocator.view import ctl_of
from guest.reporting.blocks import (
    MORE,
    SHORT,
    clear_request,
    count_pulled,
    is_reported,
    isolate_free_page,
    lists_to_report,
    watermark_ok,
)

__all__ = ["begin", "pull"]

ISOLATE = int(Migratetype.ISOLATE)
BEGIN_ACTIVE = NUMBERS["begin.active"]
PASSES = 16  # the budget lets about this part of a list go in one pass

# The policy's words: where the pass is.
W_GATE_SEEN = W_POLICY_WORDS  # the gate has been looked at in this pass
W_LIST = W_POLICY_WORDS + 1  # which list the pass is at; as many as there are lists: it is over
W_ENTERED = W_POLICY_WORDS + 2  # it has been at this list in an earlier pull: the budget is that list's
W_BUDGET = W_POLICY_WORDS + 3  # full reports that the list may still make; one more is made at 0


@kernel
def begin(zone):  # type: ignore[no-untyped-def]
    """REQUESTED becomes ACTIVE in one step (M1), and the pass is at its first list."""
    clear_request(zone)
    ctl_of(zone)[W_ACTIVE] = ACTIVE_PLAIN
    fault_point(BEGIN_ACTIVE)
    ctl_of(zone)[W_RUNS] += 1
    for index in range(4):
        ctl_of(zone)[W_POLICY_WORDS + index] = 0


@kernel
def walk_list(zone, order, migratetype, pfns, orders, count, capacity):  # type: ignore[no-untyped-def]
    """Isolate unreported blocks of one list, head to tail, into a batch of ``count`` so far; (count, batch is full).

    Mirrors the walk of page_reporting_cycle. It stops at an unreported block when the budget is spent (and asks for
    another run), when the batch is full, or when the block may not be isolated. That block comes first then (M3).
    The arrays are filled from their end down.
    """
    head = free_list_head(zone, order, migratetype)
    node = next_node(zone, head)
    visited = np.int64(0)
    full = False
    while node != head:
        visited += 1
        following = next_node(zone, node)
        if not is_reported(zone, node):
            if ctl_of(zone)[W_BUDGET] < 0:
                request_run(zone)
                break
            if count == capacity:
                ctl_of(zone)[W_BUDGET] -= 1
                full = True
                break
            if not isolate_free_page(zone, node, order, migratetype):
                break
            count += 1
            pfns[capacity - count] = node
            orders[capacity - count] = order
        node = following
    ctl_of(zone)[W_NODES_VISITED] += visited
    if node != head:
        splice_to_front(zone, node, head)
    return count, full


@kernel
def pull(zone, pfns, orders, capacity):  # type: ignore[no-untyped-def]
    """Fill ``pfns`` and ``orders`` (int64[capacity]) from where the pass is; returns (count, SHORT or MORE).

    Lowest order first, first type first, never ISOLATE (S9). One batch is shared by all lists: it is returned when it
    is full and another unreported block is found (MORE), or with what it holds at the end of the pass (SHORT). The
    block that was isolated last comes first.
    """
    lists = lists_to_report(zone)
    lowest = ctl_of(zone)[W_MIN_ORDER]
    count = np.int64(0)
    if not ctl_of(zone)[W_GATE_SEEN]:
        ctl_of(zone)[W_GATE_SEEN] = 1
        if not watermark_ok(zone, ctl_of(zone)[W_LOW_WATERMARK] + (capacity << lowest)):  # M4
            ctl_of(zone)[W_LIST] = lists
    while ctl_of(zone)[W_LIST] < lists:
        order = lowest + ctl_of(zone)[W_LIST] // ISOLATE
        migratetype = ctl_of(zone)[W_LIST] % ISOLATE
        if not ctl_of(zone)[W_ENTERED]:
            ctl_of(zone)[W_ENTERED] = 1
            ctl_of(zone)[W_BUDGET] = -(-ctl_of(zone)[W_NR_FREE + order] // (capacity * PASSES))  # M2
        count, full = walk_list(zone, order, migratetype, pfns, orders, count, capacity)
        if full:
            count_pulled(zone, count)
            return count, MORE
        ctl_of(zone)[W_ENTERED] = 0
        ctl_of(zone)[W_LIST] += 1
    for index in range(count):  # the arrays were filled from their end down
        pfns[index] = pfns[capacity - count + index]
        orders[index] = orders[capacity - count + index]
    count_pulled(zone, count)
    return count, SHORT
