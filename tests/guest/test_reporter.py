"""The reporter thread over a real zone, against a host that is moved by hand."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UsageError
from common.messages import Hello, Report, Status, Welcome, unpack_blocks
from guest.allocator import entry
from guest.allocator.zone import Zone
from guest.reporting import link as link_module
from guest.reporting.cycle import Cycle
from guest.reporting.reporter import Reporter
from tests.allocator.arrange import exhaust, make_zone
from tests.guest.arrange import HOUR_NS, MIB, N_PAGES, PATIENCE_S, HandHost, Wire, hello_of
from tests.support import wait_until

QUIET_S = 0.3
CAPACITY = 2  # two full batches a run: the zone has four blocks


class Scene:
    """A zone of 16 MiB, its reporter, and the host by hand."""

    def __init__(self, lab: str, *, delay_ns: int = 0, deadline_ns: int = HOUR_NS, pid: int | None = None) -> None:
        self.errors: list[BaseException] = []
        self.zone = make_zone(16 * MIB, registered=False, high_water_mark=1)
        self.host = HandHost(lab, pid=pid)
        self.wire = Wire(
            lab, deadline_ns=deadline_ns, hello=replace(hello_of(), epoch=self.zone.epoch, capacity=CAPACITY)
        )
        self.reporter = Reporter(
            self.zone,
            Cycle(self.zone, capacity=CAPACITY),
            self.wire.link,
            delay_ns=delay_ns,
            on_error=self.errors.append,
        )

    def start(self) -> None:
        """Everybody meets; the request of the registration is pending."""
        self.wire.link.start()
        self.host.meet()
        self.reporter.start()

    def serve(self, status: Status = Status.DONE) -> Report:
        """Answer one report."""
        report = self.host.report()
        self.host.answer(report, status)
        return report

    def serve_run(self) -> list[Report]:
        """Answer the reports of a whole run."""
        reports = [self.serve()]

        def over() -> bool:
            if (report := self.host.report_now()) is not None:
                self.host.answer(report)
                reports.append(report)
            return self.idle()

        wait_until(over, what="the end of the run")
        return reports

    def idle(self) -> bool:
        """No run is asked for or under way."""
        statistics = self.zone.statistics()
        return not statistics.requested and not statistics.active

    def close(self) -> None:
        self.reporter.stop()
        self.wire.close()
        self.host.close()
        self.zone.close()


@pytest.fixture
def scene(lab_name: str) -> Iterator[Scene]:
    opened = Scene(lab_name)
    yield opened
    opened.close()
    assert opened.errors == []


def switches(thread_id: int | None) -> int:
    """How often the thread has given up its CPU: a thread that sleeps does not."""
    text = Path(f"/proc/self/task/{thread_id}/status").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if "ctxt_switches" in line)


def blocks_of(zone: Zone) -> int:
    return sum(zone.statistics().nr_free[9:])


def test_a_run_reports_everything_once(scene: Scene) -> None:
    blocks = blocks_of(scene.zone)
    scene.start()
    reports = scene.serve_run()
    assert [unpack_blocks(report.blocks)[0].size for report in reports] == [CAPACITY] * (blocks // CAPACITY)
    assert scene.zone.unreported_pages() == 0
    statistics = scene.reporter.statistics()
    assert (statistics.blocks, statistics.pages, statistics.runs) == (blocks, N_PAGES, 1)
    assert [taken[1] for taken in scene.reporter.timeline.rows()] == [CAPACITY] * (blocks // CAPACITY)
    scene.zone.validate()


def test_p2_a_quiet_guest_never_wakes_its_threads(scene: Scene) -> None:
    scene.start()
    scene.serve_run()
    wakes = scene.reporter.statistics().wakes
    threads = [scene.reporter.native_id, scene.wire.link._thread.native_id]
    wait_until(lambda: scene.reporter.statistics().runs == 1)
    before = [switches(thread) for thread in threads]
    with pytest.raises(AssertionError, match="a wake-up"):
        wait_until(lambda: [switches(thread) for thread in threads] != before, QUIET_S, what="a wake-up")
    assert scene.reporter.statistics().wakes == wakes == 1


def test_p2_small_frees_wake_nobody(scene: Scene) -> None:
    scene.start()
    scene.serve_run()
    held = [scene.zone.alloc(0) for _ in range(8)]
    for pfn in held[1:]:  # the first one keeps them from merging up to order 9
        assert pfn is not None
        scene.zone.free(pfn)
    scene.zone.validate()
    assert not scene.zone.statistics().requested
    assert scene.reporter.statistics().wakes == 1


@pytest.mark.parametrize("delay_ns", [100_000_000, 300_000_000])
def test_b4_a_run_waits_for_the_delay_after_the_request(lab_name: str, delay_ns: int) -> None:
    scene = Scene(lab_name, delay_ns=delay_ns)
    try:
        started_ns = time.monotonic_ns()  # registration asked already; the thread hears of it when it starts
        scene.start()
        assert scene.serve_run()[0].pulled_ns - started_ns >= delay_ns
        taken = exhaust(scene.zone)
        asked_ns = time.monotonic_ns()
        for pfn in taken:
            scene.zone.free(pfn, 9)
        assert scene.serve_run()[0].pulled_ns - asked_ns >= delay_ns
    finally:
        scene.close()
    assert scene.errors == []


def test_s8_a_failed_run_is_tried_again_by_itself(scene: Scene) -> None:
    scene.start()
    scene.serve(Status.FAILED)
    wait_until(lambda: scene.reporter.statistics().failed_runs == 1)
    scene.serve_run()  # nobody has freed anything meanwhile
    assert scene.zone.unreported_pages() == 0
    assert scene.wire.link.statistics().failed == 1


@pytest.mark.parametrize("status", [Status.FAILED, Status.REJECTED, Status.BUSY])
def test_p2_a_host_that_always_fails_does_not_make_it_spin(scene: Scene, status: Status) -> None:
    """v9's worker spun when it could not go on; ours waits longer each time, even if the delay is 0."""
    scene.start()
    pulled_ns = [scene.serve(status).pulled_ns for _ in range(5)]
    gaps = [after - before for before, after in itertools.pairwise(pulled_ns)]
    assert sum(gaps) >= 200_000_000, gaps  # lower bounds: 20, 40, 80 and 160 ms
    scene.zone.validate()


def test_a_host_that_dies_in_a_run_leaves_nothing_in_flight_and_its_successor_goes_on(lab_name: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    ) as mortal:
        scene = Scene(lab_name, pid=mortal.pid)
        try:
            scene.start()
            scene.serve()
            scene.host.report()
            mortal.kill()
            wait_until(lambda: scene.zone.statistics().in_flight_blocks == 0, what="the batch to be put back")
            scene.zone.validate()
            scene.host.pid = os.getpid()
            hello = scene.host.hear(Hello)
            scene.host.say(Welcome(scene.host.pid, hello.epoch))
            scene.serve_run()
            assert scene.zone.unreported_pages() == 0
            assert scene.wire.link.statistics().withdrawn == 1
        finally:
            scene.close()


def test_s13_after_stop_nothing_is_in_flight_and_nothing_is_reported(scene: Scene) -> None:
    scene.start()
    scene.host.report()  # and no answer, with a deadline of an hour
    assert scene.zone.statistics().in_flight_blocks == CAPACITY
    scene.reporter.stop()
    assert not scene.reporter.is_alive()
    statistics = scene.zone.statistics()
    assert (statistics.in_flight_blocks, statistics.reported_pages) == (0, 0)
    for pfn in exhaust(scene.zone):
        scene.zone.free(pfn, 9)
    assert not scene.zone.statistics().requested
    assert scene.host.reports.receive(0) is None
    scene.zone.validate()


def test_s5_stopping_beside_a_host_inside_the_gate_leaves_its_blocks_in_flight(
    lab_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may discard them whenever it wakes: to put them back would hand them out to somebody who writes to them."""
    monkeypatch.setattr(link_module, "_STOP_GRACE_S", 0.05)
    scene = Scene(lab_name, deadline_ns=1_000_000)
    try:
        scene.wire.link.start()
        scene.host.meet()
        assert scene.host.ram.try_gate()
        scene.reporter.start()
        scene.host.report()
        scene.reporter.stop()
        assert scene.zone.statistics().in_flight_blocks == CAPACITY
        assert scene.host.ram.withdrawn_seq() == 0
        scene.host.ram.ungate()
        scene.zone.validate()
    finally:
        scene.close()


def test_s13_stop_before_start(lab_name: str) -> None:
    scene = Scene(lab_name)
    scene.close()
    assert scene.reporter.ident is None
    assert scene.reporter.statistics().wakes == 0


def test_s13_stop_while_waiting_for_a_host(lab_name: str) -> None:
    scene = Scene(lab_name)
    try:
        scene.reporter.start()
        wait_until(lambda: scene.reporter.statistics().wakes == 1)
    finally:
        scene.close()
    assert not scene.reporter.is_alive()
    assert scene.reporter.statistics().runs == 0


def test_s13_stop_during_the_delay(lab_name: str) -> None:
    scene = Scene(lab_name, delay_ns=HOUR_NS)
    try:
        scene.start()
        wait_until(lambda: scene.reporter.statistics().wakes == 1)
    finally:
        scene.close()
    assert not scene.reporter.is_alive()


def test_s14_a_second_device_is_refused_until_the_first_has_left(scene: Scene) -> None:
    def another() -> Reporter:
        return Reporter(scene.zone, Cycle(scene.zone), scene.wire.link, delay_ns=0, on_error=scene.errors.append)

    with pytest.raises(UsageError, match=str(os.getpid())):
        another()
    scene.start()
    scene.serve_run()
    scene.reporter.stop()
    another().stop()


def test_s14_a_dead_device_is_replaced(lab_name: str) -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as dead:
        dead.wait(PATIENCE_S)
    zone = make_zone(16 * MIB, registered=False)
    assert int(entry.register_device(zone.address, dead.pid, 0)) == 0
    wire = Wire(lab_name)
    errors: list[BaseException] = []
    try:
        Reporter(zone, Cycle(zone), wire.link, delay_ns=0, on_error=errors.append).stop()
    finally:
        wire.close()
        zone.close()
