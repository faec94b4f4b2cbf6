"""What is known of each page while a trace is followed: allocated or free, on the buddy lists or off them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from common.native import kernel
from lab.trace.columns import Columns
from lab.trace.events import Event
from lab.trace.snapshot import Snapshot

__all__ = ["FOLLOWED", "Pages"]

_LEAF_SHIFT = 15
_LEAF = 1 << _LEAF_SHIFT
_TOP = (1 << (32 - _LEAF_SHIFT)) + 1
# A page's byte: what is known of it, what is known of the lists, and where that comes from.
_STATE, _FREE, _ALLOCATED, _OFF = 0x03, 1, 2, 3  # _OFF: allocated or on a per-CPU list
_ZONE, _ON_LIST, _OFF_LIST = 0x0C, 0x04, 0x08
_SEEDED, _TOUCHED = 0x10, 0x20

# Names of the counts, in their order in the array. "pages" where a name says so, else events.
FOLLOWED = (
    "known_before",
    "frees_of_unknown",
    "frees_of_unknown_pages",
    "frees_of_free",
    "frees_of_free_pages",
    "allocations_of_allocated",
    "allocations_of_allocated_pages",
    "batched_without_free",
    "removed_not_on_list",
    "added_already_on_list",
    "misaligned",
    "seeded_removals",
    "seeded_removals_wrong",
)
(_KNOWN, _F_UNKNOWN, _F_UNKNOWN_P, _F_FREE, _F_FREE_P, _A_ALLOC, _A_ALLOC_P, _BATCHED, _REMOVED, _ADDED, _MISALIGNED,
 _SEED_ALL, _SEED_WRONG) = range(13)  # fmt: skip
_E_ALLOC, _E_FREE, _E_BATCHED = int(Event.mm_page_alloc), int(Event.mm_page_free), int(Event.mm_page_free_batched)
_E_REMOVE, _E_ADD = int(Event.mm_page_alloc_zone_locked), int(Event.mm_page_pcpu_drain)


@kernel
def _follow(events, pfns, orders, top, pool, counts):  # type: ignore[no-untyped-def]
    """Apply events to the pages' bytes and count what does not fit.

    Args:
        events, pfns, orders: columns.
        top: int64, row of ``pool`` by pfn >> 15; rows of every page named exist.
        pool: uint8 (n, 32768), a byte a page.
        counts: int64, by ``FOLLOWED``, added to.
    """
    for row in range(events.size):
        event = np.int64(events[row])
        if event > _E_ADD:
            continue
        pfn, pages = np.int64(pfns[row]), np.int64(1) << np.int64(orders[row])
        if pfn & (pages - 1):
            counts[_MISALIGNED] += 1
        unknown, clash, seeded, seeded_wrong = 0, 0, 0, 0
        for page in range(pfn, pfn + pages):
            leaf, place = top[page >> _LEAF_SHIFT], page & (_LEAF - 1)
            byte = np.int64(pool[leaf, place])
            if event == _E_REMOVE or event == _E_ADD:
                zone = byte & _ZONE
                now = _OFF_LIST if event == _E_REMOVE else _ON_LIST
                unknown += zone == 0
                clash += zone == now
                if event == _E_REMOVE and byte & _SEEDED:
                    seeded = 1
                    seeded_wrong = seeded_wrong | (zone == _OFF_LIST)
                byte = (byte & ~(_ZONE | _SEEDED)) | now
            else:
                state = byte & _STATE
                now = _ALLOCATED if event == _E_ALLOC else _FREE
                unknown += state == 0
                clash += (state != _FREE) if event == _E_BATCHED else (state == now)
                byte = (byte & ~_STATE) | now | _TOUCHED
            pool[leaf, place] = byte
        if unknown == 0:
            counts[_KNOWN] += 1
        counts[_SEED_ALL] += seeded
        counts[_SEED_WRONG] += seeded_wrong
        if event == _E_FREE and unknown:
            counts[_F_UNKNOWN] += 1
            counts[_F_UNKNOWN_P] += unknown
        if clash == 0:
            continue
        if event == _E_FREE:
            counts[_F_FREE] += 1
            counts[_F_FREE_P] += clash
        elif event == _E_ALLOC:
            counts[_A_ALLOC] += 1
            counts[_A_ALLOC_P] += clash
        elif event == _E_BATCHED:
            counts[_BATCHED] += 1
        elif event == _E_REMOVE:
            counts[_REMOVED] += 1
        else:
            counts[_ADDED] += 1


class Pages:
    """A byte for each page, in leaves that exist where the trace or the snapshot names a page."""

    def __init__(self, start: Snapshot | None) -> None:
        self._top: npt.NDArray[np.int64] = np.full(_TOP, -1, np.int64)
        self._pool: npt.NDArray[np.uint8] = np.zeros((16, _LEAF), np.uint8)
        self._leaves = 0
        self._end = 0
        self._given = start.n_pages if start else 0
        self.counts: npt.NDArray[np.int64] = np.zeros(len(FOLLOWED), np.int64)
        if start is not None:
            self._seed(start)

    def _seed(self, start: Snapshot) -> None:
        ends = start.pfn + (np.int64(1) << start.order.astype(np.int64))
        self._end = max(start.n_pages, int(ends.max()))
        self._reach(np.arange((self._end - 1 >> _LEAF_SHIFT) + 1))
        self._pool[self._top[: (self._end - 1 >> _LEAF_SHIFT) + 1]] = _OFF | _OFF_LIST | _SEEDED
        for pfn, end in zip(start.pfn.tolist(), ends.tolist(), strict=True):
            leaf = self._top[pfn >> _LEAF_SHIFT]  # an aligned block of order 10 lies in one leaf
            self._pool[leaf, pfn & (_LEAF - 1) : ((end - 1) & (_LEAF - 1)) + 1] = _FREE | _ON_LIST | _SEEDED

    def _reach(self, numbers: npt.NDArray[np.int64]) -> None:
        """Make the leaves of these numbers."""
        for number in numbers.tolist():
            if self._top[number] >= 0:
                continue
            if self._leaves == len(self._pool):
                self._pool = np.concatenate([self._pool, np.zeros_like(self._pool)])
            self._top[number] = self._leaves
            self._leaves += 1

    def apply(self, rows: Columns) -> None:
        """Follow these events."""
        pfns, orders = rows["pfn"].astype(np.int64), rows["order"].astype(np.int64)
        lasts = pfns + (np.int64(1) << orders) - 1
        events = rows["event"]
        paged = events <= _E_ADD
        if paged.any():
            self._end = max(self._end, int(lasts[paged].max()) + 1)
            touched = np.zeros(_TOP, np.bool_)
            touched[pfns >> _LEAF_SHIFT] = True
            touched[lasts >> _LEAF_SHIFT] = True
            self._reach(np.flatnonzero(touched))
            _follow(events, pfns, orders, self._top, self._pool, self.counts)

    @property
    def n_pages(self) -> int:
        """Pages of the machine as far as it is known: the snapshot's, else up to the highest that was named."""
        return self._given or self._end

    def known_pages(self) -> tuple[int, int]:
        """Pages whose state the events tell, and those whose state events or snapshot tell."""
        from_events = altogether = 0
        for number in np.flatnonzero(self._top >= 0).tolist():
            within = max(0, min(_LEAF, self.n_pages - (number << _LEAF_SHIFT)))  # a leaf may go beyond the machine
            used = self._pool[self._top[number], :within]
            from_events += int(np.count_nonzero(used & _TOUCHED))
            altogether += int(np.count_nonzero(used & _STATE))
        return from_events, altogether if self._end else 0
