"""walk-locked: everything free is reported, with the lock held until the host has answered for the last of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from common.geometry import PAGEBLOCK_PAGES, Migratetype
from common.statistics import percentiles
from guest.allocator.zone import Zone
from guest.reporting.cycle import Batch, Cycle, Outcome
from guest.reporting.table import POLICIES
from tests.allocator.arrange import ALLOC_NO_WATERMARKS, MIB, exhaust, make_zone
from tests.reporting.arrange import free_alternating, reported_heads
from tests.support import wait_until

MOVABLE = Migratetype.MOVABLE


@pytest.fixture
def zone() -> Iterator[Zone]:
    opened = make_zone(64 * MIB, high_water_mark=2)
    yield opened
    opened.validate()
    opened.close()


def walk_cycle(zone: Zone, *, capacity: int = 16) -> Cycle:
    return Cycle(zone, "walk-locked", capacity=capacity)


def blocks_in(batches: list[Batch]) -> list[tuple[int, int]]:
    return [(int(pfn), int(order)) for batch in batches for pfn, order in zip(batch.pfns, batch.orders, strict=True)]


def collecting(seen: list[Batch]) -> Callable[[Batch], Outcome]:
    def report(batch: Batch) -> Outcome:
        seen.append(batch)
        return Outcome.DONE

    return report


def lists_of(zone: Zone) -> list[tuple[int, int]]:
    """Free blocks in the order in which the iterator walks: top order first, types from the first, front to tail."""
    kinds = [kind for kind in Migratetype if kind != Migratetype.ISOLATE]
    return [(pfn, order) for order in (10, 9) for kind in kinds for pfn, _ in zone.free_list(order, kind)]


def test_the_row_says_what_it_is() -> None:
    row = POLICIES["walk-locked"]
    assert (row.number, row.trigger, row.delay_ns, row.capacity, row.under_lock) == (5, "hwm", 100_000_000, 16, True)


@pytest.mark.parametrize(("capacity", "sizes"), [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (8, [7]), (64, [7])])
def test_every_free_block_is_handed_over_in_list_order(zone: Zone, capacity: int, sizes: list[int]) -> None:
    """S10, the part that holds: batches are full but the last, which is marked."""
    free_alternating(zone, 7)
    zone.set_pageblock_migratetype(0, Migratetype.UNMOVABLE)
    expected = lists_of(zone)
    seen: list[Batch] = []
    done = walk_cycle(zone, capacity=capacity).run(collecting(seen))
    assert blocks_in(seen) == expected
    assert [batch.pfns.size for batch in seen] == sizes
    assert [batch.last for batch in seen] == [size < capacity for size in sizes]
    assert done.nodes_visited == done.blocks == 7
    assert lists_of(zone) == expected


def test_blocks_stay_where_they_are_and_carry_no_flag(zone: Zone) -> None:
    """So the next run reports all of them again, and frees ask for it whatever was reported."""
    freed, _ = free_alternating(zone, 5)
    cycle = walk_cycle(zone)
    for _ in range(3):
        assert cycle.run(collecting([])).blocks == 5
        assert reported_heads(zone) == []
        assert sorted(pfn for pfn, _ in zone.free_list(9, MOVABLE)) == freed
        assert zone.statistics().in_flight_max_blocks == 0
        zone.validate()


def test_b3_reported_blocks_count_for_nothing(zone: Zone) -> None:
    """B3: with two free already, each further free is over the mark of two."""
    freed, _ = free_alternating(zone, 3)
    cycle = walk_cycle(zone)
    cycle.run(collecting([]))
    assert not zone.statistics().requested
    pfn = zone.alloc(9, flags=ALLOC_NO_WATERMARKS)
    assert pfn in freed
    zone.free(pfn, 9)
    assert zone.statistics().requested
    cycle.run(collecting([]))
    assert not zone.statistics().requested


def test_s9_isolated_blocks_are_not_handed_over(zone: Zone) -> None:
    freed, _ = free_alternating(zone, 4)
    zone.isolate(freed[1] // PAGEBLOCK_PAGES)
    seen: list[Batch] = []
    walk_cycle(zone).run(collecting(seen))
    assert sorted(pfn for pfn, _ in blocks_in(seen)) == [freed[0], freed[2], freed[3]]


def test_the_lock_is_held_until_the_host_has_answered_for_the_last_block(zone: Zone) -> None:
    """What S10 forbids, on purpose: nobody allocates meanwhile."""
    free_alternating(zone, 3)
    got: list[int | None] = []
    allocating = threading.Thread(target=lambda: got.append(zone.alloc(9, flags=ALLOC_NO_WATERMARKS)))
    cycle = walk_cycle(zone, capacity=2)
    cycle.begin()
    first = cycle.pull()
    assert first is not None
    allocating.start()
    for batch in (first, None):
        settled = batch if batch is not None else cycle.pull()
        assert settled is not None
        assert zone.statistics().active
        with pytest.raises(AssertionError, match="an allocation"):
            wait_until(lambda: got, 0.1, what="an allocation")
        cycle.put_back(settled, Outcome.DONE)
    allocating.join()
    assert got[0] is not None
    assert cycle.pull() is None
    assert not cycle.end()
    zone.free(got[0], 9)


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.WITHDRAWN])
@pytest.mark.parametrize("capacity", [1, 2, 16])
def test_s8_a_report_that_fails_ends_the_walk_and_releases_the_lock(
    zone: Zone, outcome: Outcome, capacity: int
) -> None:
    freed, _ = free_alternating(zone, 5)
    seen: list[Batch] = []

    def report(batch: Batch) -> Outcome:
        seen.append(batch)
        return outcome

    done = walk_cycle(zone, capacity=capacity).run(report)
    assert done.failed
    assert not done.requested
    assert len(seen) == 1
    assert sorted(pfn for pfn, _ in zone.free_list(9, MOVABLE)) == freed
    assert not zone.statistics().active
    assert walk_cycle(zone).run(collecting([])).blocks == 5


@pytest.mark.parametrize("pulls", [0, 1])
def test_ending_early_releases_the_lock_and_keeps_the_request(zone: Zone, pulls: int) -> None:
    """A run may end before ``pull`` said None: what it has not reported is for the next one."""
    free_alternating(zone, 5)
    cycle = walk_cycle(zone, capacity=2)
    cycle.begin()
    for _ in range(pulls):
        batch = cycle.pull()
        assert batch is not None
        cycle.put_back(batch, Outcome.DONE)
    assert cycle.end()
    zone.validate()
    assert walk_cycle(zone).run(collecting([])).blocks == 5


def test_s5_what_a_host_may_still_discard_leaves_the_lists_before_the_lock_is_released(zone: Zone) -> None:
    """S5: a report that could not be settled; the blocks stay in flight, and come back once it is."""
    freed, _ = free_alternating(zone, 5)
    seen: list[Batch] = []

    def report(batch: Batch) -> Outcome:
        seen.append(batch)
        return Outcome.UNSETTLED

    cycle = walk_cycle(zone, capacity=2)
    cycle.run(report)
    lost = [pfn for pfn, _ in blocks_in(seen)]
    assert zone.statistics().in_flight_blocks == 2
    zone.validate()
    rest = exhaust(zone)
    assert not set(rest) & set(lost)
    assert sorted(rest + lost) == freed
    assert cycle.put_back(seen[0], Outcome.FAILED) == 2
    assert sorted(pfn for pfn, _ in zone.free_list(9, MOVABLE)) == sorted(lost)
    for pfn in rest:
        zone.free(pfn, 9)


def test_an_error_in_the_report_releases_the_lock(zone: Zone) -> None:
    free_alternating(zone, 3)

    def report(batch: Batch) -> Outcome:
        raise OSError("the host is gone")

    with pytest.raises(OSError, match="the host is gone"):
        walk_cycle(zone, capacity=2).run(report)
    zone.validate()
    assert not zone.statistics().active


def test_an_empty_zone_is_walked_and_asks_for_nothing(zone: Zone) -> None:
    """P1, P2."""
    exhaust(zone)
    done = walk_cycle(zone).run(collecting([]))
    assert (done.blocks, done.batches, done.requested) == (0, 0, False)


def test_s6_residence_is_settled_before_the_lock_is_released(zone: Zone) -> None:
    """Pages that were used and given back read "returned" by the time anybody can have them."""
    freed, _ = free_alternating(zone, 2)
    resident = np.frombuffer(zone._resident, dtype=np.uint8)
    resident[freed[0] : freed[0] + PAGEBLOCK_PAGES] = 1
    walk_cycle(zone).run(collecting([]))
    assert zone.statistics().returned_pages == PAGEBLOCK_PAGES
    assert set(zone.resident_map()[freed[0] : freed[0] + PAGEBLOCK_PAGES]) == {2}


def test_holds_and_waits_are_recorded_once_a_walk(zone: Zone) -> None:
    free_alternating(zone, 9)
    cycle = walk_cycle(zone, capacity=2)
    for _ in range(3):
        cycle.run(collecting([]))
    held, waited = percentiles(cycle.walk_hold_ns), percentiles(cycle.walk_wait_ns)
    assert held.count == waited.count == 3
    assert 0 < waited.max < held.max
    assert zone.statistics().nodes_hold_max == 9
    assert zone.statistics().runs == 3
