"""Hello, goodbye and death, with the host in this process and turned by hand."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import posix_ipc
import pytest

from common import ramobject
from common.geometry import PAGE_BYTES
from common.messages import Ack, Announce, Hello, Refuse, Status, Welcome
from common.names import SHM_DIR, ack_queue, report_queue
from common.queues import Queue
from host import registry as registry_module
from host.loop import Host
from tests.host.stand_in import N_PAGES, StandIn
from tests.support import leftovers


@pytest.fixture
def host(lab_name: str) -> Iterator[Host]:
    with Host(lab_name) as running:
        yield running


@pytest.fixture
def guest(host: Host, lab_name: str) -> Iterator[StandIn]:
    with StandIn(lab_name) as stand_in:
        yield stand_in


def settle(host: Host) -> None:
    """Let the host serve whatever is waiting."""
    while host._selector.select(0):
        host.turn(0)


def greet(host: Host, guest: StandIn, hello: Hello | None = None) -> Welcome | Refuse:
    guest.say(hello or guest.said)
    settle(host)
    answer = guest.heard()
    assert isinstance(answer, Welcome | Refuse)
    return answer


def ended_pid() -> int:
    """Pid of a process that has ended."""
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    return int(done.stdout)


def test_a_hello_is_welcomed_with_its_epoch(host: Host, guest: StandIn) -> None:
    assert greet(host, guest) == Welcome(os.getpid(), guest.said.epoch)
    (statistics,) = host.statistics().guests
    assert (statistics.name, statistics.state) == ("g0", "live")
    assert statistics.memory_bytes == N_PAGES * PAGE_BYTES
    assert host.statistics().guests_seen == 1


def test_a_guest_of_the_model_backend_is_welcomed_and_its_bytes_are_marked(host: Host, lab_name: str) -> None:
    with StandIn(lab_name, backend="model", n_pages=1 << 28) as guest:
        assert isinstance(greet(host, guest), Welcome)
        guest.report((0, 10), ((1 << 28) - 1024, 10))
        settle(host)
        assert guest.acknowledged().freed_bytes == 2048 * PAGE_BYTES
        (statistics,) = host.statistics().guests
        assert statistics.counters.modelled_bytes == statistics.counters.freed_bytes == 2048 * PAGE_BYTES
        assert statistics.final_resident_bytes == 0


def test_s11_hellos_that_break_a_rule_are_refused_and_counted(host: Host, guest: StandIn) -> None:
    wrong: list[dict[str, Any]] = [
        {"n_pages": N_PAGES + 1},
        {"n_pages": N_PAGES + 512},
        {"n_pages": 512},
        {"backend": "model"},
        {"pid": ended_pid()},
    ]
    for count, change in enumerate(wrong, 1):
        assert isinstance(greet(host, guest, dataclasses.replace(guest.said, **change)), Refuse), change
        assert host.statistics().hellos_refused == count
    assert not host.registry.guests
    assert isinstance(greet(host, guest), Welcome)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a process of another user")
def test_s11_a_pid_of_another_user_is_refused(host: Host, guest: StandIn) -> None:
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, user=65534) as other:  # nobody
        answer = greet(host, guest, dataclasses.replace(guest.said, pid=other.pid))
        other.kill()
    assert isinstance(answer, Refuse)
    assert "user 65534" in answer.reason


def test_s11_objects_that_are_not_the_guests_own_are_refused(host: Host, guest: StandIn) -> None:
    os.chmod(SHM_DIR + guest.ram.name, 0o644)
    assert isinstance(greet(host, guest), Refuse)
    os.chmod(SHM_DIR + guest.ram.name, 0o600)
    guest.reports.unlink()
    assert isinstance(greet(host, guest), Refuse)
    posix_ipc.MessageQueue(
        report_queue(guest.lab, "g0"), posix_ipc.O_CREX, mode=0o600, max_messages=1, max_message_size=8192
    ).close()
    answer = greet(host, guest)
    assert isinstance(answer, Refuse)
    assert "too long" in answer.reason


def test_s11_an_ack_queue_too_short_for_answers_is_refused(host: Host, guest: StandIn) -> None:
    guest.acks.unlink()
    with Queue.create(ack_queue(guest.lab, "g0"), max_messages=1, message_bytes=8):
        guest.hello()
        settle(host)
    assert host.statistics().hellos_refused == 1


def test_a_hello_without_any_objects_is_refused(host: Host, guest: StandIn) -> None:
    guest.say(dataclasses.replace(guest.said, guest="g1"))
    settle(host)
    assert host.statistics().hellos_refused == 1


def test_the_same_guest_may_say_hello_again_and_keeps_its_account(host: Host, guest: StandIn) -> None:
    guest.touch()
    greet(host, guest)
    guest.report((0, 9))
    settle(host)
    assert guest.acknowledged().status is Status.DONE
    assert isinstance(greet(host, guest), Welcome)
    guest.report((0, 9))
    settle(host)
    assert guest.acknowledged().status is Status.DONE
    statistics = host.statistics()
    assert (statistics.guests_seen, len(statistics.guests)) == (1, 1)
    assert (statistics.counters.reports, statistics.counters.duplicates) == (2, 1)


def test_a_new_epoch_is_a_new_guest_and_the_old_account_is_kept(host: Host, guest: StandIn) -> None:
    greet(host, guest)
    guest.report((0, 9))
    settle(host)
    guest.acknowledged()
    assert greet(host, guest, dataclasses.replace(guest.said, epoch=2)) == Welcome(os.getpid(), 2)
    statistics = host.statistics()
    assert [(one.state, one.counters.reports) for one in statistics.guests] == [("left", 1), ("live", 0)]
    assert (statistics.guests_seen, statistics.counters.reports) == (2, 1)


def test_a_name_taken_by_a_live_process_is_refused_without_telling_its_owner(host: Host, guest: StandIn) -> None:
    greet(host, guest)
    guest.say(dataclasses.replace(guest.said, pid=os.getppid(), epoch=2))
    settle(host)
    assert host.statistics().hellos_refused == 1
    assert guest.acks.receive(0) is None
    assert host.registry.guests["g0"].hello == guest.said


def test_a_newcomer_with_its_own_queue_is_told_that_the_name_is_taken(host: Host, guest: StandIn) -> None:
    greet(host, guest)
    guest.remove()
    with StandIn(guest.lab, epoch=2, pid=os.getppid()) as newcomer:
        newcomer.hello()
        settle(host)
        answer = newcomer.heard()
    assert isinstance(answer, Refuse)
    assert f"pid {os.getpid()}" in answer.reason


def test_a_goodbye_frees_the_name_and_keeps_the_account(host: Host, guest: StandIn) -> None:
    guest.touch()
    greet(host, guest)
    guest.goodbye()
    settle(host)
    statistics = host.statistics()
    assert [(one.state, one.final_resident_bytes) for one in statistics.guests] == [("left", N_PAGES * PAGE_BYTES)]
    assert statistics.guests_lost == 0
    assert isinstance(greet(host, guest, dataclasses.replace(guest.said, epoch=2)), Welcome)
    assert host.statistics().guests_lost == 0


@pytest.mark.parametrize("change", [{"epoch": 9}, {"pid": 1}, {"guest": "g1"}])
def test_a_goodbye_of_somebody_else_changes_nothing(host: Host, guest: StandIn, change: dict[str, int]) -> None:
    greet(host, guest)
    said = guest.said
    guest.said = dataclasses.replace(said, **change)  # type: ignore[arg-type]
    guest.goodbye()
    settle(host)
    assert host.registry.guests["g0"].objects is not None


def test_departed_guests_are_bounded_and_the_sums_forget_nobody(lab_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "MAX_DEPARTED", 2)
    with Host(lab_name) as host, StandIn(lab_name) as guest:
        for epoch in range(1, 6):
            guest.said = dataclasses.replace(guest.said, epoch=epoch)
            greet(host, guest)
            guest.report((0, 9))
            settle(host)
            guest.acknowledged()
            guest.goodbye()
            settle(host)
        statistics = host.statistics()
    assert (len(statistics.guests), statistics.guests_seen, statistics.counters.reports) == (2, 5, 5)


def test_the_number_of_guests_is_bounded(lab_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "MAX_GUESTS", 1)
    with Host(lab_name) as host, StandIn(lab_name) as first, StandIn(lab_name, "g1") as second:
        assert isinstance(greet(host, first), Welcome)
        assert isinstance(greet(host, second), Refuse)
        assert isinstance(greet(host, first), Welcome)


def test_no_descriptor_is_left_open(lab_name: str) -> None:
    def live() -> None:  # a function, for the stand-in's memory keeps its descriptor as long as its name
        with Host(lab_name) as host, StandIn(lab_name) as guest:
            greet(host, guest)
            greet(host, guest)
            host.registry.hello(dataclasses.replace(guest.said, n_pages=1024))
            guest.goodbye()
            settle(host)
            greet(host, guest, dataclasses.replace(guest.said, epoch=2))

    before = len(os.listdir("/proc/self/fd"))
    for _life in range(3):
        live()
    assert len(os.listdir("/proc/self/fd")) == before


def test_s5_a_forged_hello_does_not_touch_the_guest_that_is_registered(host: Host, guest: StandIn) -> None:
    """In its name and of its pid, by somebody of the same user: refused; the guest neither hears nor loses."""
    guest.touch()
    greet(host, guest)
    host.registry.hello(dataclasses.replace(guest.said, n_pages=1024))
    assert host.registry.hellos_refused == 1
    assert guest.acks.receive(0) is None
    guest.report((0, 9))
    settle(host)
    assert guest.acknowledged().status is Status.DONE


def test_s5_a_repeated_or_foreign_report_discards_nothing(host: Host, guest: StandIn) -> None:
    guest.touch()
    greet(host, guest)
    guest.report((0, 9), seq=5)
    settle(host)
    assert guest.acknowledged().status is Status.DONE
    guest.touch()
    for seq, epoch in ((5, 1), (4, 1), (6, 2)):
        guest.report((0, 9), seq=seq, epoch=epoch)
        settle(host)
        ack = guest.heard()
        assert isinstance(ack, Ack)
        assert (ack.status, ack.seq, ack.epoch) == (Status.REJECTED, seq, epoch)
    assert (guest.memory == 0xA5).all()


def test_guests_that_wait_are_announced_to_and_strangers_are_left_alone(lab_name: str) -> None:
    with StandIn(lab_name) as waiting, StandIn(lab_name, "g1") as broken, StandIn(lab_name, "g2") as starting:
        broken.acks.unlink()
        with Queue.create(ack_queue(lab_name, "g1"), max_messages=1, message_bytes=1):
            starting.acks.unlink()  # its RAM object is there, its queue is not yet
            with Host(lab_name):
                assert waiting.heard(0) == Announce(os.getpid())
            assert os.path.exists(SHM_DIR + starting.ram.name)


def test_what_a_guest_left_that_died_without_a_host_is_removed(lab_name: str) -> None:
    """Its memory is locked by nobody; that of a guest that lives is, and stays."""
    with StandIn(lab_name) as dead, StandIn(lab_name, "g1"):
        fcntl.lockf(dead.ram.fileno(), fcntl.LOCK_UN)  # what the kernel does when a process ends
        ramobject._owned_here.discard(dead.ram.identity)
        with Host(lab_name):
            left = leftovers(lab_name, ["g0", "g1"])
            assert not [name for name in left if ".g0." in name]
            assert len([name for name in left if ".g1." in name]) == 4
