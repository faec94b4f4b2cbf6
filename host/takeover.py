"""The name of a lab: one live host at a time, a dead one's leftovers taken over, waiting guests told.

Who holds ``flock`` on the lock object is the host; the kernel drops it with the process, so there is nothing to time
out and no pid to guess by. The object's text, the pid, is for people.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from types import TracebackType
from typing import Self

from common import faults
from common.errors import LabError, NameInUseError
from common.messages import Announce, encode
from common.names import SHM_DIR, ack_queue, control_queue, guests_in_shm, ram_object, report_queue, zone_object
from common.queues import Queue, create_control_queue, unlink_queue
from common.ramobject import dead_object, is_kept
from common.refusals import shm_refusal
from host.objects import unlink_shared_memory

__all__ = ["LabName", "announce", "lock_object", "remove_dead_host"]

# A guest makes its RAM object, locks it, and only then gives it a size. One without a size this old is dead too.
_ORPHAN_AGE_S = 2.0


def lock_object(lab: str) -> str:
    """Shared memory: held by the live host of ``lab``."""
    return f"/fpr.{lab}.host"


class LabName:
    """The name ``lab``, held, and its control queue. Released by ``close`` or by the death of this process."""

    def __init__(self, lab: str) -> None:
        """Take the name.

        Raises:
            NameInUseError: a live host has it.
            MachineError: shared memory or queues are not to be had; the message names the fix.
        """
        self.lab = lab
        self._lock = _take_lock(lab)
        faults.reach("host.named")
        try:
            unlink_queue(control_queue(lab))  # that of a dead host: nobody else can have made it
            self.control = create_control_queue(lab)
        except BaseException:
            self._release()
            raise

    def close(self) -> None:
        """Remove the control queue and give the name back. Idempotent."""
        if self._lock < 0:
            return
        self.control.close()
        self.control.unlink()
        self._release()

    def _release(self) -> None:
        """Unlink before unlocking: whoever takes the lock next then finds that its object has no name, and retries."""
        unlink_shared_memory(lock_object(self.lab))
        os.close(self._lock)
        self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _take_lock(lab: str) -> int:
    """Descriptor of the lock object, locked, and still the one that the name stands for."""
    path = SHM_DIR + lock_object(lab)
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        except OSError as error:
            if isinstance(error, PermissionError) and os.path.lexists(path):
                raise _foreign(path, lab) from None
            raise shm_refusal(f"cannot open {path}", error) from error
        if not _is_plain(descriptor):
            os.close(descriptor)
            raise _foreign(path, lab)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise NameInUseError(f"name: {lab!r} has a host already (pid {holder}); choose another --name") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                _sign(descriptor, lab)
                return descriptor
        os.close(descriptor)  # its last holder removed the name between our open and our lock


def _is_plain(descriptor: int) -> bool:
    """Whether this is a file of ours alone. A second link to a guest's memory would be emptied for our pid."""
    status = os.fstat(descriptor)
    return stat.S_ISREG(status.st_mode) and status.st_nlink <= 1 and status.st_uid == os.geteuid()


def _foreign(path: str, lab: str) -> NameInUseError:
    return NameInUseError(f"name: {path} is not a plain file of ours, so {lab!r} is taken; choose another --name")


def _sign(descriptor: int, lab: str) -> None:
    """Write our pid into the lock object, for people. A full disk costs a host its name, and leaves none behind."""
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        unlink_shared_memory(lock_object(lab))
        os.close(descriptor)
        raise shm_refusal(f"cannot write {SHM_DIR}{lock_object(lab)}", error) from error


def remove_dead_host(lab: str) -> bool:
    """Remove the names of a host that is gone, as the next host of that name would; False if it lives.

    Raises:
        OSError: they are not ours, or there is no room for the lock.
        LabError: the control queue belongs to another user.
    """
    path = SHM_DIR + lock_object(lab)
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if not _is_plain(descriptor):
            return False
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return False  # its last holder removed the name between our open and our lock
        unlink_queue(control_queue(lab))
        unlink_shared_memory(lock_object(lab))
    except (BlockingIOError, FileNotFoundError):
        return False
    finally:
        os.close(descriptor)
    return True


def announce(lab: str) -> int:
    """Ask the guests of ``lab`` that are there already to say hello; how many were told.

    Their names come from shared memory. A guest that cannot be told now (queue full) hears of this host when its next
    report is overdue. What a dead guest left without an ack queue is removed; with one, it looks like a live one.
    """
    told = 0
    for guest in guests_in_shm(lab, os.listdir(SHM_DIR)):
        try:
            status = os.lstat(SHM_DIR + ram_object(lab, guest))
        except OSError:
            continue
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            continue
        locked_once = status.st_size > 0 or time.time() - status.st_ctime > _ORPHAN_AGE_S
        if locked_once and _remove_dead_guest(lab, guest):
            continue
        try:
            with Queue.open(ack_queue(lab, guest), read=False, write=True) as queue:
                told += queue.send(encode(Announce(os.getpid())), 0)
        except (LabError, OSError, ValueError):  # not there yet, hostile, gone, or too short a queue
            continue
    return told


def _remove_dead_guest(lab: str, guest: str) -> bool:
    """Remove the names of a guest whose process is gone, as a host that had lived would have; False if it lives.

    Those of a guest that wants to keep them stay: it is told of this host, for when it is back.
    """
    try:
        if is_kept(SHM_DIR + ram_object(lab, guest)):
            return False
        with dead_object(SHM_DIR + ram_object(lab, guest)) as dead:
            if dead:
                unlink_shared_memory(zone_object(lab, guest))
                for queue in (report_queue(lab, guest), ack_queue(lab, guest)):
                    with contextlib.suppress(LabError):
                        unlink_queue(queue)
            return dead
    except OSError:
        return False
