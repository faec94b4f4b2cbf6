"""What is measured in a run: one table that the virtual clock, the real processes, tables and plots all go by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from lab.experiment.spec import RunSpec

__all__ = ["METRICS", "SERIES", "Metric", "RunResult"]


@dataclass(frozen=True)
class Metric:
    """One figure of a run.

    Attributes:
        unit: "ns", "s", "bytes", "pages", "GiB·min", "1/s", or "" for a count.
        better: +1 when more is better, -1 when less is, 0 when neither.
    """

    name: str
    title: str
    unit: str
    better: int


METRICS = {
    metric.name: metric
    for metric in (
        # Pages allocated plus pages freed, over the time in which the vCPUs were not pausing of their own will.
        Metric("page_ops_per_s", "page operations a second", "1/s", 1),
        Metric("job_s", "time to do the work", "s", -1),  # with work_pages only
        Metric("gib_min", "footprint", "GiB·min", -1),  # integral of resident memory until the end of the work
        Metric("peak_bytes", "peak footprint", "bytes", -1),
        # From the moment when all vCPUs are idle or done (an episode) until so much of what is free and was resident
        # then is given back; median over the episodes of a run. None: not reached in most of them.
        Metric("t50_s", "50 % returned after", "s", -1),
        Metric("t90_s", "90 % returned after", "s", -1),
        Metric("t99_s", "99 % returned after", "s", -1),
        Metric("returned_bytes", "returned", "bytes", 1),
        Metric("stayed_bytes", "stayed returned", "bytes", 1),  # returned less what was faulted in again, at the end
        # Pages that were given back and had to come back: by a fault of whoever touched them, or populated by the host
        # because an allocation asked for them (shared). First touches likewise.
        Metric("refaults", "refaults", "pages", -1),
        Metric("first_touches", "first touches", "pages", 0),
        Metric("zeroing_skipped_pages", "pages not cleared again", "pages", 1),  # the host proved them zero (Z1)
        Metric("reports", "reports", "", -1),
        Metric("reported_blocks", "blocks reported", "", -1),
        Metric("duplicates", "duplicate blocks", "", -1),  # reported again with no use in between
        Metric("runs", "reporting runs", "", -1),
        # Pulls and put-backs together; of these and of the nodes None when nothing was ever pulled.
        Metric("hold_p50_ns", "lock held, p50", "ns", -1),
        Metric("hold_p99_ns", "lock held, p99", "ns", -1),
        Metric("hold_max_ns", "lock held, longest", "ns", -1),
        Metric("nodes_hold_max", "list nodes under one hold, most", "", -1),
        Metric("nodes_per_block", "list nodes per pulled block", "", -1),
        Metric("alloc_p50_ns", "allocation while reporting, p50", "ns", -1),
        Metric("alloc_p99_ns", "allocation while reporting, p99", "ns", -1),
        Metric("alloc_p999_ns", "allocation while reporting, p99.9", "ns", -1),
        Metric("guest_cpu_s", "processor time, guest", "s", -1),
        Metric("host_cpu_s", "processor time, host", "s", -1),
        Metric("violations", "violations", "", -1),
        Metric("failed_allocations", "allocations that failed", "", -1),
    )
}

# Columns of a run's series, float64[n] each, times ascending from the start of the workload.
SERIES = ("t_s", "resident_bytes", "allocated_bytes", "reported_bytes")


@dataclass(frozen=True)
class RunResult:
    """What came of one run.

    Attributes:
        metrics: by name, exactly those of ``METRICS``; None where the run cannot tell.
        series: by name, exactly those of ``SERIES``.
        facts: what is not compared: complaints, how the run ended, versions. Plain JSON values.
    """

    spec: RunSpec
    metrics: dict[str, float | None]
    series: dict[str, npt.NDArray[np.float64]]
    facts: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON, keys in a fixed order; ``from_dict`` reads it."""
        return {
            "key": self.spec.key(),
            "spec": self.spec.as_dict(),
            "metrics": {name: self.metrics.get(name) for name in METRICS},
            "facts": self.facts,
            "series": {name: [round(float(value), 6) for value in self.series[name]] for name in SERIES},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The result that ``as_dict`` described; without a series when that was left out."""
        series = values.get("series") or {name: [] for name in SERIES}
        return cls(
            spec=RunSpec.from_dict(values["spec"]),
            metrics={name: values["metrics"].get(name) for name in METRICS},
            series={name: np.array(series[name], dtype=np.float64) for name in SERIES},
            facts=values.get("facts", {}),
        )
