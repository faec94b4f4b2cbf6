"""What somebody says in another guest's name: no hello or goodbye that is not that guest's own changes anything (S11).

The forgers here have the run of the control queue. They do not have the other guest's objects.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import subprocess
import threading
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from common import ramobject
from common.errors import PeerError
from common.geometry import PAGE_BYTES, TOP_ORDER
from common.messages import MAX_CAPACITY, MAX_I63, Goodbye, Hello, Refuse, Status, Welcome, encode
from common.names import control_queue
from common.queues import Queue
from common.ramobject import GATE_BYTES, RamObject
from guest.reporting.link import Link
from host import registry as registry_module
from host.loop import Host
from tests.guest.arrange import HOUR_NS, hello_of
from tests.host.stand_in import N_PAGES, StandIn
from tests.host.test_registry import ended_pid, greet, settle
from tests.support import wait_until

EPOCH = 0x5EC2E7


@pytest.fixture
def host(lab_name: str) -> Iterator[Host]:
    with Host(lab_name) as running:
        yield running


@pytest.fixture
def victim(host: Host, lab_name: str) -> Iterator[StandIn]:
    """There, its memory in use, not yet registered."""
    with StandIn(lab_name, epoch=EPOCH) as guest:
        guest.touch()
        yield guest


def other_values(hello: Hello) -> list[Hello]:
    """``hello`` with each field but the name changed to others that are within bounds."""
    values: dict[str, tuple[Any, ...]] = {
        "pid": (1, os.getppid()),
        "epoch": (1, hello.epoch + 1, MAX_I63),
        "n_pages": (1, N_PAGES // 2, N_PAGES * 2),
        "backend": ("model", "shared"),
        "capacity": (1, MAX_CAPACITY),
        "min_order": (1, TOP_ORDER),
        "poison": (1, 255),
    }
    return [
        dataclasses.replace(hello, **{field.name: value})
        for field in dataclasses.fields(hello)
        if field.name != "guest"
        for value in values.get(field.name, (True, False))  # the others are switches
        if value != getattr(hello, field.name)
    ]


def serves(host: Host, guest: StandIn) -> None:
    """The guest reports, and every byte of it is given back: as if nothing had been."""
    guest.touch()
    guest.report((0, 10))
    settle(host)
    ack = guest.acknowledged()
    assert (ack.status, ack.freed_bytes) == (Status.DONE, 1024 * PAGE_BYTES)
    assert not guest.memory[:1024].any()
    assert (guest.memory[1024:] == 0xA5).all()


def test_a_forged_hello_changes_nothing_for_a_guest_that_is_registered(host: Host, victim: StandIn) -> None:
    """It knows everything but the epoch, or even that; each field is changed, and there are some in this list."""
    greet(host, victim)
    registered = host.registry.guests["g0"]
    forged = other_values(victim.said)
    assert len(forged) > len(dataclasses.fields(Hello))
    for hello in forged:
        victim.forge(hello)
        settle(host)
        assert host.registry.guests["g0"] is registered, hello
    assert host.registry.hellos_refused == len(forged)
    assert host.registry.guests_seen == 1
    assert victim.acks.receive(0) is None
    serves(host, victim)


def test_a_forged_hello_neither_registers_nor_refuses_a_guest_that_is_not_there_yet(
    host: Host, victim: StandIn
) -> None:
    """A refusal would end it: nobody tells a guest what it has not asked."""
    for hello in other_values(victim.said):
        victim.forge(hello)
        settle(host)
    assert not host.registry.guests
    assert victim.acks.receive(0) is None
    assert isinstance(greet(host, victim), Welcome)
    serves(host, victim)


def test_a_forged_hello_does_not_bring_back_a_guest_that_left(host: Host, victim: StandIn) -> None:
    greet(host, victim)
    victim.goodbye()
    settle(host)
    for hello in other_values(victim.said):
        victim.forge(hello)
        settle(host)
    assert host.registry.guests["g0"].objects is None
    assert victim.acks.receive(0) is None


def test_a_goodbye_takes_the_epoch(host: Host, victim: StandIn) -> None:
    greet(host, victim)
    for epoch in (1, EPOCH - 1, EPOCH + 1, MAX_I63):
        victim.forge(Goodbye("g0", victim.said.pid, epoch))
        settle(host)
    serves(host, victim)


@pytest.fixture
def other_pid() -> Iterator[int]:
    """Of another live process of this user."""
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as other:
        yield other.pid
        other.kill()


def test_a_guest_cannot_name_another_ones_process(host: Host, victim: StandIn, other_pid: int) -> None:
    answer = greet(host, victim, dataclasses.replace(victim.said, pid=other_pid))
    assert isinstance(answer, Refuse)
    assert f"belongs to pid {os.getpid()}, not to pid {other_pid}" in answer.reason
    assert not host.registry.guests


def test_a_guest_that_has_let_go_of_its_memory_is_nobody(host: Host, victim: StandIn, other_pid: int) -> None:
    """Without the owner's lock the kernel does not say whose the object is, and then it is not anybody's either."""
    ramobject._owned_here.discard(victim.ram.identity)
    fcntl.lockf(victim.ram.fileno(), fcntl.LOCK_UN)
    for pid in (other_pid, os.getpid()):
        answer = greet(host, victim, dataclasses.replace(victim.said, pid=pid))
        assert isinstance(answer, Refuse)
        assert "belongs to nobody who lives" in answer.reason
    assert not host.registry.guests


def test_memory_that_was_replaced_meanwhile_is_not_taken(host: Host, victim: StandIn) -> None:
    """Between the first look and the open: what counts is what stands in the object that was opened."""
    victim.ram.say(b"\0" * 64)
    with pytest.raises(PeerError, match="has been replaced"):
        host.registry._register(victim.said)
    assert not host.registry.guests


def test_a_hello_of_a_process_that_has_ended_is_none(host: Host, victim: StandIn) -> None:
    assert isinstance(greet(host, victim, dataclasses.replace(victim.said, pid=ended_pid())), Refuse)


def test_more_memory_than_can_be_is_not_claimed(host: Host, victim: StandIn) -> None:
    """The object is sparse and costs its guest nothing; what the host would keep of it is a bit a page."""
    space = os.fstatvfs(victim.ram.fileno())
    blocks = space.f_blocks * space.f_frsize // (4 << 20) + 1
    large = RamObject(victim.ram.name, victim.ram.fileno(), blocks * (4 << 20))
    os.ftruncate(victim.ram.fileno(), large.ram_bytes + GATE_BYTES)
    hello = dataclasses.replace(victim.said, n_pages=large.ram_bytes // PAGE_BYTES)
    large.say(encode(hello))
    victim.forge(hello)
    settle(host)
    answer = victim.heard()
    assert isinstance(answer, Refuse)
    assert "more than all of" in answer.reason


def test_guests_that_left_make_room_for_those_who_come(lab_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that says hello and goodbye under ever new names locks nobody out."""
    monkeypatch.setattr(registry_module, "MAX_GUESTS", 2)
    with Host(lab_name) as host:
        for name in ("g1", "g2", "g3", "g4"):
            with StandIn(lab_name, name) as passing:
                assert isinstance(greet(host, passing), Welcome)
                passing.goodbye()
                settle(host)
        with StandIn(lab_name) as guest:
            assert isinstance(greet(host, guest), Welcome)
            serves(host, guest)
        assert len(host.registry.guests) <= 2


def test_hellos_for_names_that_do_not_exist_leave_nothing_in_memory(lab_name: str) -> None:
    with Host(lab_name, max_reports_per_s=0) as host, StandIn(lab_name, epoch=EPOCH) as guest:

        def flood(count: int) -> None:
            for number in range(count):
                guest.forge(Hello(f"n{number}", os.getpid(), number + 1, N_PAGES, "shared", 16, 0))
                guest.forge(Goodbye(f"n{number}", os.getpid(), number + 1))
                settle(host)

        flood(300)  # caches of the interpreter
        tracemalloc.start()
        try:
            before, _peak = tracemalloc.get_traced_memory()
            flood(2000)
            after, _peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert after - before < 2000 * 8  # less than a word each
        assert not host.registry.guests
        assert not host.registry.departed
        assert isinstance(greet(host, guest), Welcome)


def test_a_flooded_control_queue_keeps_no_guest_out(lab_name: str) -> None:
    """Four threads wait in line to send rubbish again and again; a guest that wants to say hello waits in line too."""
    stopping = threading.Event()

    def flood() -> None:
        with contextlib.suppress(PeerError), Queue.open(control_queue(lab_name), read=False, write=True) as control:
            while not stopping.is_set():
                control.stand_in_line(encode(Hello("nobody", os.getpid(), 1, N_PAGES, "shared", 16, 0)), 1.0)

    with Host(lab_name) as host, RamObject.create(lab_name, "g0", ram_bytes=N_PAGES * PAGE_BYTES) as ram:
        threads = [threading.Thread(target=host.run), *(threading.Thread(target=flood) for _sender in range(4))]
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: host._own.held_off >= 2, what="the flood")
            link = Link(lab_name, hello_of(), ram, deadline_ns=HOUR_NS, on_refused=lambda _error: None)
            try:
                link.start()
                wait_until(lambda: link.connected, what="the welcome")
            finally:
                link.close()
        finally:
            stopping.set()
            host.stop()
            for thread in threads:
                thread.join(20)
            ram.unlink()
        assert not any(thread.is_alive() for thread in threads)
        assert host.registry.guests_seen == 1
