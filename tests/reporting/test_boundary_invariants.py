"""The boundary while a run is active: D1 to D7, on scenes small enough to draw.

In the drawings the list is written head to tail, ``|`` stands ahead of the boundary.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from common.geometry import PAGEBLOCK_PAGES, Migratetype
from guest.allocator.zone import Zone
from guest.reporting.cycle import Batch, Cycle, Outcome
from tests.allocator.arrange import ALLOC_NO_WATERMARKS, JIT_OFF, MIB, make_zone
from tests.allocator.shape import shape_of
from tests.allocator.view import boundary_of
from tests.reporting.arrange import accept, boundary_cycle, flags_of, free_alternating, unreported_heads

MOVABLE, ISOLATE, CMA = Migratetype.MOVABLE, Migratetype.ISOLATE, Migratetype.CMA


@pytest.fixture
def zone() -> Iterator[Zone]:
    """64 MiB, 32 pageblocks, per-CPU lists off."""
    zone = make_zone(64 * MIB)
    yield zone
    zone.validate()
    zone.close()


def drawn(zone: Zone, kind: Migratetype = MOVABLE) -> str:
    """The list of order 9 with its boundary, as ``UU|RR``."""
    mark = boundary_of(zone, 9, kind)
    picture = ""
    for pfn, reported in zone.free_list(9, kind):
        picture += ("|" if pfn == mark else "") + ("R" if reported else "U")
    return picture if mark is not None else picture + "|"


def one_batch(cycle: Cycle, outcome: Outcome = Outcome.DONE) -> Batch:
    """Pull, and put back."""
    batch = cycle.pull()
    assert batch is not None
    cycle.put_back(batch, outcome)
    return batch


def half_way(zone: Zone, blocks: int = 6, capacity: int = 3) -> tuple[Cycle, list[int], list[int]]:
    """A run after its first batch: ``UUU|RRR``. Also the freed blocks by address and their allocated buddies."""
    freed, buddies = free_alternating(zone, blocks)
    cycle = boundary_cycle(zone, capacity=capacity)
    cycle.begin()
    one_batch(cycle)
    assert drawn(zone) == "U" * (blocks - capacity) + "|" + "R" * capacity
    return cycle, freed, buddies


def test_d1_boundary_is_the_list_head_or_a_node_of_that_list(zone: Zone) -> None:
    """D1: over a whole run, while blocks come and go."""
    _, buddies = free_alternating(zone, 10)
    cycle = boundary_cycle(zone, capacity=2)

    def report(batch: Batch) -> Outcome:
        if buddies:
            zone.free(buddies.pop(), 9)
        if len(buddies) % 2:
            zone.alloc(9, flags=ALLOC_NO_WATERMARKS)
        for order in (9, 10):
            for kind in Migratetype:
                mark = boundary_of(zone, order, kind)
                assert mark is None or mark in [pfn for pfn, _ in zone.free_list(order, kind)]
        return Outcome.DONE

    cycle.run(report)


def test_d2_from_the_boundary_to_the_tail_all_are_reported(zone: Zone) -> None:
    """D2: with frees and allocations between the batches."""
    freed, buddies = free_alternating(zone, 12)
    assert freed
    cycle = boundary_cycle(zone, capacity=2)
    cycle.begin()
    while (batch := cycle.pull()) is not None:
        if len(buddies) > 6:
            zone.free(buddies.pop(), 9)
        cycle.put_back(batch, Outcome.DONE)
        ahead, _, behind = drawn(zone).partition("|")
        assert set(behind) <= {"R"}
        assert "RU" not in ahead
    cycle.end()


def test_d3_removing_the_boundary_page_moves_it_to_the_next(zone: Zone) -> None:
    """D3: the page at the boundary merges away."""
    cycle, freed, buddies = half_way(zone)
    entries = [pfn for pfn, _ in zone.free_list(9, MOVABLE)]
    mark = boundary_of(zone, 9, MOVABLE)
    assert mark == entries[3]
    zone.free(buddies[freed.index(mark)], 9)
    assert boundary_of(zone, 9, MOVABLE) == entries[4]
    assert drawn(zone) == "UUU|RR"
    cycle.end()


def test_d3_removing_the_only_reported_page_moves_it_to_the_list_head(zone: Zone) -> None:
    """D3: the next node is the list head."""
    cycle, freed, buddies = half_way(zone, 4, 1)
    mark = boundary_of(zone, 9, MOVABLE)
    assert mark is not None
    zone.free(buddies[freed.index(mark)], 9)
    assert drawn(zone) == "UUU|"
    cycle.end()


@pytest.mark.parametrize(("index", "picture"), [(0, "UU|RRR"), (2, "UU|RRR"), (4, "UUU|RR"), (5, "UUU|RR")])
def test_d3_removing_another_page_leaves_it(zone: Zone, index: int, picture: str) -> None:
    """D3: ahead of the boundary or behind it."""
    cycle, freed, buddies = half_way(zone)
    mark = boundary_of(zone, 9, MOVABLE)
    victim = zone.free_list(9, MOVABLE)[index][0]
    zone.free(buddies[freed.index(victim)], 9)
    assert boundary_of(zone, 9, MOVABLE) == mark
    assert drawn(zone) == picture
    cycle.end()


def test_d3_the_boundary_page_is_allocated(zone: Zone) -> None:
    """D3: all unreported ones are gone, so an allocation takes the boundary page itself."""
    cycle, _, _ = half_way(zone)
    entries = [pfn for pfn, _ in zone.free_list(9, MOVABLE)]
    got = [zone.alloc(9, flags=ALLOC_NO_WATERMARKS) for _ in range(4)]
    assert got == entries[:4]
    assert drawn(zone) == "|RR"
    cycle.end()


def test_d4_a_put_back_lands_directly_ahead_of_the_boundary_and_becomes_it(zone: Zone) -> None:
    """D4: first pulled, nearest the tail, so the list keeps its order."""
    cycle, _, _ = half_way(zone)
    before = [pfn for pfn, _ in zone.free_list(9, MOVABLE)]
    batch = one_batch(cycle)
    assert [int(pfn) for pfn in batch.pfns] == before[2::-1]
    assert [pfn for pfn, _ in zone.free_list(9, MOVABLE)] == before
    assert drawn(zone) == "|RRRRRR"
    cycle.end()


def test_d4_an_ordinary_free_lands_at_the_head(zone: Zone) -> None:
    """D4: order 9 never goes to the tail for a likely merge."""
    cycle, freed, _ = half_way(zone)
    pfn = freed[-1] + 4 * PAGEBLOCK_PAGES
    zone.free(pfn, 9)
    assert zone.free_list(9, MOVABLE)[0] == (pfn, False)
    assert drawn(zone) == "UUUU|RRR"
    cycle.end()


def test_d4_a_likely_merge_lands_directly_ahead_of_the_boundary() -> None:
    """D4: at a low minimum order a tail add meets the boundary."""
    zone = make_zone(16 * MIB, min_order=3, high_water_mark=1024)
    pfns = free_alternating(zone, 2, order=4)[0]
    cycle = boundary_cycle(zone, capacity=1)
    cycle.begin()
    one_batch(cycle)
    # 64..79 is freed with 96..127 free as one block of order 5: it would merge into a block whose buddy is free.
    zone.free(96, 4)
    zone.free(112, 4)
    before = [pfn for pfn, _ in zone.free_list(4, MOVABLE)]
    mark = boundary_of(zone, 4, MOVABLE)
    assert mark == pfns[0]
    zone.free(64, 4)
    after = [pfn for pfn, _ in zone.free_list(4, MOVABLE)]
    assert after == [*before[: before.index(mark)], 64, *before[before.index(mark) :]]
    assert boundary_of(zone, 4, MOVABLE) == mark
    cycle.end()
    zone.validate()
    zone.close()


@pytest.mark.parametrize("merge_likely", [True, False])
def test_d5_an_idle_list_reads_unreported_reported_unreported(merge_likely: bool) -> None:
    """D5: U* R* U* after each run and any frees, so a pull finds nothing iff there is nothing."""
    zone = make_zone(16 * MIB, min_order=2, merge_likely=merge_likely)
    held = sorted(free_alternating(zone, 0, order=2)[0]) or list(range(0, 4096, 4))
    cycle = boundary_cycle(zone, capacity=5)
    for turn in range(7):
        for pfn in held[turn::7][: 20 + turn]:
            zone.free(pfn, 2)
            for order in range(2, 11):
                flags = [flag for _, flag in zone.free_list(order, MOVABLE)]
                assert shape_of(flags) in ("", "U", "R", "UR", "RU", "URU")
        cycle.run(accept)
        assert unreported_heads(zone, 2) == []
    zone.validate()
    zone.close()


def test_d5_pull_is_none_only_when_nothing_is_left(zone: Zone) -> None:
    """D5: at each step of a run."""
    free_alternating(zone, 7)
    cycle = boundary_cycle(zone, capacity=1)
    cycle.begin()
    for left in range(7, 0, -1):
        assert len(unreported_heads(zone)) == left
        one_batch(cycle)
    assert cycle.pull() is None
    cycle.end()


@pytest.mark.parametrize("first", range(1, 8))
@pytest.mark.parametrize("capacity", [1, 3, 16])
def test_d6_none_is_missed_on_a_list_that_was_rotated_while_idle(zone: Zone, first: int, capacity: int) -> None:
    """D6: compaction turns ``UUUURRRR`` anywhere; v9 would miss blocks, the repair must not."""
    freed, _ = free_alternating(zone, 4)
    boundary_cycle(zone).run(accept)
    for pfn in range(freed[-1] + 2 * PAGEBLOCK_PAGES, freed[-1] + 10 * PAGEBLOCK_PAGES, 2 * PAGEBLOCK_PAGES):
        zone.free(pfn, 9)
    assert flags_of(zone) == "UUUURRRR"
    zone.rotate(9, MOVABLE, zone.free_list(9, MOVABLE)[first][0])
    boundary_cycle(zone, capacity=capacity).run(accept)
    assert flags_of(zone) == "RRRRRRRR"


@pytest.mark.parametrize("first", range(1, 8))
@pytest.mark.parametrize("in_flight", [False, True])
def test_d6_none_is_missed_on_a_list_that_was_rotated_during_a_run(zone: Zone, first: int, in_flight: bool) -> None:
    """D6: between two batches, or while one is out; D2 holds all the same."""
    cycle, _, _ = half_way(zone, 11, 3)
    batch = cycle.pull() if in_flight else None
    zone.rotate(9, MOVABLE, zone.free_list(9, MOVABLE)[first][0])
    zone.validate()
    if batch is not None:
        cycle.put_back(batch, Outcome.DONE)
        zone.validate()
    while (batch := cycle.pull()) is not None:
        cycle.put_back(batch, Outcome.DONE)
        zone.validate()
    cycle.end()
    assert flags_of(zone) == "R" * 11


def test_d6_rotated_twice_with_blocks_at_both_ends_and_in_the_middle(zone: Zone) -> None:
    """D6: ``RURURU`` by hand: rotate, free, rotate, free."""
    freed, _ = free_alternating(zone, 2)
    boundary_cycle(zone).run(accept)
    for step in range(1, 4):
        zone.free(freed[-1] + 2 * step * PAGEBLOCK_PAGES, 9)
        entries = zone.free_list(9, MOVABLE)
        zone.rotate(9, MOVABLE, next(pfn for pfn, flag in entries if flag))
    boundary_cycle(zone, capacity=2).run(accept)
    assert flags_of(zone) == "RRRRR"


def test_d6_a_long_walk_over_reported_blocks_is_finished() -> None:
    """D6: more Reported blocks on either side than one hold of the lock may look at."""
    zone = make_zone(64 * MIB, min_order=0, high_water_mark=1 << 20)
    pages = free_alternating(zone, 5000, order=0)[0]
    boundary_cycle(zone, capacity=1024).run(accept)
    fresh = [pages[-1] + 2 * step for step in range(1, 6)]
    for pfn in fresh:
        zone.free(pfn, 0)
    entries = zone.free_list(0, MOVABLE)
    zone.rotate(0, MOVABLE, entries[len(entries) // 2][0])
    statistics = boundary_cycle(zone, capacity=2).run(accept)
    assert statistics.blocks == len(fresh)
    assert flags_of(zone, 0) == "R" * (len(pages) + len(fresh))
    assert not zone.statistics().requested
    zone.close()


@pytest.mark.parametrize("capacity", [16, 32])
def test_d7_nodes_looked_at_do_not_grow_with_what_is_reported(capacity: int) -> None:
    """D7: a constant number a block, plus what an empty list costs a pull, behind 16 or 500 reported blocks."""
    visited: list[tuple[int, int]] = []
    fresh = 16
    for memory_bytes in (128 * MIB, (256 if JIT_OFF else 2048) * MIB):
        zone = make_zone(memory_bytes)
        count = memory_bytes // (4 * MIB)
        freed, _ = free_alternating(zone, count)
        for _ in range(fresh):
            assert zone.alloc(9, flags=ALLOC_NO_WATERMARKS) is not None
        cycle = boundary_cycle(zone, capacity=capacity)
        cycle.run(accept)
        states = zone.page_states()
        held = [pfn for pfn in freed if (int(states[pfn]) >> 4) & 7 == 2]
        for pfn in held:
            zone.free(pfn, 9)
        statistics = cycle.run(accept)
        assert statistics.blocks == len(held) == fresh
        visited.append((statistics.nodes_visited, statistics.batches))
        zone.close()
    (small, batches), (large, _) = visited
    lists = 2 * 5  # orders 9 and 10, five types that may be pulled
    assert large == small
    assert small <= 2 * fresh + 2 * lists * (batches + 1)


def test_d7_a_first_run_over_everything_is_linear() -> None:
    """D7: O(n) in total, where a walk past the reported run would be O(n^2)."""
    per_block: list[float] = []
    for memory_bytes in (64 * MIB, (256 if JIT_OFF else 2048) * MIB):
        zone = make_zone(memory_bytes)
        free_alternating(zone, memory_bytes // (4 * MIB))
        statistics = boundary_cycle(zone, capacity=16).run(accept)
        assert statistics.blocks == memory_bytes // (4 * MIB)
        per_block.append(statistics.nodes_visited / statistics.blocks)
        zone.close()
    assert per_block[1] <= per_block[0] <= 4


def test_boundaries_of_two_types_are_apart(zone: Zone) -> None:
    """D1: one boundary per order and migratetype."""
    freed, _ = free_alternating(zone, 8)
    for pfn in freed[:4]:
        zone.set_pageblock_migratetype(pfn // PAGEBLOCK_PAGES, CMA)
    cycle = boundary_cycle(zone, capacity=6)
    cycle.begin()
    batch = one_batch(cycle)
    assert {int(pfn) for pfn in batch.pfns[:4]} == set(freed[:4]), "the last type first"
    assert drawn(zone, CMA) == "|RRRR"
    assert drawn(zone, MOVABLE) == "UU|RR"
    cycle.end()


def test_a_reported_block_that_changes_type_during_a_run_takes_its_flag_along() -> None:
    """Section 1.7, move_to_free_list: it becomes the boundary of the list it comes to (D1, D2)."""
    zone = make_zone(16 * MIB, min_order=4)
    freed, _ = free_alternating(zone, 2 * 16 + 2, order=4)
    cycle = boundary_cycle(zone, capacity=20)
    cycle.begin()
    one_batch(cycle)
    zone.set_pageblock_migratetype(0, CMA)
    assert zone.free_list(4, CMA) == [(pfn, pfn in freed[:20]) for pfn, _ in zone.free_list(4, CMA)]
    assert flags_of(zone, 4, CMA) == "R" * 16
    assert boundary_of(zone, 4, CMA) == zone.free_list(4, CMA)[0][0]
    assert flags_of(zone, 4) == "U" * 14 + "R" * 4
    zone.set_pageblock_migratetype(1, CMA)
    assert sorted(flags_of(zone, 4, CMA)) == ["R"] * 20 + ["U"] * 12
    mark = boundary_of(zone, 4, CMA)
    entries = [pfn for pfn, _ in zone.free_list(4, CMA)]
    assert mark in entries
    assert flags_of(zone, 4, CMA)[entries.index(mark) :] == "R" * (len(entries) - entries.index(mark))
    zone.validate()
    while (batch := cycle.pull()) is not None:
        cycle.put_back(batch, Outcome.DONE)
    cycle.end()
    assert unreported_heads(zone, 4) == []
    zone.close()


@pytest.mark.parametrize("order", [4, 9])
def test_a_reported_block_that_changes_type_while_idle_loses_its_flag(order: int) -> None:
    """Section 1.7: without ACTIVE the flag and its count go (B1)."""
    zone = make_zone(16 * MIB, min_order=4)
    freed, _ = free_alternating(zone, 2, order=order)
    boundary_cycle(zone).run(accept)
    assert zone.statistics().reported[order] == 2
    zone.set_pageblock_migratetype(freed[0] // PAGEBLOCK_PAGES, CMA)
    assert (freed[0], False) in zone.free_list(order, CMA)
    assert zone.statistics().reported[order] == (1 if order == 9 else 0)
    zone.close()
