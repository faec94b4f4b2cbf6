"""What one guest did, from its start to its end, put together from all of its parts."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import LabError
from common.geometry import PAGE_BYTES
from common.statistics import percentiles
from guest.workloads import engine

if TYPE_CHECKING:
    from guest.machine import Machine
    from guest.workloads.vcpu import VCpu

__all__ = ["GuestResult", "collect"]


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
    reports_timeline: tuple[list[int], ...] = ()
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


def collect(machine: Machine) -> GuestResult:
    """The result so far of ``machine``; walks its whole zone. Final figures after ``Machine.stop_work``."""
    machine.usage.take()
    statistics, reporter, link, resident = machine.sample()
    complaints = list(machine.complaints())
    try:
        machine.zone.validate()
    except LabError as error:
        complaints.append(str(error))
    holds = {
        "pull": _histogram(machine.cycle.pull_holds),
        "put_back": _histogram(machine.cycle.put_back_holds),
        "all": _histogram(machine.cycle.pull_holds, machine.cycle.put_back_holds),
    }
    if machine.policy.under_lock:
        holds["waiting"] = _histogram(machine.cycle.walk_wait_ns)  # the part of "pull" that was not the walk
    return GuestResult(
        ok=not complaints and machine.error is None,
        name=machine.name,
        memory_bytes=machine.settings.memory,
        peak_resident_bytes=machine.peak_resident_bytes,
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
        alloc_ns=_histogram(*(row for vcpu in machine.vcpus for row in vcpu.times)),
        alloc_reporting_ns=_histogram(*(vcpu.times[engine.T_REPORTING] for vcpu in machine.vcpus)),
        page_operations=sum(int(vcpu.state[engine.S_OPERATIONS]) for vcpu in machine.vcpus),
        turns=sum(int(vcpu.state[engine.S_TURNS]) for vcpu in machine.vcpus),
        duration_s=time.monotonic() - machine.started_s,
        work_s=(machine.work_ended_s or time.monotonic()) - machine.started_s,
        reports=0 if reporter is None else reporter.batches,
        blocks=0 if reporter is None else reporter.blocks,
        reported_bytes=0 if reporter is None else reporter.pages * PAGE_BYTES,
        withdrawn=link.withdrawn,
        failed=link.failed,
        connections=link.connections,
        stale_acks=link.stale_acks,
        runs=statistics.runs if reporter is None else reporter.runs,
        wakes=0 if reporter is None else reporter.wakes,
        unreported_bytes=machine.zone.unreported_pages() * PAGE_BYTES,
        repairs=statistics.repairs,
        nodes_visited=statistics.nodes_visited,
        nodes_hold_max=statistics.nodes_hold_max,
        pulled_blocks=statistics.pulled_blocks,
        failed_allocations=statistics.failed_allocations,
        cpu_s=time.process_time() - machine.cpu_before_s,
        job_s=_job_s(machine),
        started_ns=int(machine.started_s * 1e9),
        per_vcpu=tuple(_describe(vcpu) for vcpu in machine.vcpus),
        series=machine.usage.columns(),
        pressure=statistics.pressure,
        commands=link.commands,
        settings=_described_settings(machine),
        reports_timeline=() if machine.reporter is None else tuple(machine.reporter.timeline.rows()),
        installs=statistics.installs,
        installed_bytes=statistics.installed_pages * PAGE_BYTES,
        reinstalled_bytes=statistics.reinstalled_pages * PAGE_BYTES,
        install_wait_ns=statistics.install_wait_ns,
        asks_withdrawn=statistics.asks_withdrawn,
    )


def _job_s(machine: Machine) -> float | None:
    if machine.job is None or not machine.job.done_ns:
        return None
    return machine.job.done_ns / 1e9 - machine.started_s


def _described_settings(machine: Machine) -> dict[str, Any]:
    settings = machine.settings
    return {
        "policy": machine.policy.name,
        "min_order": settings.min_order,
        "capacity": machine.cycle.capacity,
        "delay_ns": machine.delay_ns,
        "high_water_mark": machine.high_water_mark,
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
        "pauses": tuple(vcpu.pauses.rows()),
    }
