"""Kernels that go through a recording or a plan once, before anything is moved."""

from __future__ import annotations

import numpy as np

from common.geometry import PAGEBLOCK_ORDER, Migratetype
from common.native import kernel
from lab.replay import hindsight
from lab.replay.kernels import OF_PAGEBLOCK, OP_ALLOC, OP_GIVE, OP_TAKE, OP_TOUCH
from lab.trace.events import Event

__all__ = ["NOTHING", "first_rows", "first_types", "plan_rows", "top_page"]

_ALLOC, _FREE = int(Event.mm_page_alloc), int(Event.mm_page_free)
_TAKE, _GIVE = int(Event.mm_page_alloc_zone_locked), int(Event.mm_page_pcpu_drain)
_COSTLY = 3  # PAGE_ALLOC_COSTLY_ORDER: up to here, and at pageblock order, the per-CPU lists come first
ISOLATE = int(Migratetype.ISOLATE)
NOTHING = -1  # in place of what a row does


@kernel
def top_page(events, pfns, orders):  # type: ignore[no-untyped-def]
    """One behind the highest page that a page event names."""
    top = np.int64(0)
    for row in range(events.size):
        if events[row] <= _GIVE:
            top = max(top, np.int64(pfns[row]) + (np.int64(1) << np.int64(orders[row])))
    return top


@kernel
def plan_rows(events, orders, types, unseen, ops, op_types):  # type: ignore[no-untyped-def]
    """Write what each row of a recording does to the free lists; how many do anything.

    Args:
        events, orders, types: columns of the recording. unseen: uint8 a row, as ``hindsight.find_unseen`` writes it.
        ops, op_types: int8 a row: ``NOTHING``, or already said; written to.
    """
    kept = 0
    for row in range(events.size):
        event = np.int64(events[row])
        if ops[row] == NOTHING:
            migratetype = np.int64(types[row])
            if event == _ALLOC:
                ops[row] = OP_TOUCH
            elif event == _TAKE or event == _GIVE:
                ops[row] = OP_TAKE if event == _TAKE else OP_GIVE
                if migratetype >= ISOLATE or migratetype < 0:  # another kernel's number, or none
                    migratetype = np.int64(OF_PAGEBLOCK)
            elif event == _FREE:
                order = np.int64(orders[row])
                if unseen[row] == hindsight.SILENT:
                    ops[row] = OP_TAKE
                elif unseen[row] == hindsight.BYPASS or not (order <= _COSTLY or order == PAGEBLOCK_ORDER):
                    ops[row] = OP_GIVE
                migratetype = np.int64(OF_PAGEBLOCK)
            op_types[row] = migratetype
        if ops[row] != NOTHING:
            kept += 1
    return kept


@kernel
def first_types(ops, pfns, types, block_types, told):  # type: ignore[no-untyped-def]
    """The type that a pageblock is first freed under, else first taken from, else first asked for.

    Args:
        block_types: int64 a pageblock, written to. told: int64 a pageblock, -1; the row that told it, written to.
    """
    rank = np.zeros(block_types.size, np.uint8)
    for row in range(ops.size):
        op, migratetype = np.int64(ops[row]), np.int64(types[row])
        own = 3 if op == OP_GIVE else (2 if op == OP_TAKE else (1 if op == OP_ALLOC else 0))
        block = np.int64(pfns[row]) >> PAGEBLOCK_ORDER
        if own > rank[block] and 0 <= migratetype < ISOLATE:
            block_types[block] = migratetype
            told[block] = row
            rank[block] = own


@kernel
def first_rows(ops, pfns, block_of, first):  # type: ignore[no-untyped-def]
    """The first row that takes from each free block. ``block_of``: int32 a page, -1 for none; ``first``: written to."""
    for row in range(ops.size):
        if ops[row] == OP_TAKE or ops[row] == OP_ALLOC:
            block = block_of[pfns[row]]
            if block >= 0 and row < first[block]:
                first[block] = row
