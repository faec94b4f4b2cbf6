"""The free lists as a recording begins: a snapshot put right by what the recording tells, or learnt from it alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from common.errors import UsageError
from lab.replay import kernels
from lab.replay.against import passes_of
from lab.replay.source import Recording
from lab.replay.start import Place, Watermarks
from lab.trace.events import Event
from lab.trace.snapshot import UNKNOWN_PAGES, Snapshot, free_heads

__all__ = ["Correction", "corrected", "eased", "first_events", "has_zone_events", "learnt"]

# Of the pages named, contradicted by what is done to them first: no snapshot of this machine. Fewer may have changed
# hands between the two; snapshots of other guests of the same size and system differ in 2 to 17 %.
_OTHER_MACHINE_SHARE, _OTHER_MACHINE_LEAST = 0.05, 1000


def has_zone_events(recording: Recording) -> bool:
    """Whether the recording says what reached the buddy lists and what left them."""
    event = recording.rows["event"]
    return bool(np.any((event == Event.mm_page_alloc_zone_locked) | (event == Event.mm_page_pcpu_drain)))


def first_events(recording: Recording, pages: int, *, allocations_tell: bool = False) -> npt.NDArray[np.uint8]:
    """What each page's first event says of it at the start: uint8[pages], as ``kernels.mark_first``.

    Args:
        allocations_tell: a page that is allocated first was free. Where zone events are recorded it was not on the
            buddy lists, or the zone would have handed it out first.
    """
    first: npt.NDArray[np.uint8] = np.zeros(pages, np.uint8)
    event = recording.rows["event"]
    telling = np.where(event <= Event.mm_page_pcpu_drain, event, 255).astype(np.int16)
    telling[(telling == 255) | (event == Event.mm_page_free_batched)] = -1
    if allocations_tell:
        telling[event == Event.mm_page_alloc] = int(Event.mm_page_alloc_zone_locked)
    kernels.mark_first(first, telling, recording.rows["pfn"], recording.rows["order"])
    return first


def learnt(recording: Recording, first: npt.NDArray[np.uint8]) -> Snapshot:
    """The free lists by the events alone: free is what is taken before it is freed, all else is in use.

    A recording of a guest that reported (it holds the reports) began with its free memory reported, from the least
    order on that it reports; in any other the host holds all of it.
    """
    pfn, order = free_heads(first == kernels.WAS_LISTED)
    orders = [size for one in passes_of(recording.rows) for _, size in one.blocks]
    reported = order >= min(orders) if orders else np.zeros(pfn.size, np.bool_)
    return Snapshot("nothing", "none", pfn, order, reported, np.full(pfn.size, UNKNOWN_PAGES, np.int64), 0)


def eased(zones: list[tuple[Place, Watermarks]], first: npt.NDArray[np.uint8]) -> list[tuple[Place, Watermarks]]:
    """The watermarks where there is no snapshot: pages that no event names count as free for them.

    Most of an idle guest's memory is free and is never named. That a pass finds the gate shut for lack of memory needs
    a guest that uses nearly all of it, whose pages are named.
    """
    found = []
    for place, marks in zones:
        unnamed = int(np.count_nonzero(first[place.first : place.end] == 0))
        lowest, low = (mark - unnamed or -1 for mark in (marks.lowest, marks.low))
        found.append((place, replace(marks, lowest=lowest, low=low)))
    return found


@dataclass(frozen=True)
class Correction:
    """What a recording says against a snapshot. Pages.

    Attributes:
        changed: what was put right. contradicted: of them, named by the recording. named: all that it names.
    """

    changed: int = 0
    contradicted: int = 0
    named: int = 0

    @property
    def share(self) -> float:
        """Of the pages named, those contradicted."""
        return self.contradicted / self.named if self.named else 0.0


def corrected(start: Snapshot, recording: Recording, pages: int) -> tuple[Snapshot, Correction]:
    """The snapshot as it must have been when the recording began, and what that changes.

    Between the two pages may have changed hands. A page whose first event is that the zone hands it out was on the
    buddy lists; one that is first drained to them, freed, or handed out by a per-CPU list was not, and neither were
    those below it in its block that no event names: a block is handed out from its low end, and they are still where
    they went then. What the host holds stays as it was seen. Where the recording begins with the snapshot, a page that
    is free in it and freed first was taken later, without an event.

    Raises:
        UsageError: the recording contradicts the snapshot throughout.
    """
    first = first_events(recording, pages)
    free = start.free_map(pages)
    if recording.at_snapshot:
        first[free & (first == kernels.FREED_FIRST)] = 0
    wrong = (free & (first >= kernels.WAS_OFF)) | (~free & (first == kernels.WAS_LISTED))
    told = int(np.count_nonzero(first))
    contradicted = int(np.count_nonzero(wrong))
    if start.pfn.size and contradicted >= _OTHER_MACHINE_LEAST and contradicted > told * _OTHER_MACHINE_SHARE:
        raise UsageError(
            f"{start.name}: of {told} pages that {recording.name} names, {contradicted} were not as it says; expected "
            "a snapshot of the same machine, taken when the recording begins"
        )
    for pfn, order in zip(start.pfn.tolist(), start.order.tolist(), strict=True):
        taken = np.flatnonzero(wrong[pfn : pfn + (1 << order)])
        if taken.size:  # expand() hands a block out from its low end
            wrong[pfn : pfn + int(taken[-1])] |= first[pfn : pfn + int(taken[-1])] == 0
    found = Correction(int(np.count_nonzero(wrong)), contradicted, told)
    if not found.changed:
        return start, found
    pfn, order = free_heads(free ^ wrong)
    return _as_seen(start, pfn, order, pages), found


def _as_seen(start: Snapshot, pfn: npt.NDArray[np.int64], order: npt.NDArray[np.uint8], pages: int) -> Snapshot:
    """Free blocks ``pfn`` with what the snapshot says of them: Reported if they are the same blocks still."""
    held: npt.NDArray[np.int8] = np.ones(pages, np.int8)  # in use: the host has it
    unknown: npt.NDArray[np.bool_] = np.zeros(pages, np.bool_)
    before = {}
    for row, (head, size) in enumerate(
        zip(start.pfn.tolist(), (1 << start.order.astype(np.int64)).tolist(), strict=True)
    ):
        before[head, size] = row
        count = int(start.host_allocated_pages[row])
        unknown[head : head + size] = count < 0
        away = bool(start.reported[row]) if count < 0 else True
        held[head + max(count, 0) : head + size] = 0 if away else 1
    sizes = 1 << order.astype(np.int64)
    same = [before.get(block, -1) for block in zip(pfn.tolist(), sizes.tolist(), strict=True)]
    totals = np.concatenate([np.zeros(1, np.int64), np.cumsum(held, dtype=np.int64)])
    counts = totals[pfn + sizes] - totals[pfn]
    counts[unknown[pfn] & np.array([row >= 0 for row in same], np.bool_)] = UNKNOWN_PAGES
    return replace(
        start,
        pfn=pfn,
        order=order,
        reported=np.array([row >= 0 and bool(start.reported[row]) for row in same], np.bool_),
        host_allocated_pages=counts,
    )
