"""A sender that floods is held off, the others are served, and nobody is polled; with a clock that is moved by hand."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.messages import CMD_FIRST_RUN, Goodbye, Report, RunEnd, Status, encode
from common.names import control_queue
from common.queues import Queue
from host.limits import REFUSED, UNAWAITED, Bucket, price_of_unawaited
from host.loop import _CONTROL_PER_S, Host
from tests.host.stand_in import StandIn
from tests.host.test_registry import greet, settle

RATE = 1000  # tokens a second, so 1000 at the start
RUBBISH = b"rubbish"


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def host(lab_name: str, clock: Clock) -> Iterator[Host]:
    with Host(lab_name, max_reports_per_s=RATE) as running:
        running._clock = clock
        running._control_bucket = Bucket(_CONTROL_PER_S, 0.0)
        yield running


@pytest.fixture
def flooder(host: Host, lab_name: str) -> Iterator[StandIn]:
    with StandIn(lab_name) as guest:
        greet(host, guest)
        yield guest


@pytest.fixture
def modest(host: Host, lab_name: str) -> Iterator[StandIn]:
    with StandIn(lab_name, "g1") as guest:
        guest.touch()
        greet(host, guest)
        yield guest


def flood(host: Host, guest: StandIn, data: bytes = RUBBISH) -> int:
    """Keep the guest's queue full until the host does not read it any more; how much it has read."""
    sent = 0
    while not host._held_off:
        while guest.reports.send(data, 0):
            sent += 1
        host.turn(0)
        while guest.acks.receive(0) is not None:
            pass
    return sent - guest.reports.waiting


def held_off(host: Host, name: str = "g0") -> int:
    return host.registry.guests[name].counters.held_off


# The bucket


@given(st.integers(1, 1 << 20), st.integers(1, 300))
def test_who_keeps_to_the_rate_is_never_overdrawn(rate: int, messages: int) -> None:
    bucket = Bucket(rate, 0.0)
    assert not any(bucket.charge(1.0, number / rate) for number in range(messages))


@given(st.integers(1, 1 << 20), st.lists(st.tuples(st.floats(0.0, 10.0), st.floats(0.0, 300.0)), max_size=50))
def test_no_more_than_a_second_and_the_rate_is_ever_given(rate: int, charges: list[tuple[float, float]]) -> None:
    """Up to the one charge that overdraws it."""
    bucket, now, spent = Bucket(rate, 0.0), 0.0, 0.0
    for pause, price in charges:
        now = max(bucket.ready_s(now), now + pause)
        bucket.charge(price, now)
        spent += price
        assert spent <= rate * (now + 1.0) + price + 1e-6 * spent


def test_a_bucket_is_ready_once_it_has_paid() -> None:
    bucket = Bucket(10, 5.0)
    assert bucket.ready_s(5.0) == 5.0
    assert not bucket.charge(10, 5.0)
    assert bucket.charge(20, 5.0)
    assert bucket.ready_s(5.0) == 7.0
    assert bucket.ready_s(6.0) == 7.0
    assert not bucket.charge(0, 7.0)


# Guests


def test_a_flood_of_rubbish_is_held_off_after_what_a_second_allows(host: Host, flooder: StandIn) -> None:
    assert flood(host, flooder) == RATE / REFUSED + 1
    assert held_off(host) == 1
    for _turn in range(20):
        host.turn(0)
    assert host.statistics().counters.malformed == RATE / REFUSED + 1
    assert flooder.reports.waiting == 1  # what was not read stays there


def test_p2_the_host_sleeps_until_it_may_go_on(host: Host, flooder: StandIn, clock: Clock) -> None:
    flood(host, flooder)
    assert host._patience_s(0.0, None, 0.0) == REFUSED / RATE
    assert not host._selector.select(0)
    clock.now_s = REFUSED / RATE
    read = host.statistics().counters.malformed
    host.turn(0)
    host.turn(0)
    assert host.statistics().counters.malformed == read + 1
    assert held_off(host) == 2


def test_others_are_served_meanwhile_and_their_accounts_are_exact(
    host: Host, flooder: StandIn, modest: StandIn
) -> None:
    flood(host, flooder)
    for block in range(4):
        modest.report((block * 1024, 10))
        settle(host)
        ack = modest.acknowledged()
        assert (ack.status, ack.freed_bytes) == (Status.DONE, 4 << 20)
    assert held_off(host, "g1") == 0
    assert held_off(host) == 1


def test_a_guest_that_waits_for_its_answers_gets_its_whole_rate(host: Host, flooder: StandIn) -> None:
    for _report in range(RATE):
        flooder.report((0, 9))
        host.turn(0)
        flooder.acknowledged()
    assert held_off(host) == 0
    flooder.report((0, 9))
    host.turn(0)
    assert held_off(host) == 1
    assert host._patience_s(0.0, None, 0.0) == 1 / RATE


def test_s10_a_guest_that_does_not_wait_pays_for_that_and_for_its_blocks(
    host: Host, flooder: StandIn, clock: Clock
) -> None:
    price = price_of_unawaited(16)
    while not host._held_off:
        while flooder.reports.waiting < flooder.reports.max_messages:
            flooder.report(*((block * 16, 0) for block in range(16)))
        host.turn(0)
        flooder.acks.receive(0)
    assert host.statistics().counters.reports == int(RATE // price) + 1
    assert price > UNAWAITED


@pytest.mark.parametrize(
    "message",
    [
        Report(9, 1, True, 0, bytes(4)),  # of another epoch
        Report(1, 1, True, 0, b"\xff" * 4),  # outside
        RunEnd(1, CMD_FIRST_RUN),  # of a run that never was
        Goodbye("g0", 1, 1),  # has no business here
    ],
)
def test_whatever_is_refused_costs_as_much(host: Host, flooder: StandIn, message: Report | RunEnd | Goodbye) -> None:
    assert flood(host, flooder, encode(message)) == RATE / REFUSED + 1


def test_a_hello_does_not_fill_the_bucket(host: Host, flooder: StandIn, clock: Clock) -> None:
    """Neither the same once more nor that of a new life."""
    flood(host, flooder)
    read = host.statistics().counters.malformed
    for epoch in (1, 2, 3):
        flooder.said = dataclasses.replace(flooder.said, epoch=epoch)
        flooder.hello()
        for _turn in range(4):
            host.turn(0)
        flooder.welcomed()
        assert len(host._held_off) == 1
        assert host.statistics().counters.malformed == read


def test_a_guest_that_is_held_off_may_leave(host: Host, flooder: StandIn, clock: Clock) -> None:
    flood(host, flooder)
    flooder.goodbye()
    host.turn(0)
    assert host.registry.guests["g0"].objects is None
    assert not host._held_off
    assert host._patience_s(0.0, None, 0.0) is None


def test_no_limit_is_no_limit(lab_name: str) -> None:
    with Host(lab_name, max_reports_per_s=0) as host, StandIn(lab_name) as guest:
        greet(host, guest)
        for _message in range(2000):
            assert guest.reports.send(RUBBISH, 0)
            host.turn(0)
        assert host.statistics().counters.malformed == 2000
        assert held_off(host) == 0


# The control queue


def test_a_flooded_control_queue_is_read_at_its_rate_and_guests_do_not_wait_for_it(
    host: Host, modest: StandIn, clock: Clock
) -> None:
    with Queue.open(control_queue(host.registry.lab), read=False, write=True) as control:
        while not host._held_off:
            while control.send(RUBBISH, 0):
                pass
            host.turn(0)
        read = host.statistics().counters.malformed
        assert abs(read - _CONTROL_PER_S) <= 2  # the hellos of the fixtures were read, too
        assert host.statistics().counters.held_off == 1
        modest.report((0, 9))
        host.turn(0)
        assert modest.acknowledged().status is Status.DONE
        assert host.statistics().counters.malformed == read
        clock.now_s = 1.0
        host.turn(0)
        host.turn(0)
        assert host.statistics().counters.malformed > read


def test_what_is_held_off_is_shown(host: Host, flooder: StandIn) -> None:
    flood(host, flooder)
    result = host.statistics().as_dict()
    assert result["host"]["held_off"] == result["guests"][0]["held_off"] == 1


def test_no_descriptor_is_left_watched_or_open(lab_name: str) -> None:
    def live() -> None:
        with Host(lab_name, max_reports_per_s=RATE) as host, StandIn(lab_name) as guest:
            greet(host, guest)
            flood(host, guest)

    before = len(os.listdir("/proc/self/fd"))
    for _life in range(3):
        live()
    assert len(os.listdir("/proc/self/fd")) == before
