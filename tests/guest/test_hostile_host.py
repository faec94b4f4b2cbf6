"""A guest against a host that lies, repeats itself, floods or falls silent: it costs time, never a page.

Each scene ends with a host that is honest again, and then every page of the zone is there, free, in nobody's hands, and
flagged Reported only if the host has acknowledged it (S3, S4, S5, S8, S11).
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator

import msgpack
import numpy as np
import posix_ipc
import pytest

from common.layout import REPORTED
from common.messages import (
    ACK_MSG_BYTES,
    MAX_CAPACITY,
    MAX_I63,
    MAX_PID,
    WIRE_VERSION,
    Ack,
    Announce,
    Command,
    Refuse,
    Report,
    RunEnd,
    Status,
    Welcome,
    encode,
    unpack_blocks,
)
from guest.reporting import reporter as reporter_module
from guest.warmup import load_kernels
from tests.allocator.arrange import exhaust
from tests.guest.arrange import HOUR_NS, N_PAGES
from tests.guest.test_reporter import Scene
from tests.support import wait_until

SHORT_NS = 15_000_000
FLOOD = 40  # five times what the queue holds


class Hostile(Scene):
    """A scene that remembers what the host has acknowledged as discarded."""

    def __init__(self, lab: str, *, deadline_ns: int = HOUR_NS) -> None:
        super().__init__(lab, deadline_ns=deadline_ns)
        self.acknowledged: set[int] = set()
        self.closed = False

    def acknowledge(self, report: Report, status: Status = Status.DONE, zeroed: bytes = b"") -> None:
        """Answer, and remember it."""
        if status in (Status.DONE, Status.INHIBITED):
            self.acknowledged.update(unpack_blocks(report.blocks)[0].tolist())
        self.host.answer(report, status, zeroed)

    def be_honest(self) -> None:
        """Welcome the guest, if it does not know its host any more, and serve it until it has nothing to report."""
        self.host.say(Welcome(self.host.pid, self.zone.epoch))

        def over() -> bool:
            while (report := self.host.report_now()) is not None:
                self.acknowledge(report)
            while self.host.control.receive(0) is not None:  # hellos
                pass
            return self.idle()

        wait_until(over, what="a guest with nothing to report")

    def lost_nothing(self) -> None:
        """Stop the reporter; then every page is free, on a list, and flagged only if that was acknowledged."""
        self.reporter.stop()
        self.zone.validate()
        statistics = self.zone.statistics()
        assert (statistics.in_flight_pages, statistics.held_pages) == (0, 0)
        assert (statistics.free_pages, statistics.allocated_pages) == (N_PAGES, 0)
        flagged = np.flatnonzero(self.zone.page_states() & REPORTED).tolist()
        assert set(flagged) <= self.acknowledged
        assert len(exhaust(self.zone, 9)) == N_PAGES >> 9
        assert self.errors == []

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            super().close()


# The first test has the compiler's time as well, where nothing is compiled yet.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Whoever waits for a guest's first report does not wait for the compiler, too."""
    load_kernels("none", "boundary")


@pytest.fixture
def scene(lab_name: str) -> Iterator[Hostile]:
    """A report may wait for an hour."""
    opened = Hostile(lab_name)
    yield opened
    opened.close()


@pytest.fixture
def hasty(lab_name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hostile]:
    """A report is soon overdue, and the guest soon tries again."""
    monkeypatch.setattr(reporter_module, "_LONGEST_BACKOFF_S", 0.02)
    opened = Hostile(lab_name, deadline_ns=SHORT_NS)
    yield opened
    opened.close()


def packed(kind: int, *fields: object) -> bytes:
    data = msgpack.packb((WIRE_VERSION, kind, *fields))
    assert isinstance(data, bytes)
    return data


# What a host may say while it owes an answer. None of it is one.


def unknown_numbers(scene: Hostile, report: Report) -> None:
    for seq in (report.seq - 1, report.seq + 1, MAX_I63):
        if seq:
            scene.host.say(Ack(report.epoch, seq, Status.DONE, 0, 0))


def wrong_epochs(scene: Hostile, report: Report) -> None:
    for epoch in (1, report.epoch - 1, report.epoch + 1, MAX_I63):
        scene.host.say(Ack(epoch, report.seq, Status.DONE, 0, 0))


def absurd_lengths(scene: Hostile, report: Report) -> None:
    for zeroed in (b"\xff" * (MAX_CAPACITY // 8), b"\1\1", b"\x80", b"\4"):
        scene.host.say(Ack(report.epoch, report.seq, Status.DONE, 0, 0, zeroed))
    for length in (0, 1, ACK_MSG_BYTES):
        scene.host.say_bytes(b"\xdc" * length)


def absurd_fields(scene: Hostile, report: Report) -> None:
    for fields in (
        (report.epoch, report.seq, 17, 0, 0, b""),
        (report.epoch, report.seq, Status.DONE, -1, 0, b""),
        (report.epoch, report.seq, Status.DONE, 1 << 63, 0, b""),
        (report.epoch, report.seq, Status.DONE, 0, 0, "text"),
        (report.epoch, float(report.seq), Status.DONE, 0, 0, b""),
        (report.epoch, True, Status.DONE, 0, 0, b""),
        (report.epoch, report.seq, Status.DONE, 0, 0),
        ([report.epoch], report.seq, Status.DONE, 0, 0, b""),
    ):
        scene.host.say_bytes(packed(5, *fields))


def messages_of_a_guest(scene: Hostile, report: Report) -> None:
    scene.host.say_bytes(encode(report)[:ACK_MSG_BYTES])
    scene.host.say(RunEnd(report.epoch, 2))


def announcements(scene: Hostile, _report: Report) -> None:
    for pid in range(1, FLOOD):
        scene.host.say(Announce(pid))


def refusals(scene: Hostile, _report: Report) -> None:
    for _time in range(FLOOD):
        scene.host.say(Refuse("go away"))


def commands(scene: Hostile, report: Report) -> None:
    for number in range(FLOOD):
        scene.host.say(Command(report.epoch, number))


def strange_welcomes(scene: Hostile, report: Report) -> None:
    """Of init, of nobody, of the guest itself, of another life."""
    for pid in (1, MAX_PID, os.getpid(), os.getppid()):
        scene.host.say(Welcome(pid, report.epoch))
        scene.host.say(Welcome(pid, report.epoch + 1))


LIES = [
    unknown_numbers,
    wrong_epochs,
    absurd_lengths,
    absurd_fields,
    messages_of_a_guest,
    announcements,
    refusals,
    commands,
    strange_welcomes,
]


@pytest.mark.parametrize("lie", LIES)
def test_s5_s11_what_is_no_answer_flags_nothing_and_loses_nothing(
    scene: Hostile, lie: Callable[[Hostile, Report], None]
) -> None:
    scene.start()
    report = scene.host.report()
    lie(scene, report)
    scene.host.say_bytes(b"end of the scene")
    wait_until(lambda: not scene.host.acks.waiting, what="a guest that has heard everything")
    assert scene.zone.statistics().reported_pages == 0
    scene.acknowledge(report)
    scene.be_honest()
    assert scene.wire.refusals == []
    scene.lost_nothing()


@pytest.mark.parametrize("status", list(Status))
def test_s8_an_answer_given_twice_counts_once(scene: Hostile, status: Status) -> None:
    scene.start()
    for _report in range(2):
        report = scene.host.report()
        scene.acknowledge(report, status)
        for again in Status:
            scene.host.say(Ack(report.epoch, report.seq, again, MAX_I63, MAX_I63))
    scene.be_honest()
    scene.lost_nothing()


def test_s5_an_answer_that_never_comes_costs_a_deadline(hasty: Hostile) -> None:
    hasty.start()
    wait_until(lambda: hasty.wire.link.statistics().withdrawn >= 3, what="withdrawn reports")
    assert hasty.zone.statistics().reported_pages == 0
    hasty.be_honest()
    hasty.lost_nothing()


def test_s5_answers_that_come_late_are_those_of_nobody(hasty: Hostile) -> None:
    """Each report is answered only once it has been withdrawn and the next one is out."""
    hasty.start()
    late: list[Report] = []
    for _report in range(4):
        report = hasty.host.report()
        withdrawn = hasty.wire.link.statistics().withdrawn
        wait_until(lambda: hasty.wire.link.statistics().withdrawn > withdrawn, what="a withdrawal")  # noqa: B023  now
        late.append(report)
    heard = hasty.wire.link.statistics().stale_acks
    for report in late:
        hasty.host.answer(report)
    wait_until(lambda: hasty.wire.link.statistics().stale_acks == heard + len(late), what="late answers")
    assert hasty.zone.statistics().reported_pages == 0
    hasty.be_honest()
    hasty.lost_nothing()


def test_s5_a_gate_that_the_host_keeps_shut_keeps_a_report_in_flight_and_no_more(hasty: Hostile) -> None:
    hasty.start()
    hasty.host.report()
    assert hasty.host.ram.try_gate()
    wait_until(lambda: hasty.zone.statistics().in_flight_blocks > 0)
    pause = threading.Event()
    for _look in range(20):
        assert hasty.zone.statistics().in_flight_blocks <= hasty.reporter.cycle.capacity  # S10
        pause.wait(0.005)
    hasty.host.ram.ungate()
    hasty.be_honest()
    hasty.lost_nothing()


@pytest.mark.parametrize("data", [encode(Announce(1)), encode(Ack(1, 1, Status.DONE, 0, 0)), b"", b"\xff" * 200])
def test_s13_a_guest_that_is_flooded_works_and_can_end(scene: Hostile, data: bytes) -> None:
    """Somebody fills its queue as fast as it reads: the true answers are among that, and it ends when it is told to."""
    stopping = threading.Event()
    sent = [0]

    def flood() -> None:
        with contextlib.suppress(posix_ipc.Error):  # the guest has closed its end, and the scene ours
            while not stopping.is_set():
                sent[0] += scene.host.acks.send(data, 0.1)

    scene.start()
    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        wait_until(lambda: sent[0] > FLOOD, what="the flood")
        scene.be_honest()
        scene.lost_nothing()
        closing = threading.Thread(target=scene.close)
        closing.start()
        closing.join(20)
        assert not closing.is_alive()
    finally:
        stopping.set()
        flooding.join()


def test_s3_s4_a_host_that_does_all_of_it_at_random_beside_a_guest_at_work(hasty: Hostile) -> None:
    """Two seconds of lies, silence, late answers and a few true ones, while blocks are allocated and freed."""
    chance = random.Random(20_190_906)
    hasty.start()
    owned: list[tuple[int, int]] = []
    unanswered: list[Report] = []

    def work() -> None:
        order = chance.choice((0, 3, 9, 10))
        if owned and chance.random() < 0.5:
            hasty.zone.free(*owned.pop(chance.randrange(len(owned))))
        elif (pfn := hasty.zone.alloc(order)) is not None:
            assert all(pfn + (1 << order) <= other or other + (1 << size) <= pfn for other, size in owned)  # S3
            owned.append((pfn, order))

    def say(data: bytes) -> None:
        with contextlib.suppress(AssertionError):
            assert hasty.host.acks.send(data, 0.001)

    def tell_the_truth() -> None:
        if unanswered:
            hasty.acknowledge(unanswered.pop(chance.randrange(len(unanswered))), chance.choice(list(Status)))

    def lie() -> None:
        if unanswered:
            chance.choice(LIES)(hasty, unanswered[-1])

    def say_anything() -> None:
        say(chance.randbytes(chance.randrange(60)))

    def shut_the_gate() -> None:
        if hasty.host.ram.try_gate():
            threading.Event().wait(0.003)
            hasty.host.ram.ungate()

    end = time.monotonic() + 2.0
    while time.monotonic() < end:
        work()
        if (report := hasty.host.report_now()) is not None:
            unanswered = [*unanswered[-3:], report]
        chance.choice((work, work, tell_the_truth, tell_the_truth, lie, say_anything, shut_the_gate))()
        while hasty.host.control.receive(0) is not None:
            pass
        hasty.zone.validate()
        assert hasty.zone.statistics().in_flight_blocks <= hasty.reporter.cycle.capacity
    assert hasty.wire.link.statistics().reports > 3
    for pfn, order in owned:
        hasty.zone.free(pfn, order)
    hasty.be_honest()
    hasty.acknowledged.update(range(N_PAGES))  # what was split and merged since has other heads
    hasty.lost_nothing()
