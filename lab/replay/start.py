"""The zones as a recording begins: their bounds, their free lists, and what the host holds of their pages."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from common.errors import UsageError
from common.geometry import (
    MIN_MEMORY_BYTES,
    PAGE_BYTES,
    PAGEBLOCK_ORDER,
    PAGEBLOCK_PAGES,
    PCP_MIGRATETYPES,
    TOP_ORDER,
    Migratetype,
)
from common.layout import NEVER_TOUCHED, RESIDENT, RETURNED
from guest.allocator.zone import Zone, ZoneSettings
from lab.replay import kernels, survey
from lab.replay.plan import Plan, is_listed
from lab.trace.snapshot import Snapshot

__all__ = [
    "ZONE_ENDS",
    "Part",
    "Place",
    "Watermarks",
    "batch_pages",
    "build_zone",
    "machine_pages",
    "part_of",
    "places",
    "recommended_kbytes",
    "watermarks",
]

# First pfn behind ZONE_DMA (16 MiB) and ZONE_DMA32 (4 GiB) on x86-64; ZONE_NORMAL is what is left.
ZONE_ENDS = (("DMA", 1 << 12), ("DMA32", 1 << 20), ("Normal", 1 << 40))
_GUESS_PAGES = 1 << 14  # a machine whose size nobody tells has a multiple of 64 MiB
_MIN_KBYTES = 128
_MAX_KBYTES = 1 << 18
_SCALE = 10  # vm.watermark_scale_factor
_MIB_PAGES = (1 << 20) // PAGE_BYTES
MOVABLE = int(Migratetype.MOVABLE)


@dataclass(frozen=True)
class Watermarks:
    """Pages. ``lowest`` is WMARK_MIN.

    Attributes:
        boot_low: WMARK_LOW before khugepaged raised min_free_kbytes; the per-CPU lists have kept to it (as seen in a
            6.1 guest: some 630 pages a CPU of 1 GiB and two).
    """

    lowest: int
    low: int
    boot_low: int = 0


@dataclass(frozen=True)
class Place:
    """A zone of the recorded machine: pfns from ``first`` on, below ``end``."""

    name: str
    first: int
    end: int

    @property
    def pages(self) -> int:
        """Its size."""
        return self.end - self.first


def machine_pages(start: Snapshot | None, highest_pfn: int, memory_bytes: int) -> int:
    """Pages of the machine: as given, as the snapshot says, or up to the highest page that is known, rounded up.

    Raises:
        UsageError: the machine given is smaller than what the recording names.
    """
    known = highest_pfn + 1
    if start is not None:
        known = max(known, start.n_pages, int((start.pfn + (np.int64(1) << start.order.astype(np.int64))).max()))
    if memory_bytes:
        given = memory_bytes // PAGE_BYTES
        if given < known:
            raise UsageError(f"--memory: {memory_bytes} bytes are {given} pages; the recording names page {known - 1}")
        return given
    if start is not None and start.n_pages == known:
        return known
    return -(-known // _GUESS_PAGES) * _GUESS_PAGES


def places(pages: int) -> list[Place]:
    """The zones of a machine of so many pages, whole blocks of the top order. A small one has but one zone."""
    whole = -(-pages >> TOP_ORDER) << TOP_ORDER
    least = MIN_MEMORY_BYTES // PAGE_BYTES
    found: list[Place] = []
    first = 0
    for name, end in ZONE_ENDS:
        last = min(end, whole)
        if last - first >= least:
            found.append(Place(name, first, last))
            first = last
        elif last > first and found:
            found[-1] = replace(found[-1], end=last)
            first = last
    if not found:
        found.append(Place("DMA", 0, least))
    return found


def recommended_kbytes(zones: list[Place]) -> int:
    """vm.min_free_kbytes of such a machine with transparent huge pages.

    Mirrors init_per_zone_wmark_min, raised by set_recommended_min_free_kbytes of khugepaged, with all pages taken as
    managed. A guest without huge pages has less: then it is given.
    """
    total = sum(zone.pages for zone in zones)
    pages = len(zones) * PAGEBLOCK_PAGES * (2 + PCP_MIGRATETYPES * PCP_MIGRATETYPES)
    return max(_boot_kbytes(total), min(pages, total // 20) * PAGE_BYTES >> 10)


def _boot_kbytes(pages: int) -> int:
    """vm.min_free_kbytes of so many pages without huge pages (init_per_zone_wmark_min)."""
    return min(max(math.isqrt((pages * PAGE_BYTES >> 10) * 16), _MIN_KBYTES), _MAX_KBYTES)


def watermarks(zones: list[Place], min_free_kbytes: int) -> list[Watermarks]:
    """Of each zone: min, its share of min_free_kbytes, and low, a quarter or a thousandth of the zone above it.

    Mirrors __setup_per_zone_wmarks, with all pages taken as managed.
    """
    total = sum(zone.pages for zone in zones)
    found = []
    for zone in zones:
        lowest, low = _marks(zone, total, min_free_kbytes)
        found.append(Watermarks(lowest, low, _marks(zone, total, _boot_kbytes(total))[1]))
    return found


def _marks(zone: Place, total: int, min_free_kbytes: int) -> tuple[int, int]:
    lowest = ((min_free_kbytes << 10) // PAGE_BYTES) * zone.pages // total
    return lowest, lowest + max(lowest // 4, zone.pages * _SCALE // 10000)


def batch_pages(zone: Place) -> int:
    """Pages that a per-CPU list of such a zone is filled and drained by (zone_batchsize)."""
    batch = max(1, min(zone.pages >> 10, _MIB_PAGES) // 4)
    return max(1, (1 << ((batch + batch // 2).bit_length() - 1)) - 1)


@dataclass(frozen=True)
class Part:
    """A zone of the recorded machine as the recording begins: what all replays of it share.

    Attributes:
        plan: its rows, pfns counted from the zone's first.
        types: int64, of every pageblock. pfn, order, reported, list_type, turn: of its free blocks; ``turn`` sorts
            those of a list. resident: uint8, what the host holds of every page.
    """

    place: Place
    marks: Watermarks
    plan: Plan
    types: npt.NDArray[np.int64]
    pfn: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]
    reported: npt.NDArray[np.bool_]
    list_type: npt.NDArray[np.int64]
    turn: npt.NDArray[np.int64]
    resident: npt.NDArray[np.uint8]


def part_of(place: Place, marks: Watermarks, start: Snapshot, plan: Plan, *, follow: bool) -> Part:
    """One zone of a machine whose free blocks are those of ``start``.

    The snapshot tells neither types nor the order of the lists. A pageblock is of the type that the recording frees its
    pages under first, else of the one that they are taken from, else MOVABLE. A block is on the list that it is first
    taken from (before it was stolen, if it was), else on that of its pageblock. A list holds what is not reported
    first, in the order in which the recording takes it, then by pfn; what is reported comes behind, as drained.
    Where pages are placed by an allocator of ours (not ``follow``), a list is by pfn, as memory is freed at boot.
    """
    own = plan.of_pages(place.first, place.end)
    types = _pageblock_types(place, own)
    inside = (start.pfn >= place.first) & (start.pfn < place.end)
    pfn = start.pfn[inside] - place.first
    order = start.order[inside].astype(np.int64)
    if follow:
        turn, list_type = _first_takes(pfn, order, own, place, types)
    else:
        turn, list_type = np.zeros(pfn.size, np.int64), types[pfn >> PAGEBLOCK_ORDER]
    resident = np.full(place.pages, RESIDENT, np.uint8)
    held = start.host_allocated_pages[inside]
    for head, size, was_reported, pages in zip(
        pfn.tolist(), (1 << order).tolist(), start.reported[inside].tolist(), held.tolist(), strict=True
    ):
        away = RETURNED if was_reported else NEVER_TOUCHED
        known = (0 if was_reported else size) if pages < 0 else pages
        resident[head + known : head + size] = away
    return Part(place, marks, own, types, pfn, order, start.reported[inside], list_type, turn, resident)


def build_zone(part: Part, settings: ZoneSettings) -> Zone:
    """A zone of our own with a part's free blocks, and the host's pages under it; its lists shuffled if it shuffles."""
    zone = Zone.private(
        replace(
            settings,
            memory_bytes=part.place.pages * PAGE_BYTES,
            min_watermark=part.marks.lowest,
            low_watermark=part.marks.low,
        )
    )
    kernels.write_types(zone.address, part.types)
    reported = part.reported & (part.order >= settings.min_order)
    shuffled = np.random.default_rng(settings.seed).permutation(part.pfn.size) if settings.shuffle else part.turn
    turn = np.lexsort((part.pfn, shuffled, reported))
    kernels.seed(zone.address, part.pfn[turn], part.order[turn], part.list_type[turn], reported[turn])
    kernels.set_resident(zone.address, part.resident)
    return zone


def _pageblock_types(place: Place, plan: Plan) -> npt.NDArray[np.int64]:
    """Types at the start: what the first free says, else the first allocation; before a theft, whose it was."""
    types = np.full(place.pages >> PAGEBLOCK_ORDER, MOVABLE, np.int64)
    told = np.full(types.size, -1, np.int64)
    survey.first_types(plan.op, plan.pfn, plan.migratetype, types, told)
    for steal in reversed(plan.steals):
        if not steal.convert:
            continue
        first_block = ((steal.pfn - place.first) & ~((1 << steal.order) - 1)) >> PAGEBLOCK_ORDER
        for block in range(first_block, first_block + max(1, (1 << steal.order) // PAGEBLOCK_PAGES)):
            if told[block] < 0 or plan.t_ns[told[block]] >= steal.t_ns:
                types[block] = steal.from_type
    return types


def _first_takes(
    pfn: npt.NDArray[np.int64],
    order: npt.NDArray[np.int64],
    plan: Plan,
    place: Place,
    types: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of each free block: the row that takes from it first (a row beyond all for none), and the list it is on."""
    never = len(plan)
    first_take = np.full(pfn.size, never, np.int64)
    list_type = types[pfn >> PAGEBLOCK_ORDER]
    block_of = np.full(place.pages, -1, np.int32)
    for index, (head, size) in enumerate(zip(pfn.tolist(), (1 << order).tolist(), strict=True)):
        block_of[head : head + size] = index
    survey.first_rows(plan.op, plan.pfn, block_of, first_take)
    touched = np.flatnonzero(first_take < never)
    taken_from = plan.migratetype[first_take[touched]]
    list_type[touched] = np.where(is_listed(taken_from), taken_from, list_type[touched])
    for steal in reversed(plan.steals):
        at = int(block_of[steal.pfn - place.first])
        if at >= 0 and (first_take[at] == never or plan.t_ns[first_take[at]] >= steal.t_ns):
            list_type[at] = steal.from_type
    return first_take, list_type
