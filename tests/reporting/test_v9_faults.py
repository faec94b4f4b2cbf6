"""The faults of v9 that are known, each shown to be repaired (docs/divergences.md)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from common.geometry import N_ORDERS, PAGEBLOCK_PAGES, Migratetype
from guest.allocator.zone import Zone
from guest.reporting.cycle import Batch, Outcome
from tests.allocator.arrange import MIB, make_zone
from tests.allocator.view import boundary_of
from tests.reporting.arrange import accept, boundary_cycle, flags_of, free_alternating, reported_heads, unreported_heads

MOVABLE, ISOLATE = Migratetype.MOVABLE, Migratetype.ISOLATE


@pytest.fixture
def zone() -> Iterator[Zone]:
    """64 MiB, 32 pageblocks, per-CPU lists off, a run asked for at 2 blocks."""
    zone = make_zone(64 * MIB, high_water_mark=2)
    yield zone
    zone.validate()
    zone.close()


# ---------------------------------------------------------------- 1: the ISOLATE boundary


def test_isolating_a_free_block_during_the_very_first_run(zone: Zone) -> None:
    """Fault 1: v9 never set the ISOLATE boundary and would follow a null pointer here."""
    freed, _ = free_alternating(zone, 4)
    cycle = boundary_cycle(zone, capacity=2)
    cycle.begin()
    assert boundary_of(zone, 9, ISOLATE) is None
    zone.isolate(freed[1] // PAGEBLOCK_PAGES)
    assert zone.free_list(9, ISOLATE) == [(freed[1], False)]
    zone.validate()
    while (batch := cycle.pull()) is not None:
        cycle.put_back(batch, Outcome.DONE)
    cycle.end()
    assert reported_heads(zone) == sorted({*freed} - {freed[1]})


def test_a_reported_block_is_isolated_during_a_run_and_comes_back(zone: Zone) -> None:
    """Fault 1: with ACTIVE the move sets the boundary of ISOLATE, and leaving takes it away."""
    freed, _ = free_alternating(zone, 4)
    cycle = boundary_cycle(zone, capacity=2)
    cycle.begin()
    batch = cycle.pull()
    assert batch is not None
    cycle.put_back(batch, Outcome.DONE)
    victim = int(batch.pfns[0])
    zone.isolate(victim // PAGEBLOCK_PAGES)
    assert zone.free_list(9, ISOLATE) == [(victim, True)]
    assert boundary_of(zone, 9, ISOLATE) == victim
    zone.validate()
    zone.unisolate(victim // PAGEBLOCK_PAGES)
    assert boundary_of(zone, 9, ISOLATE) is None
    zone.validate()
    while (batch := cycle.pull()) is not None:
        cycle.put_back(batch, Outcome.DONE)
    cycle.end()
    assert reported_heads(zone) == freed


def test_a_block_in_flight_whose_pageblock_was_isolated_meanwhile(zone: Zone) -> None:
    """Fault 1: v9 reads the type again at put-back; the block goes to ISOLATE and is not pulled again (S9)."""
    freed, _ = free_alternating(zone, 1)
    cycle = boundary_cycle(zone)
    cycle.begin()
    batch = cycle.pull()
    assert batch is not None
    zone.isolate(freed[0] // PAGEBLOCK_PAGES)
    cycle.put_back(batch, Outcome.DONE)
    assert [pfn for pfn, _ in zone.free_list(9, ISOLATE)] == freed
    zone.validate()
    assert cycle.pull() is None
    cycle.end()
    assert zone.statistics().isolated_pages == PAGEBLOCK_PAGES


def test_half_of_a_block_in_flight_is_isolated(zone: Zone) -> None:
    """Fault 1 and S9: 4 MiB come back to two pageblocks that disagree; no isolated page can be handed out."""
    cycle = boundary_cycle(zone, capacity=1)
    cycle.begin()
    batch = cycle.pull()
    assert batch is not None
    assert int(batch.orders[0]) == 10
    second = int(batch.pfns[0]) // PAGEBLOCK_PAGES + 1
    zone.isolate(second)
    cycle.put_back(batch, Outcome.DONE)
    zone.validate()
    inside = range(second * PAGEBLOCK_PAGES, (second + 1) * PAGEBLOCK_PAGES)
    for order in range(N_ORDERS):
        for kind in Migratetype:
            if kind is not ISOLATE:
                for pfn, _ in zone.free_list(order, kind):
                    assert not set(range(pfn, pfn + (1 << order))) & set(inside)
    cycle.end()


# ---------------------------------------------------------------- 2: lists that somebody else reordered


def test_rotation_hides_no_block(zone: Zone) -> None:
    """Fault 2 (D6): ``RRUURR`` reads as empty to v9, at both ends Reported."""
    freed, _ = free_alternating(zone, 4)
    boundary_cycle(zone).run(accept)
    for step in (1, 2):
        zone.free(freed[-1] + 2 * step * PAGEBLOCK_PAGES, 9)
    assert flags_of(zone) == "UURRRR"
    zone.rotate(9, MOVABLE, zone.free_list(9, MOVABLE)[4][0])
    assert flags_of(zone) == "RRUURR"
    statistics = boundary_cycle(zone).run(accept)
    assert statistics.blocks == 2
    assert flags_of(zone) == "RRRRRR"


@pytest.mark.parametrize("why", ["failed", "stopped"])
def test_a_run_that_ended_early_hides_no_block(why: str) -> None:
    """Fault 2 and S8: a second run fails or is stopped half-way, which leaves ``URUR``: as hidden as by rotation.

    Blocks at both ends need tail adds while idle: a likely merge at an order below the pageblock's.
    """
    zone = make_zone(16 * MIB, min_order=4, high_water_mark=1024)
    free_alternating(zone, 2, order=4)
    cycle = boundary_cycle(zone, capacity=1)
    cycle.run(accept)
    for pair in (256, 512):
        zone.free(pair + 32, 4)
        zone.free(pair + 48, 4)
        zone.free(pair, 4)  # its would-be merge partner is free: to the tail
    zone.free(1024, 4)  # to the head
    assert flags_of(zone, 4) == "URRUU"
    if why == "failed":
        outcomes = iter([Outcome.DONE] * 3 + [Outcome.FAILED])
        cycle.run(lambda batch: next(outcomes))
    else:
        cycle.begin()
        for _ in range(3):
            batch = cycle.pull()
            assert batch is not None
            cycle.put_back(batch, Outcome.DONE)
        cycle.end()
    cycle.run(accept)
    assert unreported_heads(zone, 4) == []
    zone.validate()
    zone.close()


# ---------------------------------------------------------------- 3: a report that failed


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.WITHDRAWN])
@pytest.mark.parametrize("good", [0, 1, 2])
def test_only_what_was_discarded_is_flagged(zone: Zone, good: int, outcome: Outcome) -> None:
    """Fault 3 (S8): batches before the failure keep their flags, the failed one has none, and the next run takes it."""
    freed, _ = free_alternating(zone, 9)
    discarded: list[int] = []
    calls = 0

    def report(batch: Batch) -> Outcome:
        nonlocal calls
        calls += 1
        if calls > good:
            return outcome
        discarded.extend(int(pfn) for pfn in batch.pfns)
        return Outcome.DONE

    boundary_cycle(zone, capacity=2).run(report)
    assert reported_heads(zone) == sorted(discarded)
    assert zone.statistics().reported[9] == len(discarded) == 2 * good
    assert not zone.statistics().active
    boundary_cycle(zone, capacity=2).run(accept)
    assert reported_heads(zone) == freed


def test_a_report_that_raises_leaves_nothing_in_flight(zone: Zone) -> None:
    """Fault 3 (S8, S4): whatever happens to the reporter, the batch comes back unflagged and the run is over."""
    freed, _ = free_alternating(zone, 5)

    def report(batch: Batch) -> Outcome:
        raise ConnectionError("the host went away")

    with pytest.raises(ConnectionError):
        boundary_cycle(zone, capacity=2).run(report)
    now = zone.statistics()
    assert (now.in_flight_blocks, now.reported_pages, now.active, now.requested) == (0, 0, False, False)
    assert sorted(pfn for pfn, _ in zone.free_list(9, MOVABLE)) == freed


# ---------------------------------------------------------------- 4: a worker that spins


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.WITHDRAWN])
def test_a_run_that_fails_ends_and_asks_for_no_other(zone: Zone, outcome: Outcome) -> None:
    """Fault 4: v9 leaves REQUESTED set on a zone it cannot serve, and its worker spins. A later free asks again."""
    freed, buddies = free_alternating(zone, 6)
    assert zone.statistics().requested
    calls = 0

    def report(batch: Batch) -> Outcome:
        nonlocal calls
        calls += 1
        assert calls < 100
        return outcome

    boundary_cycle(zone, capacity=2).run(report)
    assert calls == 1
    assert not zone.statistics().requested
    assert not zone.statistics().active
    zone.free(buddies[0], 9)
    zone.free(freed[-1] + 2 * PAGEBLOCK_PAGES, 9)
    assert zone.statistics().requested


def test_a_run_with_nothing_to_do_ends_at_once(zone: Zone) -> None:
    """Fault 4: no memory free, one pull, no report."""
    free_alternating(zone, 0)
    statistics = boundary_cycle(zone).run(accept)
    assert (statistics.blocks, statistics.batches) == (0, 0)
    assert not zone.statistics().requested
