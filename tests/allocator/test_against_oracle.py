"""The compiled allocator and reporting cycle, step by step against the naive oracle.

``ExactMachine`` compares pfns, every free list entry by entry, the boundaries, page states and counters after each
step; ``StealingMachine`` lets requests fall back to other migratetypes too. ``LooseMachine`` turns on per-CPU
lists and shuffling, where only what holds in any order is checked: S3, S4 and ``validate()``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.errors import AllocatorError
from common.geometry import N_MIGRATETYPES, N_ORDERS, PAGEBLOCK_PAGES, Migratetype
from common.layout import ALLOCATED, FREE, HEAD_MASK, IN_FLIGHT, MT_MASK, MT_SHIFT, REPORTED
from guest.allocator.zone import Zone
from guest.reporting.cycle import Batch, Cycle, Outcome
from tests.allocator.arrange import ALLOC_NO_WATERMARKS, bounded, make_zone
from tests.allocator.oracle import CMA, ISOLATE, MOVABLE, RECLAIMABLE, UNMOVABLE, OracleZone
from tests.allocator.view import boundary_of, pageblock_types

N_PAGES = 4096
PAGEBLOCKS = N_PAGES // PAGEBLOCK_PAGES
ORDERS = st.one_of(st.integers(0, 10), st.sampled_from((0, 8, 9, 9, 10)))
REQUEST_TYPES = st.sampled_from((MOVABLE, MOVABLE, UNMOVABLE, RECLAIMABLE))


def pairs_of(batch: Batch | None) -> list[tuple[int, int]]:
    """(pfn, order) of each block."""
    return (
        [] if batch is None else [(int(pfn), int(order)) for pfn, order in zip(batch.pfns, batch.orders, strict=True)]
    )


class ExactMachine(RuleBasedStateMachine):
    """One zone of 16 MiB and its oracle."""

    may_fall_back = False

    @initialize(
        min_order=st.sampled_from((9, 9, 10, 5, 0)),
        high_water_mark=st.integers(1, 5),
        capacity=st.integers(1, 8),
        min_watermark=st.sampled_from((1, 600)),
        merge_likely=st.booleans(),
        kinds=st.lists(st.sampled_from((MOVABLE, MOVABLE, UNMOVABLE, RECLAIMABLE, CMA)), min_size=4, max_size=4),
    )
    def create(
        self,
        min_order: int,
        high_water_mark: int,
        capacity: int,
        min_watermark: int,
        merge_likely: bool,
        kinds: list[int],
    ) -> None:
        self.zone = make_zone(
            min_order=min_order,
            high_water_mark=high_water_mark,
            merge_likely=merge_likely,
            min_watermark=min_watermark,
            low_watermark=min_watermark + 1,
            high_watermark=min_watermark + 2,
        )
        self.cycle = Cycle(self.zone, "boundary", capacity=capacity)
        self.capacity = capacity
        self.batch: Batch | None = None
        self.more = False  # the run goes on after what was pulled
        self.oracle = OracleZone(
            N_PAGES,
            min_order=min_order,
            high_water_mark=high_water_mark,
            min_watermark=min_watermark,
            merge_likely=merge_likely,
        )
        self.oracle.adopt(10, MOVABLE, self.zone.free_list(10, Migratetype.MOVABLE))
        self.oracle.requested = self.zone.statistics().requested
        self._type_the_pairs(kinds)

    def _type_the_pairs(self, kinds: list[int]) -> None:
        """Each 4 MiB get their type while allocated, so that no free block straddles two types on the way."""
        for _ in kinds:
            self.alloc(10, MOVABLE, urgent=True, count=1)
        for pageblock in range(PAGEBLOCKS):
            self._retype(pageblock, kinds[pageblock // 2])
        for pfn in sorted(self.oracle.allocated):
            self.oracle.free(pfn, 10)
            self.zone.free(pfn, 10)

    def _retype(self, pageblock: int, kind: int) -> None:
        self.oracle.set_pageblock_migratetype(pageblock, kind)
        self.zone.set_pageblock_migratetype(pageblock, Migratetype(kind))

    # ------------------------------------------------------------ allocate and free

    @rule(order=ORDERS, kind=REQUEST_TYPES, urgent=st.booleans(), count=st.sampled_from((1, 1, 1, 2, 8, 40)))
    def alloc(self, order: int, kind: int, urgent: bool, count: int) -> None:
        for _ in range(count):
            served = self.oracle.has_block(order, kind) or (kind == MOVABLE and self.oracle.has_block(order, CMA))
            if not served and not self.may_fall_back:
                return
            expected = self.oracle.alloc(order, kind, no_watermarks=urgent)
            got = self.zone.alloc(order, Migratetype(kind), flags=ALLOC_NO_WATERMARKS if urgent else 0)
            assert got == expected

    @precondition(lambda self: self.oracle.allocated)
    @rule(data=st.data(), count=st.sampled_from((1, 1, 1, 2, 8, 40)), stride=st.integers(1, 3))
    def free(self, data: st.DataObject, count: int, stride: int) -> None:
        held = sorted(self.oracle.allocated)
        first = data.draw(st.integers(0, len(held) - 1), label="first")
        for pfn in held[first::stride][:count]:
            order = self.oracle.allocated[pfn][0]
            self.oracle.free(pfn, order)
            self.zone.free(pfn, order)

    @rule(pfn=st.integers(-2, N_PAGES + 2), order=st.integers(-1, 11))
    def free_wrongly(self, pfn: int, order: int) -> None:
        names = self.oracle.refusal(pfn, order)
        if not names:
            return
        before = self.zone.snapshot()
        with pytest.raises(AllocatorError) as caught:
            self.zone.free(pfn, order)
        assert type(caught.value).__name__ in names, (pfn, order, names)
        assert self.zone.snapshot() == before

    # ------------------------------------------------------------ pageblocks and compaction

    @rule(pageblock=st.integers(0, PAGEBLOCKS - 1), kind=st.sampled_from((MOVABLE, UNMOVABLE, RECLAIMABLE, CMA)))
    def retype(self, pageblock: int, kind: int) -> None:
        """CMA stays CMA."""
        if self.oracle.pageblocks[pageblock] not in (ISOLATE, CMA):
            self._retype(pageblock, kind)

    @rule(pageblock=st.integers(0, PAGEBLOCKS - 1))
    def isolate_or_unisolate(self, pageblock: int) -> None:
        if self.oracle.pageblocks[pageblock] == ISOLATE:
            self.oracle.unisolate(pageblock)
            self.zone.unisolate(pageblock)
        else:
            self.oracle.isolate(pageblock)
            self.zone.isolate(pageblock)

    @rule(data=st.data())
    def rotate(self, data: st.DataObject) -> None:
        filled = sorted(key for key, entries in self.oracle.lists.items() if len(entries) > 1)
        if not filled:
            return
        order, kind = data.draw(st.sampled_from(filled), label="list")
        pfn = data.draw(st.sampled_from(self.oracle.lists[order, kind]), label="pfn")
        self.oracle.rotate(order, kind, pfn)
        self.zone.rotate(order, Migratetype(kind), pfn)

    # ------------------------------------------------------------ the reporting cycle

    @precondition(lambda self: not self.oracle.active)
    @rule()
    def begin(self) -> None:
        self.oracle.begin()
        self.cycle.begin()
        self.more = True

    @precondition(lambda self: self.oracle.active and self.batch is None)
    @rule()
    def pull(self) -> None:
        self.batch = self.cycle.pull()
        seen = pairs_of(self.batch)
        if not self.more:
            assert seen == [], "the run is over: by underflow without a new request, or by a failed report"
            return
        expected, last = self.oracle.pull(self.capacity, seen)
        self.more = not last
        assert seen == expected
        if self.batch is not None:
            assert self.batch.last == last

    @precondition(lambda self: self.batch is not None)
    @rule(outcome=st.sampled_from((Outcome.DONE, Outcome.DONE, Outcome.DONE, Outcome.FAILED, Outcome.WITHDRAWN)))
    def put_back(self, outcome: Outcome) -> None:
        assert self.batch is not None
        self.oracle.put_back(pairs_of(self.batch), done=outcome is Outcome.DONE)
        self.cycle.put_back(self.batch, outcome)
        self.batch = None
        self.more = outcome is Outcome.DONE and (self.more or self.oracle.requested)

    @precondition(lambda self: self.oracle.active and self.batch is None)
    @rule(abandon=st.booleans())
    def end(self, abandon: bool) -> None:
        self.oracle.end(abandon=abandon)
        assert self.cycle.end(abandon=abandon) == self.oracle.requested

    # ------------------------------------------------------------ compared after each step

    @invariant()
    def same(self) -> None:
        self.zone.validate()
        for order in range(N_ORDERS):
            for kind in range(N_MIGRATETYPES):
                self._compare_list(order, kind)
        statistics = self.zone.statistics()
        for name, value in self.oracle.statistics().items():
            assert getattr(statistics, name) == value, name
        assert statistics.in_flight_max_blocks >= self.oracle.in_flight_max_blocks
        assert pageblock_types(self.zone) == self.oracle.pageblocks
        self._compare_states()

    def _compare_list(self, order: int, kind: int) -> None:
        entries = [(int(pfn), bool(flag)) for pfn, flag in self.zone.free_list(order, Migratetype(kind))]
        if (order, kind) in self.oracle.loose:
            self.oracle.adopt(order, kind, entries)
            return
        assert entries == self.oracle.free_list(order, kind), (order, kind)
        if self.oracle.active:
            assert boundary_of(self.zone, order, kind) == self.oracle.boundary[order, kind], (order, kind)

    def _compare_states(self) -> None:
        """Heads as the oracle has them; every other page is interior."""
        expected = np.zeros(N_PAGES, dtype=np.uint16)
        mask = np.full(N_PAGES, HEAD_MASK | REPORTED, dtype=np.uint16)
        for pfn, block in self.oracle.blocks.items():
            expected[pfn] = FREE | block.order | (REPORTED if block.reported else 0) | block.migratetype << MT_SHIFT
            mask[pfn] |= MT_MASK
        for pfn, (order, kind) in self.oracle.allocated.items():
            expected[pfn] = ALLOCATED | order
            if pfn not in self.oracle.from_cma:  # a movable page of CMA may be marked as either
                expected[pfn] |= kind << MT_SHIFT
                mask[pfn] |= MT_MASK
        for pfn, order in self.oracle.in_flight.items():
            expected[pfn] = IN_FLIGHT | order
        differing = np.flatnonzero((self.zone.page_states() & mask) != expected)
        assert differing.size == 0, differing[:8]

    def teardown(self) -> None:
        if hasattr(self, "zone"):
            self.zone.close()


class StealingMachine(ExactMachine):
    """The same with requests that fall back to other migratetypes and steal pageblocks."""

    may_fall_back = True


class LooseMachine(RuleBasedStateMachine):
    """Per-CPU lists, shuffling and migratetypes at will: what must hold in any order."""

    @initialize(
        min_order=st.sampled_from((9, 5, 0)),
        batch=st.sampled_from((1, 7, 63)),
        high=st.sampled_from((0, 20)),
        shuffle=st.booleans(),
        seed=st.integers(1, 1 << 31),
    )
    def create(self, min_order: int, batch: int, high: int, shuffle: bool, seed: int) -> None:
        self.zone: Zone = make_zone(
            min_order=min_order, pcp_batch=batch, pcp_high=high, shuffle=shuffle, seed=seed, high_water_mark=2
        )
        self.cycle = Cycle(self.zone, "boundary", capacity=4)
        self.held: dict[int, int] = {}
        self.flying: dict[int, int] = {}
        self.batch: Batch | None = None
        self.active = False

    @rule(order=ORDERS, kind=REQUEST_TYPES, cpu=st.integers(-1, 1), count=st.sampled_from((1, 3, 70)))
    def alloc(self, order: int, kind: int, cpu: int, count: int) -> None:
        for _ in range(count):
            pfn = self.zone.alloc(order, Migratetype(kind), cpu=cpu)
            if pfn is None:
                return
            assert pfn not in self.held
            self.held[pfn] = order

    @precondition(lambda self: self.held)
    @rule(data=st.data(), cpu=st.integers(-1, 1), count=st.sampled_from((1, 3, 70)), stride=st.integers(1, 3))
    def free(self, data: st.DataObject, cpu: int, count: int, stride: int) -> None:
        held = sorted(self.held)
        first = data.draw(st.integers(0, len(held) - 1), label="first")
        for pfn in held[first::stride][:count]:
            self.zone.free(pfn, self.held.pop(pfn), cpu=cpu)

    @rule(cpu=st.integers(0, 1))
    def drain(self, cpu: int) -> None:
        self.zone.drain(cpu)

    @rule()
    def step_the_cycle(self) -> None:
        if not self.active:
            self.cycle.begin()
            self.active = True
        elif self.batch is not None:
            self.cycle.put_back(self.batch, Outcome.DONE)
            self.batch = None
            self.flying = {}
        else:
            self.batch = self.cycle.pull()
            self.flying = dict(pairs_of(self.batch))
            if self.batch is None:
                self.cycle.end()
                self.active = False

    @invariant()
    def conserved(self) -> None:
        """S3 and S4: no page handed out twice, none lost."""
        self.zone.validate()
        owners = np.zeros(N_PAGES, dtype=np.int64)
        for blocks in (self.held, self.flying, self._free_blocks()):
            for pfn, order in blocks.items():
                assert pfn % (1 << order) == 0
                owners[pfn : pfn + (1 << order)] += 1
        assert owners.max() == 1
        statistics = self.zone.statistics()
        assert int((owners == 0).sum()) == statistics.pcp_pages
        assert statistics.allocated_pages == sum(1 << order for order in self.held.values())
        assert statistics.in_flight_pages == sum(1 << order for order in self.flying.values())
        parts = (statistics.free_pages, statistics.isolated_pages, statistics.pcp_pages)
        assert sum(parts) + statistics.in_flight_pages + statistics.allocated_pages == N_PAGES

    def _free_blocks(self) -> dict[int, int]:
        lists: dict[Any, int] = {}
        for order in range(N_ORDERS):
            for kind in Migratetype:
                for pfn, _ in self.zone.free_list(order, kind):
                    assert pfn not in lists
                    lists[int(pfn)] = order
        return lists

    def teardown(self) -> None:
        if hasattr(self, "zone"):
            self.zone.close()


# Seconds while all is well; shrinking a failure to the few steps that matter may take minutes.
pytestmark = pytest.mark.timeout(600)

TestExact = ExactMachine.TestCase
TestExact.settings = bounded(40, 40)
TestStealing = StealingMachine.TestCase
TestStealing.settings = bounded(30, 40)
TestLoose = LooseMachine.TestCase
TestLoose.settings = bounded(40, 30)
