"""One guest as the host that it trusts has it: the zone mapped, the RAM object open, a thread that claims, one that
populates.

No lock of this process is held while the guest's zone lock is: the kernels take that and give it back. A discard and a
populate exclude each other here, so that a populate that comes late cannot undo a discard that has been counted.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import LabError, PeerError, UsageError
from common.geometry import N_ORDERS, PAGE_BYTES, PAGE_SHIFT
from common.layout import N_ASKS, W_ASKS_WORK
from common.mutex import post_semaphore, wait_semaphore
from common.names import ram_object, zone_object
from common.ramobject import RamObject
from common.statistics import percentiles
from guest.allocator import entry
from guest.allocator.zone import Zone
from guest.memory import present_pages
from guest.reporting import shared
from guest.reporting.claims import take_over
from guest.reporting.cycle import Batch, Cycle, Outcome
from host.accounting import Counters, GuestStatistics
from host.discard import BACKENDS
from host.objects import Identities, shared_memory_identity
from host.proof import Proof, best_proof

__all__ = ["AttachedGuest", "NotYetError", "OpenGuest"]


class NotYetError(PeerError):
    """The guest is not to be served, now or ever: it is being made or taken apart, or never opened its zone."""


@dataclass(frozen=True, slots=True)
class OpenGuest:
    """The objects of a guest, open and checked. Whoever has it closes them."""

    name: str
    zone: Zone
    ram: RamObject
    pidfd: int
    identities: Identities

    @classmethod
    def open(cls, lab: str, name: str) -> OpenGuest:
        """Open and check a guest of this user by its names.

        Raises:
            NotYetError: it does not let a host in, now.
            SegmentError, PeerError: not ours, of another layout, or damaged. MachineError: no space for the mapping.
        """
        with contextlib.ExitStack() as opened:
            zone = Zone.attach(lab, name)
            opened.callback(zone.close)
            if not zone.open_to_host():
                raise NotYetError(f"guest {name} does not let a host in")
            ram = opened.enter_context(RamObject.open(lab, name, ram_bytes=zone.ram_bytes))
            pid = ram.owner_pid()
            if pid != zone.owner_pid:  # the kernel says who owns the memory; the zone merely claims it
                raise NotYetError(f"guest {name}: its memory is that of process {pid}, its zone of {zone.owner_pid}")
            try:
                pidfd = os.pidfd_open(pid)
            except OSError as error:
                raise NotYetError(f"guest {name}: process {pid}: {error.strerror}") from error
            opened.pop_all()
        zone_identity = shared_memory_identity(zone_object(lab, name))
        ram_identity = shared_memory_identity(ram_object(lab, name))
        return cls(name, zone, ram, pidfd, Identities(lab, name, zone_identity, ram_identity, None, None))

    def close(self) -> None:
        """Close everything."""
        self.zone.close()
        self.ram.close()
        os.close(self.pidfd)


class AttachedGuest:
    """A guest that is served: from ``attach`` to ``detach``.

    Args:
        opened: closed by ``detach``, or at once when this raises.
        every_ns: from a request of the free path to the run that it asked for.
        on_error: called from a thread with what made it give up.

    Raises:
        UsageError: a device that lives has the zone (S14).
    """

    def __init__(self, opened: OpenGuest, *, every_ns: int, on_error: Callable[[BaseException], None]) -> None:
        self.name = opened.name
        self.pidfd = opened.pidfd
        self.counters = Counters()
        self.installs = self.late_installs = self.refused_installs = self.installed_bytes = 0
        self.claim_wakes = self.ask_wakes = self.runs = 0
        self._opened = opened
        self._zone = opened.zone
        self._ram = opened.ram
        self._every_s = every_ns / 1e9
        self._on_error = on_error
        self._stopping = threading.Event()
        self._memory = threading.Lock()  # a discard and a populate exclude each other
        self._peak_resident_bytes = 0
        self._final: GuestStatistics | None = None
        self._has_ram = self._ram.ram_bytes > 0
        residence = self._residence if self._has_ram else None
        proof: Proof = best_proof()
        self._backend = BACKENDS["shared" if self._has_ram else "model"](self._ram, self._zone.n_pages, proof)
        self._asks_address = self._zone.address + 8 * W_ASKS_WORK
        try:
            self._take_zone(residence)
            self._cycle = Cycle(self._zone, "shared", residence=residence)
        except BaseException:
            opened.close()
            raise
        self._threads = [
            threading.Thread(target=self._guarded, args=(loop,), name=f"{kind}-{self.name}", daemon=True)
            for kind, loop in (("claim", self._claim), ("populate", self._populate))
        ]
        for thread in self._threads:
            thread.start()

    def _take_zone(self, residence: Callable[[int, int], np.ndarray] | None) -> None:
        """Become the zone's device. There is one such host a lab, so any other one but the guest itself is dead."""
        pid = os.getpid()
        holder = take_over(self._zone, pid, residence)
        if holder not in (0, pid, self._zone.owner_pid):
            holder = take_over(self._zone, pid, residence, stale_pid=holder)
        if holder:
            raise UsageError(f"process {holder} is the device of guest {self.name}; one a zone (-EBUSY)")
        shared.set_asking(self._zone.address, pid)

    def _residence(self, pfn: int, order: int) -> np.ndarray:
        return present_pages(self._ram.fileno(), pfn, order)

    # -- the two threads ----------------------------------------------------------------------------------------------

    def _guarded(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except (LabError, OSError) as error:
            if not self._stopping.is_set():
                self._on_error(error)

    def _claim(self) -> None:
        """Sleep until the guest's free path asks for a run, wait the period, claim; again."""
        while not self._stopping.is_set():
            wait_semaphore(self._zone.work_address)
            if self._stopping.is_set():
                return
            self.claim_wakes += 1
            if self._stopping.wait(self._every_s):
                return
            self._run_once()

    def _run_once(self) -> None:
        """One run of the cycle, ended early when the host stops. The guest may close its zone at any time."""
        shared.set_asking(self._zone.address, os.getpid())  # a sign of life, should an ask have been given up
        failed = False
        self._cycle.begin()
        try:
            while not (failed or self._stopping.is_set()) and (batch := self._cycle.pull()) is not None:
                outcome = Outcome.FAILED
                try:
                    outcome = self._discard(batch)
                finally:
                    self._cycle.put_back(batch, outcome)
                failed = outcome is Outcome.FAILED
        finally:
            self._cycle.end(abandon=failed)
        self.runs += 1
        if failed and not self._stopping.is_set():
            entry.locked_request(self._zone.address)  # what it could not have now it tries again, a period later

    def _discard(self, batch: Batch) -> Outcome:
        """Give a claimed batch back to the operating system, with proof."""
        ascending = np.argsort(batch.pfns)
        starts = batch.pfns[ascending]
        ends = starts + (np.int64(1) << batch.orders[ascending])
        counters = self.counters
        self.note_resident()
        counters.reports += 1
        counters.blocks += len(starts)
        counters.asked_bytes += batch.pages << PAGE_SHIFT
        for order, count in enumerate(np.bincount(batch.orders, minlength=N_ORDERS).tolist()):
            counters.order_histogram[order] += count
        with self._memory:
            started_ns = time.monotonic_ns()
            outcome = self._backend.discard(starts, ends)
            counters.discard_ns.record(time.monotonic_ns() - started_ns)
        counters.freed_bytes += outcome.freed_bytes
        counters.modelled_bytes += outcome.modelled_bytes
        counters.failures += outcome.failures
        counters.duplicates += outcome.duplicates
        counters.empty_blocks += outcome.empty_blocks
        return Outcome.FAILED if outcome.failures else Outcome.DONE

    def _populate(self) -> None:
        """Sleep until the guest asks for a block, populate it, answer; again."""
        asks = np.zeros((N_ASKS, shared.ASK_COLUMNS), dtype=np.int64)
        while not self._stopping.is_set():
            wait_semaphore(self._asks_address)
            if self._stopping.is_set():
                return
            self.ask_wakes += 1
            count = int(shared.collect_asks(self._zone.address, asks))
            for index, pfn, order, sequence in asks[: max(count, 0)].tolist():
                self._install(index, pfn, order, sequence)

    def _install(self, index: int, pfn: int, order: int, sequence: int) -> None:
        """Populate one block and say so, unless the asker has given up.

        Then the block may have been claimed again, and its discard counted: populating it would undo that. While it is
        asked for it is in flight and cannot be claimed; should that end now, a discard has to wait for this populate.
        """
        populated = True
        with self._memory:
            if shared.is_awaited(self._zone.address, index, sequence) != 1:
                self.late_installs += 1
                return
            if self._has_ram:
                try:
                    os.posix_fallocate(self._ram.fileno(), pfn * PAGE_BYTES, PAGE_BYTES << order)
                except OSError:  # no space: the guest goes on without
                    populated = False
            answered = int(shared.answer_ask(self._zone.address, index, sequence, populated))
        if not populated:
            self.refused_installs += 1
        elif answered == 1:
            self.installs += 1
            self.installed_bytes += PAGE_BYTES << order
        else:
            self.late_installs += 1

    # -- the end ------------------------------------------------------------------------------------------------------

    def detach(self, *, died: bool) -> None:
        """Stop serving: nothing of this guest is in flight here afterwards, and it asks for nothing any more.

        ``died``: its process is gone; its names are removed if it left any.
        """
        if self._final is not None:
            return
        self._stopping.set()
        post_semaphore(self._zone.work_address)
        post_semaphore(self._asks_address)
        for thread in self._threads:
            thread.join()
        shared.refuse_asks(self._zone.address)
        entry.unregister_device(self._zone.address, os.getpid())
        closed = not self._zone.open_to_host()
        self.note_resident()
        self._final = self._snapshot("live" if not died else "left" if closed else "lost")
        self._opened.close()
        if died:
            self._opened.identities.remove()

    @property
    def attached(self) -> bool:
        """Not detached yet."""
        return self._final is None

    def note_resident(self) -> int:
        """What the guest's RAM holds now; kept if it is the most so far."""
        resident = self._ram.resident_bytes() if self._has_ram else 0
        self._peak_resident_bytes = max(self._peak_resident_bytes, resident)
        return resident

    def statistics(self) -> GuestStatistics:
        """Account, live or final."""
        if self._final is not None:
            return self._final
        self.note_resident()
        return self._snapshot("live")

    def _snapshot(self, state: str) -> GuestStatistics:
        return GuestStatistics(
            name=self.name,
            state=state,
            backend="shared" if self._has_ram else "model",
            memory_bytes=self._zone.n_pages * PAGE_BYTES,
            peak_resident_bytes=self._peak_resident_bytes,
            final_resident_bytes=self.note_resident(),
            counters=self.counters.copy(),
        )

    def own_account(self) -> dict[str, Any]:
        """What an ordinary host has no word for."""
        return {
            "installs": self.installs,
            "installed_bytes": self.installed_bytes,
            "late_installs": self.late_installs,
            "refused_installs": self.refused_installs,
            "runs": self.runs,
            "lock_hold_ns": {
                "pull": percentiles(self._cycle.pull_holds).as_dict(),
                "put_back": percentiles(self._cycle.put_back_holds).as_dict(),
                "all": percentiles(self._cycle.pull_holds, self._cycle.put_back_holds).as_dict(),
            },
        }
