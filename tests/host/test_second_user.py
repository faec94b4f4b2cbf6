"""A second user of the machine, a real one: can neither join, read nor remove, nor make us touch what is not ours."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator

import pytest

from common.errors import NameInUseError, PeerError, SegmentError
from common.messages import Hello, Status
from common.names import SHM_DIR, ack_queue, control_queue, ram_object, report_queue, zone_object
from common.queues import Queue, create_ack_queue, create_control_queue
from common.ramobject import RamObject
from common.segment import Segment, open_object
from host.loop import Host
from host.takeover import LabName, announce, lock_object
from tests.host.second_user import N_PAGES, NOBODY
from tests.host.stand_in import StandIn
from tests.host.test_registry import greet, settle
from tests.support import leftovers, remove_leftovers

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def second_user(action: str, lab: str) -> dict[str, str]:
    """What the other user tried, and what came of it."""
    command = [sys.executable, "-m", "tests.host.second_user", action, lab, str(os.getpid())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.fixture
def host(lab_name: str) -> Iterator[Host]:
    with Host(lab_name) as running:
        yield running


@pytest.fixture
def guest(host: Host, lab_name: str) -> Iterator[StandIn]:
    with StandIn(lab_name) as stand_in:
        stand_in.touch()
        greet(host, stand_in)
        yield stand_in


@pytest.fixture
def planted(lab_name: str, guest: StandIn) -> Iterator[None]:
    """Under names of this lab and of two others stands what another user has made."""
    found = second_user("plant", lab_name)
    try:
        assert set(found.values()) == {"done"}, found
        yield
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(SHM_DIR + ram_object(lab_name, "g4"))
        for lab in (lab_name, f"{lab_name}-b", f"{lab_name}-c"):
            remove_leftovers(name for name in leftovers(lab, ["g1", "g5"]) if ".g0." not in name)


def test_a_second_user_can_neither_join_read_nor_remove(host: Host, guest: StandIn) -> None:
    """Beyond the modes of the objects this rests on the sticky bit of /dev/shm: only who made a name can remove it."""
    assert os.stat(SHM_DIR).st_mode & stat.S_ISVTX
    before = sorted(leftovers(guest.lab, ["g0"]))
    found = second_user("attack", guest.lab)
    assert len(found) >= 30
    assert not [name for name, result in found.items() if result == "done"]
    assert sorted(leftovers(guest.lab, ["g0"])) == before
    guest.report((0, 10))
    settle(host)
    ack = guest.acknowledged()
    assert (ack.status, ack.freed_bytes) == (Status.DONE, 4 << 20)
    assert host.statistics().counters.malformed == host.registry.hellos_refused == 0


def test_all_objects_are_0600(guest: StandIn) -> None:
    for descriptor in (guest.ram.fileno(), guest.reports.fileno(), guest.acks.fileno()):
        assert stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o600
    for name in (control_queue(guest.lab), report_queue(guest.lab, "g0"), ack_queue(guest.lab, "g0")):
        with Queue.open(name, read=True, write=False) as queue:
            assert stat.S_IMODE(os.fstat(queue.fileno()).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(SHM_DIR + lock_object(guest.lab)).st_mode) == 0o600


def test_s11_what_a_second_user_made_is_not_opened_for_anybody(host: Host, guest: StandIn, planted: None) -> None:
    """Somebody of ours says hello for it, so that it gets to the host's own checks; we are root, whom no mode stops."""
    for name in ("g1", "g2", "g3", "g4", "g5"):
        guest.forge(dataclasses.replace(guest.said, guest=name))
        settle(host)
        with pytest.raises(PeerError):
            RamObject.open(guest.lab, name, ram_bytes=N_PAGES << 12)
    assert host.registry.hellos_refused == 5
    assert list(host.registry.guests) == ["g0"]
    assert (guest.memory == 0xA5).all()
    for queue in (report_queue(guest.lab, "g1"), ack_queue(guest.lab, "g5")):
        with pytest.raises(PeerError, match="must be owned"):
            Queue.open(queue, read=True, write=False)
    for zone in ("g1", "g2"):
        with pytest.raises(SegmentError):
            Segment.attach(zone_object(guest.lab, zone), writable=True)
    for name in ("g1", "g2", "g3", "g4"):
        with pytest.raises(NameInUseError):
            RamObject.create(guest.lab, name, ram_bytes=0)
    with pytest.raises(NameInUseError):
        create_ack_queue(guest.lab, "g5")


def test_a_lock_object_of_a_second_user_is_not_taken(lab_name: str, planted: None) -> None:
    path = SHM_DIR + lock_object(f"{lab_name}-b")
    with pytest.raises(NameInUseError, match="not a plain file of ours"):
        LabName(f"{lab_name}-b")
    assert os.stat(path).st_uid == NOBODY
    assert os.stat(path).st_size == 0  # our pid is not in it


def test_a_dead_lab_of_a_second_user_is_not_announced_to(lab_name: str, planted: None) -> None:
    """A host that starts looks for guests that wait: those of another user are none, dead or alive, and stay."""
    before = sorted(name for name in leftovers(lab_name, ["g1", "g5"]) if ".host" not in name)
    assert any(".g1.ram" in name for name in before)
    assert announce(lab_name) == 1  # our own
    assert sorted(name for name in leftovers(lab_name, ["g1", "g5"]) if ".host" not in name) == before


def test_names_that_another_user_has_taken_are_an_error_with_its_fix(lab_name: str) -> None:
    """The other way round: we are nobody, and root has every name already."""
    with (
        StandIn(lab_name),
        create_ack_queue(lab_name, "g1") as ack,
        create_control_queue(f"{lab_name}-c") as control,
        Host(lab_name),
    ):
        os.unlink(SHM_DIR + zone_object(lab_name, "g0"))
        os.close(open_object(zone_object(lab_name, "g0"), create_bytes=4096))
        before = sorted(leftovers(lab_name, ["g0", "g1"]))
        try:
            found = second_user("suffer", lab_name)
        finally:
            ack.unlink()
            control.unlink()
        after = sorted(leftovers(lab_name, ["g0"]))
    assert after == [name for name in before if name != ack.name and not name.endswith(".g1.ack")]
    kinds = {name: result.partition(":")[0] for name, result in found.items()}
    assert kinds == {
        "host": "NameInUseError",
        "control": "NameInUseError",
        "memory": "NameInUseError",
        "zone": "NameInUseError",
        "attach": "MachineError",
        "queues": "NameInUseError",
        "leftovers": "NameInUseError",
        "remove zone": "NameInUseError",
        "write": "PeerError",
    }, found
    for name in ("host", "control", "leftovers"):
        assert "choose another --name" in found[name]


def test_a_hello_for_a_name_with_a_path_in_it_is_no_message(host: Host, guest: StandIn) -> None:
    for name in ("../g0", "g0/../g1", ".", "g0\0", "g0.ram", "", "/g0"):
        guest.forge(Hello(name, os.getpid(), 1, N_PAGES, "shared", 16, 0))
        settle(host)
    assert host.statistics().counters.malformed == 7
    assert host.registry.hellos_refused == 0
