"""What a recording does to the free lists, as columns that a kernel works through."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.geometry import PAGEBLOCK_ORDER, Migratetype
from lab.replay.kernels import OF_PAGEBLOCK, OP_CONVERT, OP_GIVE, OP_STEAL, OP_TAKE, OP_TOUCH
from lab.trace.columns import Columns
from lab.trace.events import NO_MIGRATETYPE, Event

__all__ = ["Plan", "Steal", "build_plan", "has_own_lists"]

_COSTLY = 3  # PAGE_ALLOC_COSTLY_ORDER: up to here, and at pageblock order, the per-CPU lists come first
_STEAL = re.compile(
    r"fallback_order=(\d+) .*?fallback_migratetype=(\d+)(?:.*? change_ownership=(\d))?",
)


@dataclass(frozen=True)
class Steal:
    """An allocation that had to go to another type's list (mm_page_alloc_extfrag)."""

    row: int
    pfn: int
    order: int
    from_type: int
    to_type: int
    convert: bool


@dataclass(frozen=True)
class Plan:
    """Rows in the order of time.

    Attributes:
        t_ns, op, pfn, order, migratetype: columns; int64, int8, int64, int8, int8.
        steals: the rows of OP_STEAL and OP_CONVERT in full.
        unseen_frees: frees past the per-CPU lists that left no event and were found by what came after.
    """

    t_ns: npt.NDArray[np.int64]
    op: npt.NDArray[np.int8]
    pfn: npt.NDArray[np.int64]
    order: npt.NDArray[np.int8]
    migratetype: npt.NDArray[np.int8]
    steals: list[Steal]
    unseen_frees: int

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
        )


def has_own_lists(order: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether blocks of an order go through the per-CPU lists (pcp_allowed_order)."""
    return np.asarray((order <= _COSTLY) | (order == PAGEBLOCK_ORDER), np.bool_)


def build_plan(rows: Columns) -> Plan:
    """The plan of a zone replay.

    What reaches the buddy lists is mm_page_alloc_zone_locked, mm_page_pcpu_drain and, without an event of its own, the
    free of an order that has no per-CPU list. So is a free of another order that found those lists locked
    (free_unref_page): it is known by the page being taken from the buddy lists next, without a drain in between.
    """
    event, order = rows["event"], rows["order"]
    zone_free = (event == Event.mm_page_free) & ~has_own_lists(order)
    bypass = np.zeros(len(rows), np.bool_)
    bypass[_bypassing_frees(rows)] = True
    steals = _steals(rows)
    op = np.full(len(rows), -1, np.int8)
    op[event == Event.mm_page_alloc] = OP_TOUCH
    op[event == Event.mm_page_alloc_zone_locked] = OP_TAKE
    op[event == Event.mm_page_pcpu_drain] = OP_GIVE
    op[zone_free | bypass] = OP_GIVE
    migratetype = rows["migratetype"].astype(np.int8)
    migratetype[(zone_free | bypass) | ((op == OP_GIVE) & (migratetype == NO_MIGRATETYPE))] = OF_PAGEBLOCK
    migratetype[(op == OP_TAKE) & (migratetype == NO_MIGRATETYPE)] = int(Migratetype.MOVABLE)
    pfn = rows["pfn"].astype(np.int64)
    orders = order.astype(np.int8)
    for steal in steals:
        op[steal.row] = OP_CONVERT if steal.convert else OP_STEAL
        migratetype[steal.row] = steal.to_type
    kept = np.flatnonzero(op >= 0)
    return Plan(rows["t_ns"][kept], op[kept], pfn[kept], orders[kept], migratetype[kept], steals, int(bypass.sum()))


def _bypassing_frees(rows: Columns) -> npt.NDArray[np.intp]:
    """Rows of mm_page_free after which the next that is heard of the page is that the zone hands it out."""
    event = rows["event"]
    kinds = (Event.mm_page_alloc, Event.mm_page_free, Event.mm_page_alloc_zone_locked, Event.mm_page_pcpu_drain)
    of_interest = np.flatnonzero(np.isin(event, [int(kind) for kind in kinds]))
    if not of_interest.size:
        return of_interest
    pfn = rows["pfn"][of_interest]
    by_page = of_interest[np.argsort(pfn, kind="stable")]
    page, what, order = rows["pfn"][by_page], event[by_page], rows["order"][by_page]
    found = (
        (page[:-1] == page[1:])
        & (what[:-1] == Event.mm_page_free)
        & (what[1:] == Event.mm_page_alloc_zone_locked)
        & has_own_lists(order[:-1])
    )
    return np.asarray(by_page[:-1][found], np.intp)


def _steals(rows: Columns) -> list[Steal]:
    found = []
    for row in np.flatnonzero(rows["event"] == Event.mm_page_alloc_extfrag).tolist():
        told = _STEAL.search(rows.text(row) or "")
        if told is None:
            continue
        found.append(
            Steal(
                row=row,
                pfn=int(rows["pfn"][row]),
                order=int(told[1]),
                from_type=int(told[2]),
                to_type=int(rows["migratetype"][row]),
                convert=told[3] == "1",
            )
        )
    return found
