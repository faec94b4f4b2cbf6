"""How fast virtual time runs: page operations a second on one core, the production kernels and the clock together."""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks.rows import Row, median, spread
from common.errors import LabError
from lab.experiment.spec import RunSpec
from lab.virtual.costs import Costs
from lab.virtual.run import run_virtual

__all__ = ["run"]

_TARGET = 10e6
_WORK_PAGES = 10_000_000
_CASES = (("churn", 0), ("page-fault", 0), ("memhog", 9))


def run(rounds: int) -> Iterator[Row]:
    """One row a workload: a job of so many page operations, from the specification to the result."""
    rates: dict[tuple[str, int], list[float]] = {case: [] for case in _CASES}
    for number in range(rounds + 1):
        for case in _CASES:
            workload, order = case
            spec = RunSpec(workload=workload, work_order=order, work_pages=_WORK_PAGES)
            start = time.process_time()
            result = run_virtual(spec, Costs.example())
            elapsed = time.process_time() - start
            if result.facts["complaints"]:
                raise LabError(f"a virtual run of the benchmark: {result.facts['complaints'][0]}")
            if number:
                rates[case].append(_WORK_PAGES / elapsed)
    for (workload, order), samples in rates.items():
        yield Row(
            name=f"virtual time, {workload}, order {order}",
            unit="page operations/s",
            value=median(samples),
            spread=spread(samples),
            against="the same second of a processor",
            ratio=None,
            target=f">= {_TARGET:.0f}",
            ok=median(samples) >= _TARGET,
        )
