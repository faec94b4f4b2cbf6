"""Replay of a recording: exact moves, what leaves no event, the timer, and the whole command on small recordings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.geometry import Migratetype
from common.layout import FREE, KIND_MASK, REPORTED
from guest.allocator.view import open_zone
from guest.allocator.zone import Zone, ZoneSettings
from guest.reporting.cycle import Cycle, Outcome
from lab.replay import hindsight, kernels
from lab.replay.against import RealPass, compare
from lab.replay.engine import Pass
from lab.replay.learn import corrected, eased, first_events, learnt
from lab.replay.plan import build_plan
from lab.replay.source import Recording
from lab.replay.start import ZONE_ENDS, Watermarks, machine_pages, places, recommended_kbytes, watermarks
from lab.replay.timer import Timer
from lab.trace.columns import Columns
from lab.trace.events import Event
from lab.trace.snapshot import read_snapshot

PAGES = 4096
MOVABLE = int(Migratetype.MOVABLE)
HEAD = "pfn,order,reported,host_allocated_pages\n"


def new_zone(min_order: int = 9) -> Zone:
    """A zone of 16 MiB, all free."""
    return Zone.private(
        ZoneSettings(
            memory_bytes=16 << 20, cpus=1, min_order=min_order, trigger="any", min_watermark=8, low_watermark=9
        )
    )


def free_pages(zone: Zone) -> set[int]:
    states = zone.page_states()
    heads = np.flatnonzero(states & KIND_MASK == FREE).tolist()
    return {page for pfn in heads for page in range(pfn, pfn + (1 << int(states[pfn] & 0xF)))}


def columns(*rows: tuple[Any, ...]) -> Columns:
    """Rows of (event, pfn, order, migratetype, cpu), a millisecond apart."""
    made = Columns.empty(len(rows))
    for index, (event, pfn, order, migratetype, cpu) in enumerate(rows):
        made["t_ns"][index] = 10**9 + index * 10**6
        made["event"][index], made["pfn"][index], made["order"][index] = int(event), pfn, order
        made["migratetype"][index], made["cpu"][index] = migratetype, cpu
    return made


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, PAGES - 1), st.sampled_from([0, 0, 0, 1, 3, 9])), max_size=60))
def test_pages_leave_and_come_back_exactly(moves: list[tuple[int, int]]) -> None:
    """S1, S3, S4: the free pages are those of a plain set, and every record fits, after each move."""
    zone = new_zone()
    view = open_zone(zone.address)
    free = set(range(PAGES))
    taken: dict[int, int] = {}
    counts = np.zeros(kernels.COUNTS, np.int64)
    for at, order in moves:
        pfn = at & ~((1 << order) - 1)
        pages = set(range(pfn, pfn + (1 << order)))
        if taken.get(pfn) == order:
            kernels.give_pages(view, pfn, order, MOVABLE, counts)
            free |= pages
            del taken[pfn]
        else:
            whole = pages <= free
            assert kernels.take_exact(view, np.int64(pfn), np.int64(order), MOVABLE) == whole
            if whole:
                free -= pages
                taken[pfn] = order
        zone.validate()
    assert free_pages(zone) == free
    assert not counts.any()


def test_the_halves_of_a_reported_block_are_unreported_and_on_the_list_taken_from() -> None:
    """S7: taking one page out of a Reported block leaves ten unreported halves, on the list of the event."""
    zone = new_zone(min_order=0)
    cycle = Cycle(zone, "rotate", capacity=32)
    cycle.run(lambda _batch: Outcome.KEPT)
    assert zone.page_states()[1024] & REPORTED
    assert kernels.take_exact(open_zone(zone.address), np.int64(1024 + 700), np.int64(0), int(Migratetype.UNMOVABLE))
    zone.validate()
    halves = [zone.free_list(order, Migratetype.UNMOVABLE) for order in range(10)]
    assert [len(entries) for entries in halves] == [1] * 10
    assert not any(reported for entries in halves for _, reported in entries)
    assert halves[9] == [(1024, False)]  # the lower half, for the page lies in the upper one


def test_a_block_taken_while_it_is_reported_is_lost_to_the_report() -> None:
    """S5: the recorded guest has the page; the policy's put-back skips the block."""
    zone = new_zone()
    cycle = Cycle(zone, "rotate", capacity=2)
    cycle.begin()
    batch = cycle.pull()
    assert batch is not None
    counts = np.zeros(kernels.COUNTS, np.int64)
    kernels.take_pages(open_zone(zone.address), batch.pfns[0], np.int64(0), MOVABLE, counts)
    assert counts[kernels.C_CONFLICTS] == 1
    assert cycle.put_back(batch, Outcome.KEPT) == batch.pfns.size - 1
    cycle.end()
    zone.validate()
    assert int(batch.pfns[0]) not in free_pages(zone)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        # Handed out by the zone with no drain in between.
        ([(Event.mm_page_free, 7, 0, -1, 0), (Event.mm_page_alloc_zone_locked, 7, 0, 1, 1)], [hindsight.BYPASS, 0]),
        # As a part of a larger block.
        ([(Event.mm_page_free, 9, 0, -1, 0), (Event.mm_page_alloc_zone_locked, 8, 1, 1, 1)], [hindsight.BYPASS, 0]),
        # Kept by the per-CPU list, which handed it out.
        ([(Event.mm_page_free, 7, 0, -1, 0), (Event.mm_page_alloc, 7, 0, 1, 0)], [0, 0]),
        # A page freed later on the same list was drained, so this one was not on it.
        (
            [
                (Event.mm_page_free, 7, 0, -1, 0),
                (Event.mm_page_free, 8, 0, -1, 0),
                (Event.mm_page_pcpu_drain, 8, 0, 1, 1),
            ],
            [hindsight.BYPASS, 0, 0],
        ),
        # That one was freed on another CPU.
        (
            [
                (Event.mm_page_free, 7, 0, -1, 0),
                (Event.mm_page_free, 8, 0, -1, 1),
                (Event.mm_page_pcpu_drain, 8, 0, 1, 1),
            ],
            [0, 0, 0],
        ),
        # It was on the buddy lists, and nobody took it.
        (
            [
                (Event.mm_page_free, 8, 0, -1, 0),
                (Event.mm_page_pcpu_drain, 8, 0, 1, 0),
                (Event.mm_page_free, 8, 0, -1, 0),
            ],
            [0, 0, hindsight.SILENT],
        ),
        # Its pageblock was of another type first: it was on that type's list.
        (
            [
                (Event.mm_page_alloc_zone_locked, 7, 0, 0, 0),
                (Event.mm_page_free, 7, 0, -1, 0),
                (Event.mm_page_free, 8, 0, -1, 0),
                (Event.mm_page_pcpu_drain, 8, 0, 1, 1),
            ],
            [0, 0, 0, 0],
        ),
    ],
)
def test_moves_without_an_event_are_found(rows: list[tuple[Any, ...]], expected: list[int]) -> None:
    made = columns(*rows)
    found = np.zeros(len(rows), np.uint8)
    hindsight.find_unseen(
        made["event"],
        made["cpu"],
        made["pfn"],
        made["order"],
        made["migratetype"],
        np.zeros(64, np.int64),
        np.full(1, hindsight.UNKNOWN_TYPE, np.int8),
        np.zeros(hindsight.KEYS, np.int64),
        found,
    )
    assert found.tolist() == expected


def test_large_frees_reach_the_buddy_lists_without_a_drain() -> None:
    """Orders 4 to 8 and 10 have no per-CPU list; the others wait for their drain."""
    rows = [(Event.mm_page_free, 1024 * (1 + order), order, -1, 0) for order in range(11)]
    plan = build_plan(columns(*rows))
    assert plan.op.tolist() == [kernels.OP_GIVE] * 6
    assert plan.order.tolist() == [4, 5, 6, 7, 8, 10]
    assert set(plan.migratetype.tolist()) == {kernels.OF_PAGEBLOCK}


@pytest.mark.parametrize(("used", "wanted"), [(0, 0), (600, 0), (600, 2), (1700, 0)])
def test_a_theft_is_followed(used: int, wanted: int) -> None:
    """The lists of every order and type, and what is free, are those of a zone that stole by itself."""
    real, ours = new_zone(), new_zone()
    for _ in range(used):
        pfn = real.alloc(0, Migratetype.MOVABLE)
        assert pfn is not None
        assert kernels.take_exact(open_zone(ours.address), np.int64(pfn), np.int64(0), MOVABLE)
    before = lists_of(real)
    stolen = real.alloc(0, Migratetype(wanted))
    assert stolen is not None
    order = next(order for (order, _), blocks in before.items() if stolen in blocks)
    rows = columns(
        (Event.mm_page_alloc_extfrag, stolen, 0, wanted, 0), (Event.mm_page_alloc_zone_locked, stolen, 0, wanted, 0)
    )
    rows["text_id"][0] = 0
    rows.texts.append(
        f"pfn={stolen:#x} alloc_order=0 fallback_order={order} alloc_migratetype={wanted} fallback_migratetype=1 "
        "change_ownership=1"
    )
    plan = build_plan(rows)
    counts = np.zeros(kernels.COUNTS, np.int64)
    kernels.apply(ours.address, plan.op, plan.pfn, plan.order, plan.migratetype, 0, len(plan), False, counts)
    assert lists_of(ours) == lists_of(real)
    ours.validate()


def lists_of(zone: Zone) -> dict[tuple[int, int], list[int]]:
    """First pfns on each free list, front to tail."""
    return {
        (order, int(kind)): [pfn for pfn, _ in zone.free_list(order, kind)]
        for order in range(11)
        for kind in (Migratetype.UNMOVABLE, Migratetype.MOVABLE, Migratetype.RECLAIMABLE)
    }


@pytest.mark.parametrize(
    ("order", "wanted", "converts", "expected"),
    [
        (10, 0, 1, kernels.OP_CONVERT),
        (3, 0, 0, kernels.OP_MOVE),
        (4, 1, 0, kernels.OP_MOVE),
        (3, 1, 0, kernels.OP_STEAL),
    ],
)
def test_what_a_theft_takes_along(order: int, wanted: int, converts: int, expected: int) -> None:
    rows = columns((Event.mm_page_alloc_extfrag, 1024, 0, wanted, 0))
    rows["text_id"][0] = 0
    rows.texts.append(
        f"pfn=0x400 alloc_order=0 fallback_order={order} pageblock_order=9 alloc_migratetype={wanted} "
        f"fallback_migratetype=2 fragmenting=1 change_ownership={converts}"
    )
    plan = build_plan(rows)
    assert plan.op.tolist() == [expected]
    assert (plan.steals[0].order, plan.steals[0].from_type, plan.steals[0].to_type) == (order, 2, wanted)


def test_a_snapshot_of_before_is_corrected(tmp_path: Path) -> None:
    """What was taken in between goes, from the low end of its block; what was freed in between comes; flags go too."""
    path = tmp_path / "blocks.csv"
    path.write_text(f"{HEAD}1024,10,1,0\n2048,3,1,0\n3072,0,0,1\n")
    rows = columns(
        (Event.mm_page_pcpu_drain, 1026, 0, 1, 0),  # 1024 and 1025 went with it, and were not heard of again
        (Event.mm_page_alloc_zone_locked, 3073, 0, 1, 0),
    )
    recording = Recording("rows", rows, {}, [], 10**9, 2 * 10**9, at_snapshot=False)
    found, correction = corrected(read_snapshot(str(path)), recording, PAGES)
    assert (correction.changed, correction.contradicted, correction.named) == (4, 2, 2)
    blocks = dict(zip(found.pfn.tolist(), zip(found.order.tolist(), found.reported.tolist(), strict=True), strict=True))
    assert 1024 not in blocks
    assert blocks[1027] == (0, False)
    assert blocks[1536] == (9, False)
    assert blocks[2048] == (3, True)  # nothing happened to it
    assert blocks[3072] == (1, False)  # merged with what came


def test_without_a_snapshot_the_state_is_learnt_from_the_events() -> None:
    rows = columns((Event.mm_page_alloc_zone_locked, 2048, 9, 1, 0), (Event.mm_page_pcpu_drain, 64, 0, 1, 0))
    recording = Recording("rows", rows, {}, [], 10**9, 2 * 10**9, at_snapshot=False)
    found = learnt(recording, first_events(recording, PAGES))
    assert list(zip(found.pfn.tolist(), found.order.tolist(), strict=True)) == [(2048, 9)]


def test_without_a_snapshot_a_guest_that_reports_has_reported_what_is_free() -> None:
    """From the least order on that its own reports have; one that reports nothing has reported nothing."""
    rows = columns(
        (Event.mm_page_alloc_zone_locked, 2048, 10, 1, 0),
        (Event.mm_page_alloc_zone_locked, 4, 1, 1, 0),
        (Event.report, 0, 0, -1, 0),
    )
    rows["text_id"][2] = 0
    rows.texts.append("nents=1 0x200:9 bytes=2097152")
    recording = Recording("rows", rows, {}, [], 10**9, 2 * 10**9, at_snapshot=False)
    found = learnt(recording, first_events(recording, PAGES))
    assert list(zip(found.pfn.tolist(), found.reported.tolist(), strict=True)) == [(4, False), (2048, True)]
    silent = replace(recording, rows=rows.take(slice(0, 2)))
    assert not learnt(silent, first_events(silent, PAGES)).reported.any()


def test_what_no_event_names_counts_as_free_for_the_gate() -> None:
    """M4 where there is no snapshot: a guest that is idle but for a few pages is not short of memory."""
    rows = columns((Event.mm_page_alloc_zone_locked, 64, 4, 1, 0))
    recording = Recording("rows", rows, {}, [], 10**9, 2 * 10**9, at_snapshot=False)
    first = first_events(recording, PAGES)
    zones = [(place, Watermarks(100, 5000)) for place in places(PAGES)]
    (_, marks), *_ = eased(zones, first)
    assert (marks.lowest, marks.low) == (100 - (PAGES - 16), 5000 - (PAGES - 16))


def test_the_timer_wheel_rounds_up_to_its_granularity() -> None:
    """M1: at 250 Hz two seconds are 500 ticks, on the level whose step is 8 ticks: 4 to 36 ms late, never early."""
    timer = Timer(2 * 10**9, 250, 0)
    assert timer.fires_ns(10**9) == 3_008_000_000
    late = [timer.fires_ns(now) - now - 2 * 10**9 for now in range(10**9, 10**9 + 40_000_000, 333_333)]
    assert min(late) >= 0
    assert max(late) <= 36_000_000
    assert Timer(10**8, 250, 0).fires_ns(10**9) == 1_104_000_000  # the finest level
    assert Timer(0).fires_ns(5) == 5


def test_zones_and_watermarks_are_the_kernels() -> None:
    """A guest of 1 GiB: DMA and DMA32, vm.min_free_kbytes of 45056 as khugepaged recommends for two zones."""
    zones = places(1 << 18)
    assert [(zone.name, zone.first, zone.end) for zone in zones] == [("DMA", 0, 4096), ("DMA32", 4096, 1 << 18)]
    assert recommended_kbytes(zones) == 45056
    dma, dma32 = watermarks(zones, 45056)
    assert (dma.lowest, dma32.lowest) == (176, 11088)
    assert dma32.low == 11088 + 11088 // 4
    assert dma.low + (32 << 9) > zones[0].pages  # M4: the DMA zone is never reported at order 9
    assert ZONE_ENDS[1][1] == 1 << 20


def test_a_machine_is_as_large_as_what_is_named() -> None:
    assert machine_pages(None, 5000, 0) == 1 << 14
    assert machine_pages(None, 5000, 64 << 20) == 1 << 14


def test_passes_are_paired_by_time() -> None:
    ours = [Pass(2 * 10**9, blocks=[(0, 9), (512, 9)]), Pass(9 * 10**9, blocks=[(1024, 9)])]
    real = [
        RealPass(2_030_000_000, 1024, 1, [(0, 9), (1536, 9)], []),
        RealPass(5 * 10**9, 512, 1, [(2048, 9)], []),
    ]
    found = compare(ours, real)
    assert [row["within"] for row in found["passes"]] == [True, False, False]
    assert found["blocks_found"] == pytest.approx(1 / 3)
    assert found["bytes_ratio"] == 1.0
