"""The event loop: fairness, hostile input, and no polling."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.geometry import PAGE_BYTES
from common.messages import Ack, Announce, Goodbye, Hello, Report, Status, Welcome, encode
from common.names import control_queue
from common.queues import Queue
from host.accounting import HostStatistics
from host.loop import Host
from tests.common.test_messages import messages
from tests.host.stand_in import StandIn
from tests.host.test_registry import greet, settle
from tests.support import wait_until


@pytest.fixture
def host(lab_name: str) -> Iterator[Host]:
    with Host(lab_name) as running:
        yield running


@pytest.fixture
def guest(host: Host, lab_name: str) -> Iterator[StandIn]:
    with StandIn(lab_name) as stand_in:
        yield stand_in


def send_control(lab: str, data: bytes) -> None:
    with Queue.open(control_queue(lab), read=False, write=True) as control:
        assert control.send(data, 0)


def test_s11_rubbish_is_counted_and_dropped(host: Host, guest: StandIn) -> None:
    greet(host, guest)
    for data in (b"", b"rubbish", encode(Announce(1)), encode(Hello("g0", 1, 1, 1, "shared", 1, 1))[:-1]):
        send_control(host.registry.lab, data)
        assert guest.reports.send(data[:80], 0)
        settle(host)
    guest.report((0, 9))
    settle(host)
    assert guest.acknowledged().status is Status.DONE
    assert host.statistics().guests[0].counters.malformed == 4
    assert host.statistics().counters.malformed == 8


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=80) | messages.map(encode), max_size=6), st.booleans())
def test_s11_nothing_that_arrives_raises(host: Host, guest: StandIn, arrivals: list[bytes], control: bool) -> None:
    greet_again = "g0" not in host.registry.guests or host.registry.guests["g0"].objects is None
    if greet_again:
        guest.hello()
        settle(host)
    for data in arrivals:
        if control and len(data) <= 512:
            send_control(host.registry.lab, data)
        elif len(data) <= guest.reports.message_bytes:
            guest.reports.send(data, 0)
        settle(host)
        while guest.acks.receive(0) is not None:
            pass
    statistics = host.statistics()
    assert statistics.counters.failures == 0  # nothing that was asked went wrong either
    assert len(statistics.guests) <= host.registry.guests_seen


def test_a_flooding_guest_gets_one_report_a_turn(host: Host, lab_name: str) -> None:
    with StandIn(lab_name, "g0") as flooding, StandIn(lab_name, "g1") as modest:
        for guest in (flooding, modest):
            greet(host, guest)
        flooding.report((0, 9))
        flooding.report((0, 9))
        modest.report((0, 9))
        host.turn(0)
        by_name = {guest.name: guest.counters.reports for guest in host.statistics().guests}
        assert by_name == {"g0": 1, "g1": 1}


def test_a_guest_that_does_not_read_loses_answers_and_nobody_waits(host: Host, guest: StandIn) -> None:
    greet(host, guest)
    for _report in range(guest.acks.max_messages + 3):
        guest.report((0, 9))
        settle(host)
    assert host.statistics().counters.acks_dropped == 3
    assert host.statistics().counters.reports == guest.acks.max_messages + 3


def test_time_from_pull_to_ack_ignores_impossible_claims(host: Host, guest: StandIn) -> None:
    greet(host, guest)
    now = time.monotonic_ns()
    for claim in (now - 1_000_000, now + 3600 * 10**9, max(0, now - 3601 * 10**9 - 10**12), 2**63 - 1):
        guest.report((0, 9), now_ns=claim)
        settle(host)
        guest.acknowledged()
    counted = sum(host.registry.guests["g0"].counters.pull_to_ack_ns._bins)
    assert counted == 1 + (now < 3600 * 10**9)  # a machine that booted within the hour: the claim of 0 is possible
    assert host.statistics().counters.pull_to_ack_ns.percentiles().max >= 1_000_000


def test_peak_and_final_resident_memory(host: Host, guest: StandIn) -> None:
    greet(host, guest)
    guest.memory[:1024] = 1
    guest.report((0, 9))
    settle(host)
    guest.acknowledged()
    guest.memory[:100] = 1
    (statistics,) = host.statistics().guests
    assert statistics.peak_resident_bytes == 1024 * PAGE_BYTES
    assert statistics.final_resident_bytes == (512 + 100) * PAGE_BYTES


def test_p2_with_nothing_to_do_the_loop_waits_for_ever(host: Host) -> None:
    assert host._patience_s(0.0, None, 0.0) is None
    assert host._patience_s(1.0, 3.0, 0.0) == 2.0


def test_p2_a_view_that_shows_changes_only_is_asked_once_a_change(lab_name: str) -> None:
    shown: list[HostStatistics] = []

    class Watching:
        interval_s: float | None = 0.001
        always = False

        def show(self, statistics: HostStatistics) -> None:
            shown.append(statistics)

    with Host(lab_name, view=Watching()) as host, StandIn(lab_name) as guest:
        serving = threading.Thread(target=host.run)
        serving.start()
        wait_until(lambda: len(shown) == 1)
        guest.hello()
        assert isinstance(guest.heard(), Welcome)
        wait_until(lambda: len(shown[-1].guests) == 1)
        settled = len(shown)
        host.stop()
        serving.join(20)
        assert not serving.is_alive()
    assert len(shown) == settled == 2


def test_stop_interrupts_a_slow_host(lab_name: str) -> None:
    with Host(lab_name, slow_ns=3600 * 10**9) as host, StandIn(lab_name) as guest:
        serving = threading.Thread(target=host.run)
        serving.start()
        guest.hello()
        guest.heard()
        guest.report((0, 9))
        wait_until(lambda: host.registry.guests["g0"].counters.reports == 1)
        host.stop()
        serving.join(20)
        assert not serving.is_alive()
        assert guest.acknowledged().status is Status.DONE


def test_s12_an_inhibited_host_acknowledges_and_discards_nothing(lab_name: str) -> None:
    with Host(lab_name, inhibit_discard=True) as host, StandIn(lab_name) as guest:
        guest.touch()
        greet(host, guest)
        guest.report((0, 9))
        settle(host)
        ack = guest.acknowledged()
        assert (ack.status, ack.freed_bytes) == (Status.INHIBITED, 0)
        assert (guest.memory == 0xA5).all()


def test_a_report_that_waited_for_a_host_is_served_after_hello(lab_name: str) -> None:
    with StandIn(lab_name) as guest:
        guest.touch()
        guest.report((0, 9))
        with Host(lab_name) as host:
            settle(host)
            assert guest.heard() == Announce(os.getpid())
            assert isinstance(greet(host, guest), Welcome)
            ack = guest.heard()
            assert isinstance(ack, Ack)
            assert ack.freed_bytes == 512 * PAGE_BYTES


def test_a_goodbye_in_the_turn_of_a_report_wins_or_loses_cleanly(host: Host, guest: StandIn) -> None:
    greet(host, guest)
    guest.report((0, 9))
    send_control(guest.lab, encode(Goodbye("g0", guest.said.pid, guest.said.epoch)))
    settle(host)
    assert host.registry.guests["g0"].objects is None
    assert host.statistics().counters.malformed == 0


def test_a_report_type_is_needed_in_the_report_queue(host: Host, guest: StandIn) -> None:
    greet(host, guest)
    guest.say(Report(1, 1, True, 0, bytes(4)))
    settle(host)
    assert host.statistics().counters.malformed == 1
