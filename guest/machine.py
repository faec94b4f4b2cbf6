"""A guest as a whole: zone, RAM, link, reporter and vCPUs, put together and taken apart in the right order."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self, cast

import numpy as np

from common import faults, messages, names
from common.errors import InvariantViolation, MachineError, PeerError, SegmentError, UsageError
from common.geometry import PAGE_BYTES
from common.layout import C_OF_GUEST
from common.promises import check_promises
from common.queues import unlink_queue
from common.ramobject import RamObject, is_kept
from common.segment import unlink_object
from common.settings import GuestSettings
from guest.allocator import entry
from guest.allocator.zone import Zone, ZoneSettings, ZoneStatistics
from guest.inherit import Inheritance, dead_slots, free_inheritance, reap, take_over_slot
from guest.memory import present_pages
from guest.reporting.claims import Claims, take_over
from guest.reporting.cycle import Cycle
from guest.reporting.link import Link, LinkStatistics
from guest.reporting.reporter import Reporter, ReporterStatistics
from guest.reporting.table import find_policy
from guest.result import GuestResult, collect
from guest.usage import UsageRecorder
from guest.warmup import load_kernels
from guest.workloads.vcpu import Job, VCpu, WorkloadSettings, check_workload

__all__ = ["GuestResult", "Machine"]

_LONGEST_SETTLING_S = 10.0
_REAPING_PERIOD_S = 0.5
_GATE_RETRY_S = 0.02  # only while a host sits inside the gate of a guest that is being taken over
_SHORTEST_GATE_WAIT_S = 5.0


def remove_leftovers(lab: str, guest: str) -> None:
    """Remove what a dead guest of this name left behind beside its RAM object. The caller owns that name now."""
    unlink_object(names.zone_object(lab, guest))
    for queue in (names.report_queue(lab, guest), names.ack_queue(lab, guest)):
        unlink_queue(queue)


class Machine:
    """One guest in this process. Use as a context manager: leaving it stops everything and removes its names.

    With ``settings.attach`` it takes the place of a guest that was killed: memory, geometry and per-CPU slots are those
    of its zone then, whatever the settings say, and each vCPU goes on with the blocks of one of its.

    Args:
        on_owning: called in taking over, right before the dead guest's zone becomes this process's: until then it may
            end at any instruction, from then on it has to end in order.

    Raises:
        UsageError: settings. NameInUseError: a live guest has this name. MachineError: memory, queues. SegmentError,
        PeerError: there is nothing to attach to.
    """

    def __init__(self, settings: GuestSettings, on_owning: Callable[[], None] = lambda: None) -> None:
        self.settings = settings
        self._on_owning = on_owning
        self.lab = names.check_name("host", settings.host)
        self.name = names.check_name("name", settings.name or f"guest-{os.getpid()}")
        self.policy = find_policy(settings.policy)
        if settings.workload != "none":
            check_workload(settings.workload)
        self.delay_ns = self.policy.delay_ns if settings.delay_ns is None else settings.delay_ns
        mark = settings.high_water_mark
        self.high_water_mark = self.policy.high_water_mark if mark is None else mark
        self.vcpus: list[VCpu] = []
        self.reporter: Reporter | None = None
        self.error: BaseException | None = None
        self.replaced = False  # the guest of this name that was here before was killed, and had wanted to be kept
        self.ended = threading.Event()
        self._built = False
        self._last_sequence = 0
        self._next_reaping = 0.0
        self._ram_map: mmap.mmap | None = None
        self._ram_view: np.ndarray | None = None
        self.peak_resident_bytes = 0
        self.job = Job(settings.work_pages) if settings.work_pages else None
        self.started_s = time.monotonic()
        self.cpu_before_s = time.process_time()
        self.work_ended_s = 0.0
        self._close = contextlib.ExitStack()
        try:
            self._build()
        except BaseException:
            self._close.close()
            raise

    def _build(self) -> None:
        settings = self.settings
        if settings.attach:
            self._attach()
        else:
            self._create()
        self._map_ram()
        settings = self.settings
        shared = settings.backend == "shared"
        self.usage = UsageRecorder(self.zone.address, self.ram.resident_bytes if shared else None)
        self.cycle = Cycle(
            self.zone, settings.policy, capacity=settings.capacity, residence=self._residence if shared else None
        )
        inherited = self._take_over() if settings.attach else []
        hello = messages.Hello(
            guest=self.name,
            pid=os.getpid(),
            epoch=self.zone.epoch,
            n_pages=self.zone.n_pages,
            backend=cast("messages.BackendName", settings.backend),
            capacity=self.cycle.capacity,
            min_order=settings.min_order,
            poison=settings.poison,
            commands=self.policy.host_started,
        )
        self.link: Link | Claims
        if self.policy.host_driven:
            self.link = Claims(self.zone, self._residence if shared else None)
        else:
            self.link = Link(
                self.lab,
                hello,
                self.ram,
                deadline_ns=settings.deadline_ns,
                on_refused=self.fail,
                wait_for_ack=settings.wait_for_ack,
                last_sequence=self._last_sequence,
            )
        self._close.callback(self.link.close)
        if self.policy.name != "off" and isinstance(self.link, Link):
            self.reporter = Reporter(self.zone, self.cycle, self.link, delay_ns=self.delay_ns, on_error=self.fail)
        self._build_vcpus(inherited)
        self._built = True

    def _create(self) -> None:
        """A new guest's objects. The RAM object first: who has made it owns the guest's name until the process ends."""
        settings = self.settings
        ram_bytes = settings.memory if settings.backend == "shared" else 0
        self.ram = RamObject.create(
            self.lab,
            self.name,
            ram_bytes=ram_bytes,
            kept=settings.keep,
            overcommit=settings.overcommit,
            # First of all of a dead guest: its zone beside a new and empty memory would be taken for one guest's.
            before=self._replace,
        )
        self._close.callback(self._close_ram)
        if ram_bytes and not settings.overcommit:
            check_promises(self.ram)
        remove_leftovers(self.lab, self.name)
        self.zone = Zone.create(self.lab, self.name, settings=self._zone_settings(ram_bytes))
        self._close.callback(self.zone.unlink)

    def _replace(self) -> None:
        """A dead guest has this name: note whether it had wanted a successor, and remove what is not its RAM object."""
        self.replaced = is_kept(names.SHM_DIR + names.ram_object(self.lab, self.name))
        remove_leftovers(self.lab, self.name)

    def _attach(self) -> None:
        """The objects of a guest that was killed, and what its zone says of the settings."""
        try:
            self.zone = Zone.attach(self.lab, self.name)
            if self.settings.workload != "none" and self.settings.vcpus > self.zone.n_cpus:
                raise UsageError(
                    f"vcpus: {self.settings.vcpus}; guest {self.name!r} was started with {self.zone.n_cpus} per-CPU "
                    "slots (--vcpus and --spare-slots together), allowed is 1 to that many"
                )
            self.ram = RamObject.adopt(self.lab, self.name, ram_bytes=self.zone.ram_bytes)
        except (SegmentError, PeerError) as error:
            raise type(error)(
                f"guest {self.name!r} cannot be taken over: {error}; was it started with --keep? Without --attach a "
                "new one begins"
            ) from error
        self._close.callback(self._leave)
        if not self.zone.is_named():
            raise SegmentError(f"guest {self.name!r}: its zone was replaced meanwhile; try again")
        if self.zone.open_to_host():
            raise UsageError(f"guest {self.name!r} ran the policy 'shared': its zone belongs to its host as well")
        found = self.zone.settings()
        self.settings = replace(
            self.settings,
            memory=found.memory_bytes,
            backend="shared" if found.ram_bytes else "model",
            min_order=found.min_order,
            pcp_batch=found.pcp_batch,
            pcp_high=found.pcp_high,
            shuffle=found.shuffle,
            merge_likely=found.merge_likely,
            host_zeroed=found.host_zeroed,
            poison=found.poison,
        )
        faults.reach("attach.owned")

    def _take_over(self) -> list[Inheritance]:
        """Everything of the dead process becomes this one's; the slots with blocks, for its vCPUs.

        First its reports are withdrawn, so that a host which is still at one cannot discard what is in use again (S5).
        Then its blocks in flight go back, unflagged, and only then is anything handed out by this process.
        """
        self._last_sequence = self._withdraw_reports()
        faults.reach("attach.withdrawn")
        residence = self._residence if self.settings.backend == "shared" else None
        try:
            self.zone.validate()  # takes every lock, so what the dead one held is repaired
        except InvariantViolation as error:
            raise InvariantViolation(
                f"guest {self.name!r} cannot be taken over: damaged, {error}; without --attach a new one begins"
            ) from error
        holder = take_over(self.zone, os.getpid(), residence, stale_pid=self.zone.device_pid())
        if holder:
            raise UsageError(f"process {holder} reports this zone already; one reporting device a zone (-EBUSY)")
        entry.unregister_device(self.zone.address, os.getpid())
        self.cycle.release()
        faults.reach("attach.put-back")
        inherited = [
            slot
            for cpu, pid in sorted(dead_slots(self.zone, guest_is_dead=True), key=self._is_of_joined)
            if (slot := take_over_slot(self.zone, cpu, pid, self.ram_address)) is not None
        ]
        for queue in (names.report_queue(self.lab, self.name), names.ack_queue(self.lab, self.name)):
            unlink_queue(queue)
        # Last: until here another process could still do the same, and find the same dead one.
        self._on_owning()
        self.zone.take_ownership(self.policy.trigger, self.high_water_mark)
        return inherited

    def _is_of_joined(self, slot: tuple[int, int]) -> bool:
        """Whether a slot (and its pid) is that of a process that had joined: the guest's own come first."""
        return not self.zone.slot_word(slot[0], C_OF_GUEST)

    def _withdraw_reports(self) -> int:
        """Close the gate for all that the dead process sent; the number that new reports follow on.

        Raises:
            MachineError: a host is inside the gate, past the deadline.
        """
        end = time.monotonic() + max(self.settings.deadline_ns / 1e9, _SHORTEST_GATE_WAIT_S)
        while not self.ram.try_gate():
            if time.monotonic() > end:
                raise MachineError(
                    f"guest {self.name!r}: a host is in the midst of a discard of its memory and does not go on; "
                    "continue it (kill -CONT) or end it, then try again"
                )
            self.ended.wait(_GATE_RETRY_S)
        try:
            return self.ram.withdraw_all()
        finally:
            self.ram.ungate()

    def _leave(self) -> None:
        """End of a guest that attached. If that failed on the way, what the dead process left stays for the next."""
        if self._built:
            self.zone.unlink()
            self._close_ram()
        else:
            self._drop_ram_view()
            self.ram.close()

    def _map_ram(self) -> None:
        self._ram_map = self.ram.map() if self.settings.backend == "shared" else None
        if self._ram_map is not None:
            self._ram_view = np.frombuffer(self._ram_map, dtype=np.uint8)
        # SAFETY: the view keeps the mapping alive; it is dropped after the vCPU threads have been joined.
        self.ram_address = 0 if self._ram_view is None else int(self._ram_view.ctypes.data)

    def _zone_settings(self, ram_bytes: int) -> ZoneSettings:
        settings = self.settings
        return ZoneSettings(
            memory_bytes=settings.memory,
            cpus=settings.vcpus + settings.spare_slots,
            pcp_batch=settings.pcp_batch,
            pcp_high=settings.pcp_high,
            shuffle=settings.shuffle,
            merge_likely=settings.merge_likely,
            seed=settings.seed,
            min_order=settings.min_order,
            high_water_mark=self.high_water_mark,
            trigger=self.policy.trigger,
            ram_bytes=ram_bytes,
            host_zeroed=settings.host_zeroed,
            poison=settings.poison,
        )

    def _build_vcpus(self, inherited: Sequence[Inheritance] = ()) -> None:
        """The vCPUs; each goes on with the blocks of one slot of a dead process. Those of the others are freed."""
        settings = self.settings
        spare = inherited if settings.workload == "none" else inherited[settings.vcpus :]
        for slot in spare:
            free_inheritance(self.zone, slot, self.ram_address)
        if settings.workload == "none":
            return
        for index in range(settings.vcpus):
            vcpu = VCpu(
                self.zone,
                self.ram_address,
                WorkloadSettings.of(settings, self.zone.n_pages, index),
                on_error=self.fail,
                on_idle=self._note_idle,
                job=self.job,
                inherited=inherited[index] if index < len(inherited) else None,
            )
            self.zone.give_to_guest(vcpu.cpu)
            self.vcpus.append(vcpu)

    def _note_idle(self) -> None:
        self.usage.take(mark=True)

    def fail(self, error: BaseException) -> None:
        """End the guest with this error; called from any thread."""
        if self.error is None:
            self.error = error
        self.ended.set()

    def _residence(self, pfn: int, order: int) -> np.ndarray:
        """Which pages of a block the RAM object still holds: bool[2**order]. For blocks of an uncertain discard."""
        return present_pages(self.ram.fileno(), pfn, order)

    # -- life ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            load_kernels(self.settings.workload, self.policy.name)
            self.link.start()
            if self.reporter is not None:
                self.reporter.start()
            self.usage.take()
            self.cpu_before_s = time.process_time()
            self.started_s = time.monotonic()
            for vcpu in self.vcpus:
                vcpu.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop_work()
        self.stop_reporting()
        self._close.close()
        self.zone.close()

    def stop_work(self) -> None:
        """Stop the vCPUs: they check and free all they hold, and drain their lists. What the dead left is freed."""
        for vcpu in self.vcpus:
            vcpu.stop()
        if not self.work_ended_s:
            self.work_ended_s = time.monotonic()
        for vcpu in self.vcpus:
            if vcpu.ident is not None:
                self._join(vcpu)
        reap(self.zone, self.ram_address)

    def _join(self, vcpu: VCpu) -> None:
        """Wait for a vCPU that was told to stop. It may sleep on a zone lock that is held until a host answers."""
        if self.policy.under_lock and self.reporter is not None:
            vcpu.join(self.settings.deadline_ns / 1e9 + _LONGEST_SETTLING_S)
            if vcpu.is_alive():
                self.reporter.hurry()
        vcpu.join()

    def settle(self) -> None:
        """After ``stop_work``: let the reporter give back what the workload freed, as an idle guest would.

        Returns when no run is requested or active, or after the delay, a deadline and a second, ten seconds at most; at
        once without a host to report to.
        """
        if self.reporter is None and not self.policy.host_driven:
            return
        patience_s = min((self.delay_ns + self.settings.deadline_ns) / 1e9 + 1.0, _LONGEST_SETTLING_S)
        end = time.monotonic() + patience_s
        while time.monotonic() < end and self.link.connected:
            statistics = self.sample()[0]
            if not statistics.requested and not statistics.active:
                return
            if self.ended.wait(self.usage.period_s):
                return  # interrupted, or an error: leave now
            self.usage.take()

    def stop_reporting(self) -> None:
        """Stop the reporter; nothing is in flight afterwards."""
        if self.reporter is not None:
            self.reporter.stop()
        elif isinstance(self.link, Claims):
            self.link.stop()

    def _close_ram(self) -> None:
        # The name first: the map has a descriptor of its own, and to close it drops the owner's lock.
        self.ram.unlink()
        self._drop_ram_view()
        self.ram.close()

    def _drop_ram_view(self) -> None:
        self._ram_view = None
        if self._ram_map is not None:
            with contextlib.suppress(BufferError):
                self._ram_map.close()

    # -- look ---------------------------------------------------------------------------------------------------------

    def resident_bytes(self) -> int:
        """What the RAM object really holds; with the model backend what the resident map says."""
        if self.settings.backend == "shared":
            return self.ram.resident_bytes()
        return self.zone.statistics().resident_pages * PAGE_BYTES

    def sample(self) -> tuple[ZoneStatistics, ReporterStatistics | None, LinkStatistics, int]:
        """Everything a view shows: zone, reporter, link, resident bytes."""
        resident = self.resident_bytes()
        self.peak_resident_bytes = max(self.peak_resident_bytes, self.usage.peak_bytes, resident)
        reporter = None if self.reporter is None else self.reporter.statistics()
        return self.zone.statistics(), reporter, self.link.statistics(), resident

    def wait(self, seconds: float | None) -> None:
        """Sleep until the time is up (None: never), the job is done or something ended the guest; record its memory."""
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            period_s = self.usage.period_s
            if end is not None:
                period_s = min(period_s, max(0.0, end - time.monotonic()))
            if self.ended.wait(period_s):
                return
            self.usage.take()
            self._look_after_processes()
            if isinstance(self.link, Claims):
                self.link.check()
            if (self.job is not None and self.job.is_done()) or (end is not None and time.monotonic() >= end):
                return

    def _look_after_processes(self) -> None:
        """Free what processes that had joined and were killed have left; looked for now and then."""
        if time.monotonic() >= self._next_reaping:
            self._next_reaping = time.monotonic() + _REAPING_PERIOD_S
            reap(self.zone, self.ram_address)

    def complaints(self) -> tuple[str, ...]:
        """What the vCPUs found wrong with their memory."""
        return tuple(text for vcpu in self.vcpus if (text := vcpu.complaint()))

    def check(self) -> None:
        """Walk the whole zone and the vCPUs' findings.

        Raises:
            InvariantViolation: with everything that is wrong.
        """
        self.zone.validate()
        complaints = self.complaints()
        if complaints:
            raise InvariantViolation("; ".join(complaints))

    def result(self) -> GuestResult:
        """The result so far. Call it after ``stop_work`` for final figures."""
        return collect(self)
