"""What a recording does to the free lists, as columns that a kernel works through."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from common.geometry import PAGEBLOCK_ORDER, Migratetype
from lab.replay import hindsight
from lab.replay.kernels import (
    OF_PAGEBLOCK,
    OP_ALLOC,
    OP_CONVERT,
    OP_FREE,
    OP_GIVE,
    OP_MOVE,
    OP_STEAL,
    OP_TAKE,
    OP_TOUCH,
)
from lab.trace.columns import Columns
from lab.trace.events import Event
from lab.trace.snapshot import Snapshot

__all__ = ["Plan", "Steal", "build_page_plan", "build_plan", "has_own_lists", "is_listed"]

_COSTLY = 3  # PAGE_ALLOC_COSTLY_ORDER: up to here, and at pageblock order, the per-CPU lists come first
_STEAL = re.compile(
    r"fallback_order=(\d+) .*?fallback_migratetype=(\d+)(?:.*? change_ownership=(\d))?",
)


@dataclass(frozen=True)
class Steal:
    """An allocation that had to go to another type's list (mm_page_alloc_extfrag)."""

    row: int
    t_ns: int
    pfn: int
    order: int
    from_type: int
    to_type: int
    convert: bool

    @property
    def op(self) -> int:
        """What goes with the block: a small movable allocation takes it alone (can_steal_fallback)."""
        if self.convert:
            return OP_CONVERT
        alone = self.order < PAGEBLOCK_ORDER // 2 and self.to_type == Migratetype.MOVABLE
        return OP_STEAL if alone else OP_MOVE


@dataclass(frozen=True)
class Plan:
    """Rows in the order of time.

    Attributes:
        t_ns, op, pfn, order, migratetype: columns; int64, int8, int64, int8, int8.
        steals: the rows of OP_STEAL and OP_CONVERT in full.
        unseen_frees, silent_takes: moves without an event that were found by what came after.
        cpu: int16, numbered from 0 without gaps; empty where per-CPU lists are not replayed. cpus: how many there are.
        repeats: a free may be told twice.
    """

    t_ns: npt.NDArray[np.int64]
    op: npt.NDArray[np.int8]
    pfn: npt.NDArray[np.int64]
    order: npt.NDArray[np.int8]
    migratetype: npt.NDArray[np.int8]
    steals: list[Steal]
    unseen_frees: int
    silent_takes: int
    cpu: npt.NDArray[np.int16] = field(default_factory=lambda: np.zeros(0, np.int16))
    cpus: int = 1
    repeats: bool = False

    def __len__(self) -> int:
        return len(self.t_ns)

    def of_pages(self, first: int, end: int) -> Plan:
        """The rows of one zone's pages, first <= pfn < end, counted from ``first``."""
        rows = np.flatnonzero((self.pfn >= first) & (self.pfn < end))
        steals = [steal for steal in self.steals if first <= steal.pfn < end]
        return Plan(
            self.t_ns[rows],
            self.op[rows],
            self.pfn[rows] - first,
            self.order[rows],
            self.migratetype[rows],
            steals,
            self.unseen_frees,
            self.silent_takes,
            self.cpu[rows] if self.cpu.size else self.cpu,
            self.cpus,
            self.repeats,
        )


def has_own_lists(order: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether blocks of an order go through the per-CPU lists (pcp_allowed_order)."""
    return np.asarray((order <= _COSTLY) | (order == PAGEBLOCK_ORDER), np.bool_)


def is_listed(migratetype: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether a page can come from a list of this type; a number beyond is another kernel's, or none."""
    return np.asarray((migratetype >= 0) & (migratetype < Migratetype.ISOLATE), np.bool_)


def build_plan(rows: Columns, start: Snapshot | None = None) -> Plan:
    """The plan of a zone replay. ``start``: the free lists as the rows begin, where it is known that they begin there.

    What reaches the buddy lists is mm_page_alloc_zone_locked, mm_page_pcpu_drain and, without an event of its own, the
    free of an order that has no per-CPU list; and what ``hindsight`` finds.
    """
    event, order = rows["event"], rows["order"]
    unseen = _unseen(rows, start)
    zone_free = (event == Event.mm_page_free) & ~has_own_lists(order)
    bypass, silent = unseen == hindsight.BYPASS, unseen == hindsight.SILENT
    steals = _steals(rows)
    op = np.full(len(rows), -1, np.int8)
    op[event == Event.mm_page_alloc] = OP_TOUCH
    op[event == Event.mm_page_alloc_zone_locked] = OP_TAKE
    op[event == Event.mm_page_pcpu_drain] = OP_GIVE
    op[zone_free | bypass] = OP_GIVE
    op[silent] = OP_TAKE
    migratetype = rows["migratetype"].astype(np.int8)
    of_pageblock = zone_free | bypass | silent | ~is_listed(migratetype)
    migratetype[of_pageblock & ((op == OP_GIVE) | (op == OP_TAKE))] = OF_PAGEBLOCK
    pfn = rows["pfn"].astype(np.int64)
    orders = order.astype(np.int8)
    for steal in steals:
        op[steal.row] = steal.op
        migratetype[steal.row] = steal.to_type
    kept = np.flatnonzero(op >= 0)
    return Plan(
        rows["t_ns"][kept],
        op[kept],
        pfn[kept],
        orders[kept],
        migratetype[kept],
        steals,
        int(np.count_nonzero(bypass)),
        int(np.count_nonzero(silent)),
    )


def build_page_plan(rows: Columns, *, batched: bool) -> Plan:
    """The plan of a page or a demand replay: what was allocated and freed, by whom.

    Args:
        batched: there are batched frees without their mm_page_free; they count as the free. Those that repeat one
            meet a page that is free, and do nothing.
    """
    event = rows["event"]
    op = np.full(len(rows), -1, np.int8)
    op[event == Event.mm_page_alloc] = OP_ALLOC
    op[event == Event.mm_page_free] = OP_FREE
    if batched:
        op[event == Event.mm_page_free_batched] = OP_FREE
    kept = np.flatnonzero(op >= 0)
    numbers, cpu = np.unique(rows["cpu"][kept], return_inverse=True)
    return Plan(
        rows["t_ns"][kept],
        op[kept],
        rows["pfn"][kept].astype(np.int64),
        rows["order"][kept].astype(np.int8),
        rows["migratetype"][kept].astype(np.int8),
        [],
        0,
        0,
        cpu.astype(np.int16),
        max(1, len(numbers)),
        batched,
    )


def _unseen(rows: Columns, start: Snapshot | None) -> npt.NDArray[np.uint8]:
    """What the events behind each free say of it: uint8 a row, as ``hindsight.find_unseen`` writes them."""
    ends = rows["pfn"].astype(np.int64) + (np.int64(1) << rows["order"].astype(np.int64))
    pages = int(ends.max(initial=0))
    known: npt.NDArray[np.int64] = np.zeros(pages, np.int64)
    if start is not None:
        pages = max(pages, start.n_pages, int((start.pfn + (np.int64(1) << start.order.astype(np.int64))).max()))
        known = np.where(start.free_map(pages), hindsight.LISTED, 0).astype(np.int64)
    found: npt.NDArray[np.uint8] = np.zeros(len(rows), np.uint8)
    hindsight.find_unseen(
        rows["event"],
        rows["cpu"],
        rows["pfn"],
        rows["order"],
        rows["migratetype"],
        known,
        np.full((pages >> PAGEBLOCK_ORDER) + 1, hindsight.UNKNOWN_TYPE, np.int8),
        np.zeros(hindsight.KEYS, np.int64),
        found,
    )
    return found


def _steals(rows: Columns) -> list[Steal]:
    found = []
    for row in np.flatnonzero(rows["event"] == Event.mm_page_alloc_extfrag).tolist():
        told = _STEAL.search(rows.text(row) or "")
        if told is None or not (is_listed(rows["migratetype"][row : row + 1])[0] and int(told[2]) < Migratetype.ISOLATE):
            continue
        found.append(
            Steal(
                row=row,
                t_ns=int(rows["t_ns"][row]),
                pfn=int(rows["pfn"][row]),
                order=int(told[1]),
                from_type=int(told[2]),
                to_type=int(rows["migratetype"][row]),
                convert=told[3] == "1",
            )
        )
    return found
