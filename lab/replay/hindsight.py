"""Moves that leave no event, found by what comes after: a kernel, and the tables that it works on."""

from __future__ import annotations

import numpy as np

from common.geometry import PAGEBLOCK_ORDER, Migratetype
from common.native import kernel
from lab.trace.events import Event

__all__ = ["BYPASS", "KEYS", "LISTED", "SILENT", "UNKNOWN_TYPE", "find_unseen", "list_key"]

_ALLOC, _FREE = int(Event.mm_page_alloc), int(Event.mm_page_free)
_TAKE, _GIVE = int(Event.mm_page_alloc_zone_locked), int(Event.mm_page_pcpu_drain)
_COSTLY = 3
_CPUS, _ORDERS, _TYPES = 4096, 16, 4
KEYS = _CPUS * _ORDERS * _TYPES

# What is found out about a row of mm_page_free.
BYPASS = 1  # it went to the buddy lists at once
SILENT = 2  # its pages were on the buddy lists: somebody took them without an event

# A page's word: 0 for unknown, LISTED when it is on the buddy lists, else 1 and above for the row that freed it.
LISTED = -1
MOVABLE = int(Migratetype.MOVABLE)
UNKNOWN_TYPE = -1
MIXED_TYPE = -2  # of several types, one after the other: whose lists its pages were on when is not known


@kernel
def see_type(block_types, block, migratetype):  # type: ignore[no-untyped-def]
    """A pageblock is of this type as a zone event tells."""
    if block_types[block] == UNKNOWN_TYPE:
        block_types[block] = migratetype
    elif block_types[block] != migratetype:
        block_types[block] = MIXED_TYPE


@kernel
def list_key(cpu, order, migratetype):  # type: ignore[no-untyped-def]
    """Which per-CPU list a page is on."""
    return ((cpu & (_CPUS - 1)) * _ORDERS + order) * _TYPES + (migratetype & (_TYPES - 1))


@kernel
def find_unseen(  # type: ignore[no-untyped-def]
    events, cpus, pfns, orders, types, pages, block_types, newest, found
):
    """Mark the frees that went past the per-CPU lists, and those of pages that were taken silently.

    A free past the lists (free_unref_page that finds them locked) has been if the zone hands the page out next; and if
    a page that was freed later on the same per-CPU list was drained while nothing more is heard of this one, for a list
    is drained from its old end. That holds for movable pages alone: others may have left the list for an allocation in
    bulk, which has no event. From the buddy lists pages are taken silently by compaction (isolate_freepages).

    Args:
        events, cpus, pfns, orders, types: columns of the recording.
        pages: int64 a page, LISTED where it is known to be on the buddy lists, else 0.
        block_types: int8 a pageblock, UNKNOWN_TYPE.
        newest: int64[KEYS], zeros: of each per-CPU list, the newest free that was drained.
        found: uint8 a row, zeros, written to.
    """
    for row in range(events.size):
        event = np.int64(events[row])
        if event > _GIVE:
            continue
        pfn, order = np.int64(pfns[row]), np.int64(orders[row])
        if event == _FREE:
            listed = order <= _COSTLY or order == PAGEBLOCK_ORDER
            if pages[pfn] == LISTED:
                found[row] = SILENT
            for page in range(pfn, pfn + (1 << order)):
                pages[page] = row + 1 if listed else LISTED
        elif event == _TAKE:
            if types[row] >= 0:
                see_type(block_types, pfn >> PAGEBLOCK_ORDER, types[row])
            for page in range(pfn, pfn + (1 << order)):
                if pages[page] > 0:
                    found[pages[page] - 1] = BYPASS
                pages[page] = 0
        elif event == _GIVE:
            freed = pages[pfn]
            if types[row] >= 0:
                see_type(block_types, pfn >> PAGEBLOCK_ORDER, types[row])
            if freed > 0:
                key = list_key(np.int64(cpus[freed - 1]), order, np.int64(types[row]))
                newest[key] = max(newest[key], freed)
            for page in range(pfn, pfn + (1 << order)):
                pages[page] = LISTED
        elif event == _ALLOC:
            if block_types[pfn >> PAGEBLOCK_ORDER] == UNKNOWN_TYPE:  # what was asked for, which is mostly the same
                block_types[pfn >> PAGEBLOCK_ORDER] = types[row]
            for page in range(pfn, pfn + (1 << order)):
                pages[page] = 0
    for head in range(pages.size):
        last = pages[head]
        if last > 0 and np.int64(pfns[last - 1]) == head and found[last - 1] == 0:
            last_order = np.int64(orders[last - 1])
            movable = block_types[head >> PAGEBLOCK_ORDER] == MOVABLE
            if movable and newest[list_key(np.int64(cpus[last - 1]), last_order, MOVABLE)] > last:
                found[last - 1] = BYPASS
