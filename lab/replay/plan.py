"""What a recording does to the free lists, as columns that a kernel works through."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from common.geometry import PAGEBLOCK_ORDER, Migratetype
from lab.replay import hindsight, survey
from lab.replay.kernels import OF_PAGEBLOCK, OP_ALLOC, OP_CONVERT, OP_FREE, OP_MOVE, OP_STEAL
from lab.trace.columns import Columns
from lab.trace.events import MAX_ORDER, Event
from lab.trace.snapshot import Snapshot

__all__ = ["Plan", "Steal", "build_page_plan", "build_plan", "is_listed"]

_STEAL = re.compile(
    r"fallback_order=(\d{1,3}) .*?fallback_migratetype=(\d{1,3})\b(?:.*? change_ownership=(\d))?",
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
        inside = (self.pfn >= first) & (self.pfn < end)
        if inside.all() and not first:
            return self
        rows = np.flatnonzero(inside)
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


def is_listed(migratetype: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether a page can come from a list of this type; a number beyond is another kernel's, or none."""
    return np.asarray((migratetype >= 0) & (migratetype < Migratetype.ISOLATE), np.bool_)


def build_plan(rows: Columns, start: Snapshot | None = None) -> Plan:
    """The plan of a zone replay. ``start``: the free lists as the rows begin, where it is known that they begin there.

    What reaches the buddy lists is mm_page_alloc_zone_locked, mm_page_pcpu_drain and, without an event of its own, the
    free of an order that has no per-CPU list; and what ``hindsight`` finds.
    """
    unseen = _unseen(rows, start)
    steals = _steals(rows)
    op = np.full(len(rows), survey.NOTHING, np.int8)
    migratetype = np.full(len(rows), OF_PAGEBLOCK, np.int8)
    for steal in steals:
        op[steal.row] = steal.op
        migratetype[steal.row] = steal.to_type
    survey.plan_rows(rows["event"], rows["order"], rows["migratetype"], unseen, op, migratetype)
    kept = np.flatnonzero(op != survey.NOTHING)
    return Plan(
        rows["t_ns"][kept],
        op[kept],
        rows["pfn"][kept].astype(np.int64),
        rows["order"][kept].astype(np.int8),
        migratetype[kept],
        steals,
        int(np.count_nonzero(unseen == hindsight.BYPASS)),
        int(np.count_nonzero(unseen == hindsight.SILENT)),
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
    pages = int(survey.top_page(rows["event"], rows["pfn"], rows["order"]))
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
        types = np.array([rows["migratetype"][row], -1 if told is None else int(told[2])])
        if told is None or not is_listed(types).all() or int(told[1]) > MAX_ORDER:
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
