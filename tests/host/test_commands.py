"""Runs that the host starts: when, at whom, and what a guest may say about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from common.messages import CMD_DONE, CMD_FIRST_RUN, Command, RunEnd, encode
from host.commands import Commands
from host.loop import Host
from tests.host.stand_in import StandIn
from tests.host.test_registry import greet, settle

HOUR_NS = 3600 * 10**9


@pytest.fixture
def host(lab_name: str) -> Iterator[Host]:
    with Host(lab_name, hint_every_ns=HOUR_NS) as running:
        yield running


@pytest.fixture
def guest(host: Host, lab_name: str) -> Iterator[StandIn]:
    """Waits for commands."""
    with StandIn(lab_name) as stand_in:
        stand_in.said = replace(stand_in.said, commands=True)
        greet(host, stand_in)
        yield stand_in


class Clock:
    """Moved by hand; seconds."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def commanded(guest: StandIn) -> int:
    """The id that comes next."""
    command = guest.heard()
    assert isinstance(command, Command)
    assert command.epoch == guest.said.epoch
    return command.id


def end(host: Host, guest: StandIn, number: int, epoch: int = 0) -> None:
    assert guest.reports.send(encode(RunEnd(epoch or guest.said.epoch, number)), 0)
    settle(host)


def malformed(host: Host) -> int:
    return host.statistics().guests[0].counters.malformed


def test_the_first_run_starts_with_the_welcome_and_its_end_is_answered_by_done(host: Host, guest: StandIn) -> None:
    assert commanded(guest) == CMD_FIRST_RUN
    end(host, guest, CMD_FIRST_RUN)
    assert commanded(guest) == CMD_DONE
    assert guest.acks.receive(0) is None  # the next is due in an hour
    assert host.statistics().guests[0].counters.commands == 2


def test_a_guest_that_reports_by_itself_is_commanded_nothing(host: Host, lab_name: str) -> None:
    with StandIn(lab_name) as other:
        greet(host, other)
        assert other.acks.receive(0) is None
        end(host, other, CMD_FIRST_RUN)
        assert other.acks.receive(0) is None
        assert malformed(host) == 1


@pytest.mark.parametrize(("number", "epoch"), [(CMD_FIRST_RUN + 1, 0), (CMD_FIRST_RUN, 99)])
def test_s11_the_end_of_a_run_that_never_was_is_counted_and_dropped(
    host: Host, guest: StandIn, number: int, epoch: int
) -> None:
    commanded(guest)
    end(host, guest, number, epoch)
    assert guest.acks.receive(0) is None
    assert malformed(host) == 1


def test_an_end_is_answered_once(host: Host, guest: StandIn) -> None:
    commanded(guest)
    for _time in range(3):
        end(host, guest, CMD_FIRST_RUN)
    assert commanded(guest) == CMD_DONE
    assert guest.acks.receive(0) is None


def test_the_same_guest_that_says_hello_again_gets_a_newer_run(host: Host, guest: StandIn) -> None:
    """Its old end, still under way, ends nothing."""
    assert commanded(guest) == CMD_FIRST_RUN
    guest.hello()
    settle(host)
    guest.welcomed()
    assert commanded(guest) == CMD_FIRST_RUN + 1
    end(host, guest, CMD_FIRST_RUN)
    assert guest.acks.receive(0) is None
    assert malformed(host) == 0


def test_the_next_run_waits_for_its_time_and_for_the_end_of_the_last(host: Host, guest: StandIn) -> None:
    commanded(guest)
    registered = host.registry.guests["g0"]
    clock = Clock()
    commands = Commands(2.0, clock)
    commands.welcomed(registered)
    assert commanded(guest) == CMD_FIRST_RUN + 1
    clock.now_s += 5.0
    assert commands.next_due_s([registered]) is None  # the guest has not said that it is complete
    commands.start_due([registered])
    assert guest.acks.receive(0) is None
    commands.ended(registered, RunEnd(1, CMD_FIRST_RUN + 1))
    assert commanded(guest) == CMD_DONE
    assert commands.next_due_s([registered]) == 1002.0
    commands.start_due([registered])
    assert commanded(guest) == CMD_FIRST_RUN + 2
    commands.ended(registered, RunEnd(1, CMD_FIRST_RUN + 2))
    assert commanded(guest) == CMD_DONE
    commands.start_due([registered])
    assert guest.acks.receive(0) is None  # two seconds from the start are not over
    assert commands.next_due_s([registered]) == 1007.0


def test_every_nought_is_once(host: Host, guest: StandIn) -> None:
    commanded(guest)
    registered = host.registry.guests["g0"]
    clock = Clock()
    commands = Commands(0.0, clock)
    commands.welcomed(registered)
    number = commanded(guest)
    commands.ended(registered, RunEnd(1, number))
    assert commands.next_due_s([registered]) is None


def test_a_full_queue_delays_a_run_and_loses_none(host: Host, guest: StandIn) -> None:
    commanded(guest)
    registered = host.registry.guests["g0"]
    clock = Clock()
    commands = Commands(1.0, clock)
    while registered.answer(Command(1, CMD_DONE)):
        pass
    commands.welcomed(registered)
    assert not registered.run_in_progress
    while guest.acks.receive(0) is not None:
        pass
    due_s = commands.next_due_s([registered])
    assert due_s is not None
    clock.now_s = due_s
    commands.start_due([registered])
    assert commanded(guest) == CMD_FIRST_RUN + 1
