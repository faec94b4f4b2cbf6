"""Free lists: circular, doubly linked through the page records (include/linux/list.h, helpers of patch 6/8).

Everything here runs with the zone lock held. The helpers that take a page off a list or move it are the only places
where the Reported flag is lost and where the boundary is moved, as in v9.
"""

from __future__ import annotations

import numpy as np

from common.faults import NUMBERS
from common.geometry import N_ORDERS, Migratetype
from common.layout import (
    ACTIVE_BOUNDARY,
    ACTIVE_RELEASE,
    FREE,
    INACTIVE,
    INTERIOR,
    MT_SHIFT,
    REPORTED,
    W_ACTIVE,
    W_BOUNDARY,
    W_MIN_ORDER,
    W_N_PAGES,
    W_NR_FREE,
    W_REPORTED,
    ZEROED,
)
from common.native import barrier, fault_point, kernel
from guest.allocator.view import ctl_of, links_of, pages_of

__all__ = [
    "add_to_free_list",
    "add_to_free_list_tail",
    "del_page_from_free_list",
    "free_list_head",
    "link_after",
    "link_before",
    "move_to_free_list",
    "next_node",
    "previous_node",
    "splice_to_front",
    "unlink",
]

ISOLATE = int(Migratetype.ISOLATE)
MT_FIELD = 0x7
LINK_FIRST, LINK_FORWARD = NUMBERS["link.first"], NUMBERS["link.forward"]
UNLINK_FORWARD = NUMBERS["unlink.forward"]
LIST_STATED, LIST_LINKED = NUMBERS["list.stated"], NUMBERS["list.linked"]
LIST_UNLINKED, LIST_UNCOUNTED = NUMBERS["list.unlinked"], NUMBERS["list.uncounted"]
MOVE_UNLINKED, MOVE_STATED = NUMBERS["move.unlinked"], NUMBERS["move.stated"]


@kernel
def next_node(zone, node):  # type: ignore[no-untyped-def]
    """Node behind ``node``."""
    return np.int64(links_of(zone)[2 * node])


@kernel
def previous_node(zone, node):  # type: ignore[no-untyped-def]
    """Node ahead of ``node``."""
    return np.int64(links_of(zone)[2 * node + 1])


@kernel
def free_list_head(zone, order, migratetype):  # type: ignore[no-untyped-def]
    """Node number of the head of free list (order, migratetype)."""
    return ctl_of(zone)[W_N_PAGES] + migratetype * N_ORDERS + order


@kernel
def link_before(zone, node, successor):  # type: ignore[no-untyped-def]
    """Link ``node`` directly ahead of ``successor`` (list_add_tail when that is a list head)."""
    before = np.int64(links_of(zone)[2 * successor + 1])
    links_of(zone)[2 * node] = successor
    links_of(zone)[2 * node + 1] = before
    fault_point(LINK_FIRST)
    links_of(zone)[2 * successor + 1] = node
    links_of(zone)[2 * before] = node


@kernel
def link_after(zone, node, predecessor):  # type: ignore[no-untyped-def]
    """Link ``node`` directly behind ``predecessor`` (list_add when that is a list head)."""
    behind = np.int64(links_of(zone)[2 * predecessor])
    links_of(zone)[2 * node] = behind
    links_of(zone)[2 * node + 1] = predecessor
    fault_point(LINK_FIRST)
    barrier()  # its own links are right before the forward chain leads to it
    links_of(zone)[2 * predecessor] = node
    fault_point(LINK_FORWARD)
    links_of(zone)[2 * behind + 1] = node


@kernel
def unlink(zone, node):  # type: ignore[no-untyped-def]
    """Take ``node`` off its list (list_del). Its own links are left stale."""
    behind = np.int64(links_of(zone)[2 * node])
    before = np.int64(links_of(zone)[2 * node + 1])
    links_of(zone)[2 * before] = behind
    fault_point(UNLINK_FORWARD)
    links_of(zone)[2 * behind + 1] = before


@kernel
def add_to_free_list(zone, pfn, order, migratetype, zeroed=0):  # type: ignore[no-untyped-def]
    """Make ``pfn`` a free, unreported head at the front of its list: always ahead of the boundary (D4).

    ``zeroed``: ZEROED if all of it is known to be zero, else 0.
    """
    barrier()  # what it is made of is interior before it is a head
    pages_of(zone)[pfn] = FREE | order | (migratetype << MT_SHIFT) | zeroed
    fault_point(LIST_STATED)
    link_after(zone, pfn, free_list_head(zone, order, migratetype))
    fault_point(LIST_LINKED)
    ctl_of(zone)[W_NR_FREE + order] += 1


@kernel
def tail_position(zone, order, migratetype):  # type: ignore[no-untyped-def]
    """Node that a tail add goes ahead of: the boundary during a run, else the list head (get_unreported_tail)."""
    active = ctl_of(zone)[W_ACTIVE]
    if (active == ACTIVE_BOUNDARY or active == ACTIVE_RELEASE) and order >= ctl_of(zone)[W_MIN_ORDER]:
        return ctl_of(zone)[W_BOUNDARY + migratetype * N_ORDERS + order]
    return free_list_head(zone, order, migratetype)


@kernel
def add_to_free_list_tail(zone, pfn, order, migratetype, zeroed=0):  # type: ignore[no-untyped-def]
    """Make ``pfn`` a free, unreported head directly ahead of the boundary, or at the very tail (D4)."""
    barrier()  # as above
    pages_of(zone)[pfn] = FREE | order | (migratetype << MT_SHIFT) | zeroed
    fault_point(LIST_STATED)
    link_before(zone, pfn, tail_position(zone, order, migratetype))
    fault_point(LIST_LINKED)
    ctl_of(zone)[W_NR_FREE + order] += 1


@kernel
def retire_boundary(zone, pfn, order, migratetype):  # type: ignore[no-untyped-def]
    """Move the boundary to the next node if it is ``pfn`` (D3)."""
    word = W_BOUNDARY + migratetype * N_ORDERS + order
    if ctl_of(zone)[W_ACTIVE] and ctl_of(zone)[word] == pfn:
        ctl_of(zone)[word] = next_node(zone, pfn)


@kernel
def del_page_from_free_list(zone, pfn, order, becomes=INTERIOR):  # type: ignore[no-untyped-def]
    """Take a free head off its list; Reported, its counter and the boundary follow (S2, D3). It becomes interior.

    Returns its ZEROED bit, which is the caller's to pass on (Z2). ``becomes``: its state, at once, where nobody may
    take it for free in between.
    """
    state = np.int64(pages_of(zone)[pfn])
    if state & REPORTED:
        retire_boundary(zone, pfn, order, (state >> MT_SHIFT) & MT_FIELD)
        ctl_of(zone)[W_REPORTED + order] -= 1
    unlink(zone, pfn)
    fault_point(LIST_UNLINKED)
    pages_of(zone)[pfn] = becomes
    fault_point(LIST_UNCOUNTED)
    ctl_of(zone)[W_NR_FREE + order] -= 1
    return state & ZEROED


@kernel
def move_to_free_list(zone, pfn, order, migratetype):  # type: ignore[no-untyped-def]
    """Move a free head to the list of another migratetype, as v9's move_to_free_list.

    A Reported block keeps its flag while a run is active or when it goes into isolation; otherwise it loses it. During
    a run of v9 it becomes the boundary of the list it comes to; during one of v10 to v13 it goes to the head. The
    caller moves ``free_pages`` against ``isolated_pages``.
    """
    state = np.int64(pages_of(zone)[pfn])
    position = tail_position(zone, order, migratetype)  # taken first: the page itself may be about to become it
    if position == pfn:
        position = next_node(zone, pfn)  # it is the boundary of the very list that it moves within
    reported = state & REPORTED
    if reported != 0:
        active = ctl_of(zone)[W_ACTIVE]
        if active != INACTIVE:
            retire_boundary(zone, pfn, order, (state >> MT_SHIFT) & MT_FIELD)
            if active == ACTIVE_BOUNDARY:
                ctl_of(zone)[W_BOUNDARY + migratetype * N_ORDERS + order] = pfn
        elif migratetype != ISOLATE:
            ctl_of(zone)[W_REPORTED + order] -= 1
            reported = np.int64(0)
    unlink(zone, pfn)
    fault_point(MOVE_UNLINKED)
    pages_of(zone)[pfn] = FREE | order | (migratetype << MT_SHIFT) | reported | (state & ZEROED)
    fault_point(MOVE_STATED)
    if reported != 0 and ctl_of(zone)[W_ACTIVE] == ACTIVE_RELEASE:
        link_after(zone, pfn, free_list_head(zone, order, migratetype))
    else:
        link_before(zone, pfn, position)


@kernel
def splice_to_front(zone, pfn, head):  # type: ignore[no-untyped-def]
    """Turn the list so that ``pfn`` is its first entry, order kept (list_rotate_to_front). Bounded: four links."""
    unlink(zone, head)
    link_before(zone, head, pfn)
