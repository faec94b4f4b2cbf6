"""The hint policy: allocate the top order until failure, hold, free; and the pressure path that it shares with hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from common.geometry import TOP_ORDER, Migratetype
from common.layout import HELD, KIND_MASK, RETURNED
from common.messages import CMD_DONE, CMD_FIRST_RUN, CMD_STOP, Command, Report, RunEnd, Status, Welcome, decode
from guest.allocator.held import PRESSURE_BLOCKS
from guest.allocator.zone import Zone
from guest.reporting.cycle import RELEASE_BLOCKS, Batch, Cycle, Outcome
from guest.reporting.reporter import Reporter
from tests.allocator.arrange import MIB, exhaust, make_zone
from tests.guest.arrange import HOUR_NS, PATIENCE_S, HandHost, Wire, hello_of
from tests.support import wait_until

TOP_PAGES = 1 << TOP_ORDER
SHORT_NS = 50_000_000


@pytest.fixture
def zone() -> Iterator[Zone]:
    """64 MiB, 16 top-order blocks; no free and no registration asks for a run."""
    zone = make_zone(64 * MIB, trigger="off")
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


def begin_and_hold(cycle: Cycle) -> list[int]:
    """A whole pass, its blocks held and not yet freed; their pfns."""
    held: list[int] = []
    cycle.begin()
    while (batch := cycle.pull()) is not None:
        held += batch.pfns.tolist()
        cycle.put_back(batch, Outcome.DONE)
    return held


def test_neither_registration_nor_a_free_asks_for_a_run(zone: Zone) -> None:
    """The host starts the runs: trigger off."""
    pfns = exhaust(zone, 9)
    for pfn in pfns:
        zone.free(pfn, 9)
    statistics = zone.statistics()
    assert (statistics.requested, statistics.requests) == (False, 0)


def test_a_pass_takes_every_top_block_that_min_allows() -> None:
    """__GFP_NORETRY without reserves: down to the min watermark, not below."""
    zone = make_zone(64 * MIB, trigger="off", min_watermark=2 * TOP_PAGES + 1, low_watermark=0, high_watermark=0)
    taken: list[int] = []

    def report(batch: Batch) -> Outcome:
        assert set(batch.orders.tolist()) == {TOP_ORDER}
        taken.extend(batch.pfns.tolist())
        return Outcome.DONE

    done = Cycle(zone, "hint", capacity=4).run(report)
    assert len(set(taken)) == len(taken) == done.blocks == 16 - 3
    assert zone.statistics().free_pages == zone.n_pages
    zone.validate()
    zone.close()


def test_nothing_smaller_than_the_top_order_is_hinted() -> None:
    """Whatever the minimum order is."""
    zone = make_zone(16 * MIB, trigger="off", min_order=0)
    for pfn in exhaust(zone, 9)[::2]:
        zone.free(pfn, 9)
    assert Cycle(zone, "hint").run(accept).blocks == 0
    zone.validate()
    zone.close()


def test_s3_s4_held_blocks_are_on_no_list_and_nobody_else_gets_them(zone: Zone) -> None:
    """S3, S4: until DONE; conservation counts them by themselves."""
    cycle = Cycle(zone, "hint", capacity=5)
    busy = zone.alloc(9)
    assert busy is not None
    held = begin_and_hold(cycle)
    statistics = zone.statistics()
    assert len(held) == statistics.held_blocks == 15
    assert statistics.held_pages == 15 * TOP_PAGES
    assert statistics.in_flight_blocks == 0
    assert accounted(zone) == zone.n_pages
    listed = {pfn for order in range(TOP_ORDER + 1) for kind in Migratetype for pfn, _ in zone.free_list(order, kind)}
    assert listed.isdisjoint(held)
    assert ((zone.page_states()[held] & KIND_MASK) == HELD).all()
    zone.validate()
    cycle.end()
    assert zone.statistics().held_pages == 0
    assert zone.statistics().free_pages == zone.n_pages - 512
    assert sum(zone.statistics().reported) == 0


def test_s8_a_failed_batch_goes_back_and_ends_the_run(zone: Zone) -> None:
    """S8: and what was held of earlier batches is free at the end too; nobody asks for another run."""
    answers = iter([Outcome.DONE, Outcome.FAILED])
    done = Cycle(zone, "hint", capacity=4).run(lambda _batch: next(answers))
    assert (done.failed, done.batches, done.requested) == (True, 2, False)
    assert zone.statistics().free_pages == zone.n_pages


def test_s10_at_most_capacity_is_in_flight_and_release_is_in_chunks() -> None:
    """S10: in flight; what is held is bounded by the min watermark alone. Each hold of the lock frees a chunk."""
    zone = make_zone(256 * MIB, trigger="off")
    cycle = Cycle(zone, "hint", capacity=3)
    begin_and_hold(cycle)
    assert zone.statistics().in_flight_max_blocks == 3
    assert cycle.release(2) == 2
    assert zone.statistics().held_blocks == 61
    before = int(cycle.put_back_holds[:-1].sum())  # the last word is the longest
    assert cycle.release() == 61
    assert int(cycle.put_back_holds[:-1].sum()) - before == -(-61 // RELEASE_BLOCKS) == 4
    assert cycle.release() == 0
    cycle.end()
    zone.validate()
    zone.close()


def test_pages_of_a_report_that_nobody_waited_for_are_not_called_returned(zone: Zone) -> None:
    """Without waiting the guest does not know; with waiting it does."""
    zone._resident[:] = 1  # every page is in use by somebody
    Cycle(zone, "hint").run(lambda _batch: Outcome.SENT)
    assert not (zone.resident_map() == RETURNED).any()
    Cycle(zone, "hint").run(accept)
    assert int((zone.resident_map() == RETURNED).sum()) == 15 * TOP_PAGES


# ---------------------------------------------------------------- pressure


@pytest.mark.parametrize("cpu", [-1, 0])
def test_s3_an_allocation_that_would_fail_takes_held_blocks_back_first(cpu: int) -> None:
    """The shrinker's work, in the allocating path: from the zone and from a per-CPU list that has to be refilled."""
    zone = make_zone(64 * MIB, trigger="off", pcp_batch=63, min_watermark=8, low_watermark=9, high_watermark=10)
    cycle = Cycle(zone, "hint")
    small = zone.alloc(0)
    assert small is not None
    begin_and_hold(cycle)
    taken = 0
    while zone.alloc(9, cpu=cpu) is not None:
        taken += 1
        zone.validate()
    statistics = zone.statistics()
    assert statistics.held_blocks == 0
    assert statistics.pressure > 0
    assert taken >= 2 * 15  # everything that was held came back, in halves
    assert accounted(zone) == zone.n_pages
    cycle.end()
    zone.close()


def test_a_chunk_is_bounded_and_stops_at_the_high_watermark() -> None:
    zone = make_zone(64 * MIB, trigger="off", min_watermark=8, low_watermark=600, high_watermark=6 * TOP_PAGES)
    cycle = Cycle(zone, "hint")
    begin_and_hold(cycle)
    assert zone.statistics().held_blocks == 15  # the last would leave nothing above min
    assert zone.alloc(9) is not None  # leaves 512, below low
    statistics = zone.statistics()
    assert (statistics.held_blocks, statistics.pressure) == (15 - PRESSURE_BLOCKS, 1)
    zone.validate()
    cycle.end()
    zone.close()


def test_pressure_ends_the_pass_that_would_allocate_it_all_again(zone: Zone) -> None:
    cycle = Cycle(zone, "hint", capacity=8)
    cycle.begin()
    first = cycle.pull()
    assert first is not None
    cycle.put_back(first, Outcome.DONE)
    wanted = exhaust(zone, TOP_ORDER)  # eight are free, eight are held
    assert len(wanted) == 16
    for pfn in wanted:
        zone.free(pfn, TOP_ORDER)
    assert cycle.pull() is None
    cycle.end()


def test_without_held_blocks_there_is_no_pressure(zone: Zone) -> None:
    exhaust(zone, 9)
    assert zone.alloc(0) is None
    assert zone.statistics().pressure == 0


# ---------------------------------------------------------------- with a reporter and a host by hand


class Scene:
    """A zone of 16 MiB, its reporter under the hint policy, a host by hand."""

    def __init__(self, lab: str, *, deadline_ns: int = HOUR_NS) -> None:
        self.errors: list[BaseException] = []
        self.zone = make_zone(16 * MIB, registered=False, trigger="off")
        self.host = HandHost(lab)
        self.epoch = self.zone.epoch
        hello = replace(hello_of(), epoch=self.epoch, capacity=2, commands=True)
        self.wire = Wire(lab, deadline_ns=deadline_ns, hello=hello)
        self.cycle = Cycle(self.zone, "hint", capacity=2)
        self.reporter = Reporter(self.zone, self.cycle, self.wire.link, delay_ns=0, on_error=self.errors.append)
        self.wire.link.start()
        self.host.meet()
        self.reporter.start()

    def order(self, number: int, epoch: int = 0) -> None:
        self.host.say(Command(epoch or self.epoch, number))

    def heard(self) -> Report | RunEnd:
        """What comes next on the queue of the reports."""
        data = self.host.reports.receive(PATIENCE_S)
        assert data is not None, "the guest said nothing"
        message = decode(data)
        assert isinstance(message, Report | RunEnd)
        return message

    def serve_pass(self) -> tuple[int, RunEnd]:
        """Answer the reports of a pass; how many, and its end."""
        reports = 0
        while isinstance(message := self.heard(), Report):
            self.host.answer(message, Status.DONE)
            reports += 1
        return reports, message

    def held(self) -> int:
        return self.zone.statistics().held_blocks

    def quiet(self) -> bool:
        now = self.zone.statistics()
        return not now.active and not now.requested and now.held_blocks == now.in_flight_blocks == 0

    def close(self) -> None:
        self.reporter.stop()
        assert self.quiet()
        self.wire.close()
        self.host.close()
        self.zone.validate()
        self.zone.close()


@pytest.fixture
def scene(lab_name: str) -> Iterator[Scene]:
    opened = Scene(lab_name)
    yield opened
    opened.close()
    assert opened.errors == []


def test_p2_a_registered_guest_waits_for_the_command(scene: Scene) -> None:
    wait_until(lambda: scene.wire.link.connected, what="the welcome")
    assert scene.reporter.statistics().wakes == 0
    assert scene.host.report_now(0.1) is None


def test_a_run_from_command_to_done(scene: Scene) -> None:
    """Blocks are held from their acknowledgement to DONE, and then free; a later run does it all again."""
    for number in (CMD_FIRST_RUN, CMD_FIRST_RUN + 7):
        scene.order(number)
        reports, end = scene.serve_pass()
        assert reports == 2  # of four blocks three are above min, two a report
        assert end == RunEnd(scene.epoch, number)
        assert scene.held() == 3
        scene.order(CMD_DONE)
        wait_until(scene.quiet, what="the blocks to be free")
    wait_until(lambda: scene.reporter.statistics().runs == 2, what="both runs")


def test_stop_pauses_and_a_newer_run_goes_on_from_there(scene: Scene) -> None:
    """CMD_STOP: the guest allocates no more, keeps what it has; with a new id it goes on, and DONE frees all."""
    scene.order(CMD_FIRST_RUN)
    first = scene.heard()
    assert isinstance(first, Report)
    scene.order(CMD_STOP)
    wait_until(lambda: scene.wire.link.statistics().commands == 2, what="the order to be heard")
    scene.host.answer(first)
    assert scene.heard() == RunEnd(scene.epoch, CMD_FIRST_RUN)
    assert scene.held() == 2
    scene.order(CMD_FIRST_RUN + 1)
    reports, end = scene.serve_pass()
    assert (reports, end.id) == (1, CMD_FIRST_RUN + 1)
    assert scene.held() == 3
    scene.order(CMD_DONE)
    wait_until(scene.quiet, what="the blocks to be free")


def test_s11_replayed_and_stale_commands_are_dropped_and_counted(scene: Scene) -> None:
    scene.order(CMD_FIRST_RUN + 5)
    scene.serve_pass()
    scene.order(CMD_DONE)
    wait_until(scene.quiet, what="the run to end")
    for number, epoch in ((CMD_FIRST_RUN + 5, 0), (CMD_FIRST_RUN, 0), (CMD_FIRST_RUN + 6, scene.epoch + 1)):
        scene.order(number, epoch)
    wait_until(lambda: scene.wire.link.statistics().stale_commands == 3, what="the commands to be dropped")
    assert scene.zone.statistics().runs == 1
    assert scene.host.report_now(0.1) is None


def test_s11_a_flood_of_commands_costs_time_only(scene: Scene) -> None:
    """A hundred runs at once: each pass ends, what is held is bounded, and the last DONE frees everything."""
    scene.order(CMD_FIRST_RUN)
    last = CMD_FIRST_RUN + 100
    for number in range(CMD_FIRST_RUN + 1, last + 1):
        scene.order(number)
    end = RunEnd(scene.epoch, 0)
    while end.id != last:
        _reports, end = scene.serve_pass()
        assert scene.held() <= 3
    scene.order(CMD_DONE)
    wait_until(scene.quiet, what="the blocks to be free")


@pytest.mark.parametrize("orders", [(), (CMD_STOP,), (CMD_STOP, CMD_FIRST_RUN + 1)])
def test_s3_a_host_that_never_says_done_gets_a_deadline_and_no_more(lab_name: str, orders: tuple[int, ...]) -> None:
    scene = Scene(lab_name, deadline_ns=SHORT_NS)
    scene.order(CMD_FIRST_RUN)
    scene.serve_pass()
    for number in orders:
        scene.order(number)
    wait_until(lambda: scene.reporter.statistics().runs >= 1 and scene.held() == 0, what="the blocks to be free")
    wait_until(scene.quiet, what="the end")
    scene.close()


def test_s13_stop_frees_what_is_held(scene: Scene) -> None:
    scene.order(CMD_FIRST_RUN)
    scene.serve_pass()
    assert scene.held() == 3
    scene.reporter.stop()
    assert scene.held() == 0


def test_a_failed_run_is_ended_too_so_that_the_host_starts_another(scene: Scene) -> None:
    scene.order(CMD_FIRST_RUN)
    report = scene.heard()
    assert isinstance(report, Report)
    scene.host.answer(report, Status.FAILED)
    assert scene.heard() == RunEnd(scene.epoch, CMD_FIRST_RUN)
    wait_until(scene.quiet, what="the end of the run")
    assert scene.host.report_now(0.1) is None  # and does not try again by itself


def test_a_new_welcome_begins_the_numbers_anew(scene: Scene) -> None:
    """Another host counts from the first run again."""
    scene.order(CMD_FIRST_RUN + 9)
    scene.serve_pass()
    scene.order(CMD_DONE)
    wait_until(scene.quiet, what="the run to end")
    scene.host.say(Welcome(os.getpid(), scene.epoch))
    wait_until(lambda: scene.wire.link.statistics().connections == 2, what="the second welcome")
    scene.order(CMD_FIRST_RUN)
    _reports, end = scene.serve_pass()
    assert end.id == CMD_FIRST_RUN
    scene.order(CMD_DONE)
    wait_until(scene.quiet, what="the run to end")


def test_s14_what_a_dead_reporter_held_is_freed_by_the_next(lab_name: str) -> None:
    """S14, and nothing is held for good."""
    zone = make_zone(16 * MIB, registered=False, trigger="off")
    begin_and_hold(Cycle(zone, "hint"))  # and its process dies
    assert zone.statistics().held_blocks == 3
    wire = Wire(lab_name, hello=replace(hello_of(), epoch=zone.epoch, commands=True))
    reporter = Reporter(zone, Cycle(zone, "hint"), wire.link, delay_ns=0, on_error=lambda _error: None)
    assert zone.statistics().held_blocks == 0
    reporter.stop()
    wire.close()
    zone.validate()
    zone.close()


def test_without_waiting_nothing_is_awaited_and_nothing_withdrawn(lab_name: str) -> None:
    """--no-wait-for-ack: the pass ends, the blocks are free, and the reports are still in the host's queue."""
    zone = make_zone(16 * MIB, registered=False, trigger="off")
    host = HandHost(lab_name)
    wire = Wire(lab_name, hello=replace(hello_of(), epoch=zone.epoch, commands=True), wait_for_ack=False)
    errors: list[BaseException] = []
    reporter = Reporter(zone, Cycle(zone, "hint", capacity=3), wire.link, delay_ns=0, on_error=errors.append)
    wire.link.start()
    host.meet()
    reporter.start()
    host.say(Command(zone.epoch, CMD_FIRST_RUN))
    wait_until(lambda: reporter.statistics().runs == 1, what="the run")
    assert zone.statistics().free_pages == zone.n_pages
    assert zone.statistics().held_blocks == 0
    report = host.report()
    assert host.ram.withdrawn_seq() == 0  # so a host that discards it now does so in good faith
    host.answer(report)
    wait_until(lambda: wire.link.statistics().stale_acks == 1, what="the answer that nobody waits for")
    reporter.stop()
    wire.close()
    host.close()
    assert errors == []
    zone.validate()
    zone.close()
