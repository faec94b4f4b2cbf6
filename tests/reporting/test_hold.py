"""The hold policy: what was reported stays out of the allocator until memory is short, and then cools down."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from common.geometry import N_ORDERS, PAGEBLOCK_PAGES, Migratetype
from common.layout import HELD, KIND_MASK
from guest.allocator.held import PRESSURE_BLOCKS
from guest.allocator.repair import rebuild_zone
from guest.allocator.view import open_zone
from guest.allocator.zone import Zone
from guest.reporting.cycle import Batch, Cycle, Outcome
from guest.reporting.hold import FIRST_COOLDOWN_NS, LONGEST_COOLDOWN_NS, QUIET_NS, Cooldown
from guest.reporting.reporter import Reporter
from tests.allocator.arrange import MIB, exhaust, make_zone
from tests.guest.arrange import HandHost, Wire, hello_of
from tests.reporting.arrange import free_alternating, reported_heads
from tests.support import wait_until

SECOND_NS = 1_000_000_000
HIGH_PAGES = 3 * 1024


@pytest.fixture
def zone() -> Iterator[Zone]:
    """64 MiB, 16 top-order blocks, of which the high watermark keeps three."""
    zone = make_zone(64 * MIB, trigger="any", min_watermark=16, low_watermark=1024, high_watermark=HIGH_PAGES)
    yield zone
    zone.validate()
    zone.close()


def accept(_batch: Batch) -> Outcome:
    return Outcome.DONE


def accounted(zone: Zone) -> int:
    """Pages that the counters know of (S4)."""
    now = zone.statistics()
    return (
        now.free_pages + now.isolated_pages + now.pcp_pages + now.in_flight_pages + now.held_pages + now.allocated_pages
    )


def test_a_run_leaves_the_high_watermark_in_the_allocator_and_holds_the_rest(zone: Zone) -> None:
    done = Cycle(zone, "hold", capacity=4).run(accept)
    statistics = zone.statistics()
    assert done.blocks == statistics.held_blocks == 13
    assert statistics.free_pages == HIGH_PAGES
    assert (statistics.in_flight_blocks, statistics.in_flight_max_blocks) == (0, 4)
    assert not statistics.requested


def test_blocks_are_pulled_from_the_tail_and_down_to_the_minimum_order() -> None:
    """Oldest first, as v9; a lower order still fits where a higher one does not."""
    zone = make_zone(64 * MIB, trigger="any", low_watermark=2, high_watermark=600)
    free_alternating(zone, 4)
    tail = [pfn for pfn, _flag in zone.free_list(9, Migratetype.MOVABLE)][::-1]
    taken: list[int] = []

    def report(batch: Batch) -> Outcome:
        taken.extend(batch.pfns.tolist())
        return Outcome.DONE

    Cycle(zone, "hold").run(report)
    assert taken == tail[:2]  # a third would leave 512
    zone.validate()
    zone.close()


def test_s1_s3_s4_held_blocks_are_on_no_list_and_accounted_for(zone: Zone) -> None:
    """S1 (nothing is flagged), S3, S4."""
    held: list[int] = []

    def report(batch: Batch) -> Outcome:
        held.extend(batch.pfns.tolist())
        return Outcome.DONE

    Cycle(zone, "hold").run(report)
    listed = {pfn for order in range(N_ORDERS) for kind in Migratetype for pfn, _flag in zone.free_list(order, kind)}
    assert listed.isdisjoint(held)
    assert reported_heads(zone) == []
    assert accounted(zone) == zone.n_pages
    got = [zone.alloc(9) for _block in range(4)]  # down to low and not below: none of the held ones
    assert None not in got
    assert not {pfn for pfn in got if pfn is not None and any(h <= pfn < h + 1024 for h in held)}
    assert zone.statistics().pressure == 0


def test_s9_isolated_blocks_are_never_pulled(zone: Zone) -> None:
    """S9"""
    for pageblock in range(zone.n_pages // PAGEBLOCK_PAGES):
        zone.isolate(pageblock)
    assert Cycle(zone, "hold").run(accept).blocks == 0


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.WITHDRAWN])
def test_s8_what_was_not_taken_is_not_held(zone: Zone, outcome: Outcome) -> None:
    """S8"""
    done = Cycle(zone, "hold").run(lambda _batch: outcome)
    assert done.failed
    assert zone.statistics().held_blocks == 0
    assert zone.statistics().free_pages == zone.n_pages


def test_below_the_low_watermark_held_blocks_come_back_in_steps_to_the_high_one(zone: Zone) -> None:
    """A chunk an allocation, oldest first; the allocation itself succeeds."""
    order_held: list[int] = []

    def report(batch: Batch) -> Outcome:
        order_held.extend(batch.pfns.tolist())
        return Outcome.DONE

    Cycle(zone, "hold").run(report)
    for _block in range(4):
        assert zone.alloc(9) is not None
    assert zone.statistics().pressure == 0
    assert zone.alloc(9) is not None  # 512 would be left
    statistics = zone.statistics()
    assert statistics.pressure == 1
    came_back = 13 - statistics.held_blocks
    assert came_back == 2  # 1024 free and two blocks of 1024: the high watermark
    still = np.flatnonzero((zone.page_states() & KIND_MASK) == HELD)
    assert set(still.tolist()) == set(order_held[2:])
    assert statistics.requested  # the reporter learns of it


def test_an_allocation_fails_only_when_nothing_is_held_any_more(zone: Zone) -> None:
    cycle = Cycle(zone, "hold")
    cycle.run(accept)
    assert len(exhaust(zone, 10)) == 16
    assert zone.statistics().held_blocks == 0
    assert zone.statistics().pressure >= 13 // PRESSURE_BLOCKS
    assert zone.alloc(0) is None


def test_pressure_ends_a_run_and_what_is_in_flight_goes_back_free(zone: Zone) -> None:
    """Not held while memory is short, though the host took it: it is free, unflagged and not resident."""
    cycle = Cycle(zone, "hold", capacity=4)
    cycle.begin()
    first = cycle.pull()
    assert first is not None
    cycle.put_back(first, Outcome.DONE)
    second = cycle.pull()
    assert second is not None
    got = exhaust(zone, 10)  # eight are free, four held
    assert len(got) == 12
    assert zone.statistics().pressure > 0
    cycle.put_back(second, Outcome.DONE)
    assert zone.statistics().held_blocks == 0
    assert zone.statistics().free_pages == 4 * 1024
    assert cycle.pull() is None
    assert reported_heads(zone) == []
    cycle.end()


def test_a_repair_keeps_what_is_held(zone: Zone) -> None:
    """After the death of a lock's owner the records alone count; REQUESTED may be set, so no run is asked for here."""
    Cycle(zone, "hold").run(accept)
    before = zone.statistics()
    rebuild_zone(open_zone(zone.address))
    after = zone.statistics()
    assert (after.held_blocks, after.held_pages, after.free_pages) == (
        before.held_blocks,
        before.held_pages,
        before.free_pages,
    )
    zone.validate()
    assert Cycle(zone, "hold").release() == 13


def test_release_gives_back_as_many_as_asked_for(zone: Zone) -> None:
    cycle = Cycle(zone, "hold")
    cycle.run(accept)
    assert cycle.release(5) == 5
    assert zone.statistics().held_blocks == 8
    assert cycle.release() == 8
    assert cycle.release() == 0
    assert zone.statistics().free_pages == zone.n_pages
    assert zone.statistics().pressure == 0


def test_other_policies_never_cool_down(zone: Zone) -> None:
    exhaust(zone, 9)
    assert Cycle(zone, "boundary").cooling_ns(0) == 0


# ---------------------------------------------------------------- the cool-down, which has no clock of its own


def test_without_pressure_there_is_no_cool_down() -> None:
    cooldown = Cooldown()
    cooldown.note(0, 123)
    assert cooldown.left_ns(123) == 0


def test_each_pressure_after_a_cool_down_doubles_it_up_to_the_longest() -> None:
    """1, 2, 4 ... 64, 64 seconds."""
    cooldown = Cooldown()
    now_ns, lengths = 5 * SECOND_NS, []
    for pressure in range(1, 10):
        cooldown.note(pressure, now_ns)
        lengths.append(cooldown.left_ns(now_ns) // SECOND_NS)
        assert cooldown.left_ns(now_ns + cooldown.length_ns - 1) == 1
        now_ns += cooldown.length_ns
        assert cooldown.left_ns(now_ns) == 0
    assert lengths == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    assert LONGEST_COOLDOWN_NS == 64 * FIRST_COOLDOWN_NS


def test_pressure_in_a_cool_down_makes_it_start_over_and_no_longer() -> None:
    cooldown = Cooldown()
    cooldown.note(1, 0)
    cooldown.note(7, SECOND_NS // 2)
    assert cooldown.left_ns(SECOND_NS // 2) == SECOND_NS
    cooldown.note(7, SECOND_NS)  # no more than before: nothing happened
    assert cooldown.left_ns(SECOND_NS) == SECOND_NS // 2


@pytest.mark.parametrize(("quiet_ns", "length_ns"), [(QUIET_NS, 2 * SECOND_NS), (QUIET_NS + 1, SECOND_NS)])
def test_a_quiet_period_brings_it_back_to_the_first(quiet_ns: int, length_ns: int) -> None:
    """Counted from the end of the cool-down."""
    cooldown = Cooldown()
    cooldown.note(1, 0)
    cooldown.note(2, FIRST_COOLDOWN_NS + quiet_ns)
    assert cooldown.length_ns == length_ns


def test_a_cycle_cools_down_with_any_clock(zone: Zone) -> None:
    """Virtual time asks with its own; what the zone had counted before is not news."""
    cycle = Cycle(zone, "hold")
    cycle.run(accept)
    assert cycle.cooling_ns(77) == 0
    exhaust(zone, 9)
    assert cycle.cooling_ns(100) == FIRST_COOLDOWN_NS
    assert cycle.cooling_ns(100 + FIRST_COOLDOWN_NS) == 0
    assert Cycle(zone, "hold").cooling_ns(0) == 0


# ---------------------------------------------------------------- with a reporter


@pytest.fixture
def wire(lab_name: str) -> Iterator[tuple[Wire, HandHost]]:
    host = HandHost(lab_name)
    wire = Wire(lab_name, hello=hello_of(n_pages=4096, capacity=4))
    yield wire, host
    wire.close()
    host.close()


def serve(host: HandHost, zone: Zone) -> None:
    """Answer whatever is reported until no run is asked for or under way."""

    def over() -> bool:
        while (report := host.report_now()) is not None:
            host.answer(report)
        now = zone.statistics()
        return not now.requested and not now.active

    wait_until(over, what="the end of the run")


def test_s13_the_reporter_holds_cools_down_and_frees_everything_when_it_stops(wire: tuple[Wire, HandHost]) -> None:
    """S13: nothing is held once stop has returned, be it in the midst of a cool-down."""
    link_end, host = wire
    zone = make_zone(16 * MIB, registered=False, trigger="any", min_watermark=16, low_watermark=64, high_watermark=1024)
    errors: list[BaseException] = []
    reporter = Reporter(zone, Cycle(zone, "hold", capacity=4), link_end.link, delay_ns=0, on_error=errors.append)
    link_end.link.start()
    host.meet()
    reporter.start()
    serve(host, zone)
    assert zone.statistics().held_blocks == 3
    runs = reporter.statistics().runs
    wakes = reporter.statistics().wakes
    got = exhaust(zone, 10)
    assert len(got) == 4
    wait_until(lambda: reporter.statistics().wakes > wakes, what="the reporter to learn of the pressure")
    for pfn in got:
        zone.free(pfn, 10)
    serve(host, zone)
    assert reporter.statistics().runs > runs
    assert zone.statistics().held_blocks == 3
    exhaust(zone, 10)  # pressure once more: a cool-down of two seconds
    reporter.stop()
    assert zone.statistics().held_blocks == 0
    assert errors == []
    zone.validate()
    zone.close()


def test_what_a_dead_reporter_held_is_freed_by_the_next(wire: tuple[Wire, HandHost]) -> None:
    link_end, _host = wire
    zone = make_zone(16 * MIB, registered=False, trigger="any")
    Cycle(zone, "hold").run(accept)
    assert zone.statistics().held_blocks > 0
    reporter = Reporter(zone, Cycle(zone, "hold"), link_end.link, delay_ns=0, on_error=lambda _error: None)
    assert zone.statistics().held_blocks == 0
    reporter.stop()
    zone.validate()
    zone.close()
