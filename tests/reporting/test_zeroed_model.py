"""Z1 to Z3 page by page: random histories of a zone against a model that knows pages and nothing of lists.

The model has one bool a page: has the host confirmed a block that holds it, since it was last handed out? A block
carries the mark exactly if that is so of all its pages; where it is so of some only, they have merged with others, and
the model forgets them as well.
"""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.geometry import PAGEBLOCK_PAGES, Migratetype
from common.layout import INTERIOR, KIND_MASK, ORDER_MASK, ZEROED
from guest.allocator.percpu import cpu_slot
from guest.allocator.view import open_zone
from guest.memory import FINDING_WORDS, use_pages
from guest.reporting.cycle import Answer, Batch, Cycle, Outcome
from tests.allocator.arrange import ALLOC_NO_WATERMARKS, bounded, make_zone
from tests.allocator.view import pageblock_types

N_PAGES = 4096
PAGEBLOCKS = N_PAGES // PAGEBLOCK_PAGES
ORDERS = st.one_of(st.integers(0, 10), st.sampled_from((0, 3, 8, 9, 9, 10)))
KINDS = st.sampled_from((Migratetype.MOVABLE, Migratetype.MOVABLE, Migratetype.UNMOVABLE, Migratetype.RECLAIMABLE))
DISCARDED = (Outcome.DONE, Outcome.FAILED)


class ZeroedMachine(RuleBasedStateMachine):
    """One zone of 16 MiB with two per-CPU slots, and its pages."""

    @initialize(
        min_order=st.sampled_from((0, 3, 9, 9)),
        pcp_batch=st.sampled_from((0, 4)),
        capacity=st.integers(1, 8),
        confirmed=st.sampled_from((True, True, False)),
    )
    def create(self, min_order: int, pcp_batch: int, capacity: int, confirmed: bool) -> None:
        """``confirmed``: a run has gone before, all of it discarded."""
        self.zone = make_zone(
            min_order=min_order, pcp_batch=pcp_batch, pcp_high=64, high_water_mark=0, host_zeroed=True
        )
        self.cycle = Cycle(self.zone, "boundary", capacity=capacity)
        self.finding = np.zeros(FINDING_WORDS, dtype=np.int64)
        self.zeroed = np.zeros(N_PAGES, dtype=np.bool_)  # the model
        self.held: dict[int, int] = {}  # order of each block that is handed out
        self.batch: Batch | None = None
        self.active = False
        if confirmed:
            self.cycle.run(lambda batch: Answer(Outcome.DONE, np.ones(batch.pfns.size, dtype=np.bool_)))
            self.zeroed[:] = True

    # ------------------------------------------------------------ allocate, use, free

    @rule(order=ORDERS, kind=KINDS, cpu=st.integers(-1, 1), count=st.sampled_from((1, 1, 2, 8)))
    def alloc(self, order: int, kind: Migratetype, cpu: int, count: int) -> None:
        for _ in range(count):
            pfn = self.zone.alloc(order, kind, cpu=cpu, flags=ALLOC_NO_WATERMARKS)
            if pfn is not None:
                self.held[pfn] = order

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        """Z3: it is the owner's once."""
        pfn = data.draw(st.sampled_from(sorted(self.held)), label="pfn")
        order = self.held[pfn]
        before = self.zone.statistics().zeroing_skipped_pages
        view = open_zone(self.zone.address)
        use_pages(view, self.zone.address, 0, int(cpu_slot(0)), self.finding, pfn, order, 1)
        skipped = self.zone.statistics().zeroing_skipped_pages - before
        assert skipped == int(self.zeroed[pfn : pfn + (1 << order)].sum())
        self.zeroed[pfn : pfn + (1 << order)] = False

    @precondition(lambda self: self.held)
    @rule(data=st.data(), cpu=st.integers(-1, 1), count=st.sampled_from((1, 1, 2, 8)))
    def free(self, data: st.DataObject, cpu: int, count: int) -> None:
        """Z3: handed out once, used or not, it has no mark any more."""
        first = data.draw(st.integers(0, len(self.held) - 1), label="first")
        for pfn in sorted(self.held)[first : first + count]:
            order = self.held.pop(pfn)
            self.zone.free(pfn, order, cpu=cpu)
            self.zeroed[pfn : pfn + (1 << order)] = False

    @rule(cpu=st.integers(0, 1))
    def drain(self, cpu: int) -> None:
        self.zone.drain(cpu)

    # ------------------------------------------------------------ lists change

    @rule(pageblock=st.integers(0, PAGEBLOCKS - 1))
    def isolate_or_unisolate(self, pageblock: int) -> None:
        if pageblock_types(self.zone)[pageblock] == Migratetype.ISOLATE:
            self.zone.unisolate(pageblock)
        else:
            self.zone.isolate(pageblock)

    @rule(pageblock=st.integers(0, PAGEBLOCKS - 1), kind=KINDS)
    def retype(self, pageblock: int, kind: Migratetype) -> None:
        if pageblock_types(self.zone)[pageblock] != Migratetype.ISOLATE:
            self.zone.set_pageblock_migratetype(pageblock, kind)

    # ------------------------------------------------------------ report

    @precondition(lambda self: self.batch is None)
    @rule()
    def pull(self) -> None:
        if not self.active:
            self.cycle.begin()
            self.active = True
        self.batch = self.cycle.pull()
        if self.batch is None:
            self.end()

    @precondition(lambda self: self.batch is not None)
    @rule(data=st.data(), outcome=st.sampled_from((Outcome.DONE, *(o for o in Outcome if o is not Outcome.UNSETTLED))))
    def put_back(self, data: st.DataObject, outcome: Outcome) -> None:
        """Z1: block by block, and only of what was discarded."""
        assert self.batch is not None
        count = self.batch.pfns.size
        mask = data.draw(st.one_of(st.just((1 << count) - 1), st.integers(0, (1 << count) - 1)), label="confirmed")
        confirmed = np.array([bool(mask >> index & 1) for index in range(count)])
        for pfn, order in zip(self.batch.pfns[confirmed].tolist(), self.batch.orders[confirmed].tolist(), strict=True):
            self.zeroed[pfn : pfn + (1 << order)] |= outcome in DISCARDED
        self.cycle.put_back(self.batch, Answer(outcome, confirmed))
        self.batch = None

    @precondition(lambda self: self.active and self.batch is None)
    @rule()
    def end(self) -> None:
        self.cycle.end()
        self.active = False

    # ------------------------------------------------------------ compared after each step

    @invariant()
    def same(self) -> None:
        self.zone.validate()
        states = self.zone.page_states()
        for pfn in np.flatnonzero(states & KIND_MASK != INTERIOR).tolist():
            pages = slice(pfn, pfn + (1 << int(states[pfn] & ORDER_MASK)))
            if not self.zeroed[pages].all():
                self.zeroed[pages] = False  # Z2: a merge
            assert bool(states[pfn] & ZEROED) == bool(self.zeroed[pfn]), pfn

    def teardown(self) -> None:
        if hasattr(self, "zone"):
            self.zone.close()


TestZeroed = ZeroedMachine.TestCase
TestZeroed.settings = bounded(examples=80, steps=50)
