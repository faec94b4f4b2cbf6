"""What the accounts of a guest and its host say in the terms of an experiment."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from common.geometry import PAGE_BYTES
from lab.experiment import derive
from lab.experiment.metrics import METRICS, SERIES, RunResult
from lab.experiment.spec import RunSpec
from lab.hosts import HOST_DRIVEN, HOST_STARTED, host_period_ns
from lab.outcome import Account, RunOutcome
from lab.result import account_checks

__all__ = ["episodes_of", "metrics_of", "result_of", "series_of"]

Series = dict[str, npt.NDArray[np.float64]]
_NEVER = {"count": 0}  # a histogram of nothing


def result_of(spec: RunSpec, outcome: RunOutcome) -> RunResult:
    """The result of a run of one guest; both accounts are there."""
    host, guest = outcome.host.account, outcome.guests[0].account
    assert host is not None
    assert guest is not None
    failed = [f"{check.name}: {check.detail}" for check in account_checks(outcome) if not check.ok]
    series = series_of(guest)
    metrics = metrics_of(spec, host, guest, series)
    # Accounts that disagree are a violation as much as a lost stamp is: a byte is not where it must be.
    metrics["violations"] = max(int(guest["violations"]), len(failed))
    facts: dict[str, Any] = {
        "complaints": list(guest["complaints"]),
        "failed_checks": failed,
        "exit_codes": {end.name: end.exit_code for end in outcome.processes},
        "duration_s": outcome.duration_s,
        "work_s": guest["work_s"],
        "episodes": len(episodes_of(guest)),
        "turns": guest["turns"],
        "freed_bytes_proven": host["host"]["freed_bytes"],
        "proof": host["host"]["proof"],
        "alloc_ns": guest["alloc_ns"],
        "lock_hold_ns": guest["lock_hold_ns"],
        **{name: guest[name] for name in ("withdrawn", "failed", "connections", "unreported_bytes")},
    }
    return RunResult(spec=spec, metrics=metrics, series=series, facts=facts)


def series_of(guest: Account) -> Series:
    """Columns of ``SERIES``, float64[n]; time 0 is the start of the work, the first row is from just before."""
    columns = guest["series"]
    times = np.maximum(np.array(columns["t_ns"], dtype=np.float64) - guest["started_ns"], 0.0) / 1e9
    return {"t_s": times} | {name: np.array(columns[name], dtype=np.float64) for name in SERIES[1:]}


def episodes_of(guest: Account) -> list[derive.Span]:
    """When all vCPUs of a guest were idle or done, in s from the start of the work."""
    started_ns = guest["started_ns"]
    last_ns = guest["series"]["t_ns"][-1]

    def spans(vcpu: Account) -> list[derive.Span]:
        done = [(vcpu["ended_ns"], last_ns)] if vcpu["ended_ns"] else []
        return [((start - started_ns) / 1e9, (end - started_ns) / 1e9) for start, end in [*vcpu["pauses"], *done]]

    return derive.episodes(spans(vcpu) for vcpu in guest["per_vcpu"])


def metrics_of(spec: RunSpec, host: Account, guest: Account, series: Series) -> dict[str, float | None]:
    """Every one of ``METRICS``.

    None where there was no job, no pulled block, no allocation while reporting, or a share was not reached.
    """
    heard = host["host"]
    # A host that claims blocks itself holds the guest's lock; otherwise the guest's reporter does.
    holder = host["guests"][0] if spec.policy in HOST_DRIVEN else guest
    pulled = guest["pulled_blocks"]
    holds = holder["lock_hold_ns"]["all"] if pulled else _NEVER
    allocations = guest["alloc_reporting_ns"]
    # What the host populated for an allocation had been given back, or was never there: like what a touch finds.
    refaults = guest["refaults"] + guest["reinstalled_bytes"] // PAGE_BYTES
    first_touches = guest["first_touches"] + (guest["installed_bytes"] - guest["reinstalled_bytes"]) // PAGE_BYTES
    spans = derive.joined(episodes_of(guest), series["t_s"], series["allocated_bytes"], guest["work_s"])
    period_ns = host_period_ns(spec.policy, spec.delay_ns)
    if spec.policy in HOST_STARTED and period_ns is not None:  # nobody waits for the host's next word
        spans = derive.without_cut_off(spans, period_ns / 1e9)
    times = derive.times_to_return(series["t_s"], series["resident_bytes"], series["allocated_bytes"], spans)
    end_s = guest["work_s"] if guest["job_s"] is None else guest["job_s"]
    found: dict[str, float | None] = {
        "page_ops_per_s": derive.throughput(
            [vcpu["operations"] for vcpu in guest["per_vcpu"]], [vcpu["busy_ns"] for vcpu in guest["per_vcpu"]]
        ),
        "job_s": guest["job_s"] if spec.work_pages else None,
        "gib_min": derive.gib_min(series["t_s"], series["resident_bytes"], end_s),
        "peak_bytes": guest["peak_resident_bytes"],
        **dict(zip(("t50_s", "t90_s", "t99_s"), times, strict=True)),
        "stayed_bytes": derive.stayed_bytes(guest["returned_bytes"], refaults * PAGE_BYTES),
        "refaults": refaults,
        "first_touches": first_touches,
        **{name: guest[name] for name in ("returned_bytes", "runs", "violations", "zeroing_skipped_pages")},
        "reports": heard["reports"],
        "reported_blocks": heard["blocks"],
        "duplicates": heard["duplicates"],
        "nodes_hold_max": guest["nodes_hold_max"] if pulled else None,
        "nodes_per_block": guest["nodes_visited"] / pulled if pulled else None,
        **_percentiles("hold", holds, ("p50", "p99", "max")),
        **_percentiles("alloc", allocations, ("p50", "p99", "p999")),
        "guest_cpu_s": guest["cpu_s"],
        "host_cpu_s": heard["cpu_s"],
        "failed_allocations": guest["failed_allocations"],
    }
    return {name: found[name] for name in METRICS}


def _percentiles(name: str, histogram: Account, keys: tuple[str, ...]) -> dict[str, float | None]:
    """Metrics of one histogram by name; None each when it is empty."""
    return {f"{name}_{key}_ns": histogram[key] if histogram["count"] else None for key in keys}
