"""Named objects of a guest as the host sees them: opened after checks, told from later ones of the same name, removed.

Removal is by identity: a name is removed only while it still stands for the very object that the guest had. So a guest
that restarts at once under its old name keeps its new objects. Between look and removal nobody can make the names anew,
because the lock of the dead guest's RAM object is held meanwhile.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from common import faults
from common.errors import LabError, PeerError
from common.geometry import PAGE_BYTES
from common.messages import ACK_MSG_BYTES, MAX_CAPACITY, Hello, report_msg_bytes
from common.names import SHM_DIR, ack_queue, ram_object, report_queue, zone_object
from common.queues import Queue, unlink_queue
from common.ramobject import RamObject, dead_object

__all__ = ["GuestObjects", "Identities", "queue_identity", "shared_memory_identity", "unlink_shared_memory"]

Identity = tuple[int, int]


def unlink_shared_memory(name: str) -> None:
    """Remove shared-memory ``name`` if it is there and ours to remove."""
    with contextlib.suppress(OSError):
        os.unlink(SHM_DIR + name)


@dataclass(frozen=True, slots=True)
class Identities:
    """Device and inode of each of a guest's objects when it said hello; None: not there."""

    lab: str
    guest: str
    zone: Identity | None
    ram: Identity | None
    report: Identity | None
    ack: Identity | None

    def remove(self) -> None:
        """Remove those names that still stand for these objects. Idempotent, raises nothing."""
        ram = ram_object(self.lab, self.guest)
        if self.ram is None or shared_memory_identity(ram) != self.ram:
            self._remove_rest()  # the guest removed it, or a successor has made its own
            return
        with contextlib.suppress(OSError), dead_object(SHM_DIR + ram) as dead:
            if dead:
                self._remove_rest()

    def _remove_rest(self) -> None:
        zone = zone_object(self.lab, self.guest)
        if self.zone is not None and shared_memory_identity(zone) == self.zone:
            unlink_shared_memory(zone)
        faults.reach("host.removing")
        for name, identity in ((report_queue, self.report), (ack_queue, self.ack)):
            if identity is not None and queue_identity(name(self.lab, self.guest)) == identity:
                with contextlib.suppress(LabError, OSError):
                    unlink_queue(name(self.lab, self.guest))


@dataclass(slots=True)
class GuestObjects:
    """The open ends of one guest: its RAM object, its report queue for reading, its ack queue for writing."""

    ram: RamObject
    report: Queue
    ack: Queue
    identities: Identities

    @classmethod
    def open(cls, lab: str, hello: Hello) -> GuestObjects:
        """Open and check what ``hello`` promises. The zone is looked at by name only, never opened.

        Raises:
            PeerError: something is missing, of another user, or of a wrong size.
            MachineError: this process cannot open any more.
        """
        ram_bytes = hello.n_pages * PAGE_BYTES if hello.backend == "shared" else 0
        with contextlib.ExitStack() as opened:
            ram = opened.enter_context(RamObject.open(lab, hello.guest, ram_bytes=ram_bytes))
            report = opened.enter_context(Queue.open(report_queue(lab, hello.guest), read=True, write=False))
            ack = opened.enter_context(Queue.open(ack_queue(lab, hello.guest), read=False, write=True))
            if report.message_bytes > report_msg_bytes(MAX_CAPACITY):
                raise PeerError(f"{report.name} takes messages of {report.message_bytes} bytes, too long for a report")
            if ack.message_bytes < ACK_MSG_BYTES:
                raise PeerError(f"{ack.name} takes messages of {ack.message_bytes} bytes, too short for an answer")
            opened.pop_all()
        zone = shared_memory_identity(zone_object(lab, hello.guest))
        return cls(ram, report, ack, Identities(lab, hello.guest, zone, ram.identity, report.identity, ack.identity))

    def close(self) -> None:
        """Close all ends. Idempotent."""
        self.ram.close()
        self.report.close()
        self.ack.close()


def shared_memory_identity(name: str) -> Identity | None:
    """Identity of what shared-memory ``name`` stands for now."""
    try:
        status = os.lstat(SHM_DIR + name)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def queue_identity(name: str) -> Identity | None:
    """Identity of what queue ``name`` stands for now."""
    try:
        with Queue.open(name, read=True, write=False) as queue:
            return queue.identity
    except (LabError, OSError):
        return None
