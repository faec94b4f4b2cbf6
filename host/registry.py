"""Who reports to this host: hello, goodbye, death.

A guest is known by its name; who it is, is decided by (pid, epoch), and that the process lives by a pidfd. One name
has one live guest. The same guest may say hello again (after a host restart, after it reconnected): it keeps its
counters. Every rule that a hello breaks is answered by ``Refuse`` and counted.

Anybody who can reach the control queue may send a hello in anybody's name. One counts only if the guest whose name it
bears has written the same into its own gate page, and if the kernel says that the process it names owns that object.
Any other is counted and changes nothing, and nobody is answered, for nobody knows who sent it. What a goodbye takes is
the epoch, 62 random bits that a guest tells its host alone.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from common import faults
from common.errors import LabError, PeerError, UsageError
from common.geometry import PAGE_BYTES, check_memory_bytes
from common.messages import MAX_REASON_CHARS, Goodbye, Hello, Message, Refuse, Welcome, encode
from common.names import SHM_DIR, ack_queue, ram_object
from common.queues import Queue
from common.ramobject import has_said, is_kept
from host.accounting import Counters, GuestStatistics
from host.discard import BACKENDS, Backend
from host.limits import Bucket
from host.objects import GuestObjects, Identities, queue_identity
from host.proof import Proof

__all__ = ["MAX_DEPARTED", "MAX_GUESTS", "Guest", "Registry"]

MAX_GUESTS = 240  # four descriptors each, within the customary limit of 1024 (ulimit -n)
MAX_DEPARTED = 1024  # departed guests whose statistics are kept one by one; the sums forget nobody


@dataclass(slots=True)
class Guest:
    """A registered guest. ``objects`` is None once it said goodbye; the pidfd stays until its process ends."""

    hello: Hello
    pidfd: int
    identities: Identities
    objects: GuestObjects | None
    backend: Backend
    counters: Counters = field(default_factory=Counters)
    last_seq: int = 0
    peak_resident_bytes: int = 0
    resident_bytes: int = 0
    run_id: int = 0  # of the run that this host has started last (host/commands.py)
    run_in_progress: bool = False
    next_run_s: float | None = None
    bucket: Bucket | None = None  # what it may still send; None: no limit

    def note_resident(self) -> None:
        """Look at the guest's resident memory: before each report and at the end."""
        if self.objects is not None:
            with contextlib.suppress(OSError):
                self.resident_bytes = self.objects.ram.resident_bytes()
                self.peak_resident_bytes = max(self.peak_resident_bytes, self.resident_bytes)

    def answer(self, message: Message) -> bool:
        """Send ``message`` without waiting; a guest that does not read its queue loses it, counted. True if sent."""
        if self.objects is None:
            return False
        try:
            sent = self.objects.ack.send(encode(message), 0)
        except OSError:
            sent = False
        self.counters.acks_dropped += not sent
        return sent

    def statistics(self, state: str) -> GuestStatistics:
        """Snapshot."""
        self.note_resident()
        return GuestStatistics(
            name=self.hello.guest,
            state=state,
            backend=self.hello.backend,
            memory_bytes=self.hello.n_pages * PAGE_BYTES,
            peak_resident_bytes=self.peak_resident_bytes,
            final_resident_bytes=self.resident_bytes,
            counters=self.counters.copy(),
        )


class Registry:
    """All guests of one host. ``opened`` and ``closing`` tell the event loop which descriptors come and go."""

    def __init__(
        self, lab: str, proof: Proof, *, opened: Callable[[Guest], None], closing: Callable[[Guest], None]
    ) -> None:
        self.lab = lab
        self.proof = proof
        self.guests: dict[str, Guest] = {}
        self.departed: deque[GuestStatistics] = deque(maxlen=MAX_DEPARTED)
        self.departed_counters = Counters()
        self.guests_seen = 0
        self.guests_lost = 0
        self.hellos_refused = 0
        self._opened = opened
        self._closing = closing

    def hello(self, hello: Hello) -> Guest | None:
        """Register the guest and welcome it, or refuse it (None). Raises nothing that a guest could cause."""
        if not has_said(self.lab, hello.guest, encode(hello)):
            self.hellos_refused += 1
            return None
        try:
            guest = self._register(hello)
        except (LabError, OSError) as error:
            self.hellos_refused += 1
            self._refuse(hello, str(error))
            return None
        faults.reach("host.opened")
        guest.answer(Welcome(os.getpid(), hello.epoch))
        return guest

    def goodbye(self, goodbye: Goodbye) -> None:
        """Close a guest's ends. Its process may live on, or die before it has removed its names: the pidfd stays."""
        guest = self.guests.get(goodbye.guest)
        if guest is None or (guest.hello.pid, guest.hello.epoch) != (goodbye.pid, goodbye.epoch):
            return
        if guest.objects is not None:
            self._remember(guest, "left")
            self._close_objects(guest)

    def died(self, guest: Guest) -> None:
        """The process of ``guest`` has ended: remove what it left behind, keep its account.

        Of a guest that asked for it the names stay, for a process that takes its place.
        """
        if self.guests.get(guest.hello.guest) is guest:
            self._retire(guest, lost=True)
            if not is_kept(SHM_DIR + ram_object(self.lab, guest.hello.guest)):
                guest.identities.remove()  # by identity: what a successor has made meanwhile stays

    def close(self) -> None:
        """Close everything; guests that live keep their names, for the next host."""
        for guest in list(self.guests.values()):
            self._drop(guest)

    def statistics(self) -> tuple[Counters, tuple[GuestStatistics, ...]]:
        """The sums over all guests, and each: the departed in order of departure, then the live."""
        live = [guest.statistics("live") for guest in self.guests.values() if guest.objects is not None]
        total = self.departed_counters.copy()
        for guest in live:
            total.add(guest.counters)
        return total, (*self.departed, *live)

    def _register(self, hello: Hello) -> Guest:
        """The new or renewed guest. Raises ``LabError`` or ``OSError`` with the reason."""
        _check_memory(hello)
        present = self.guests.get(hello.guest)
        if present is not None and present.hello.pid != hello.pid and present.objects is not None and _alive(present):
            raise PeerError(f"the name {hello.guest} is taken by pid {present.hello.pid}, which lives")
        if present is None and len(self.guests) >= MAX_GUESTS and not self._forget_one_that_left():
            raise PeerError(f"this host has {MAX_GUESTS} guests already")
        pidfd = _open_process(hello.pid)
        try:
            objects = GuestObjects.open(self.lab, hello)
        except BaseException:
            os.close(pidfd)
            raise
        try:
            _check_owner(hello, objects)
        except BaseException:
            objects.close()
            os.close(pidfd)
            raise
        guest = Guest(
            hello, pidfd, objects.identities, objects, BACKENDS[hello.backend](objects.ram, hello.n_pages, self.proof)
        )
        if present is not None and present.hello.pid == hello.pid:
            guest.bucket = present.bucket  # a hello does not fill it
        if present is not None and _is_same(present, guest):
            self._carry_over(present, guest)
        else:
            if present is not None:
                self._retire(present, lost=present.hello.pid != hello.pid)
            self.guests_seen += 1
        self.guests[hello.guest] = guest
        try:
            self._opened(guest)
        except OSError:  # the kernel watches no more descriptors for this user
            self._retire(guest, lost=False)
            raise
        return guest

    def _forget_one_that_left(self) -> bool:
        """Make room: the guest that said goodbye first, and whose process lives on, is not watched any more."""
        left = next((guest for guest in self.guests.values() if guest.objects is None), None)
        if left is not None:
            self._drop(left)
        return left is not None

    def _carry_over(self, before: Guest, guest: Guest) -> None:
        """The same guest said hello again: its account and what was discarded go on."""
        guest.counters = before.counters
        guest.last_seq = before.last_seq
        guest.run_id = before.run_id  # so that an old end of a run is none of a new one
        guest.peak_resident_bytes = before.peak_resident_bytes
        if before.hello == guest.hello and before.identities.ram == guest.identities.ram and guest.objects is not None:
            guest.backend = before.backend
            guest.backend.move_to(guest.objects.ram)
        self._drop(before)

    def _retire(self, guest: Guest, *, lost: bool) -> None:
        """Forget the guest, keep its account. ``lost``: its process died; counted unless it had said goodbye."""
        if guest.objects is not None:
            self.guests_lost += lost
            self._remember(guest, "lost" if lost else "left")
        self._drop(guest)

    def _remember(self, guest: Guest, state: str) -> None:
        self.departed.append(guest.statistics(state))
        self.departed_counters.add(guest.counters)

    def _drop(self, guest: Guest) -> None:
        """Close every descriptor of the guest and take it off the list."""
        self._close_objects(guest)
        if guest.pidfd >= 0:
            self._closing(guest)
            os.close(guest.pidfd)
            guest.pidfd = -1
        if self.guests.get(guest.hello.guest) is guest:
            del self.guests[guest.hello.guest]

    def _close_objects(self, guest: Guest) -> None:
        if guest.objects is not None:
            self._closing(guest)
            guest.objects.close()
            guest.objects = None

    def _refuse(self, hello: Hello, reason: str) -> None:
        """Tell the guest why, unless the ack queue of that name is that of another, live guest: it did not ask."""
        name = ack_queue(self.lab, hello.guest)
        present = self.guests.get(hello.guest)
        registered = present is not None and present.objects is not None and present.hello != hello
        if registered and present is not None and queue_identity(name) == present.identities.ack:
            return
        with contextlib.suppress(LabError, OSError, ValueError), Queue.open(name, read=False, write=True) as queue:
            queue.send(encode(Refuse(reason[:MAX_REASON_CHARS])), 0)


def _check_memory(hello: Hello) -> None:
    try:
        check_memory_bytes(hello.n_pages * PAGE_BYTES)
    except UsageError as error:
        raise PeerError(str(error)) from error


def _check_owner(hello: Hello, objects: GuestObjects) -> None:
    """That the open object is that of the process which said ``hello``. Its pid is the kernel's word, not the guest's.

    Raises:
        PeerError: it is not.
        OSError: the gate page is gone.
    """
    owner = objects.ram.owner_pid()
    if owner != hello.pid:
        who = f"pid {owner}" if owner else "nobody who lives"
        raise PeerError(f"the memory of guest {hello.guest} belongs to {who}, not to pid {hello.pid}")
    if not objects.ram.has_said(encode(hello)):
        raise PeerError(f"the memory of guest {hello.guest} has been replaced")


def _is_same(present: Guest, guest: Guest) -> bool:
    """Whether this is the guest that is registered, with its ends still open."""
    same_process = (present.hello.pid, present.hello.epoch) == (guest.hello.pid, guest.hello.epoch)
    return present.objects is not None and same_process


def _open_process(pid: int) -> int:
    """A pidfd of a live process of this user.

    Raises:
        PeerError: there is none.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        raise PeerError(f"pid {pid}: {error.strerror}") from error
    try:
        owner = os.stat(f"/proc/{pid}").st_uid
    except OSError as error:
        os.close(pidfd)
        raise PeerError(f"pid {pid}: {error.strerror}") from error
    if owner != os.geteuid():
        os.close(pidfd)
        raise PeerError(f"pid {pid} belongs to user {owner}")
    return pidfd


def _alive(guest: Guest) -> bool:
    """Whether the guest's process lives; a pidfd is readable once it has ended."""
    watched = select.poll()
    watched.register(guest.pidfd, select.POLLIN)
    return not watched.poll(0)
