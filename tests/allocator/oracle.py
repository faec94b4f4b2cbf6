"""The naive oracle: the buddy allocator of Linux 5.3 and the v9 reporting marks in plain dicts and lists.

Written from the patches and nothing else; slow on purpose, so that each step can be checked by eye.
A free list is a Python list, index 0 is the head. Whatever is not on a list is in ``allocated`` or ``in_flight``.
The compiled allocator is held against it step by step, pfn by pfn and list entry by list entry.

Where the patches leave the choice open the oracle says so instead of guessing: a list whose order depends on
how the repair for rotated lists walks is named by ``loose`` and compared as a set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tests.allocator.shape import shape_of

__all__ = ["FreeBlock", "OracleError", "OracleZone"]

TOP_ORDER = 10
N_ORDERS = TOP_ORDER + 1
PAGEBLOCK_ORDER = 9
PAGEBLOCK_PAGES = 1 << PAGEBLOCK_ORDER
UNMOVABLE, MOVABLE, RECLAIMABLE, HIGHATOMIC, CMA, ISOLATE = range(6)
N_MIGRATETYPES = 6

# mm/page_alloc.c of Linux 5.3, fallbacks[][]
FALLBACKS = {
    UNMOVABLE: (RECLAIMABLE, MOVABLE),
    MOVABLE: (RECLAIMABLE, UNMOVABLE),
    RECLAIMABLE: (UNMOVABLE, MOVABLE),
}

ListKey = tuple[int, int]  # (order, migratetype)


class OracleError(Exception):
    """The oracle refuses: what the caller asked for is an error in the kernel too."""


@dataclass
class FreeBlock:
    """Head of a free block: its order, the migratetype of the list it is on, and the Reported mark."""

    order: int
    migratetype: int
    reported: bool = False


@dataclass
class OracleZone:
    """One zone. All sizes are in pages."""

    n_pages: int
    min_order: int = PAGEBLOCK_ORDER
    high_water_mark: int = 32
    min_watermark: int = 0
    merge_likely: bool = True
    trigger: bool = True

    lists: dict[ListKey, list[int]] = field(default_factory=dict)
    blocks: dict[int, FreeBlock] = field(default_factory=dict)
    allocated: dict[int, tuple[int, int]] = field(default_factory=dict)  # pfn -> (order, allocated for)
    from_cma: set[int] = field(default_factory=set)  # movable allocations that CMA served
    in_flight: dict[int, int] = field(default_factory=dict)  # pfn -> order
    pageblocks: list[int] = field(default_factory=list)
    before_isolation: dict[int, int] = field(default_factory=dict)
    boundary: dict[ListKey, int | None] = field(default_factory=dict)  # None: the list head
    loose: set[ListKey] = field(default_factory=set)
    rotated: set[ListKey] = field(default_factory=set)  # and not walked to the end since
    underflow: bool = False  # the last pull found no more
    requested: bool = False
    active: bool = False
    allocations: int = 0
    frees: int = 0
    in_flight_max_blocks: int = 0
    fell_back: bool = False  # the last alloc went through a fallback

    def __post_init__(self) -> None:
        """All memory free in blocks of the highest order that fits, all pageblocks MOVABLE."""
        self.lists = {(order, kind): [] for order in range(N_ORDERS) for kind in range(N_MIGRATETYPES)}
        self.boundary = dict.fromkeys(self.lists)
        self.pageblocks = [MOVABLE] * (self.n_pages // PAGEBLOCK_PAGES)
        pfn = 0
        while pfn < self.n_pages:
            order = TOP_ORDER if pfn + (1 << TOP_ORDER) <= self.n_pages else PAGEBLOCK_ORDER
            self.blocks[pfn] = FreeBlock(order, MOVABLE)
            self.lists[order, MOVABLE].append(pfn)
            pfn += 1 << order

    # -- free lists
    def _next(self, key: ListKey, pfn: int) -> int | None:
        entries = self.lists[key]
        index = entries.index(pfn) + 1
        return entries[index] if index < len(entries) else None

    def _insertion_index(self, key: ListKey) -> int:
        """Where a tail add goes: just ahead of the boundary, or the true tail."""
        mark = self.boundary[key] if self.active and key[0] >= self.min_order else None
        return len(self.lists[key]) if mark is None else self.lists[key].index(mark)

    def _add(self, pfn: int, order: int, migratetype: int, *, tail: bool) -> None:
        assert pfn not in self.blocks
        self.blocks[pfn] = FreeBlock(order, migratetype)
        key = (order, migratetype)
        self.lists[key].insert(self._insertion_index(key) if tail else 0, pfn)

    def _retire(self, pfn: int) -> None:
        """The boundary steps over a block that is about to leave its list (D3)."""
        block = self.blocks[pfn]
        key = (block.order, block.migratetype)
        if self.active and self.boundary[key] == pfn:
            self.boundary[key] = self._next(key, pfn)

    def _delete(self, pfn: int) -> FreeBlock:
        self._retire(pfn)
        block = self.blocks.pop(pfn)
        self.lists[block.order, block.migratetype].remove(pfn)
        return block

    def _move(self, pfn: int, migratetype: int) -> None:
        """move_to_free_list of v9: to the insertion point of the other list, the mark goes along while ACTIVE."""
        block = self.blocks[pfn]
        source, target = (block.order, block.migratetype), (block.order, migratetype)
        if source == target and self.active and self.boundary[target] == pfn:
            return  # it is the insertion point itself: nothing to do
        mark = self.boundary[target] if self.active and block.order >= self.min_order else None
        if block.reported:
            if self.active:
                self._retire(pfn)
                self.boundary[target] = pfn
            elif migratetype != ISOLATE:
                block.reported = False
        self.lists[source].remove(pfn)
        entries = self.lists[target]
        entries.insert(len(entries) if mark is None else entries.index(mark), pfn)
        block.migratetype = migratetype

    # -- free (__free_one_page)
    def _free_head(self, pfn: int, order: int) -> bool:
        return pfn in self.blocks and self.blocks[pfn].order == order

    def _may_merge(self, pfn: int, buddy: int, order: int) -> bool:
        if not self._free_head(buddy, order):
            return False
        if order < PAGEBLOCK_ORDER:
            return True
        kinds = self.pageblocks[pfn // PAGEBLOCK_PAGES], self.pageblocks[buddy // PAGEBLOCK_PAGES]
        return kinds[0] == kinds[1] or ISOLATE not in kinds

    def _merge_is_likely(self, pfn: int, order: int) -> bool:
        """buddy_merge_likely of v9 2/8: the buddy of the would-be merged block is free already."""
        if not self.merge_likely or order >= TOP_ORDER - 1:
            return False
        merged = pfn & ~(1 << order)
        return self._free_head(merged ^ (1 << (order + 1)), order + 1)

    def _free_one_page(self, pfn: int, order: int, *, put_back: bool) -> tuple[int, int]:
        """Returns pfn and order of the block that went on a list.

        4 MiB of which one half is isolated go back as two pageblocks (split_large_buddy of Linux 6.10; 5.3 put the
        whole block under the type of its first half, isolated or not).
        """
        migratetype = self.pageblocks[pfn // PAGEBLOCK_PAGES]
        if order == TOP_ORDER:
            kinds = migratetype, self.pageblocks[pfn // PAGEBLOCK_PAGES + 1]
            if kinds[0] != kinds[1] and ISOLATE in kinds:
                self._free_one_page(pfn + PAGEBLOCK_PAGES, PAGEBLOCK_ORDER, put_back=put_back)
                order = PAGEBLOCK_ORDER
        while order < TOP_ORDER:
            buddy = pfn ^ (1 << order)
            if not self._may_merge(pfn, buddy, order):
                break
            self._delete(buddy)
            pfn &= buddy
            order += 1
        tail = put_back or self._merge_is_likely(pfn, order)
        self._add(pfn, order, migratetype, tail=tail)
        if not put_back:
            self._notify(order)
        return pfn, order

    def _notify(self, order: int) -> None:
        """Section 1.3."""
        if not self.trigger or order < self.min_order or self.requested:
            return
        if self.nr_free(order) >= self.reported_blocks(order) + self.high_water_mark:
            self.requested = True

    def refusal(self, pfn: int, order: int) -> set[str]:
        """Names of the errors that free(pfn, order) may raise; empty: it succeeds."""
        if not 0 <= order <= TOP_ORDER or not pfn >= 0 or pfn + (1 << order) > self.n_pages:
            return {"OutOfRangeError"}
        names = {"OutOfRangeError"} if pfn % (1 << order) else set()
        if pfn not in self.allocated:
            return names or {"DoubleFreeError"}
        if self.allocated[pfn][0] != order:
            return names | {"WrongOrderError"}
        return names

    def free(self, pfn: int, order: int) -> None:
        """An ordinary free; asks for a run when the trigger says so."""
        if self.refusal(pfn, order):
            raise OracleError(f"free({pfn}, {order})")
        del self.allocated[pfn]
        self.from_cma.discard(pfn)
        self.frees += 1
        self._free_one_page(pfn, order, put_back=False)

    # -- alloc (rmqueue)
    def _smallest(self, order: int, migratetype: int) -> int | None:
        """__rmqueue_smallest and expand: the head of the smallest order that suffices, upper halves to the head."""
        for found in range(order, N_ORDERS):
            if entries := self.lists[found, migratetype]:
                pfn = entries[0]
                self._delete(pfn)
                for half in range(found - 1, order - 1, -1):
                    self._add(pfn + (1 << half), half, migratetype, tail=False)
                return pfn
        return None

    def _first_fallback(self, order: int, migratetype: int) -> int | None:
        return next((kind for kind in FALLBACKS.get(migratetype, ()) if self.lists[order, kind]), None)

    def _fall_back(self, order: int, migratetype: int) -> bool:
        """__rmqueue_fallback of Linux 5.3: the largest block of the first fallback type that has one."""
        for current in range(TOP_ORDER, order - 1, -1):
            kind = self._first_fallback(current, migratetype)
            if kind is None:
                continue
            can_steal = current >= PAGEBLOCK_ORDER // 2 or migratetype in (UNMOVABLE, RECLAIMABLE)
            if not can_steal and migratetype == MOVABLE and current > order:
                self._steal_smallest(order, migratetype)
            else:
                self._steal(self.lists[current, kind][0], current, migratetype, can_steal=can_steal)
            return True
        return False

    def _steal_smallest(self, order: int, migratetype: int) -> None:
        """What cannot be claimed is taken where it fragments least. Only below order 4, so never with its pageblock."""
        for current in range(order, N_ORDERS):
            kind = self._first_fallback(current, migratetype)
            if kind is not None:
                self._steal(self.lists[current, kind][0], current, migratetype, can_steal=False)
                return

    def _steal(self, pfn: int, order: int, migratetype: int, *, can_steal: bool) -> None:
        """steal_suitable_fallback."""
        first = pfn // PAGEBLOCK_PAGES
        old = self.pageblocks[first]
        if old != HIGHATOMIC:
            if order >= PAGEBLOCK_ORDER:
                for pageblock in range(first, first + (1 << (order - PAGEBLOCK_ORDER))):
                    self.pageblocks[pageblock] = migratetype
            elif can_steal:
                alike = self._pages_on_our_side(first, old, migratetype)
                self._move_free_blocks(first, migratetype)  # in 5.3 whether or not the pageblock is claimed
                if alike >= PAGEBLOCK_PAGES // 2:
                    self.pageblocks[first] = migratetype
                return
        self._move(pfn, migratetype)

    def _pages_on_our_side(self, pageblock: int, old: int, migratetype: int) -> int:
        """Pages of the pageblock that are free, plus those in use by allocations alike to ours."""
        start, end = pageblock * PAGEBLOCK_PAGES, (pageblock + 1) * PAGEBLOCK_PAGES
        free = sum(1 << block.order for pfn, block in self.blocks.items() if start <= pfn < end)
        movable = sum(
            1 << order for pfn, (order, kind) in self.allocated.items() if start <= pfn < end and kind == MOVABLE
        )
        if migratetype == MOVABLE:
            return free + movable
        return free + (PAGEBLOCK_PAGES - free - movable if old == MOVABLE else 0)

    def has_block(self, order: int, migratetype: int) -> bool:
        """A list of ``migratetype`` itself can serve ``order``."""
        return any(self.lists[found, migratetype] for found in range(order, N_ORDERS))

    def alloc(self, order: int, migratetype: int, *, no_watermarks: bool = False) -> int | None:
        """First page of the block, or None: below the watermark, or nothing that large."""
        self.fell_back = False
        if not no_watermarks and self.free_pages() - (1 << order) < self.min_watermark:
            return None
        pfn = self._smallest(order, migratetype)
        if pfn is None and migratetype == MOVABLE:
            pfn = self._smallest(order, CMA)
            if pfn is not None:
                self.from_cma.add(pfn)
        if pfn is None and self._fall_back(order, migratetype):
            self.fell_back = True
            pfn = self._smallest(order, migratetype)
        if pfn is not None:
            self.allocated[pfn] = (order, migratetype)
            self.allocations += 1
        return pfn

    # -- pageblocks
    def _move_free_blocks(self, pageblock: int, migratetype: int) -> None:
        """move_freepages_block: every free block whose head lies in the pageblock, in address order."""
        for pfn in range(pageblock * PAGEBLOCK_PAGES, (pageblock + 1) * PAGEBLOCK_PAGES):
            if pfn in self.blocks:
                self._move(pfn, migratetype)

    def _split_top_block(self, pageblock: int) -> None:
        head = (pageblock & ~1) * PAGEBLOCK_PAGES
        if self._free_head(head, TOP_ORDER):
            kind = self._delete(head).migratetype
            self._add(head + PAGEBLOCK_PAGES, PAGEBLOCK_ORDER, kind, tail=False)
            self._add(head, PAGEBLOCK_ORDER, kind, tail=False)

    def set_pageblock_migratetype(self, pageblock: int, migratetype: int) -> None:
        """Its free blocks go to the lists of ``migratetype``; free as a whole, it is freed anew, so that it merges."""
        pfn = pageblock * PAGEBLOCK_PAGES
        self._split_top_block(pageblock)
        if self._free_head(pfn, PAGEBLOCK_ORDER):
            self._delete(pfn)
            self.pageblocks[pageblock] = migratetype
            self._free_one_page(pfn, PAGEBLOCK_ORDER, put_back=False)
        else:
            self._move_free_blocks(pageblock, migratetype)
            self.pageblocks[pageblock] = migratetype

    def isolate(self, pageblock: int) -> None:
        """set_migratetype_isolate; what the pageblock was is remembered for unisolate.

        A free buddy that is isolated already merges with it: free buddies that may merge are never left apart.
        """
        pfn, buddy = pageblock * PAGEBLOCK_PAGES, (pageblock ^ 1) * PAGEBLOCK_PAGES
        self.before_isolation[pageblock] = self.pageblocks[pageblock]
        self._split_top_block(pageblock)
        self.pageblocks[pageblock] = ISOLATE
        if self._free_head(pfn, PAGEBLOCK_ORDER) and self._may_merge(pfn, buddy, PAGEBLOCK_ORDER):
            self._delete(pfn)
            self._free_one_page(pfn, PAGEBLOCK_ORDER, put_back=False)
        else:
            self._move_free_blocks(pageblock, ISOLATE)

    def unisolate(self, pageblock: int) -> None:
        """unset_migratetype_isolate: back to what it was, merged with its buddy if that is free."""
        self.set_pageblock_migratetype(pageblock, self.before_isolation.pop(pageblock))

    def rotate(self, order: int, migratetype: int, pfn: int) -> None:
        """Compaction makes ``pfn`` the first entry. From here on only v10's walk is sure to find all (D6)."""
        key = (order, migratetype)
        entries = self.lists[key]
        index = entries.index(pfn)
        self.lists[key] = entries[index:] + entries[:index]
        if order >= self.min_order:
            self.rotated.add(key)
            if self.active:
                self.boundary[key] = None
                self.loose.add(key)

    # -- the reporting cycle (sections 1.4 to 1.6)
    def begin(self) -> None:
        """ACTIVE, and fresh boundaries, ISOLATE included (repair of 1.8)."""
        self.active = True
        self.underflow = False
        self.boundary = dict.fromkeys(self.lists)
        self.loose = set(self.rotated)

    def end(self, *, abandon: bool = False) -> None:
        """Not ACTIVE: from now on nothing touches the boundaries. A failed run takes its request along (M3b)."""
        self.requested = self.requested and not abandon
        if abandon or not self.underflow:
            # A run that ended early leaves any shape (``URUR``), which only v10's walk is sure to search (D5, D6).
            self.rotated |= {key for key, entries in self.lists.items() if entries and key[0] >= self.min_order}
        self.active = False
        self.boundary = dict.fromkeys(self.lists)
        self.loose.clear()

    def _unreported(self, key: ListKey) -> list[int]:
        return [pfn for pfn in self.lists[key] if not self.blocks[pfn].reported]

    def _pick(self, key: ListKey) -> int | None:
        """get_unreported_page of v9: the entry ahead of the boundary, else the head."""
        entries = self.lists[key]
        index = self._insertion_index(key) - 1
        if index < 0:
            return None
        if not self.blocks[entries[index]].reported:
            return entries[index]
        if not self.blocks[entries[0]].reported:
            return entries[0]
        self.boundary[key] = entries[0]
        return None

    def _ahead(self, key: ListKey) -> str:
        """Shape of the part ahead of the boundary."""
        return shape_of(self.blocks[pfn].reported for pfn in self.lists[key][: self._insertion_index(key)])

    def pull(self, capacity: int, seen: Sequence[tuple[int, int]] = ()) -> tuple[list[tuple[int, int]], bool]:
        """A batch of (pfn, order) and whether it is the last, for it ends in underflow.

        ``seen`` is what the allocator under test pulled: followed where the patches leave the choice open.
        """
        batch: list[tuple[int, int]] = []
        self.underflow = False
        for order in range(TOP_ORDER, self.min_order - 1, -1):
            for migratetype in range(ISOLATE - 1, -1, -1):
                key = (order, migratetype)
                if self._ahead(key) not in ("", "U", "R", "UR", "RU", "URU"):
                    self.loose.add(key)
                while True:
                    if key in self.loose:
                        left = self._unreported(key)
                        hint = seen[len(batch)] if len(batch) < len(seen) else None
                        pfn = hint[0] if hint and hint[1] == order and hint[0] in left else (left[0] if left else None)
                        self.boundary[key] = None
                    else:
                        pfn = self._pick(key)
                    if pfn is None:
                        self.rotated.discard(key)
                        break
                    self._delete(pfn)
                    self.in_flight[pfn] = order
                    batch.append((pfn, order))
                    self.in_flight_max_blocks = max(self.in_flight_max_blocks, len(self.in_flight))
                    if len(batch) == capacity:
                        return batch, False
        self.requested = False
        self.underflow = True
        return batch, True

    def put_back(self, batch: Iterable[tuple[int, int]], *, done: bool) -> None:
        """free_reported_page for each, first pulled first. Not done: nothing is flagged (S8, repair of 1.8)."""
        for pfn, order in batch:
            assert self.in_flight.pop(pfn) == order
            head, final = self._free_one_page(pfn, order, put_back=True)
            if done and final == order:
                block = self.blocks[head]
                block.reported = True
                self.boundary[order, block.migratetype] = head

    # -- what can be compared
    def free_list(self, order: int, migratetype: int) -> list[tuple[int, bool]]:
        """(pfn, reported) head to tail."""
        return [(pfn, self.blocks[pfn].reported) for pfn in self.lists[order, migratetype]]

    def adopt(self, order: int, migratetype: int, entries: Sequence[tuple[int, bool]]) -> None:
        """Take over the order (not the content) of a list where the patches leave it open."""
        assert Counter(entries) == Counter(self.free_list(order, migratetype)), (order, migratetype)
        self.lists[order, migratetype] = [pfn for pfn, _ in entries]
        self.boundary[order, migratetype] = None

    def free_pages(self) -> int:
        """On buddy lists, without ISOLATE (NR_FREE_PAGES)."""
        return sum(1 << block.order for block in self.blocks.values() if block.migratetype != ISOLATE)

    def isolated_pages(self) -> int:
        """On the ISOLATE lists."""
        return sum(1 << block.order for block in self.blocks.values() if block.migratetype == ISOLATE)

    def nr_free(self, order: int) -> int:
        """Blocks on the lists of ``order``, every migratetype."""
        return sum(block.order == order for block in self.blocks.values())

    def reported_blocks(self, order: int) -> int:
        """Reported blocks of ``order``."""
        return sum(block.order == order and block.reported for block in self.blocks.values())

    def statistics(self) -> dict[str, object]:
        """By the names of ``ZoneStatistics``."""
        return {
            "n_pages": self.n_pages,
            "free_pages": self.free_pages(),
            "isolated_pages": self.isolated_pages(),
            "pcp_pages": 0,
            "in_flight_pages": sum(1 << order for order in self.in_flight.values()),
            "in_flight_blocks": len(self.in_flight),
            "allocated_pages": sum(1 << order for order, _ in self.allocated.values()),
            "nr_free": tuple(self.nr_free(order) for order in range(N_ORDERS)),
            "reported": tuple(self.reported_blocks(order) for order in range(N_ORDERS)),
            "reported_pages": sum(1 << block.order for block in self.blocks.values() if block.reported),
            "allocations": self.allocations,
            "frees": self.frees,
            "requested": self.requested,
            "active": self.active,
        }

    def validate(self) -> None:
        """The oracle's own invariants: every page is in exactly one block, S1, S4, D1, D2."""
        owner = [0] * self.n_pages
        heads = [(pfn, block.order) for pfn, block in self.blocks.items()]
        heads += [(pfn, order) for pfn, (order, _) in self.allocated.items()]
        heads += list(self.in_flight.items())
        for pfn, order in heads:
            assert pfn % (1 << order) == 0, (pfn, order)
            for page in range(pfn, pfn + (1 << order)):
                owner[page] += 1
        assert set(owner) == {1}
        assert sum(len(entries) for entries in self.lists.values()) == len(self.blocks)
        for (order, migratetype), entries in self.lists.items():
            for pfn in entries:
                block = self.blocks[pfn]
                assert (block.order, block.migratetype) == (order, migratetype)
                assert not block.reported or order >= self.min_order
            mark = self.boundary[order, migratetype]
            if self.active and mark is not None:
                assert all(self.blocks[pfn].reported for pfn in entries[entries.index(mark) :])
