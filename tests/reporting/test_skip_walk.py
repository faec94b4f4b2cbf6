"""``skip-walk``, v10 to v13: the walk and its memory, isolation, release of a boundary (D1 to D6)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from common.geometry import PAGEBLOCK_PAGES, Migratetype
from guest.allocator.zone import Zone
from guest.reporting.cycle import Batch, Cycle, Outcome
from guest.reporting.table import find_policy
from tests.allocator.arrange import ALLOC_NO_WATERMARKS, MIB, exhaust, make_zone
from tests.allocator.view import boundary_of, pageblock_types
from tests.reporting.arrange import accept, flags_of, free_alternating, policy_cycle, policy_zone, unreported_heads

MOVABLE, UNMOVABLE, RECLAIMABLE = Migratetype.MOVABLE, Migratetype.UNMOVABLE, Migratetype.RECLAIMABLE
HIGHATOMIC, CMA, ISOLATE = Migratetype.HIGHATOMIC, Migratetype.CMA, Migratetype.ISOLATE


@pytest.fixture
def zone() -> Iterator[Zone]:
    """64 MiB, 32 pageblocks, per-CPU lists off, watermarks out of the way."""
    zone = policy_zone("skip-walk")
    yield zone
    zone.validate()
    zone.close()


def skip_walk(zone: Zone, *, capacity: int = 16) -> Cycle:
    return policy_cycle(zone, "skip-walk", capacity=capacity)


def one_batch(cycle: Cycle, outcome: Outcome = Outcome.DONE) -> Batch:
    """Pull, and put back."""
    batch = cycle.pull()
    assert batch is not None
    cycle.put_back(batch, outcome)
    return batch


def drawn(zone: Zone) -> str:
    """The list of order 9 with its boundary, as ``UU|RR``."""
    mark = boundary_of(zone, 9, MOVABLE)
    picture = ""
    for pfn, reported in zone.free_list(9, MOVABLE):
        picture += ("|" if pfn == mark else "") + ("R" if reported else "U")
    return picture if mark is not None else picture + "|"


def test_its_defaults_are_those_of_v10_to_v13() -> None:
    """Sections 0 and 1.9: HZ/10, a mark of 32, a capacity that the core of v11 accepts."""
    policy = find_policy("skip-walk")
    assert (policy.trigger, policy.high_water_mark, policy.delay_ns) == ("hwm", 32, 100_000_000)
    assert 1 <= policy.capacity <= 32


# ---------------------------------------------------------------- the walk


def test_the_walk_remembers_how_far_it_came(zone: Zone) -> None:
    """Section 1.9: the reported run is walked once in a run; afterwards an empty list costs a look."""
    free_alternating(zone, 6)
    skip_walk(zone).run(accept)
    cycle = skip_walk(zone)
    cycle.begin()
    assert drawn(zone) == "RRRRRR|"
    before = zone.statistics().nodes_visited
    assert cycle.pull() is None
    first = zone.statistics().nodes_visited - before
    assert drawn(zone) == "|RRRRRR"
    cycle.end()
    other_lists = 2 * 5 - 1  # orders 9 and 10, five types: one look each
    assert first == other_lists + 6 + 1


def test_a_boundary_moves_only_if_something_was_skipped(zone: Zone) -> None:
    """Section 1.9, v12: a walk that meets an unreported block at once leaves the boundary where it is."""
    free_alternating(zone, 6)
    cycle = skip_walk(zone, capacity=2)
    cycle.begin()
    batch = cycle.pull()
    assert batch is not None
    assert drawn(zone) == "UUUU|"
    cycle.put_back(batch, Outcome.DONE)
    assert drawn(zone) == "UUUU|RR"
    batch = cycle.pull()
    assert batch is not None
    assert drawn(zone) == "UU|RR"
    cycle.put_back(batch, Outcome.DONE)
    cycle.end()


def test_the_cost_of_a_run_is_one_walk_over_what_is_reported() -> None:
    """D7 between ``boundary`` and ``scan``: linear in the reported run, whatever the capacity, not times the blocks."""
    visited = []
    for capacity in (1, 4):
        zone = policy_zone("skip-walk", 256 * MIB, high_water_mark=1)
        freed, _ = free_alternating(zone, 40)
        skip_walk(zone).run(accept)
        for step in range(1, 9):
            zone.free(freed[-1] + 2 * step * PAGEBLOCK_PAGES, 9)
        done = skip_walk(zone, capacity=capacity).run(accept)
        assert done.blocks == 8
        visited.append(done.nodes_visited - 10 * (done.batches + 1))
        zone.close()
    assert all(nodes <= 40 + 8 for nodes in visited)


def test_d1_d2_hold_at_each_step_of_a_run_with_frees_and_allocations(zone: Zone) -> None:
    """D1 and D2: ``validate`` checks both while ACTIVE."""
    freed, buddies = free_alternating(zone, 10)
    assert freed
    cycle = skip_walk(zone, capacity=2)
    cycle.begin()
    steps = 0
    while (batch := cycle.pull()) is not None:
        zone.validate()
        if buddies:
            zone.free(buddies.pop(), 9)
        if steps % 2:
            zone.alloc(9, flags=ALLOC_NO_WATERMARKS)
        cycle.put_back(batch, Outcome.DONE)
        zone.validate()
        steps += 1
    cycle.end()
    assert steps > 3
    cycle.run(accept)  # what the last batch merged to (P1)
    assert unreported_heads(zone) == []


# ---------------------------------------------------------------- turned lists (D6)


@pytest.mark.parametrize("first", range(1, 8))
@pytest.mark.parametrize("capacity", [1, 3, 16])
def test_d6_none_is_missed_on_a_list_that_was_rotated_while_idle(zone: Zone, first: int, capacity: int) -> None:
    """D6: ``UUUURRRR`` turned anywhere."""
    freed, _ = free_alternating(zone, 4)
    skip_walk(zone).run(accept)
    for step in range(1, 5):
        zone.free(freed[-1] + 2 * step * PAGEBLOCK_PAGES, 9)
    assert flags_of(zone) == "UUUURRRR"
    zone.rotate(9, MOVABLE, zone.free_list(9, MOVABLE)[first][0])
    assert skip_walk(zone, capacity=capacity).run(accept).blocks == 4
    assert flags_of(zone) == "RRRRRRRR"


@pytest.mark.parametrize("first", range(1, 8))
@pytest.mark.parametrize("in_flight", [False, True])
def test_d6_rotation_during_a_run_releases_the_boundary_and_none_is_missed(
    zone: Zone, first: int, in_flight: bool
) -> None:
    """D6: the boundary of that list goes back to its head, between two batches or while one is out."""
    free_alternating(zone, 11)
    cycle = skip_walk(zone, capacity=3)
    cycle.begin()
    one_batch(cycle)
    assert drawn(zone) == "UUUUUUUU|RRR"
    batch = cycle.pull() if in_flight else None
    zone.rotate(9, MOVABLE, zone.free_list(9, MOVABLE)[first][0])
    assert drawn(zone).endswith("|")
    zone.validate()
    while batch is not None or (batch := cycle.pull()) is not None:
        cycle.put_back(batch, Outcome.DONE)
        zone.validate()
        batch = None
    cycle.end()
    assert flags_of(zone) == "R" * 11


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.WITHDRAWN])
def test_d6_a_run_that_ended_early_hides_nothing(zone: Zone, outcome: Outcome) -> None:
    """D6 and S8: ``URUR`` and the like are found, since Reported blocks are skipped wherever they are."""
    freed, _ = free_alternating(zone, 6)
    outcomes = iter([Outcome.DONE, outcome])
    skip_walk(zone, capacity=2).run(lambda _batch: next(outcomes))
    zone.rotate(9, MOVABLE, zone.free_list(9, MOVABLE)[4][0])
    zone.free(freed[-1] + 2 * PAGEBLOCK_PAGES, 9)
    assert flags_of(zone).count("U") == 5
    skip_walk(zone, capacity=2).run(accept)
    assert flags_of(zone) == "R" * 7


# ---------------------------------------------------------------- a Reported block that moves


def test_a_reported_block_that_is_isolated_during_a_run_goes_to_the_head_and_keeps_its_flag(zone: Zone) -> None:
    """Section 1.7, v10: flag kept, boundary pulled back, placed at the head."""
    free_alternating(zone, 4)
    cycle = skip_walk(zone, capacity=2)
    cycle.begin()
    batch = one_batch(cycle)
    reported = [pfn for pfn, flag in zone.free_list(9, MOVABLE) if flag]
    assert boundary_of(zone, 9, MOVABLE) == reported[0]
    unreported = zone.free_list(9, MOVABLE)[0][0]
    zone.isolate(unreported // PAGEBLOCK_PAGES)
    zone.isolate(reported[0] // PAGEBLOCK_PAGES)
    assert boundary_of(zone, 9, MOVABLE) == reported[1]
    assert zone.free_list(9, ISOLATE) == [(reported[0], True), (unreported, False)]
    assert boundary_of(zone, 9, ISOLATE) is None
    zone.validate()
    zone.unisolate(reported[0] // PAGEBLOCK_PAGES)
    assert {int(pfn) for pfn in batch.pfns} == set(reported)
    while (batch_ := cycle.pull()) is not None:
        cycle.put_back(batch_, Outcome.DONE)
    cycle.end()
    assert unreported_heads(zone) == []


# ---------------------------------------------------------------- isolation (__isolate_free_page)


@pytest.mark.parametrize("spare", [0, 1])
def test_m4_no_block_is_isolated_at_or_below_the_min_watermark(spare: int) -> None:
    """M4: more than min must be free without the block; the walk of the list ends there (v12)."""
    zone = make_zone(64 * MIB, min_watermark=3 * PAGEBLOCK_PAGES - spare, low_watermark=1 << 20)
    free_alternating(zone, 5)
    pulled: list[int] = []

    def report(batch: Batch) -> Outcome:
        assert zone.statistics().free_pages > 3 * PAGEBLOCK_PAGES - spare
        pulled.append(len(batch.pfns))
        return Outcome.DONE

    cycle = skip_walk(zone)
    done = cycle.run(report)
    assert pulled == [1 + spare]
    assert (done.failed, done.requested) == (False, False)
    assert zone.statistics().in_flight_blocks == 0
    assert flags_of(zone) == "U" * (4 - spare) + "R" * (1 + spare)
    zone.validate()
    zone.close()


def test_m4_where_one_list_ends_at_the_watermark_the_next_goes_on() -> None:
    """Section 1.9: it is the walk of *this* list that stops; a smaller block of another may still be isolated."""
    zone = make_zone(16 * MIB, min_watermark=300, min_order=8)
    pfns = exhaust(zone, 8)
    for pfn in (pfns[0], pfns[1], pfns[4]):  # the first two merge
        zone.free(pfn, 8)
    assert skip_walk(zone).run(accept).blocks == 1
    assert flags_of(zone, 9) == "U"
    assert zone.free_list(8, MOVABLE) == [(pfns[4], True)]
    zone.validate()
    zone.close()


@pytest.mark.parametrize("kind", [UNMOVABLE, RECLAIMABLE, MOVABLE])
def test_isolation_turns_pageblocks_movable(zone: Zone, kind: Migratetype) -> None:
    """Section 4.1: from order ``pageblock_order - 1`` on, so that the block comes back to the MOVABLE list."""
    freed, _ = free_alternating(zone, 2)
    zone.set_pageblock_migratetype(freed[0] // PAGEBLOCK_PAGES, kind)
    assert (freed[0], False) in zone.free_list(9, kind)
    skip_walk(zone).run(accept)
    assert pageblock_types(zone)[freed[0] // PAGEBLOCK_PAGES] == MOVABLE
    assert sorted(zone.free_list(9, MOVABLE)) == [(pfn, True) for pfn in freed]
    assert zone.statistics().free_pages == 2 * PAGEBLOCK_PAGES


@pytest.mark.parametrize("kind", [HIGHATOMIC, CMA])
def test_isolation_leaves_pageblocks_of_types_that_are_never_given_away(zone: Zone, kind: Migratetype) -> None:
    """Section 4.1: only convertible pageblocks change."""
    freed, _ = free_alternating(zone, 1)
    zone.set_pageblock_migratetype(freed[0] // PAGEBLOCK_PAGES, kind)
    skip_walk(zone).run(accept)
    assert pageblock_types(zone)[freed[0] // PAGEBLOCK_PAGES] == kind
    assert zone.free_list(9, kind) == [(freed[0], True)]


@pytest.mark.parametrize(("order", "became"), [(7, UNMOVABLE), (8, MOVABLE), (9, MOVABLE)])
def test_isolation_turns_a_pageblock_from_half_of_one_on(order: int, became: Migratetype) -> None:
    """Section 4.1: order 8 does, order 7 does not; what else is free there stays on its list."""
    zone = policy_zone("skip-walk", 16 * MIB, min_order=order)
    freed, _ = free_alternating(zone, 1, order=order)
    zone.set_pageblock_migratetype(0, UNMOVABLE)
    assert freed == [0]
    skip_walk(zone).run(accept)
    assert pageblock_types(zone)[0] == became
    assert zone.free_list(order, became) == [(0, True)]
    zone.validate()
    zone.close()


def test_isolation_of_a_top_block_turns_both_of_its_pageblocks(zone: Zone) -> None:
    """Section 4.1: 4 MiB cover two pageblocks."""
    zone.set_pageblock_migratetype(4, UNMOVABLE)
    zone.set_pageblock_migratetype(5, UNMOVABLE)
    assert (4 * PAGEBLOCK_PAGES, False) in zone.free_list(10, UNMOVABLE)
    skip_walk(zone).run(accept)
    assert pageblock_types(zone)[4:6] == [MOVABLE, MOVABLE]
    assert (4 * PAGEBLOCK_PAGES, True) in zone.free_list(10, MOVABLE)
