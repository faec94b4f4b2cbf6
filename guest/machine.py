"""A guest as a whole: zone, RAM, link, reporter and vCPUs, put together and taken apart in the right order."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Self, cast

import numpy as np

from common import messages, names
from common.errors import InvariantViolation, LabError
from common.geometry import PAGE_BYTES
from common.promises import check_promises
from common.queues import unlink_queue
from common.ramobject import RamObject
from common.segment import unlink_object
from common.settings import GuestSettings
from common.statistics import percentiles
from guest.allocator.zone import Zone, ZoneSettings, ZoneStatistics
from guest.memory import present_pages
from guest.reporting.claims import Claims
from guest.reporting.cycle import Cycle
from guest.reporting.link import Link, LinkStatistics
from guest.reporting.reporter import Reporter, ReporterStatistics
from guest.reporting.table import find_policy
from guest.usage import UsageRecorder
from guest.warmup import load_kernels
from guest.workloads import engine
from guest.workloads.vcpu import Job, VCpu, WorkloadSettings, check_workload

__all__ = ["GuestResult", "Machine"]

_SPARE_SLOTS = 2  # per-CPU slots beyond the vCPUs', for processes that attach
_LONGEST_SETTLING_S = 10.0


@dataclass(frozen=True)
class GuestResult:
    """What one guest did, from start to end; what ``--json`` prints.

    Attributes:
        lock_hold_ns: percentiles of how long the reporter held the zone lock: ``pull``, ``put_back``, and ``all``.
        nodes_hold_max: most list nodes looked at while the zone lock was held once.
        alloc_ns, alloc_reporting_ns: percentiles of allocation times; of all, and of those that began while a
            reporting run was active.
        cpu_s: processor time, user and system, of the whole process since the work started.
        job_s: from the start of the work until ``--work-pages`` were done; None without, or if they never were.
        started_ns: when the work started, CLOCK_MONOTONIC as every time here.
        per_vcpu: of each vCPU ``busy_ns``, ``operations``, ``pauses`` and ``ended_ns``, see ``VCpu``.
        series: columns of equal length, see ``guest.usage``.
        reinstalled_bytes: of ``installed_bytes`` what had been given back.
    """

    ok: bool
    name: str
    memory_bytes: int
    peak_resident_bytes: int
    final_resident_bytes: int
    freed_bytes: int
    returned_bytes: int
    refaults: int
    first_touches: int
    allocations: int
    frees: int
    violations: int
    zeroing_skipped_pages: int
    complaints: tuple[str, ...]
    in_flight_max_blocks: int
    lock_hold_ns: dict[str, dict[str, int]]
    alloc_ns: dict[str, int]
    page_operations: int
    turns: int
    duration_s: float
    work_s: float
    reports: int
    blocks: int
    reported_bytes: int
    withdrawn: int
    failed: int
    connections: int
    stale_acks: int
    runs: int
    wakes: int
    unreported_bytes: int
    repairs: int
    pressure: int
    commands: int
    settings: dict[str, Any] = field(default_factory=dict)
    reports_timeline: tuple[tuple[int, int, int], ...] = ()
    nodes_visited: int = 0
    nodes_hold_max: int = 0
    pulled_blocks: int = 0
    failed_allocations: int = 0
    alloc_reporting_ns: dict[str, int] = field(default_factory=dict)
    cpu_s: float = 0.0
    job_s: float | None = None
    started_ns: int = 0
    per_vcpu: tuple[dict[str, Any], ...] = ()
    series: dict[str, list[int]] = field(default_factory=dict)
    installs: int = 0
    installed_bytes: int = 0
    reinstalled_bytes: int = 0
    install_wait_ns: int = 0
    asks_withdrawn: int = 0


def remove_leftovers(lab: str, guest: str) -> None:
    """Remove what a dead guest of this name left behind beside its RAM object. The caller owns that name now."""
    unlink_object(names.zone_object(lab, guest))
    for queue in (names.report_queue(lab, guest), names.ack_queue(lab, guest)):
        unlink_queue(queue)


class Machine:
    """One guest in this process. Use as a context manager: leaving it stops everything and removes its names.

    Raises:
        UsageError: settings. NameInUseError: a live guest has this name. MachineError: memory, queues.
    """

    def __init__(self, settings: GuestSettings) -> None:
        self.settings = settings
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
        self.ended = threading.Event()
        self._ram_map: mmap.mmap | None = None
        self._ram_view: np.ndarray | None = None
        self._peak_resident_bytes = 0
        self._job = Job(settings.work_pages) if settings.work_pages else None
        self._started = time.monotonic()
        self._cpu_before_s = time.process_time()
        self._work_ended = 0.0
        self._close = contextlib.ExitStack()
        try:
            self._build()
        except BaseException:
            self._close.close()
            raise

    def _build(self) -> None:
        settings = self.settings
        shared = settings.backend == "shared"
        ram_bytes = settings.memory if shared else 0
        # The RAM object first: who has made it owns the guest's name until the process ends.
        self.ram = RamObject.create(self.lab, self.name, ram_bytes=ram_bytes, overcommit=settings.overcommit)
        self._close.callback(self._close_ram)
        if shared and not settings.overcommit:
            check_promises(self.ram)
        remove_leftovers(self.lab, self.name)
        self.zone = Zone.create(self.lab, self.name, settings=self._zone_settings(ram_bytes))
        self._close.callback(self.zone.unlink)
        self._ram_map = self.ram.map() if shared else None
        if self._ram_map is not None:
            self._ram_view = np.frombuffer(self._ram_map, dtype=np.uint8)
        # SAFETY: the view keeps the mapping alive; it is dropped after the vCPU threads have been joined.
        self.ram_address = 0 if self._ram_view is None else int(self._ram_view.ctypes.data)
        self.usage = UsageRecorder(self.zone.address, self.ram.resident_bytes if shared else None)
        self.cycle = Cycle(
            self.zone, settings.policy, capacity=settings.capacity, residence=self._residence if shared else None
        )
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
            )
        self._close.callback(self.link.close)
        if self.policy.name != "off" and isinstance(self.link, Link):
            self.reporter = Reporter(self.zone, self.cycle, self.link, delay_ns=self.delay_ns, on_error=self.fail)
        self._build_vcpus()

    def _zone_settings(self, ram_bytes: int) -> ZoneSettings:
        settings = self.settings
        return ZoneSettings(
            memory_bytes=settings.memory,
            cpus=settings.vcpus + _SPARE_SLOTS,
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

    def _build_vcpus(self) -> None:
        settings = self.settings
        if settings.workload == "none":
            return
        share = int(self.zone.n_pages * settings.fill) // settings.vcpus
        for index in range(settings.vcpus):
            work = WorkloadSettings(
                workload=settings.workload,
                target_pages=share,
                work_order=settings.work_order,
                hold_ns=settings.hold_ns,
                idle_ns=settings.idle_ns,
                seed=settings.seed * 1000 + index,
            )
            vcpu = VCpu(self.zone, self.ram_address, work, on_error=self.fail, on_idle=self._note_idle, job=self._job)
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
            self._cpu_before_s = time.process_time()
            self._started = time.monotonic()
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
        """Stop the vCPUs: they check and free all they hold, and drain their lists."""
        for vcpu in self.vcpus:
            vcpu.stop()
        if not self._work_ended:
            self._work_ended = time.monotonic()
        for vcpu in self.vcpus:
            if vcpu.ident is not None:
                self._join(vcpu)

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
        self._ram_view = None
        if self._ram_map is not None:
            with contextlib.suppress(BufferError):
                self._ram_map.close()
        self.ram.unlink()
        self.ram.close()

    # -- look ---------------------------------------------------------------------------------------------------------

    def resident_bytes(self) -> int:
        """What the RAM object really holds; with the model backend what the resident map says."""
        if self.settings.backend == "shared":
            return self.ram.resident_bytes()
        return self.zone.statistics().resident_pages * PAGE_BYTES

    def sample(self) -> tuple[ZoneStatistics, ReporterStatistics | None, LinkStatistics, int]:
        """Everything a view shows: zone, reporter, link, resident bytes."""
        resident = self.resident_bytes()
        self._peak_resident_bytes = max(self._peak_resident_bytes, self.usage.peak_bytes, resident)
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
            if isinstance(self.link, Claims):
                self.link.check()
            if (self._job is not None and self._job.is_done()) or (end is not None and time.monotonic() >= end):
                return

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
        self.usage.take()
        statistics, reporter, link, resident = self.sample()
        complaints = list(self.complaints())
        try:
            self.zone.validate()
        except LabError as error:
            complaints.append(str(error))
        holds = {
            "pull": _histogram(self.cycle.pull_holds),
            "put_back": _histogram(self.cycle.put_back_holds),
            "all": _histogram(self.cycle.pull_holds, self.cycle.put_back_holds),
        }
        if self.policy.under_lock:
            holds["waiting"] = _histogram(self.cycle.walk_wait_ns)  # the part of "pull" that was not the walk
        return GuestResult(
            ok=not complaints and self.error is None,
            name=self.name,
            memory_bytes=self.settings.memory,
            peak_resident_bytes=self._peak_resident_bytes,
            final_resident_bytes=resident,
            freed_bytes=statistics.freed_bytes,
            returned_bytes=statistics.returned_pages * PAGE_BYTES,
            refaults=statistics.refaults,
            first_touches=statistics.first_touches,
            allocations=statistics.allocations,
            frees=statistics.frees,
            violations=max(statistics.violations, len(complaints)),
            zeroing_skipped_pages=statistics.zeroing_skipped_pages,
            complaints=tuple(complaints),
            in_flight_max_blocks=statistics.in_flight_max_blocks,
            lock_hold_ns=holds,
            alloc_ns=_histogram(*(row for vcpu in self.vcpus for row in vcpu.times)),
            alloc_reporting_ns=_histogram(*(vcpu.times[engine.T_REPORTING] for vcpu in self.vcpus)),
            page_operations=sum(int(vcpu.state[engine.S_OPERATIONS]) for vcpu in self.vcpus),
            turns=sum(int(vcpu.state[engine.S_TURNS]) for vcpu in self.vcpus),
            duration_s=time.monotonic() - self._started,
            work_s=(self._work_ended or time.monotonic()) - self._started,
            reports=0 if reporter is None else reporter.batches,
            blocks=0 if reporter is None else reporter.blocks,
            reported_bytes=0 if reporter is None else reporter.pages * PAGE_BYTES,
            withdrawn=link.withdrawn,
            failed=link.failed,
            connections=link.connections,
            stale_acks=link.stale_acks,
            runs=statistics.runs if reporter is None else reporter.runs,
            wakes=0 if reporter is None else reporter.wakes,
            unreported_bytes=self.zone.unreported_pages() * PAGE_BYTES,
            repairs=statistics.repairs,
            nodes_visited=statistics.nodes_visited,
            nodes_hold_max=statistics.nodes_hold_max,
            pulled_blocks=statistics.pulled_blocks,
            failed_allocations=statistics.failed_allocations,
            cpu_s=time.process_time() - self._cpu_before_s,
            job_s=self._job_s(),
            started_ns=int(self._started * 1e9),
            per_vcpu=tuple(_describe(vcpu) for vcpu in self.vcpus),
            series=self.usage.columns(),
            pressure=statistics.pressure,
            commands=link.commands,
            settings=self._described_settings(),
            reports_timeline=() if self.reporter is None else tuple(self.reporter.timeline),
            installs=statistics.installs,
            installed_bytes=statistics.installed_pages * PAGE_BYTES,
            reinstalled_bytes=statistics.reinstalled_pages * PAGE_BYTES,
            install_wait_ns=statistics.install_wait_ns,
            asks_withdrawn=statistics.asks_withdrawn,
        )

    def _job_s(self) -> float | None:
        if self._job is None or not self._job.done_ns:
            return None
        return self._job.done_ns / 1e9 - self._started

    def _described_settings(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "policy": self.policy.name,
            "min_order": settings.min_order,
            "capacity": self.cycle.capacity,
            "delay_ns": self.delay_ns,
            "high_water_mark": self.high_water_mark,
            "workload": settings.workload,
            "work_order": settings.work_order,
            "backend": settings.backend,
            "vcpus": settings.vcpus,
            "seed": settings.seed,
            "host_zeroed": settings.host_zeroed,
            "poison": settings.poison,
            "wait_for_ack": settings.wait_for_ack,
        }


def _histogram(*histograms: np.ndarray) -> dict[str, int]:
    return percentiles(*histograms).as_dict()


def _describe(vcpu: VCpu) -> dict[str, Any]:
    return {
        "busy_ns": vcpu.busy_ns,
        "operations": vcpu.operations,
        "ended_ns": vcpu.ended_ns,
        "pauses": tuple(vcpu.pauses),
    }
