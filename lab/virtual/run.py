"""One run in virtual time, from its specification to its result."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import UsageError
from common.geometry import PAGE_BYTES
from common.statistics import percentiles
from lab.experiment import derive
from lab.experiment.metrics import METRICS, SERIES, RunResult
from lab.experiment.spec import RunSpec
from lab.virtual.account import Books
from lab.virtual.costs import Costs
from lab.virtual.machine import VirtualMachine

__all__ = ["run_virtual"]


def run_virtual(spec: RunSpec, costs: Costs) -> RunResult:
    """Run ``spec``; the same specification and costs give the same result to the byte.

    Raises:
        UsageError: the specification asks for what there is not. LabError: a job that cannot end.
    """
    if spec.mode != "virtual":
        raise UsageError(f"mode: {spec.mode!r}; virtual time runs specifications of mode 'virtual'")
    machine = VirtualMachine(spec, costs)
    try:
        machine.run()
        return _result(machine)
    finally:
        machine.close()


def _result(machine: VirtualMachine) -> RunResult:
    complaints = machine.complaints()
    assert machine.work_ended is not None
    facts: dict[str, Any] = {
        "complaints": complaints,
        "work_s": machine.work_ended / 1e9,
        "settled_s": machine.world.clock.now / 1e9,
        "episodes": machine.books.episodes.count,
        "failed_runs": 0 if machine.reporter is None else machine.reporter.failed_runs,
    }
    if machine.reporter is not None and machine.reporter.under_lock:
        facts["lock_hold_ns"] = {"waiting": percentiles(machine.reporter.walk_waits).as_dict()}
    metrics = {**_work(machine), **_footprint(machine), **_reporting(machine), **_latencies(machine.books)}
    metrics["violations"] = max(machine.zone.statistics().violations, len(complaints))
    metrics["failed_allocations"] = machine.words.failed_allocations
    return RunResult(
        spec=machine.spec, metrics={name: metrics[name] for name in METRICS}, series=_series(machine), facts=facts
    )


def _work(machine: VirtualMachine) -> dict[str, float | None]:
    """Throughput over the vCPUs' mean time at work, the pauses of their own will left out."""
    spec, vcpus = machine.spec, machine.vcpus
    host_ns = machine.host.cpu_ns[0]
    if machine.oracle is not None:
        free, _ = machine.oracle.finish(machine.world.clock.now)
        host_ns += (free + machine.oracle.refaults) * machine.oracle.discard_ns
    guest_ns = sum(vcpu.cpu_ns[0] for vcpu in vcpus)
    guest_ns += 0.0 if machine.reporter is None else machine.reporter.cpu_ns[0]
    return {
        "page_ops_per_s": derive.throughput(
            [vcpu.work_operations for vcpu in vcpus], [vcpu.work_ended - vcpu.paused_ns for vcpu in vcpus]
        ),
        "job_s": (machine.work_ended or 0.0) / 1e9 if spec.work_pages else None,
        "guest_cpu_s": guest_ns / 1e9,
        "host_cpu_s": host_ns / 1e9,
    }


def _footprint(machine: VirtualMachine) -> dict[str, float | None]:
    books, statistics = machine.books, machine.zone.statistics()
    peak = books.peak
    # As in lab.live.account: what the host populated on request had come back, or was there for the first time.
    returned, refaults = statistics.returned_pages, statistics.refaults + statistics.reinstalled_pages
    first_touches = statistics.first_touches + statistics.installed_pages - statistics.reinstalled_pages
    times = {share: books.episodes.seconds(share) for share in books.episodes.SHARES}
    if machine.oracle is not None:
        free, _ = machine.oracle.finish(machine.world.clock.now)
        refaults = machine.oracle.refaults
        returned = refaults + free
        peak = machine.oracle.peak_pages
        times = dict.fromkeys(times, 0.0)  # whatever is free for good was given back as it was freed
    return {
        "gib_min": books.gib_minutes(machine.work_resident_ns),
        "peak_bytes": peak * PAGE_BYTES,
        "t50_s": times[0.5],
        "t90_s": times[0.9],
        "t99_s": times[0.99],
        "returned_bytes": returned * PAGE_BYTES,
        "stayed_bytes": derive.stayed_bytes(returned * PAGE_BYTES, refaults * PAGE_BYTES),
        "refaults": refaults,
        "first_touches": first_touches,
        "zeroing_skipped_pages": statistics.zeroing_skipped_pages,
    }


def _reporting(machine: VirtualMachine) -> dict[str, float | None]:
    books, words = machine.books, machine.words
    held = percentiles(books.holds)
    pulled = words.pulled_blocks
    return {
        "reports": books.reports,
        "reported_blocks": books.blocks,
        "duplicates": books.duplicates,
        "runs": books.runs,
        "hold_p50_ns": held.p50 if pulled else None,
        "hold_p99_ns": held.p99 if pulled else None,
        "hold_max_ns": held.max if pulled else None,
        "nodes_hold_max": machine.zone.statistics().nodes_hold_max if pulled else None,
        "nodes_per_block": words.nodes_visited / pulled if pulled else None,
    }


def _latencies(books: Books) -> dict[str, float | None]:
    return {
        "alloc_p50_ns": books.latencies.quantile(0.5),
        "alloc_p99_ns": books.latencies.quantile(0.99),
        "alloc_p999_ns": books.latencies.quantile(0.999),
    }


def _series(machine: VirtualMachine) -> dict[str, npt.NDArray[np.float64]]:
    """The oracle's resident pages are the allocated ones, without what is free for less than a refault costs."""
    times, resident, allocated, reported = machine.books.series.columns()
    if machine.oracle is not None:
        resident = allocated
    columns = (times / 1e9, *(column * PAGE_BYTES for column in (resident, allocated, reported)))
    return dict(zip(SERIES, columns, strict=True))
