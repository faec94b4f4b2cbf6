"""Queues: deadlines, ownership, exhaustion in words."""

from __future__ import annotations

import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import posix_ipc
import pytest

from common.errors import MachineError, NameInUseError, PeerError
from common.messages import ACK_MSG_BYTES, CONTROL_MSG_BYTES, MAX_CAPACITY, report_msg_bytes
from common.names import ack_queue, control_queue
from common.queues import (
    Queue,
    QueueMissingError,
    create_ack_queue,
    create_control_queue,
    create_report_queue,
    unlink_queue,
)
from tests.support import leftovers

EXHAUST = """
import sys
from common.errors import MachineError
from common.queues import create_ack_queue
try:
    create_ack_queue(sys.argv[1], "g0").unlink()
except MachineError as error:
    print(error)
"""


@pytest.fixture
def queue(lab_name: str) -> Iterator[Queue]:
    with create_ack_queue(lab_name, "g0") as made:
        yield made
        made.unlink()


def test_messages_arrive_in_order(queue: Queue) -> None:
    with Queue.open(queue.name, read=True, write=False) as reader:
        assert queue.send(b"one", 0)
        assert queue.send(b"two", None)
        assert [reader.receive(0), reader.receive(None), reader.receive(0)] == [b"one", b"two", None]


def test_an_empty_message_is_a_message(queue: Queue) -> None:
    assert queue.send(b"", 0)
    assert queue.receive(0) == b""


def test_a_full_queue_says_so_without_waiting_and_after_waiting(queue: Queue) -> None:
    assert all(queue.send(b"x", 0) for _place in range(queue.max_messages))
    started = time.monotonic()
    assert not queue.send(b"x", 0)
    assert not queue.send(b"x", 0.05)
    assert time.monotonic() - started >= 0.05


def test_an_empty_queue_waits_no_less_than_asked(queue: Queue) -> None:
    started = time.monotonic()
    assert queue.receive(0.05) is None
    assert time.monotonic() - started >= 0.05


def test_a_signal_does_not_end_the_wait(queue: Queue) -> None:
    """The handler sends: a wait that the signal had ended would have returned None."""
    rings: list[int] = []

    def ring(number: int, _frame: object) -> None:
        rings.append(number)
        if len(rings) == 3:
            queue.send(b"third ring", 0)

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        assert queue.receive(60) == b"third ring"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_the_descriptor_can_be_watched(queue: Queue) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(queue, selectors.EVENT_READ)
        assert not selector.select(0)
        queue.send(b"x", 0)
        assert selector.select(0)


def test_sizes_and_modes_are_those_of_the_contract(lab_name: str) -> None:
    queues = (
        create_control_queue(lab_name),
        create_report_queue(lab_name, "g0", capacity=MAX_CAPACITY),
        create_ack_queue(lab_name, "g0"),
    )
    sizes = [(queue.max_messages, queue.message_bytes) for queue in queues]
    for queue in queues:
        queue.close()
        queue.unlink()
    assert sizes == [(8, CONTROL_MSG_BYTES), (2, report_msg_bytes(MAX_CAPACITY)), (8, ACK_MSG_BYTES)]
    assert report_msg_bytes(MAX_CAPACITY) <= 8192  # /proc/sys/fs/mqueue/msgsize_max for everybody


def test_a_missing_queue_is_told_from_a_foreign_one(lab_name: str) -> None:
    with pytest.raises(QueueMissingError, match="there is no queue"):
        Queue.open(control_queue(lab_name), read=False, write=True)


@pytest.mark.parametrize("mode", [0o644, 0o606, 0o660])
def test_a_queue_that_others_may_open_is_refused(lab_name: str, mode: int) -> None:
    name = ack_queue(lab_name, "g0")
    before = os.umask(0)
    try:
        posix_ipc.MessageQueue(name, posix_ipc.O_CREX, mode=mode, max_messages=1, max_message_size=8).close()
        with pytest.raises(PeerError, match="must be owned"):
            Queue.open(name, read=True, write=False)
    finally:
        os.umask(before)
        unlink_queue(name)


def test_a_name_in_use_is_refused_and_left_alone(queue: Queue) -> None:
    queue.send(b"kept", 0)
    with pytest.raises(NameInUseError):
        Queue.create(queue.name, max_messages=1, message_bytes=8)
    assert queue.receive(0) == b"kept"


def test_close_and_unlink_may_be_repeated(lab_name: str) -> None:
    queue = create_ack_queue(lab_name, "g0")
    queue.unlink()
    queue.unlink()
    queue.close()
    queue.close()
    assert leftovers(lab_name, ["g0"]) == []


def test_a_later_queue_of_the_same_name_has_another_identity(lab_name: str) -> None:
    with create_ack_queue(lab_name, "g0") as first:
        with Queue.open(first.name, read=True, write=False) as again:
            assert again.identity == first.identity
        first.unlink()
        with create_ack_queue(lab_name, "g0") as second:
            second.unlink()
            assert second.identity != first.identity


def test_exhaustion_names_the_fix_and_not_open_files_alone(lab_name: str) -> None:
    def starve() -> None:
        _soft, hard = resource.getrlimit(resource.RLIMIT_MSGQUEUE)
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, (100, hard))

    done = subprocess.run(
        [sys.executable, "-c", EXHAUST, lab_name],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=starve,
        timeout=60,
    )
    assert "ulimit -q" in done.stdout
    assert "--capacity" in done.stdout


def test_too_long_a_message_size_is_refused_in_words(lab_name: str) -> None:
    with pytest.raises(MachineError, match="msgsize_max"):
        Queue.create(ack_queue(lab_name, "g0"), max_messages=1, message_bytes=1 << 30)
