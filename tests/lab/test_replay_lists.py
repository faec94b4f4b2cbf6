"""Page and demand replay: allocations and frees through per-CPU lists of our own, at the recorded pages or anywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.geometry import Migratetype
from common.layout import ALLOCATED, FREE, KIND_MASK, ON_PCP
from guest.allocator.zone import Zone, ZoneSettings
from lab.replay import kernels, lists
from lab.replay.answer import replay, scene_of
from lab.replay.engine import ReplaySettings
from lab.replay.plan import Plan, build_page_plan
from lab.replay.source import Recording
from lab.replay.start import Place, batch_pages
from lab.trace.events import Event
from lab.trace.snapshot import Snapshot
from tests.lab.test_replay import PAGES, columns

MOVABLE = int(Migratetype.MOVABLE)
ORDERS = (0, 0, 0, 1, 3, 5, 9)


def new_zone() -> Zone:
    """A zone of 16 MiB, all free, with small per-CPU lists of two CPUs."""
    return Zone.private(
        ZoneSettings(
            memory_bytes=16 << 20,
            cpus=2,
            pcp_batch=7,
            pcp_high=40,
            min_order=4,
            trigger="any",
            min_watermark=8,
            low_watermark=9,
        )
    )


def recorded(seed: int, steps: int = 2000) -> tuple[Zone, list[tuple[Any, ...]]]:
    """A zone after random work on two CPUs, and what a recording says of it: allocations and frees."""
    zone, chance = new_zone(), np.random.default_rng(seed)
    held: list[tuple[int, int]] = []
    rows: list[tuple[Any, ...]] = []
    for _ in range(steps):
        cpu = int(chance.integers(2))
        full = sum(1 << order for _, order in held) > PAGES // 2  # further on a watermark would have its say
        if held and (full or chance.random() < 0.48):
            pfn, order = held.pop(int(chance.integers(len(held))))
            zone.free(pfn, order, cpu=cpu)
            rows.append((Event.mm_page_free, pfn, order, -1, cpu))
            continue
        order = ORDERS[int(chance.integers(len(ORDERS)))]
        allocated = zone.alloc(order, Migratetype.MOVABLE, cpu=cpu)
        if allocated is not None:
            held.append((allocated, order))
            rows.append((Event.mm_page_alloc, allocated, order, MOVABLE, cpu))
    return zone, rows


def apply(move: Any, zone: Zone, plan: Plan, aside: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """All of a plan; the counts."""
    counts = np.zeros(kernels.COUNTS, np.int64)
    columns_ = (plan.op, plan.cpu, plan.pfn, plan.order, plan.migratetype)
    end = move(zone.address, *columns_, aside, 0, len(plan), False, plan.repeats, counts)
    assert end == len(plan)
    zone.validate()
    return counts


def slots() -> npt.NDArray[np.int16]:
    return np.zeros(PAGES, np.int16)


def nowhere() -> npt.NDArray[np.int32]:
    return np.full(PAGES, lists.NOWHERE, np.int32)


def whereabouts(zone: Zone) -> list[set[int]]:
    """Heads and orders of what is free, and of what is on per-CPU lists, as packed numbers."""
    states = zone.page_states()
    found = []
    for kind in (FREE, ON_PCP):
        heads = np.flatnonzero(states & KIND_MASK == kind)
        found.append({int(head) << 4 | int(states[head] & 0xF) for head in heads})
    return found


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1 << 30))
@example(1)
def test_our_own_work_is_replayed_to_the_page(seed: int) -> None:
    """S4: the same blocks are free and on the lists, refills and drains included, as where the work was recorded."""
    original, rows = recorded(seed)
    zone = new_zone()
    counts = apply(lists.apply_by_page, zone, build_page_plan(columns(*rows), batched=False), slots())
    assert whereabouts(zone) == whereabouts(original)
    assert counts[kernels.C_NOT_FREE] == counts[kernels.C_NOT_USED] == 0


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1 << 30))
def test_our_own_demand_is_met_at_the_same_pages(seed: int) -> None:
    """Placement is the allocator's alone: from the same lists it chooses the pages that it chose."""
    original, rows = recorded(seed)
    zone, where = new_zone(), nowhere()
    counts = apply(lists.apply_by_demand, zone, build_page_plan(columns(*rows), batched=False), where)
    assert whereabouts(zone) == whereabouts(original)
    used = np.flatnonzero(where != lists.NOWHERE)
    assert np.array_equal(where[used], used)
    assert counts[kernels.C_FAILED] == counts[kernels.C_NOT_USED] == 0


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(0, 1 << 30))
def test_demand_from_elsewhere_keeps_its_sizes_and_lifetimes(seed: int, other: int) -> None:
    """S3, S4: whatever pages were recorded, each is stood for by one page of ours, and only while it is in use."""
    _, rows = recorded(seed, 1500)
    turned = np.random.default_rng(other).permutation(PAGES >> 9).tolist()
    moved = [(event, turned[pfn >> 9] << 9 | pfn & 511, order, *rest) for event, pfn, order, *rest in rows]
    zone, where = new_zone(), nowhere()
    apply(lists.apply_by_demand, zone, build_page_plan(columns(*moved), batched=False), where)
    in_use: set[int] = set()
    for event, pfn, order, *_ in moved:
        pages = range(pfn, pfn + (1 << order))
        in_use = in_use | set(pages) if event == Event.mm_page_alloc else in_use - set(pages)
    used = np.flatnonzero(where != lists.NOWHERE)
    assert set(used.tolist()) == in_use
    assert len(set(where[used].tolist())) == used.size
    assert np.all(zone.page_states()[where[used]] & KIND_MASK == ALLOCATED)
    assert zone.statistics().allocated_pages == len(in_use)


@pytest.mark.parametrize("move", [lists.apply_by_page, lists.apply_by_demand])
def test_a_huge_page_may_come_back_in_pieces(move: Any) -> None:
    """S4: what is freed need not be what was allocated, and may be told twice."""
    rows = [(Event.mm_page_alloc, 1024, 9, MOVABLE, 0)]
    rows += [(Event.mm_page_free, 1024 + 8 * index, 3, -1, index & 1) for index in range(32)]
    rows += [(Event.mm_page_free_batched, 1280 + index, 0, -1, 0) for index in range(256)] * 2
    zone = new_zone()
    aside = slots() if move is lists.apply_by_page else nowhere()
    counts = apply(move, zone, build_page_plan(columns(*rows), batched=True), aside)
    assert zone.statistics().allocated_pages == 0
    assert counts[kernels.C_NOT_USED] == 0


@pytest.mark.parametrize("move", [lists.apply_by_page, lists.apply_by_demand])
def test_what_was_missed_is_counted_and_harms_nothing(move: Any) -> None:
    """S3: a page allocated while it is in use stays with its owner (page) or gets a new place (demand)."""
    rows = [
        (Event.mm_page_free, 64, 1, -1, 0),
        (Event.mm_page_alloc, 128, 0, MOVABLE, 0),
        (Event.mm_page_alloc, 128, 1, 7, 1),
        (Event.mm_page_free, 128, 2, -1, 1),
    ]
    zone = new_zone()
    aside = slots() if move is lists.apply_by_page else nowhere()
    counts = apply(move, zone, build_page_plan(columns(*rows), batched=False), aside)
    assert counts[kernels.C_NOT_FREE] == 1
    assert counts[kernels.C_NOT_USED] == 2 + 2
    assert zone.statistics().allocated_pages == 0


def test_shuffled_lists_give_other_pages_to_the_same_demand() -> None:
    """Eight of sixteen blocks of the top order: by pfn where lists are as at boot, by chance where they are not."""
    rows = columns(*[(Event.mm_page_alloc, 1024 * index, 10, MOVABLE, 0) for index in range(8)])
    recording = Recording("rows", rows, {}, [], 10**9, 2 * 10**9, at_snapshot=True)
    heads = np.arange(0, 16384, 1024, dtype=np.int64)
    held = np.zeros(heads.size, np.int64)
    start = Snapshot("all", "blocks", heads, np.full(heads.size, 10, np.uint8), held != 0, held, 16384)
    scene = scene_of(recording, start, mode="demand", min_free_kbytes=128)
    left = []
    for chosen in (ReplaySettings(), ReplaySettings(shuffle=True, seed=3), ReplaySettings(shuffle=True, seed=4)):
        done = replay(scene, chosen)
        done.run()
        left.append(sorted(done.free_blocks()))
    assert left[0] == list(range(8192, 16384, 1024))
    assert len({tuple(one) for one in left}) == 3
    assert {len(one) for one in left} == {8}


def test_no_room_is_counted() -> None:
    rows = [(Event.mm_page_alloc, 1024 * index, 10, MOVABLE, 0) for index in range(5)]
    made = columns(*rows)
    made["pfn"][4] = 512
    zone = new_zone()
    counts = apply(lists.apply_by_demand, zone, build_page_plan(made, batched=False), np.full(2 * PAGES, -1, np.int32))
    assert counts[kernels.C_FAILED] == 1024


def test_cpus_are_numbered_without_gaps() -> None:
    rows = columns((Event.mm_page_alloc, 0, 0, 1, 200), (Event.mark, 0, 0, -1, 9), (Event.mm_page_free, 0, 0, -1, 3))
    plan = build_page_plan(rows, batched=False)
    assert (plan.cpu.tolist(), plan.cpus) == ([1, 0], 2)


def test_a_batch_is_the_kernels() -> None:
    """zone_batchsize: 63 from 1 GiB on, 1 for the 16 MiB of ZONE_DMA."""
    assert [batch_pages(Place("x", 0, pages)) for pages in (1 << 12, 1 << 16, 1 << 18, 1 << 24)] == [1, 15, 63, 63]
