"""The name of a lab."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from common.errors import NameInUseError
from common.names import SHM_DIR, control_queue
from common.queues import Queue, create_control_queue
from host.loop import Host
from host.takeover import LabName, lock_object

DIE = """
import os, sys
from host.takeover import LabName
name = LabName(sys.argv[1])
os.kill(os.getpid(), 9)
"""


def test_a_live_hosts_name_is_refused_and_named(lab_name: str) -> None:
    with Host(lab_name):
        with pytest.raises(NameInUseError, match=f"pid {os.getpid()}"):
            Host(lab_name)
        Queue.open(control_queue(lab_name), read=False, write=True).close()


def test_a_dead_hosts_name_and_queue_are_taken_over(lab_name: str) -> None:
    done = subprocess.run([sys.executable, "-c", DIE, lab_name], check=False, timeout=60)
    assert done.returncode == -9
    with Queue.open(control_queue(lab_name), read=False, write=True) as stale:
        assert stale.send(b"to the dead", 0)
        with LabName(lab_name) as name:
            assert name.control.receive(0) is None
            assert name.control.identity != stale.identity


def test_a_stale_queue_without_a_lock_is_taken_over(lab_name: str) -> None:
    with create_control_queue(lab_name) as stale, LabName(lab_name) as name:
        assert name.control.identity != stale.identity


def test_everything_is_gone_after_close(lab_name: str) -> None:
    name = LabName(lab_name)
    assert os.stat(SHM_DIR + lock_object(lab_name)).st_mode & 0o777 == 0o600
    name.close()
    name.close()
    assert not os.path.exists(SHM_DIR + lock_object(lab_name))


def test_a_name_that_was_removed_while_we_took_it_is_taken_again(
    lab_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last holder unlinks between our open and our lock: a lock on a nameless object would be worth nothing."""
    import fcntl

    path = SHM_DIR + lock_object(lab_name)
    lock = fcntl.flock
    calls: list[int] = []

    def racing(descriptor: int, operation: int) -> None:
        if not calls:
            os.unlink(path)
        calls.append(descriptor)
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", racing)
    with LabName(lab_name):
        assert len(calls) == 2
        with pytest.raises(NameInUseError):
            LabName(lab_name)
