"""The host of all trusting guests of a lab: finds them, serves each with two threads, drops those that are gone.

Guests are found by their names in shared memory, looked for four times a second: they say hello to nobody. Everything
else sleeps on a semaphore of the guest's or on its process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import time
from typing import Any, Self

from common.errors import LabError, NameInUseError, UsageError
from common.names import SHM_DIR, check_name, guests_in_shm
from common.refusals import shm_refusal
from host.accounting import Counters
from host.objects import unlink_shared_memory
from host.proof import best_proof
from lab.shared_host.attached import AttachedGuest, NotYetError, OpenGuest
from lab.shared_host.names import lock_object

__all__ = ["SharedHost", "lock_object"]

_LOOK_MS = 250


class SharedHost:
    """One host a lab, from construction to ``close``. For one thread; ``stop`` may be called from anywhere.

    Raises:
        UsageError: the name. NameInUseError: the lab has one. MachineError: shared memory.
    """

    def __init__(self, lab: str, *, every_ns: int) -> None:
        self.lab = check_name("name", lab)
        self._every_ns = every_ns
        self._lock = _take_lock(self.lab)
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._served: dict[str, AttachedGuest] = {}
        self._gone: list[AttachedGuest] = []
        self._refused: dict[str, str] = {}
        self._stopping = False
        self._error: BaseException | None = None
        self._started_s = time.monotonic()
        self._cpu_before_s = time.process_time()
        self._proof_name = best_proof().name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_details: object) -> None:
        self.close()

    def run(self, duration_s: float | None = None) -> dict[str, Any]:
        """Serve until ``stop``, or for ``duration_s``; the account.

        Raises:
            LabError: a guest's zone is beyond recovery.
        """
        end = None if duration_s is None else time.monotonic() + duration_s
        while not self._stopping and (end is None or time.monotonic() < end):
            self.look()
            self._sleep(end)
        self._drop_gone()  # whoever ended before we were told to stop has left, and its account says so
        for guest in self._served.values():
            guest.detach(died=False)
        if self._error is not None:
            raise self._error
        return self.account()

    def look(self) -> None:
        """Drop guests that are gone, serve those that are new."""
        self._drop_gone()
        for name in guests_in_shm(self.lab, os.listdir(SHM_DIR)):
            if name not in self._served:
                self._try_to_serve(name)

    def _drop_gone(self) -> None:
        for name, guest in list(self._served.items()):
            if _ended(guest.pidfd):
                guest.detach(died=True)
                self._gone.append(self._served.pop(name))

    def _try_to_serve(self, name: str) -> None:
        try:
            opened = OpenGuest.open(self.lab, name)
            self._served[name] = AttachedGuest(opened, every_ns=self._every_ns, on_error=self._fail)
            self._refused.pop(name, None)
        except NotYetError:
            return
        except (LabError, UsageError, OSError) as error:
            self._refused[name] = str(error)

    def stop(self) -> None:
        """End ``run`` soon."""
        self._stopping = True
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"\0")

    def close(self) -> None:
        """Detach from all guests and give the lab's lock back. Idempotent."""
        if self._lock < 0:
            return
        for guest in self._served.values():
            guest.detach(died=False)
        unlink_shared_memory(lock_object(self.lab))
        for descriptor in (self._wake_read, self._wake_write, self._lock):
            os.close(descriptor)
        self._lock = -1

    def account(self) -> dict[str, Any]:
        """Plain values for JSON: as the ordinary host's, with what was populated. ``ok``: no discard failed."""
        guests = [*self._gone, *self._served.values()]
        total = Counters()
        entries = []
        for guest in guests:
            statistics = guest.statistics()
            total.add(statistics.counters)
            entries.append(statistics.as_dict() | guest.own_account())
        own = {key: sum(entry[key] for entry in entries) for key in ("installs", "installed_bytes", "late_installs")}
        return {
            "ok": total.failures == 0,
            "duration_s": round(time.monotonic() - self._started_s, 3),
            "host": {
                **total.as_dict(),
                **own,
                "proof": self._proof_name,
                "guests_seen": len(guests),
                "guests_lost": sum(entry["state"] == "lost" for entry in entries),
                "guests_refused": dict(self._refused),
                "cpu_s": time.process_time() - self._cpu_before_s,
            },
            "guests": entries,
        }

    def _fail(self, error: BaseException) -> None:
        self._error = error
        self.stop()

    def _sleep(self, end: float | None) -> None:
        """Until a guest dies, ``stop``, the next look, or the end."""
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        for guest in self._served.values():
            poll.register(guest.pidfd, select.POLLIN)
        left_ms = _LOOK_MS if end is None else max(0, min(_LOOK_MS, int((end - time.monotonic()) * 1000)))
        poll.poll(left_ms)


def _ended(pidfd: int) -> bool:
    watched = select.poll()
    watched.register(pidfd, select.POLLIN)
    return bool(watched.poll(0))


def _take_lock(lab: str) -> int:
    """Descriptor of the lock object, locked, and still the one that the name stands for."""
    path = SHM_DIR + lock_object(lab)
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise shm_refusal(f"cannot open {path}", error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise NameInUseError(f"name: {lab!r} has a shared host already; choose another --name") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # its last holder removed the name between our open and our lock
