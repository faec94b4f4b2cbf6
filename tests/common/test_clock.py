"""A clock that jumps neither holds up a wait nor ends it early: none goes by the clock that can be set."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import posix_ipc
import pytest

from common.names import SHM_DIR, ram_object
from common.queues import Queue
from common.ramobject import RamObject
from host.takeover import announce
from tests.no_wall_clock import KNOWN
from tests.small_machine import ROOT

needs_filter = pytest.mark.skipif(not KNOWN, reason="system calls are known by number for x86-64 alone")

UNDER_THE_FILTER = """
import sys, threading, time
import posix_ipc
from tests.no_wall_clock import forbid
from common.queues import Queue

def timed():
    queue = posix_ipc.MessageQueue(sys.argv[1], posix_ipc.O_CREX, max_messages=1, max_message_size=8)
    queue.unlink()
    queue.receive(0.01)

def waits():
    queue = Queue.create(sys.argv[1], max_messages=1, message_bytes=8)
    queue.unlink()
    begun = time.monotonic()
    assert queue.receive(0.05) is None
    assert queue.send(b"first", 0)
    assert not queue.send(b"second", 0.05)
    assert time.monotonic() - begun >= 0.1
    threading.Timer(0.05, queue.receive, (0,)).start()
    assert queue.send(b"third", None)
    assert queue.receive(60) == b"third"

def semaphore():
    import mmap, ctypes
    import numpy as np
    from common.mutex import initialise_semaphore, post_semaphore
    from common.native import semaphore_wait_us
    memory = np.frombuffer(mmap.mmap(-1, 4096), dtype=np.uint8)
    address = int(memory.ctypes.data)
    initialise_semaphore(address)
    scratch = np.zeros(2, dtype=np.int64)
    begun = time.monotonic()
    assert not semaphore_wait_us(address, 50_000, scratch)
    assert time.monotonic() - begun >= 0.05
    post_semaphore(address)
    assert semaphore_wait_us(address, 60_000_000, scratch)

name = sys.argv[2]
if name == "semaphore":
    import common.native  # numba's import may do as it likes
forbid()
globals()[name]()
"""


def under_the_filter(lab: str, name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", UNDER_THE_FILTER, f"/fpr.{lab}.clock", name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


@needs_filter
def test_the_filter_ends_whoever_waits_by_the_wall_clock(lab_name: str) -> None:
    assert under_the_filter(lab_name, "timed").returncode == -signal.SIGSYS


@needs_filter
@pytest.mark.parametrize("name", ["waits", "semaphore"])
def test_no_wait_goes_by_the_wall_clock(lab_name: str, name: str) -> None:
    done = under_the_filter(lab_name, name)
    assert done.returncode == 0, done.stderr


class StandIn:
    """What posix_ipc gives, and asks for: a queue that is never ready, and notes what it is called with."""

    max_message_size, max_messages, block = 8, 1, True

    def __init__(self, descriptor: int) -> None:
        self.mqd = descriptor
        self.calls: list[tuple[Any, ...]] = []

    def send(self, *arguments: Any) -> None:
        self.calls.append(arguments)
        raise posix_ipc.BusyError

    receive = send


def test_the_queue_is_never_asked_to_wait() -> None:
    """So no clock of the kernel's is involved, and a jump of it between two looks changes nothing."""
    silent, other_end = os.pipe()  # nothing to read, ever
    try:
        queue = StandIn(silent)
        assert Queue("/stand-in", queue).receive(0.02) is None
        assert not queue.block
        assert set(queue.calls) == {()}
        assert len(queue.calls) <= 3, "it sleeps, and does not spin"
    finally:
        os.close(silent)
        os.close(other_end)


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
def test_a_guest_that_is_starting_survives_a_host_whose_clock_jumps(
    lab_name: str, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    """Its object, not yet locked, is taken for an old one's or is left; either way the next try makes one."""
    path = Path(SHM_DIR + ram_object(lab_name, "g0"))
    path.touch(0o600)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + jump_s)
    announce(lab_name)
    assert path.exists() == (jump_s < 0)
    with RamObject.create(lab_name, "g0", ram_bytes=4096) as ram:
        announce(lab_name)
        assert path.exists(), "locked, it is nobody's to remove"
        ram.unlink()
