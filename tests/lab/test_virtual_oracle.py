"""The oracle's bound: no policy has a smaller footprint on the same work."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from common.errors import LabError
from guest.workloads.engine import JOURNAL_WORDS
from lab.experiment.metrics import RunResult
from lab.experiment.spec import RunSpec
from lab.virtual.costs import Costs
from lab.virtual.oracle import Oracle
from lab.virtual.run import run_virtual

MS = 1_000_000
COSTS = Costs.example()
SPEC = RunSpec(
    memory=32 << 20, high_water_mark=2, capacity=2, hold_ns=5 * MS, idle_ns=20 * MS, duration_ns=30 * MS, delay_ns=MS
)
# Where a refault costs nothing, the oracle's vCPUs go through the same history as those of a guest that never reports.
FREE_FAULTS = replace(COSTS, fault_ns=0.0)


def figure(result: RunResult, name: str) -> float:
    value = result.metrics[name]
    assert value is not None
    assert result.facts["complaints"] == []
    return value


@pytest.mark.parametrize("workload", ["memhog", "burst"])
@pytest.mark.parametrize("delay_ns", [MS, 10 * MS])
def test_no_policy_beats_the_oracle(workload: str, delay_ns: int) -> None:
    """The bound, stated where faults cost nothing: the oracle's vCPUs then go through the history of a guest that never
    reports, so its footprint is that of the pages in use at each moment. Where faults cost, its own refaults stretch
    its history, and the bound holds but for that.
    """
    spec = SPEC.but(workload=workload, delay_ns=delay_ns, cores=4)
    oracle, boundary, off = (
        figure(run_virtual(spec.but(policy=policy), FREE_FAULTS), "gib_min") for policy in ("oracle", "boundary", "off")
    )
    assert 0 < oracle <= boundary < off


def test_the_oracle_counts_what_it_gives_back_and_takes_again() -> None:
    result = run_virtual(SPEC.but(policy="oracle", duration_ns=60 * MS), COSTS)
    assert figure(result, "refaults") > 0
    returned, stayed = figure(result, "returned_bytes"), figure(result, "stayed_bytes")
    assert returned - stayed == figure(result, "refaults") * 4096
    # All that was ever touched is free at the end.
    assert stayed == figure(result, "first_touches") * 4096
    assert figure(result, "reports") == 0
    assert figure(result, "host_cpu_s") > 0


def test_the_oracle_keeps_what_is_used_again_sooner_than_a_refault_takes() -> None:
    oracle = Oracle(16, COSTS)
    journal = oracle._journal
    free, take = 3 << 8 | 1, 3 << 8  # page 3, order 0
    journal[:3] = 2, take, free
    assert oracle.settle(0.0, 100.0, 2, 1) == 0.0  # its first use is no refault
    journal[:2] = 1, take
    soon = 100.0 + oracle.threshold_ns / 2
    assert oracle.settle(soon, 50.0, 1, 1) == 0.0
    journal[:2] = 1, free
    oracle.settle(soon + 50.0, 50.0, 1, 0)
    journal[:2] = 1, take
    late = soon + 100.0 + 2 * oracle.threshold_ns
    assert oracle.settle(late, 50.0, 1, 1) == pytest.approx(COSTS.fault_ns)
    assert oracle.refaults == 1
    free_pages, absent_ns = oracle.finish(late + 1e6)
    assert free_pages == 0
    assert absent_ns == pytest.approx(2 * oracle.threshold_ns)
    journal[:2] = 1, free
    oracle.settle(late + 1e6, 0.0, 1, 0)
    free_pages, absent_ns = oracle.finish(late + 3e6)
    assert free_pages == 1
    assert absent_ns == pytest.approx(2 * oracle.threshold_ns + 2e6)


def test_a_journal_that_ran_over_is_an_error() -> None:
    oracle = Oracle(16, COSTS)
    oracle._journal[0] = np.int64(JOURNAL_WORDS)
    with pytest.raises(LabError, match="journal"):
        oracle.settle(0.0, 1.0, JOURNAL_WORDS, 0)
