"""What a guest does to its own memory, gate, zone and names after it has joined harms itself alone.

A host process, a guest that does its worst, and a well-behaved one beside it whose accounts stay exact to the byte.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import posix_ipc
import pytest

from common.geometry import PAGE_BYTES
from common.messages import Status
from common.names import SHM_DIR, ack_queue, control_queue, ram_object, report_queue
from common.queues import Queue
from common.ramobject import GATE_BYTES
from tests.host.stand_in import N_PAGES, StandIn
from tests.host.test_process import HostProcess
from tests.support import wait_until

RAM_BYTES = N_PAGES * PAGE_BYTES
BLOCK_BYTES = 1024 * PAGE_BYTES


@pytest.fixture
def host(lab_name: str, tmp_path: Path) -> Iterator[HostProcess]:
    running = HostProcess(lab_name, tmp_path)
    yield running
    running.end()


# What a guest may do to what is its own.


def empties_its_memory(guest: StandIn) -> None:
    os.ftruncate(guest.ram.fileno(), 0)


def shrinks_its_memory(guest: StandIn) -> None:
    os.ftruncate(guest.ram.fileno(), RAM_BYTES // 2)


def cuts_off_its_gate(guest: StandIn) -> None:
    os.ftruncate(guest.ram.fileno(), RAM_BYTES + 4)


def grows_its_memory(guest: StandIn) -> None:
    os.ftruncate(guest.ram.fileno(), 4 * RAM_BYTES)
    os.pwrite(guest.ram.fileno(), b"\xff" * PAGE_BYTES, 3 * RAM_BYTES)


def overwrites_its_gate(guest: StandIn) -> None:
    os.pwrite(guest.ram.fileno(), b"\xff" * GATE_BYTES, RAM_BYTES)


def punches_a_hole_into_its_gate(guest: StandIn) -> None:
    ctypes.CDLL(None).fallocate(guest.ram.fileno(), 3, ctypes.c_int64(RAM_BYTES), ctypes.c_int64(GATE_BYTES))


def keeps_its_gate_shut(guest: StandIn) -> None:
    assert guest.ram.try_gate()


def withdraws_what_it_will_report(guest: StandIn) -> None:
    guest.ram.withdraw((1 << 63) - 1)


def opens_its_memory_to_all(guest: StandIn) -> None:
    os.fchmod(guest.ram.fileno(), 0o666)


def locks_its_memory(guest: StandIn) -> None:
    address = ctypes.c_void_p(guest.memory.ctypes.data)
    ctypes.CDLL(None).mlock(address, ctypes.c_size_t(RAM_BYTES))


def takes_a_lease(guest: StandIn) -> None:
    with contextlib.suppress(OSError):  # refused while the host has it open
        fcntl.fcntl(guest.ram.fileno(), fcntl.F_SETLEASE, fcntl.F_WRLCK)


def lets_go_of_its_lock(guest: StandIn) -> None:
    fcntl.lockf(guest.ram.fileno(), fcntl.LOCK_UN)


def scribbles_over_its_zone(guest: StandIn) -> None:
    Path(guest.zone_path).write_bytes(os.urandom(PAGE_BYTES))


def removes_its_names(guest: StandIn) -> None:
    guest.remove()


def replaces_its_names_by_the_others(guest: StandIn) -> None:
    """By links to those of the guest beside it, then says hello again: it would have its memory discarded."""
    guest.ram.unlink()
    os.unlink(guest.zone_path)
    other = SHM_DIR + ram_object(guest.lab, "g1")
    os.symlink(other, SHM_DIR + guest.ram.name)
    os.symlink(other, guest.zone_path)
    guest.forge(guest.said)


def links_its_name_to_the_others_memory(guest: StandIn) -> None:
    """The same with a second name of the very object. It says what stands there: its own hello, in the other's name."""
    guest.ram.unlink()
    os.link(SHM_DIR + ram_object(guest.lab, "g1"), SHM_DIR + guest.ram.name)
    guest.forge(guest.said)
    wait_until(lambda: not _waits(guest.lab), what="a host that has heard it")
    guest.ram.unlink()


def shortens_its_queues(guest: StandIn) -> None:
    for name in (report_queue(guest.lab, "g0"), ack_queue(guest.lab, "g0")):
        posix_ipc.unlink_message_queue(name)
        posix_ipc.MessageQueue(name, posix_ipc.O_CREX, mode=0o600, max_messages=1, max_message_size=1).close()
    guest.forge(guest.said)


def fills_its_own_answers(guest: StandIn) -> None:
    with Queue.open(ack_queue(guest.lab, "g0"), read=False, write=True) as acks:
        while acks.send(b"mine", 0):
            pass


WORST: list[Callable[[StandIn], None]] = [
    empties_its_memory,
    shrinks_its_memory,
    cuts_off_its_gate,
    grows_its_memory,
    overwrites_its_gate,
    punches_a_hole_into_its_gate,
    keeps_its_gate_shut,
    withdraws_what_it_will_report,
    opens_its_memory_to_all,
    locks_its_memory,
    takes_a_lease,
    lets_go_of_its_lock,
    scribbles_over_its_zone,
    removes_its_names,
    replaces_its_names_by_the_others,
    links_its_name_to_the_others_memory,
    shortens_its_queues,
    fills_its_own_answers,
]


def _waits(lab: str) -> int:
    with Queue.open(control_queue(lab), read=True, write=False) as control:
        return control.waiting


def gives_back(good: StandIn, block: int) -> int:
    """The well-behaved guest reports a block that is populated; the bytes it was proven to give back."""
    good.memory[block * 1024 : (block + 1) * 1024] = 0x5A
    good.report((block * 1024, 10))
    ack = good.acknowledged()
    assert ack.status is Status.DONE
    assert not good.memory[block * 1024 : (block + 1) * 1024].any()
    return ack.freed_bytes


def test_s6_s11_whatever_a_guest_does_to_its_own_objects_the_other_ones_account_is_exact(host: HostProcess) -> None:
    freed = 0
    with StandIn(host.lab, "g1") as good:
        good.touch()
        good.hello()
        good.welcomed()
        for worst in WORST:
            with StandIn(host.lab, "g0") as guest:
                guest.touch()
                guest.hello()
                guest.welcomed()
                worst(guest)
                for block in range(2):
                    guest.report((block * 1024, 10))
                    freed += gives_back(good, block)
                    assert (good.memory[2048:] == 0xA5).all(), worst
                wait_until(lambda: not guest.reports.waiting, what=f"a host that reads, {worst}")
                guest.forge(guest.said)  # and once more, with whatever stands there now
                freed += gives_back(good, 0)
                guest.goodbye()
                _remove_strangers(guest)
        good.goodbye()
    assert host.stop(signal.SIGTERM) == 0
    result = host.result()
    accounts = [account for account in result["guests"] if account["name"] == "g1"]
    assert len(accounts) == 1
    assert accounts[0]["freed_bytes"] == freed == 3 * len(WORST) * BLOCK_BYTES
    assert accounts[0]["reports"] == 3 * len(WORST)
    assert accounts[0]["rejected"] == accounts[0]["failures"] == accounts[0]["malformed"] == 0
    assert sum(account["failures"] for account in result["guests"] if account["name"] == "g0") > 0


def _remove_strangers(guest: StandIn) -> None:
    for name in (report_queue(guest.lab, "g0"), ack_queue(guest.lab, "g0")):
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_message_queue(name)
