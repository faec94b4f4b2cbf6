"""What runs have left in shared memory and among the queues: whose it is, whether they are dead, and its removal.

A name is removed only if two things are certain. Its owner is gone: the lock that a guest or a host holds for life is
free, and the kernel drops it with the process, in whatever namespace that was. And nobody else uses what it stands for:
the kernel grants a write lease only to the sole opener of a file (F_SETLEASE of fcntl(2)), mappings included, and of a
message queue too. Removal is under the owner's lock, as a successor of that name would do it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import posix_ipc

from common.errors import LabError
from common.names import SHM_DIR, ack_queue, control_queue, ram_object, report_queue, zone_object
from common.queues import unlink_queue
from common.ramobject import RamObject, is_kept, is_owned, remove_if_dead
from common.units import format_size
from host.objects import unlink_shared_memory
from host.takeover import lock_object as host_lock
from host.takeover import remove_dead_host
from lab.doctor.limit import Limit, Verdict
from lab.doctor.queues import MQUEUE_DIR
from lab.shared_host.names import lock_object as shared_host_lock

__all__ = ["CLEAN", "Leftover", "State", "clean", "find_leftovers", "leftover_limit"]

CLEAN = "python -m lab doctor --clean"
_STAT_BLOCK_BYTES = 512
_STARTING_S = 2.0  # a guest makes its RAM object, locks it, and only then gives it a size (host/takeover.py)
_OF_A_GUEST = re.compile(r"fpr\.([a-z0-9-]+)\.([a-z0-9-]+)\.(ram|zone|report|ack)")
_OF_A_HOST = re.compile(r"fpr\.([a-z0-9-]+)\.(host|control)")
_OF_A_SHARED_HOST = re.compile(r"fpr\.([a-z0-9-]+)\.shared-host")


class State(StrEnum):
    """Of the owner of some names."""

    LIVE = "live"
    DEAD = "dead"
    KEPT = "kept"  # the owner is gone, and wanted its names to outlive it
    IN_USE = "in use"  # the owner is gone, and somebody has it open
    FOREIGN = "another user's"


@dataclass(frozen=True)
class Leftover:
    """The names of one guest or host that ended without removing them.

    Attributes:
        guest: empty for a host.
        kind: ``guest``, ``host`` or ``shared host``.
        names: paths in shared memory, and names of queues.
        held_bytes: what they take of shared memory.
    """

    kind: str
    lab: str
    guest: str
    state: State
    user: int
    names: tuple[str, ...]
    held_bytes: int

    def __str__(self) -> str:
        who = f"{self.kind} {self.guest} of lab {self.lab}" if self.guest else f"{self.kind} of lab {self.lab}"
        return f"{who}, {self.state}, user {self.user}, {format_size(self.held_bytes)}: {', '.join(self.names)}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def find_leftovers() -> list[Leftover]:
    """All that are not of somebody who lives. Changes nothing."""
    guests: set[tuple[str, str]] = set()
    hosts: set[str] = set()
    shared_hosts: set[str] = set()
    for name in (*_listing(SHM_DIR), *_listing(MQUEUE_DIR)):
        if match := _OF_A_GUEST.fullmatch(name):
            guests.add((match[1], match[2]))
        elif match := _OF_A_HOST.fullmatch(name):
            hosts.add(match[1])
        elif match := _OF_A_SHARED_HOST.fullmatch(name):
            shared_hosts.add(match[1])
    found = [
        *(_look("guest", lab, guest, *_names_of_guest(lab, guest)) for lab, guest in sorted(guests)),
        *(_look("host", lab, "", [SHM_DIR + host_lock(lab)], [control_queue(lab)]) for lab in sorted(hosts)),
        *(_look("shared host", lab, "", [SHM_DIR + shared_host_lock(lab)], []) for lab in sorted(shared_hosts)),
    ]
    return [leftover for leftover in found if leftover.state is not State.LIVE and leftover.names]


def leftover_limit(found: Iterable[Leftover]) -> Limit:
    """The row of the table."""
    dead = [leftover for leftover in found if leftover.state is State.DEAD]
    others = [leftover for leftover in found if leftover.state is not State.DEAD]
    names = sum(len(leftover.names) for leftover in dead)
    held = sum(leftover.held_bytes for leftover in dead)
    note = "" if os.path.isdir(MQUEUE_DIR) else f"queues alone are not seen: {MQUEUE_DIR} is not mounted"
    if others:
        states = ", ".join(sorted({str(leftover.state) for leftover in others}))
        note = f"beside them the names of {len(others)} guests or hosts stay: {states}"
    return Limit(
        "names of dead runs",
        f"{names}, {format_size(held)}" if names else "none",
        "none",
        Verdict.SHORT if names else Verdict.OK,
        fix=CLEAN if names else "",
        note=note,
    )


def clean(found: Iterable[Leftover], *, kept: bool = False) -> Iterator[tuple[Leftover, bool]]:
    """Remove what is dead, and what is ``kept`` if that is wanted; for each whether it is gone.

    One whose name was taken by somebody new meanwhile stays.
    """
    for leftover in found:
        if leftover.state is State.DEAD or (kept and leftover.state is State.KEPT):
            gone = False
            with contextlib.suppress(LabError, OSError):
                gone = _REMOVE[leftover.kind](leftover.lab, leftover.guest)
            yield leftover, gone


def _remove_guest(lab: str, guest: str) -> bool:
    """Whoever owns the RAM object owns the guest's name, so that is held meanwhile; one that is not there is made."""

    def remove_others() -> None:
        unlink_shared_memory(zone_object(lab, guest))
        for queue in (report_queue(lab, guest), ack_queue(lab, guest)):
            unlink_queue(queue)

    path = SHM_DIR + ram_object(lab, guest)
    if os.path.lexists(path):
        return remove_if_dead(path, remove_others)
    with RamObject.create(lab, guest, ram_bytes=0) as name:
        remove_others()
        name.unlink()
    return True


def _remove_shared_host(lab: str, _guest: str) -> bool:
    """As its successor would: under the lock."""
    path = SHM_DIR + shared_host_lock(lab)
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            os.unlink(path)
    finally:
        os.close(descriptor)
    return True


_REMOVE = {
    "guest": _remove_guest,
    "host": lambda lab, _guest: remove_dead_host(lab),
    "shared host": _remove_shared_host,
}


def _look(kind: str, lab: str, guest: str, paths: list[str], queues: list[str]) -> Leftover:
    """The state of one owner: of its lock, which the first of ``paths`` carries, then of everything that is there."""
    statuses = {path: status for path in paths if (status := _status(path)) is not None}
    held = sum(status.st_blocks for status in statuses.values()) * _STAT_BLOCK_BYTES
    user, state = os.geteuid(), State.DEAD
    foreign = [status for status in statuses.values() if status.st_uid != user or not stat.S_ISREG(status.st_mode)]
    names = list(statuses)
    if foreign:
        user, state = foreign[0].st_uid, State.FOREIGN
    elif paths[0] in statuses and _is_alive(kind, paths[0], statuses[paths[0]]):
        state = State.LIVE
    else:
        for path in statuses:
            if not _only_we_have(path):
                state = State.IN_USE
        for queue in queues:
            found = _look_at_queue(queue)
            if found is not None:
                names.append(queue)
                state = found if found is not State.DEAD else state
        if state is State.DEAD and kind == "guest" and is_kept(paths[0]):
            state = State.KEPT
    return Leftover(kind, lab, guest, state, user, tuple(names), held)


def _is_alive(kind: str, path: str, status: os.stat_result) -> bool:
    """Whether somebody has the lock that an owner holds for life. One that cannot be asked passes for alive."""
    try:
        if kind == "guest":
            starting = status.st_size == 0 and time.time() - status.st_ctime < _STARTING_S
            return starting or is_owned(path)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _only_we_have(path: str) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return _is_unused(descriptor)
    finally:
        os.close(descriptor)


def _look_at_queue(name: str) -> State | None:
    """None: there is no such queue."""
    try:
        queue = posix_ipc.MessageQueue(name, read=True, write=False)
    except posix_ipc.ExistentialError:
        return None
    except (posix_ipc.Error, OSError, ValueError):
        return State.FOREIGN
    try:
        if os.fstat(queue.mqd).st_uid != os.geteuid():
            return State.FOREIGN
        return State.DEAD if _is_unused(queue.mqd) else State.IN_USE
    finally:
        queue.close()


def _is_unused(descriptor: int) -> bool:
    """Whether nobody else has open or mapped what ``descriptor`` has; False too where the kernel does not say."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return False
    return True


def _names_of_guest(lab: str, guest: str) -> tuple[list[str], list[str]]:
    paths = [SHM_DIR + ram_object(lab, guest), SHM_DIR + zone_object(lab, guest)]
    return paths, [report_queue(lab, guest), ack_queue(lab, guest)]


def _status(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except OSError:
        return None


def _listing(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
