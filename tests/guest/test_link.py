"""The guest's end of the wire against a host that is moved by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from common.errors import NameInUseError, UsageError
from common.messages import (
    Ack,
    Announce,
    Goodbye,
    Hello,
    Refuse,
    Status,
    Welcome,
    encode,
    unpack_blocks,
)
from common.names import report_queue
from common.queues import CONTROL_DEPTH, Queue, create_control_queue
from common.ramobject import RamObject
from guest.reporting import link as link_module
from guest.reporting.cycle import Outcome
from tests.guest.arrange import EPOCH, GUEST, PATIENCE_S, HandHost, Wire, a_batch, hello_of, open_wire
from tests.support import wait_until

SHORT_NS = 20_000_000


@pytest.fixture
def host(lab_name: str) -> Iterator[HandHost]:
    by_hand = HandHost(lab_name)
    yield by_hand
    by_hand.close()


@pytest.fixture
def wire(host: HandHost) -> Iterator[Wire]:
    """Connected; a report may wait for an hour."""
    with open_wire(host.lab) as connected:
        connect(connected, host)
        yield connected


@pytest.fixture
def hasty(host: HandHost) -> Iterator[Wire]:
    """Connected; a report is soon overdue."""
    with open_wire(host.lab, deadline_ns=SHORT_NS) as connected:
        connect(connected, host)
        yield connected


def connect(wire: Wire, host: HandHost) -> None:
    wire.link.start()
    host.meet()
    wait_until(lambda: wire.link.connected, what="the welcome")


@pytest.fixture
def mortal() -> Iterator[subprocess.Popen[bytes]]:
    """A process to die in the host's place."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def gate_looks(monkeypatch: pytest.MonkeyPatch, ram: RamObject) -> list[bool]:
    """Records what each look of the guest at its gate found."""
    looks: list[bool] = []
    try_gate = ram.try_gate

    def counted() -> bool:
        looks.append(try_gate())
        return looks[-1]

    monkeypatch.setattr(ram, "try_gate", counted)
    return looks


# Hello


def test_a_guest_says_who_it_is_and_leaves_with_a_goodbye(host: HandHost) -> None:
    with open_wire(host.lab) as wire:
        wire.link.start()
        assert host.meet() == hello_of()
        wait_until(lambda: wire.link.connected)
    goodbye = host.hear(Goodbye)
    assert (goodbye.guest, goodbye.epoch) == (GUEST, EPOCH)


def test_a_guest_that_was_first_is_found_by_announcement(lab_name: str) -> None:
    with open_wire(lab_name) as wire:
        wire.link.start()
        host = HandHost(lab_name)
        try:
            with Queue.open(f"/fpr.{lab_name}.{GUEST}.ack", read=False, write=True) as acks:
                assert acks.send(encode(Announce(host.pid)), PATIENCE_S)
            host.meet()
            wait_until(lambda: wire.link.connected)
        finally:
            host.close()


def test_an_announcement_makes_it_say_hello_again(host: HandHost, wire: Wire) -> None:
    host.say(Announce(host.pid))
    assert host.hear(Hello) == hello_of()
    host.say(Welcome(host.pid, EPOCH))
    wait_until(lambda: wire.link.statistics().connections == 2)
    assert wire.link.connected


def test_a_hello_that_found_the_queue_full_is_said_later(lab_name: str) -> None:
    with create_control_queue(lab_name) as control:
        try:
            for _message in range(CONTROL_DEPTH):
                assert control.send(b"of others", 0)
            with open_wire(lab_name) as wire:
                wire.link.start()
                for _message in range(CONTROL_DEPTH):
                    assert control.receive(0) == b"of others"
                assert control.receive(PATIENCE_S) == encode(hello_of())
        finally:
            control.unlink()


def test_a_welcome_to_somebody_else_is_none(host: HandHost) -> None:
    with open_wire(host.lab) as wire:
        wire.link.start()
        host.pid = 1 << 22  # beyond every pid: the host that said so is gone
        host.meet()
        host.say(Welcome(os.getpid(), EPOCH + 1))
        wait_until(lambda: wire.link.statistics().malformed == 1)
        assert not wire.link.connected


def test_a_refusal_is_told_once_with_its_reason(host: HandHost) -> None:
    with open_wire(host.lab) as wire:
        wire.link.start()
        host.pid = 1 << 22  # beyond every pid: its welcome is none
        host.meet()
        for _time in range(2):
            host.say(Refuse("the name is taken"))
        host.say_bytes(b"end of the scene")
        wait_until(lambda: wire.link.statistics().malformed == 1)
        (error,) = wire.refusals
        assert isinstance(error, UsageError)
        assert "the name is taken" in str(error)
        assert GUEST in str(error)


def test_queues_that_exist_are_refused_and_left_alone(host: HandHost, wire: Wire) -> None:
    with pytest.raises(NameInUseError):
        link_module.Link(host.lab, hello_of(), wire.ram, deadline_ns=1, on_refused=wire.refusals.append)
    Queue.open(report_queue(host.lab, GUEST), read=False, write=True).close()


# Reports


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (Status.DONE, Outcome.DONE),
        (Status.INHIBITED, Outcome.KEPT),  # S12
        (Status.FAILED, Outcome.FAILED),  # S8
        (Status.REJECTED, Outcome.FAILED),
        (Status.BUSY, Outcome.FAILED),
        (Status.WITHDRAWN, Outcome.WITHDRAWN),
    ],
)
def test_an_acknowledgement_decides(host: HandHost, wire: Wire, status: Status, outcome: Outcome) -> None:
    pending = wire.report(a_batch(512, 1024))
    report = host.report()
    pfns, orders = unpack_blocks(report.blocks)
    assert (report.epoch, report.seq, report.last) == (EPOCH, 1, True)
    assert (pfns.tolist(), orders.tolist()) == ([512, 1024], [9, 9])
    host.answer(report, status)
    assert pending.result(PATIENCE_S) is outcome
    statistics = wire.link.statistics()
    assert statistics.failed == (outcome is Outcome.FAILED)
    assert statistics.withdrawn == (outcome is Outcome.WITHDRAWN)
    assert wire.ram.withdrawn_seq() == 0


def test_sequence_numbers_count_up(host: HandHost, wire: Wire) -> None:
    for expected in (1, 2, 3):
        pending = wire.report()
        report = host.report()
        assert report.seq == expected
        host.answer(report)
        assert pending.result(PATIENCE_S) is Outcome.DONE


def test_only_the_ack_that_is_waited_for_counts(host: HandHost, wire: Wire) -> None:
    """Of another epoch, of another number, a duplicate, rubbish, and messages that are no answer."""
    pending = wire.report()
    report = host.report()
    host.say(Ack(EPOCH + 1, report.seq, Status.FAILED, 0, 0))
    host.say(Ack(EPOCH, report.seq + 1, Status.FAILED, 0, 0))
    host.say_bytes(b"\xc1 rubbish")
    host.say(hello_of())
    wait_until(lambda: wire.link.statistics().malformed == 2)
    assert wire.link.statistics().stale_acks == 2
    assert not pending.done()
    host.answer(report)
    assert pending.result(PATIENCE_S) is Outcome.DONE
    second = wire.report()
    second_report = host.report()
    host.answer(report, Status.FAILED)  # the first one's, once more
    wait_until(lambda: wire.link.statistics().stale_acks == 3)
    assert not second.done()
    host.answer(second_report)
    assert second.result(PATIENCE_S) is Outcome.DONE


def test_s5_an_overdue_report_is_withdrawn_for_certain(host: HandHost, hasty: Wire) -> None:
    assert hasty.report().result(PATIENCE_S) is Outcome.WITHDRAWN
    assert host.ram.try_gate()
    assert host.ram.withdrawn_seq() == 1  # whoever still has the message finds it dead
    host.ram.ungate()
    assert host.reports.receive(0) is None  # nobody had received it: it was taken back
    assert hasty.link.statistics().withdrawn == 1
    assert hasty.link.connected


def test_s5_an_answer_that_comes_late_is_not_taken_for_the_next_one(host: HandHost, hasty: Wire) -> None:
    pending = hasty.report()
    late = host.report()
    assert pending.result(PATIENCE_S) is Outcome.WITHDRAWN
    host.answer(late)
    wait_until(lambda: hasty.link.statistics().stale_acks == 1)
    assert hasty.report().result(PATIENCE_S) is Outcome.WITHDRAWN
    assert hasty.ram.withdrawn_seq() == 2


def test_s5_while_the_host_is_inside_the_gate_the_blocks_stay_in_flight(
    host: HandHost, hasty: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = gate_looks(monkeypatch, hasty.ram)
    assert host.ram.try_gate()
    pending = hasty.report()
    report = host.report()
    wait_until(lambda: len(looks) >= 3, what="the guest's third look at the gate")
    assert not any(looks)
    assert not pending.done()
    host.ram.ungate()
    host.answer(report)
    # Whether the answer or the open gate is seen first: an answer that is there by then is the truth.
    assert pending.result(PATIENCE_S) in {Outcome.DONE, Outcome.WITHDRAWN}


def test_s5_an_answer_from_inside_the_gate_counts(host: HandHost, hasty: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = gate_looks(monkeypatch, hasty.ram)
    assert host.ram.try_gate()
    pending = hasty.report()
    report = host.report()
    wait_until(lambda: len(looks) >= 2)
    host.answer(report)
    assert pending.result(PATIENCE_S) is Outcome.DONE
    host.ram.ungate()
    assert hasty.link.statistics().withdrawn == 0
    assert hasty.ram.withdrawn_seq() == 0


def test_s5_a_host_that_dies_inside_the_gate_lets_go_of_the_blocks(
    host: HandHost, hasty: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = gate_looks(monkeypatch, hasty.ram)
    assert host.ram.try_gate()
    pending = hasty.report()
    host.report()
    wait_until(lambda: len(looks) >= 2)
    host.ram.close()  # what the kernel does for a process that dies
    assert pending.result(PATIENCE_S) is Outcome.WITHDRAWN


def test_a_host_that_dies_ends_the_wait_at_once(lab_name: str, mortal: subprocess.Popen[bytes]) -> None:
    host = HandHost(lab_name, pid=mortal.pid)
    try:
        with open_wire(lab_name) as wire:  # with a deadline of an hour
            connect(wire, host)
            pending = wire.report()
            host.report()
            mortal.kill()
            assert pending.result(PATIENCE_S) is Outcome.WITHDRAWN
            assert wire.ram.withdrawn_seq() == 1
            assert not wire.link.connected
            host.hear(Hello)  # another host may have come already
    finally:
        host.close()


def test_a_successor_is_met_and_reported_to(lab_name: str, mortal: subprocess.Popen[bytes]) -> None:
    first = HandHost(lab_name, pid=mortal.pid)
    with open_wire(lab_name) as wire:
        connect(wire, first)
        mortal.kill()
        wait_until(lambda: not wire.link.connected)
        first.close()
        second = HandHost(lab_name)
        try:
            with Queue.open(f"/fpr.{lab_name}.{GUEST}.ack", read=False, write=True) as acks:
                assert acks.send(encode(Announce(second.pid)), PATIENCE_S)
            assert second.meet() == hello_of()  # the same life of the same guest
            wait_until(lambda: wire.link.connected)
            pending = wire.report()
            second.answer(second.report())
            assert pending.result(PATIENCE_S) is Outcome.DONE
            assert wire.link.statistics().connections == 2
        finally:
            second.close()


def test_without_a_host_nothing_is_sent(lab_name: str) -> None:
    with open_wire(lab_name) as wire:
        wire.link.start()
        assert wire.report().result(PATIENCE_S) is Outcome.WITHDRAWN
        statistics = wire.link.statistics()
        assert (statistics.reports, statistics.withdrawn) == (0, 0)
        assert wire.ram.withdrawn_seq() == 0


def test_waiting_for_a_host_ends_with_stop(lab_name: str) -> None:
    with open_wire(lab_name) as wire:
        wire.link.start()
        waiting = wire._pool.submit(wire.link.wait_connected)
        wire.link.stop()
        assert waiting.result(PATIENCE_S) is False


def test_s13_stop_ends_the_wait_for_an_answer(host: HandHost, wire: Wire) -> None:
    """However far the deadline is: what is out is withdrawn, so that nothing is in flight afterwards."""
    pending = wire.report()
    host.report()
    wire.link.stop()
    assert pending.result(PATIENCE_S) is Outcome.WITHDRAWN
    assert wire.ram.withdrawn_seq() == 1


def test_s13_stop_gives_up_on_a_host_that_is_stopped_inside_the_gate(
    host: HandHost, hasty: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "_STOP_GRACE_S", 0.05)
    assert host.ram.try_gate()
    pending = hasty.report()
    host.report()
    hasty.link.stop()
    assert pending.result(PATIENCE_S) is Outcome.UNSETTLED
    host.ram.ungate()


# Confirmation


@pytest.mark.parametrize("status", [Status.DONE, Status.FAILED])
def test_z1_the_answer_says_which_blocks_the_host_confirmed(host: HandHost, wire: Wire, status: Status) -> None:
    pending = wire.report_in_full(a_batch(*range(0, 9 * 512, 512)))
    host.answer(host.report(), status, b"\x82\x01")
    answer = pending.result(PATIENCE_S)
    assert answer.zeroed.tolist() == [False, True, False, False, False, False, False, True, True]


def test_z1_bits_that_do_not_fit_the_report_are_no_answer_to_it(host: HandHost, wire: Wire) -> None:
    pending = wire.report_in_full(a_batch(512, 1024))
    report = host.report()
    for wrong in (b"\1\0", b"\4", b"\x80"):
        host.answer(report, zeroed=wrong)
    wait_until(lambda: wire.link.statistics().malformed == 3)
    assert not pending.done()
    host.answer(report)
    assert pending.result(PATIENCE_S).zeroed.tolist() == [False, False]
