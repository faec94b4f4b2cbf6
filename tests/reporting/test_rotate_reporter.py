"""``rotate`` with the reporter thread around it, against a host moved by hand: the waiting side of M1, and M3b."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from common.messages import Report, Status
from guest.reporting.cycle import Cycle
from guest.reporting.reporter import Reporter
from tests.allocator.arrange import MIB, exhaust, make_zone
from tests.guest.arrange import HOUR_NS, HandHost, Wire, hello_of
from tests.support import wait_until

QUIET_S = 0.3
CAPACITY = 2


class Scene:
    """A zone of 16 MiB under ``rotate``, its reporter, and the host."""

    def __init__(self, lab: str, *, delay_ns: int = 0, deadline_ns: int = HOUR_NS) -> None:
        self.errors: list[BaseException] = []
        self.zone = make_zone(16 * MIB, registered=False, trigger="any")
        self.host = HandHost(lab)
        hello = replace(hello_of(), epoch=self.zone.epoch, capacity=CAPACITY)
        self.wire = Wire(lab, deadline_ns=deadline_ns, hello=hello)
        cycle = Cycle(self.zone, "rotate", capacity=CAPACITY)
        self.reporter = Reporter(self.zone, cycle, self.wire.link, delay_ns=delay_ns, on_error=self.errors.append)

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

    def runs(self, count: int) -> None:
        """Wait until so many runs are over."""
        wait_until(lambda: self.reporter.statistics().runs >= count, what=f"the end of run {count}")

    def free_one(self) -> None:
        """Take a block and free it again: an ordinary free of the minimum order."""
        pfn = self.zone.alloc(9)
        assert pfn is not None
        self.zone.free(pfn, 9)

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


@pytest.mark.parametrize("delay_ns", [50_000_000, 200_000_000])
def test_m1_the_delay_lies_between_the_end_of_a_run_and_the_next(lab_name: str, delay_ns: int) -> None:
    """M1: a free while the last report is out asks for a run, which begins the delay after this one has ended."""
    scene = Scene(lab_name, delay_ns=delay_ns)
    try:
        scene.start()
        scene.serve()
        last = scene.host.report()
        scene.free_one()
        answered_ns = time.monotonic_ns()
        scene.host.answer(last)
        scene.runs(1)
        assert scene.zone.statistics().requested
        assert scene.serve().pulled_ns - answered_ns >= delay_ns
        scene.runs(2)
        assert not scene.zone.statistics().requested
        assert scene.reporter.statistics().wakes == 2
        assert scene.zone.unreported_pages() == 0
        scene.zone.validate()
    finally:
        scene.close()
    assert scene.errors == []


@pytest.mark.parametrize("status", [Status.FAILED, Status.REJECTED])
def test_m3b_after_an_error_only_a_later_free_wakes_the_worker(scene: Scene, status: Status) -> None:
    """M3b: the blocks are back unflagged, and nothing happens until somebody frees."""
    scene.start()
    scene.serve(status)
    scene.runs(1)
    assert scene.reporter.statistics().failed_runs == 1
    now = scene.zone.statistics()
    assert (now.in_flight_blocks, now.reported_pages, now.requested) == (0, 0, False)
    with pytest.raises(AssertionError, match="a wake-up"):
        wait_until(lambda: scene.reporter.statistics().wakes > 1, QUIET_S, what="a wake-up")
    scene.free_one()
    scene.serve()
    assert scene.reporter.statistics().wakes == 2
    scene.zone.validate()


def test_m3b_a_free_during_the_report_that_fails_does_wake_it(scene: Scene) -> None:
    """M1 and M3b: that request came while ACTIVE, and is not lost."""
    scene.start()
    report = scene.host.report()
    scene.free_one()
    scene.host.answer(report, Status.FAILED)
    scene.serve()
    assert scene.reporter.statistics().failed_runs == 1


def test_a_report_that_was_withdrawn_is_asked_for_again(lab_name: str) -> None:
    """No host in time has no counterpart in the kernel: memory must not wait for a free that may never come."""
    scene = Scene(lab_name, deadline_ns=20_000_000)
    try:
        scene.start()
        first = scene.host.report()
        second = scene.host.report()
        assert second.seq > first.seq
        assert scene.reporter.statistics().failed_runs >= 1
        assert scene.wire.link.statistics().withdrawn >= 1
    finally:
        scene.close()
    assert scene.errors == []


def test_p2_a_quiet_guest_wakes_nobody(scene: Scene) -> None:
    """P2: once all is reported; allocations ask for nothing."""
    scene.start()
    scene.serve()
    scene.serve()
    scene.runs(1)
    assert len(exhaust(scene.zone)) == 8
    with pytest.raises(AssertionError, match="a wake-up"):
        wait_until(lambda: scene.reporter.statistics().wakes > 1, QUIET_S, what="a wake-up")
    scene.zone.validate()
