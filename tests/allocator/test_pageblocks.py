"""Pageblocks: change of type and isolation where a free block of 4 MiB covers two of them; stealing by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from common.errors import AllocatorError, OutOfRangeError
from common.geometry import PAGEBLOCK_PAGES, Migratetype
from guest.allocator.zone import Zone
from guest.reporting.cycle import Cycle, Outcome
from tests.allocator.arrange import ALLOC_NO_WATERMARKS, exhaust, make_zone
from tests.allocator.view import pageblock_types

UNMOVABLE, MOVABLE, RECLAIMABLE = Migratetype.UNMOVABLE, Migratetype.MOVABLE, Migratetype.RECLAIMABLE
CMA, ISOLATE = Migratetype.CMA, Migratetype.ISOLATE


@pytest.fixture
def zone() -> Iterator[Zone]:
    """16 MiB, 8 pageblocks."""
    zone = make_zone()
    yield zone
    zone.validate()
    zone.close()


@pytest.mark.parametrize("pageblocks", [(0,), (1,), (0, 1), (1, 0), (6, 7)])
def test_changing_the_type_of_free_memory_leaves_a_valid_zone(zone: Zone, pageblocks: tuple[int, ...]) -> None:
    """After each change: no page lost, no two free buddies left apart."""
    for pageblock in pageblocks:
        zone.set_pageblock_migratetype(pageblock, UNMOVABLE)
        zone.validate()
        assert pageblock_types(zone)[pageblock] == UNMOVABLE
    assert zone.statistics().free_pages == zone.statistics().n_pages


def test_isolation_of_half_of_a_free_block_splits_it_and_its_end_mends_it(zone: Zone) -> None:
    """S9: only the isolated half leaves; no page of it can be had; ``free_pages`` says so."""
    n_pages = zone.statistics().n_pages
    zone.isolate(3)
    zone.validate()
    assert zone.free_list(9, ISOLATE) == [(3 * PAGEBLOCK_PAGES, False)]
    now = zone.statistics()
    assert (now.free_pages, now.isolated_pages) == (n_pages - PAGEBLOCK_PAGES, PAGEBLOCK_PAGES)
    zone.unisolate(3)
    zone.validate()
    now = zone.statistics()
    assert (now.free_pages, now.isolated_pages, now.nr_free[10]) == (n_pages, 0, 4)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("order", [4, 9])
def test_a_change_to_the_type_it_has_during_a_run(order: int, index: int) -> None:
    """Section 1.7: the page at the boundary is its own insertion point; the list must survive that (D1, D2)."""
    zone = make_zone(min_order=4)
    exhaust(zone, order)
    freed = [pageblock * PAGEBLOCK_PAGES for pageblock in (0, 2, 4)]
    for pfn in freed:
        zone.free(pfn, order)
    cycle = Cycle(zone, "boundary", capacity=2)
    cycle.begin()
    batch = cycle.pull()
    assert batch is not None
    cycle.put_back(batch, Outcome.DONE)
    zone.set_pageblock_migratetype(zone.free_list(order, MOVABLE)[index][0] // PAGEBLOCK_PAGES, MOVABLE)
    zone.validate()
    assert sorted(pfn for pfn, _ in zone.free_list(order, MOVABLE)) == freed
    cycle.end()
    zone.close()


def test_stealing_twice_from_one_pageblock_during_a_run() -> None:
    """Section 1.7, by allocations alone: the first theft brings a Reported page along, the second finds it there."""
    zone = make_zone(min_order=0)
    exhaust(zone, 0)
    zone.free(0)
    cycle = Cycle(zone, "boundary", capacity=4)
    cycle.begin()
    batch = cycle.pull()
    assert batch is not None
    cycle.put_back(batch, Outcome.DONE)
    for pfn in (8, 12):
        zone.free(pfn)
        zone.free(pfn + 1)
        assert zone.alloc(1, UNMOVABLE, flags=ALLOC_NO_WATERMARKS) == pfn
        zone.validate()
        assert zone.free_list(0, UNMOVABLE) == [(0, True)]
    cycle.end()
    zone.close()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_isolation_of_both_halves_of_a_free_block(zone: Zone, order: tuple[int, int]) -> None:
    """Neighbouring pageblocks, one after the other, as a memory offline does; then back (S4)."""
    for pageblock in order:
        zone.isolate(pageblock)
        zone.validate()
    assert zone.statistics().isolated_pages == 2 * PAGEBLOCK_PAGES
    for pageblock in order:
        zone.unisolate(pageblock)
        zone.validate()
    assert zone.statistics().free_pages == zone.statistics().n_pages
    assert zone.statistics().nr_free[10] == 4


@pytest.mark.parametrize("first", [0, 1])
def test_one_half_of_a_free_isolated_block_leaves_isolation(zone: Zone, first: int) -> None:
    """S9: 4 MiB freed while both halves are isolated; the half that stays isolated is on no other list."""
    pfn = zone.alloc(10)
    assert pfn == 0
    zone.isolate(0)
    zone.isolate(1)
    zone.free(pfn, 10)
    assert zone.statistics().isolated_pages == 2 * PAGEBLOCK_PAGES
    zone.unisolate(first)
    zone.validate()
    assert zone.statistics().isolated_pages == PAGEBLOCK_PAGES
    assert zone.free_list(9, ISOLATE) == [((1 - first) * PAGEBLOCK_PAGES, False)]
    zone.unisolate(1 - first)
    assert zone.statistics().nr_free[10] == 4


def test_isolation_gives_the_old_type_back(zone: Zone) -> None:
    held = exhaust(zone)
    zone.set_pageblock_migratetype(2, CMA)
    zone.isolate(2)
    assert pageblock_types(zone)[2] == ISOLATE
    zone.free(held[2], 9)
    assert zone.free_list(9, ISOLATE) == [(held[2], False)]
    zone.unisolate(2)
    assert zone.free_list(9, CMA) == [(held[2], False)]


def test_nothing_is_handed_out_of_isolation(zone: Zone) -> None:
    """S9's other half: isolated memory is for nobody, whatever the request."""
    zone.isolate(5)
    inside = range(5 * PAGEBLOCK_PAGES, 6 * PAGEBLOCK_PAGES)
    got = [pfn for kind in (MOVABLE, UNMOVABLE, RECLAIMABLE) for pfn in exhaust(zone, 0, kind)]
    assert not set(got) & set(inside)
    assert len(got) == zone.statistics().n_pages - PAGEBLOCK_PAGES
    zone.unisolate(5)


def test_isolation_twice_and_its_end_twice_are_refused(zone: Zone) -> None:
    zone.isolate(1)
    before = zone.snapshot()
    with pytest.raises(AllocatorError):
        zone.isolate(1)
    assert zone.snapshot() == before
    zone.unisolate(1)
    with pytest.raises(AllocatorError):
        zone.unisolate(1)


@pytest.mark.parametrize("pageblock", [-1, 8, 1 << 40])
def test_pageblocks_outside_the_zone_are_refused(zone: Zone, pageblock: int) -> None:
    before = zone.snapshot()
    for call in (zone.isolate, zone.unisolate, lambda outside: zone.set_pageblock_migratetype(outside, CMA)):
        with pytest.raises(OutOfRangeError):
            call(pageblock)
    assert zone.snapshot() == before


def test_the_first_unmovable_page_takes_the_largest_block_with_its_pageblocks(zone: Zone) -> None:
    """__rmqueue_fallback: order 10 is claimed whole, two pageblocks change their type."""
    pfn = zone.alloc(0, UNMOVABLE)
    assert pfn is not None
    types = pageblock_types(zone)
    first = pfn // PAGEBLOCK_PAGES & ~1
    assert [index for index, kind in enumerate(types) if kind == UNMOVABLE] == [first, first + 1]
    second = zone.alloc(9, UNMOVABLE)
    assert second == (first + 1) * PAGEBLOCK_PAGES
    assert pageblock_types(zone) == types


def test_a_movable_request_that_cannot_claim_takes_the_smallest_block(zone: Zone) -> None:
    """can_steal_fallback: below order 4 a movable request claims nothing and fragments least."""
    pages = exhaust(zone, 0, UNMOVABLE)
    for pfn in (*range(8, 16), 32):
        zone.free(pfn, 0)
    assert len(pages) == zone.statistics().n_pages
    assert zone.alloc(0, MOVABLE, flags=ALLOC_NO_WATERMARKS) == 32
    assert set(pageblock_types(zone)) == {UNMOVABLE}
    assert zone.free_list(3, UNMOVABLE) == [(8, False)]


def test_movable_requests_use_cma_before_they_steal(zone: Zone) -> None:
    held = exhaust(zone)
    zone.set_pageblock_migratetype(2, CMA)
    zone.set_pageblock_migratetype(4, RECLAIMABLE)
    zone.free(held[2], 9)
    zone.free(held[4], 9)
    assert zone.alloc(9, MOVABLE, flags=ALLOC_NO_WATERMARKS) == held[2]
    assert zone.alloc(9, MOVABLE, flags=ALLOC_NO_WATERMARKS) == held[4]
    assert pageblock_types(zone)[2] == CMA
    assert pageblock_types(zone)[4] == MOVABLE


@pytest.mark.parametrize("kind", [UNMOVABLE, RECLAIMABLE])
def test_only_movable_requests_may_use_cma(zone: Zone, kind: Migratetype) -> None:
    held = exhaust(zone)
    zone.set_pageblock_migratetype(2, CMA)
    zone.free(held[2], 9)
    assert zone.alloc(0, kind, flags=ALLOC_NO_WATERMARKS) is None


@pytest.mark.parametrize(("pages", "claimed"), [(255, False), (256, True)])
def test_half_a_pageblock_is_enough_to_claim_it(zone: Zone, pages: int, claimed: bool) -> None:
    """steal_suitable_fallback: free pages and pages alike, against half of 512."""
    exhaust(zone, 0)
    for pfn in range(pages):
        zone.free(pfn)
    assert zone.alloc(0, UNMOVABLE, flags=ALLOC_NO_WATERMARKS) is not None
    assert pageblock_types(zone)[0] == (UNMOVABLE if claimed else MOVABLE)


def test_isolation_drains_per_cpu_lists(zone: Zone) -> None:
    """S9: a page of the pageblock that lay on a per-CPU list is not handed out either (drain_all_pages)."""
    pfn = zone.alloc(0, cpu=0)
    assert pfn is not None
    zone.free(pfn, cpu=0)
    zone.isolate(pfn // PAGEBLOCK_PAGES)
    zone.validate()
    assert zone.statistics().pcp_pages == 0
    taken = [zone.alloc(0, cpu=0) for _ in range(PAGEBLOCK_PAGES)]
    assert all(other is not None and other // PAGEBLOCK_PAGES != pfn // PAGEBLOCK_PAGES for other in taken)
