"""One end of a POSIX message queue: create, open, check, send and receive with one deadline.

The queue itself never waits: ``mq_timedreceive`` goes by the wall clock, and a clock that is set back by an hour would
make a wait of a second last an hour. Waiting is ``poll`` on its descriptor, by the monotonic clock.

Queues are sized to what travels in them, never to the limit: an unprivileged user has about 800 KiB for all queues
together (``RLIMIT_MSGQUEUE``), at most 10 messages a queue and 8 KiB a message. ``fileno`` may be watched by a
selector.
"""

from __future__ import annotations

import errno
import math
import os
import resource
import select
import stat
import time
from types import TracebackType
from typing import Any, Self

import posix_ipc

from common.errors import MachineError, NameInUseError, PeerError
from common.messages import ACK_MSG_BYTES, CONTROL_MSG_BYTES, report_msg_bytes
from common.names import ack_queue, control_queue, report_queue

__all__ = [
    "ACK_DEPTH",
    "CONTROL_DEPTH",
    "REPORT_DEPTH",
    "Queue",
    "QueueMissingError",
    "create_ack_queue",
    "create_control_queue",
    "create_report_queue",
    "queue_bytes",
    "unlink_queue",
]

CONTROL_DEPTH = 8
REPORT_DEPTH = 2  # one report is in flight at a time; the second place is for the one after a withdrawal
ACK_DEPTH = 8
# What the kernel counts for each place of a queue beside its message, on 64-bit Linux: struct msg_msg and struct
# posix_msg_tree_node (mqueue_get_inode of ipc/mqueue.c, which counts a node for every message to be on the safe side).
_PLACE_BYTES = 48 + 48
_LONGEST_POLL_MS = (1 << 31) - 1


def queue_bytes(max_messages: int, message_bytes: int) -> int:
    """What a queue takes of ``RLIMIT_MSGQUEUE`` as long as it exists, full or empty (mqueue_get_inode)."""
    return max_messages * (message_bytes + _PLACE_BYTES)


class QueueMissingError(PeerError):
    """There is no queue of that name: the other side has not started, or is gone."""


class Queue:
    """An open queue. ``message_bytes`` is the longest message it takes, ``max_messages`` how many it holds."""

    def __init__(self, name: str, queue: Any) -> None:
        self.name = name
        self._queue = queue
        self._queue.block = False
        self._open = True
        self.message_bytes: int = queue.max_message_size
        self.max_messages: int = queue.max_messages

    @classmethod
    def create(cls, name: str, *, max_messages: int, message_bytes: int) -> Self:
        """A new queue, mode 0600, open for both directions.

        Raises:
            NameInUseError: it exists; whether it is stale is the caller's to know.
            MachineError: a limit or a permission; the message names the fix.
        """
        try:
            queue = posix_ipc.MessageQueue(
                name, posix_ipc.O_CREX, mode=0o600, max_messages=max_messages, max_message_size=message_bytes
            )
        except posix_ipc.ExistentialError as error:
            raise NameInUseError(f"queue {name} exists already") from error
        except (posix_ipc.Error, OSError, ValueError, MemoryError) as error:
            raise _cannot_create(name, max_messages, message_bytes, error) from error
        return cls(name, queue)

    @classmethod
    def open(cls, name: str, *, read: bool, write: bool) -> Self:
        """An existing queue of this user.

        Raises:
            QueueMissingError: there is none.
            PeerError: it belongs to somebody else, or somebody else may open it.
            MachineError: this process cannot open any more.
        """
        try:
            queue = posix_ipc.MessageQueue(name, read=read, write=write)
        except posix_ipc.ExistentialError as error:
            raise QueueMissingError(f"there is no queue {name}") from error
        except posix_ipc.PermissionsError as error:
            raise PeerError(f"queue {name} belongs to another user") from error
        except (posix_ipc.Error, OSError, ValueError, MemoryError) as error:
            raise MachineError(f"cannot open queue {name}: {error}; raise ulimit -n") from error
        status = os.fstat(queue.mqd)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            queue.close()
            raise PeerError(f"queue {name} must be owned by user {os.geteuid()} with mode 0600")
        return cls(name, queue)

    @property
    def waiting(self) -> int:
        """Messages in the queue now."""
        return int(self._queue.current_messages)

    def fileno(self) -> int:
        """Descriptor, for a selector."""
        return int(self._queue.mqd)

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode: tells this queue from a later one of the same name."""
        status = os.fstat(self._queue.mqd)
        return status.st_dev, status.st_ino

    def send(self, data: bytes, timeout_s: float | None) -> bool:
        """Put ``data`` (at most ``message_bytes`` long) into the queue.

        ``timeout_s``: None waits for ever, 0 does not wait. False: it was full until then.
        """
        return self._until_deadline(self._queue.send, (data,), select.POLLOUT, timeout_s) is not None

    def stand_in_line(self, data: bytes, timeout_s: float) -> bool:
        """As ``send``, but wait in the kernel, which lets those who wait there in in the order in which they came.

        Who merely polls never finds a place free while somebody else waits. The kernel waits on the wall clock, so the
        wait may end early or late by what that is set meanwhile; so may a signal end it early.
        """
        try:
            self._queue.block = True
            self._queue.send(data, timeout_s)
        except (posix_ipc.BusyError, posix_ipc.SignalError):
            return False
        finally:
            self._queue.block = False
        return True

    def receive(self, timeout_s: float | None) -> bytes | None:
        """The oldest message. ``timeout_s`` as in ``send``; None: it was empty until then."""
        answer = self._until_deadline(self._queue.receive, (), select.POLLIN, timeout_s)
        return None if answer is None else answer[0]

    def _until_deadline(self, call: Any, arguments: tuple[Any, ...], event: int, timeout_s: float | None) -> Any:
        """Result of ``call`` as a tuple, or None once ``timeout_s`` has passed. Signals do not shorten the wait.

        ``event``: what to poll for while the queue is not ready. Another process may be faster, so it is asked again.
        """
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            try:
                return call(*arguments) or ()
            except posix_ipc.BusyError:
                left_s = deadline - time.monotonic()
            except posix_ipc.SignalError:
                # A Python handler has run by now. KeyboardInterrupt alone would have got through: what else a handler
                # raises posix_ipc replaces by this, so a handler that is to end something must note it.
                continue
            if left_s <= 0:
                return None
            watched = select.poll()
            watched.register(self._queue.mqd, event)
            watched.poll(None if timeout_s is None else min(math.ceil(left_s * 1000), _LONGEST_POLL_MS))

    def close(self) -> None:
        """Close this end. Idempotent."""
        if self._open:
            self._open = False
            self._queue.close()

    def unlink(self) -> None:
        """Remove the name; ends that are open go on working. Idempotent."""
        unlink_queue(self.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def unlink_queue(name: str) -> None:
    """Remove queue ``name`` if there is one.

    Raises:
        NameInUseError: it is another user's.
    """
    try:
        posix_ipc.unlink_message_queue(name)
    except posix_ipc.ExistentialError:
        pass
    except posix_ipc.PermissionsError as error:
        raise NameInUseError(f"queue {name} belongs to another user; choose another --name") from error


def create_control_queue(lab: str) -> Queue:
    """The host's queue for hello and goodbye. Raises as ``Queue.create``."""
    return Queue.create(control_queue(lab), max_messages=CONTROL_DEPTH, message_bytes=CONTROL_MSG_BYTES)


def create_report_queue(lab: str, guest: str, *, capacity: int) -> Queue:
    """A guest's queue for reports of at most ``capacity`` blocks. Raises as ``Queue.create``."""
    return Queue.create(report_queue(lab, guest), max_messages=REPORT_DEPTH, message_bytes=report_msg_bytes(capacity))


def create_ack_queue(lab: str, guest: str) -> Queue:
    """A guest's queue for acknowledgements. Raises as ``Queue.create``."""
    return Queue.create(ack_queue(lab, guest), max_messages=ACK_DEPTH, message_bytes=ACK_MSG_BYTES)


def _cannot_create(name: str, max_messages: int, message_bytes: int, error: Exception) -> MachineError:
    """The fix in words. posix_ipc words EMFILE itself and leaves errno empty, so its text is looked at too."""
    code = getattr(error, "errno", None)
    asked = f"queue {name} of {max_messages} x {message_bytes} bytes"
    if code == errno.ENOSPC:
        return MachineError(
            f"{asked}: this machine has as many queues as it may; remove some, or raise the limit: "
            "sysctl -w fs.mqueue.queues_max=512"
        )
    if code == errno.EMFILE or "maximum number of files" in str(error):
        return _too_many_files(asked, queue_bytes(max_messages, message_bytes))
    if code == errno.ENFILE or "system limit on the total number" in str(error):
        return MachineError(f"{asked}: the machine has too many files open; raise /proc/sys/fs/file-max")
    if isinstance(error, ValueError):
        return MachineError(
            f"{asked}: refused by the kernel; see /proc/sys/fs/mqueue/msg_max and msgsize_max, "
            "or use a smaller --capacity"
        )
    if code == errno.ENOMEM or isinstance(error, MemoryError):
        return MachineError(f"{asked}: out of memory; free some memory, or use fewer guests")
    if isinstance(error, posix_ipc.PermissionsError):
        return MachineError(f"{asked}: not permitted; does a security module forbid POSIX message queues?")
    return MachineError(f"{asked}: {error}; does this kernel have POSIX message queues (CONFIG_POSIX_MQUEUE)?")


def _too_many_files(asked: str, needed_bytes: int) -> MachineError:
    """The kernel says the same for two limits; whether another file can be opened tells which of them it is."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return MachineError(f"{asked}: this process has too many files open; raise ulimit -n")
    limit = resource.getrlimit(resource.RLIMIT_MSGQUEUE)[0]
    return MachineError(
        f"{asked}: this user's queues are full (the kernel says: too many open files): it takes {needed_bytes} bytes "
        f"more of the {limit} that all of them may have; raise ulimit -q (RLIMIT_MSGQUEUE), end other guests, or use a "
        "smaller --capacity; python -m lab doctor has the figures"
    )
