"""Virtual time: the same history each time, nothing lost in the zone, and the promises of the reporter to the ns."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.errors import LabError, UsageError
from guest.allocator.zone import Zone, ZoneSettings
from guest.memory import mark_returned
from guest.reporting.cycle import Batch, Outcome
from guest.workloads.vcpu import VCpu, WorkloadSettings
from lab.experiment.metrics import METRICS, SERIES, RunResult
from lab.experiment.spec import RunSpec
from lab.virtual.account import Episodes
from lab.virtual.costs import Costs
from lab.virtual.machine import VirtualMachine
from lab.virtual.run import run_virtual
from lab.virtual.survey import survey_batch

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
MS = 1_000_000
COSTS = Costs.example()
# Small enough for kernels without the compiler; a high-water mark and a capacity that go with so little memory.
SPEC = RunSpec(
    memory=32 * MIB,
    high_water_mark=2,
    capacity=2,
    hold_ns=5 * MS,
    idle_ns=40 * MS,
    duration_ns=100 * MS,
    delay_ns=5 * MS,
)
PROGRAM = """
import json, sys
from lab.experiment.spec import RunSpec
from lab.virtual.account import Episodes
from lab.virtual.costs import Costs
from lab.virtual.run import run_virtual
spec = RunSpec.from_dict(json.loads(sys.argv[1]))
print(json.dumps(run_virtual(spec, Costs.example()).as_dict()))
"""


def ran(spec: RunSpec, costs: Costs = COSTS) -> RunResult:
    """The result, in which nothing may be wrong."""
    result = run_virtual(spec, costs)
    assert result.facts["complaints"] == []
    assert result.metrics["violations"] == 0
    return result


def metric(result: RunResult, name: str) -> float:
    value = result.metrics[name]
    assert value is not None, name
    return value


@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("workload", ["memhog", "churn", "burst", "build", "page-fault"])
def test_the_zone_is_whole_again_at_the_end(workload: str, vcpus: int) -> None:
    """S4: free + in flight + allocated = managed, and validate() finds nothing, whatever was interleaved."""
    spec = SPEC.but(workload=workload, vcpus=vcpus, work_order=0, min_order=4, duration_ns=12 * MS, delay_ns=MS)
    result = ran(spec)
    assert set(result.metrics) == set(METRICS)
    assert metric(result, "page_ops_per_s") > 0
    assert metric(result, "reports") > 0
    assert metric(result, "returned_bytes") >= metric(result, "stayed_bytes") > 0


def test_frees_and_allocations_fall_between_pull_and_put_back() -> None:
    machine = VirtualMachine(
        SPEC.but(workload="churn", work_order=0, min_order=0, duration_ns=8 * MS, delay_ns=MS), COSTS
    )
    moved = []
    cycle = machine.cycle
    assert cycle is not None
    pull, put_back = cycle.pull, cycle.put_back
    seen = 0

    def pulling() -> object:
        nonlocal seen
        seen = sum(vcpu.work_operations for vcpu in machine.vcpus)
        return pull()

    def putting_back(batch: object, outcome: Outcome) -> int:
        moved.append(sum(vcpu.work_operations for vcpu in machine.vcpus) - seen)
        return put_back(batch, outcome)  # type: ignore[arg-type]

    cycle.pull, cycle.put_back = pulling, putting_back  # type: ignore[method-assign,assignment]
    machine.run()
    assert machine.complaints() == []
    machine.close()
    assert sum(pages > 0 for pages in moved) > len(moved) / 2


@pytest.mark.parametrize("policy", ["boundary", "off", "oracle"])
def test_the_same_specification_gives_the_same_bytes(policy: str) -> None:
    spec = SPEC.but(policy=policy, workload="churn", vcpus=2, work_order=0, duration_ns=10 * MS)
    first, second = (json.dumps(ran(spec).as_dict()) for _ in range(2))
    assert first == second
    assert json.dumps(ran(spec.but(seed=2)).as_dict()["metrics"]) != json.dumps(json.loads(first)["metrics"])


def test_two_processes_give_the_same_bytes() -> None:
    spec = SPEC.but(workload="burst", vcpus=2, work_order=0, duration_ns=10 * MS)
    arguments = [sys.executable, "-c", PROGRAM, json.dumps(spec.as_dict())]
    texts = [subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True, text=True).stdout for _ in range(2)]
    assert texts[0] == texts[1]
    assert json.loads(texts[0]) == json.loads(json.dumps(ran(spec).as_dict()))


@pytest.mark.parametrize("delay_ns", [0, MS, 7 * MS])
def test_b4_a_run_begins_the_delay_after_its_request(delay_ns: int) -> None:
    """B4, in virtual time to the ns; the first request is that of the registration, at 0."""
    machine = VirtualMachine(SPEC.but(delay_ns=delay_ns), COSTS)
    machine.run()
    reporter = machine.reporter
    assert reporter is not None
    assert reporter.requested_at[0] == 0
    assert len(reporter.began_at) > 1
    waited = np.array(reporter.began_at) - np.array(reporter.requested_at)
    assert waited == pytest.approx(delay_ns, abs=1e-3)
    machine.close()


def test_p2_a_quiet_guest_makes_no_run() -> None:
    """P2: held for most of the run, nothing is freed, so nothing is run after the first."""
    short, long = (
        ran(SPEC.but(hold_ns=hold_ns, duration_ns=hold_ns + 60 * MS, idle_ns=MS * 1000))
        for hold_ns in (50 * MS, 5000 * MS)
    )
    assert short.metrics["runs"] == long.metrics["runs"]
    assert short.metrics["reports"] == long.metrics["reports"]


def test_off_reports_nothing() -> None:
    result = ran(SPEC.but(policy="off"))
    assert result.metrics["reports"] == result.metrics["runs"] == result.metrics["returned_bytes"] == 0
    assert result.metrics["hold_max_ns"] is result.metrics["t50_s"] is None


def test_throughput_falls_as_faults_cost_more() -> None:
    """Without reporting each fault is a first touch, so the job takes longer by exactly what they cost."""
    job = SPEC.but(workload="page-fault", policy="off", work_pages=20_000)
    runs = [ran(job, replace(COSTS, fault_ns=cost, first_fault_ns=cost)) for cost in (0.0, 500.0, 4000.0)]
    touches = metric(runs[0], "first_touches")
    assert touches > 0
    times = [metric(run, "job_s") for run in runs]
    assert times[1] - times[0] == pytest.approx(touches * 500e-9)
    assert times[2] - times[0] == pytest.approx(touches * 4000e-9)
    reported = [
        metric(
            ran(job.but(policy="boundary", delay_ns=MS), replace(COSTS, fault_ns=cost, first_fault_ns=cost)),
            "page_ops_per_s",
        )
        for cost in (0.0, 8000.0)
    ]
    assert reported[1] < reported[0] / 2


# The same work whatever it takes: then two runs differ in nothing but its pace.
CROWD = SPEC.but(workload="churn", vcpus=2, work_order=0, policy="off", work_pages=20_000)


def test_more_to_do_than_processors_makes_everyone_slower() -> None:
    one, two, three = (metric(ran(CROWD.but(cores=cores)), "job_s") for cores in (1, 2, 3))
    assert one == pytest.approx(2 * two)
    assert three == two


def test_a_shared_memory_slows_everyone() -> None:
    fast, slow = (metric(ran(CROWD, replace(COSTS, work_slowdown=by)), "job_s") for by in (1.0, 2.0))
    assert slow == pytest.approx(2 * fast)


def test_s12_an_inhibited_host_returns_nothing_and_is_reported_to_all_the_same() -> None:
    result = ran(SPEC.but(inhibit_discard=True))
    assert metric(result, "reports") > 0
    assert result.metrics["returned_bytes"] == result.metrics["refaults"] == result.metrics["duplicates"] == 0


def test_a_job_runs_until_its_work_is_done() -> None:
    spec = SPEC.but(workload="churn", work_order=0, duration_ns=1, work_pages=20_000)
    half, whole = (ran(spec.but(work_pages=pages)) for pages in (10_000, 20_000))
    assert metric(half, "job_s") < metric(whole, "job_s")
    assert metric(whole, "job_s") == whole.facts["work_s"] > 1e-9
    done = metric(whole, "page_ops_per_s") * metric(whole, "job_s")
    assert 20_000 <= done < 20_000 + 4096
    assert ran(SPEC).metrics["job_s"] is None


def test_a_job_that_cannot_get_on_ends() -> None:
    machine = VirtualMachine(SPEC.but(workload="page-fault", work_order=9, work_pages=10, fill=0.01), COSTS)
    with pytest.raises(LabError, match="0 of 10 page operations"):
        machine.run()
    machine.close()


def test_memory_freed_before_an_idle_time_is_given_back_in_it() -> None:
    result = ran(SPEC)
    assert result.facts["episodes"] >= 2
    assert 0 < metric(result, "t50_s") <= metric(result, "t90_s") <= metric(result, "t99_s") < 0.04
    # The delay comes first, since the request is made while memory is being freed.
    assert metric(result, "t99_s") > 0.004


def test_an_idle_time_too_short_to_give_anything_back_counts_for_none() -> None:
    machine = VirtualMachine(SPEC.but(delay_ns=2_000 * MS, idle_ns=MS, hold_ns=MS, duration_ns=30 * MS), COSTS)
    machine.run()
    assert machine.books.episodes.count > 3
    times = machine.books.episodes._times[0.5]
    assert sum(math.isfinite(time) for time in times) <= 1  # the last one, in which the guest settles
    assert machine.books.episodes.seconds(0.5) is None  # most did not get there
    machine.close()


def test_a_rest_in_which_nothing_was_freed_goes_on_with_the_last() -> None:
    """As ``derive.joined``: the second rest of the same work is no episode, the third is."""
    episodes = Episodes()
    episodes.begin(0.0, 100, 0, (7, 0))
    episodes.progress(1e9, 50)
    episodes.end()
    episodes.progress(2e9, 80)  # somebody works: it may be what was freed now
    episodes.begin(3e9, 100, 90, (7, 0))
    assert episodes.count == 1
    assert [episodes.seconds(share) for share in (0.5, 0.9)] == [1.0, 3.0]
    episodes.begin(5e9, 10, 100, (9, 0))
    episodes.finish(6e9)
    assert episodes.count == 2
    assert episodes._times[0.99] == [math.inf, math.inf]


def test_what_the_end_cuts_off_counts_for_nothing_where_nobody_waits() -> None:
    for least_ns, times in ((0.0, [math.inf]), (2e9, [])):
        episodes = Episodes()
        episodes.begin(0.0, 100, 0, (7, 0))
        episodes.finish(1e9, least_ns)
        assert episodes._times[0.5] == times


def test_the_series_is_steady_and_agrees_with_the_integral() -> None:
    result = ran(SPEC.but(duration_ns=3_000 * MS))
    times = result.series["t_s"]
    assert all(len(result.series[name]) == len(times) for name in SERIES)
    assert 384 <= len(times) <= 768
    assert np.diff(times) == pytest.approx(times[1] - times[0])
    work_s = result.facts["work_s"]
    mean = result.series["resident_bytes"][times <= work_s].mean() / (1 << 30) * work_s / 60
    assert metric(result, "gib_min") == pytest.approx(mean, rel=0.03)
    assert result.series["resident_bytes"].max() <= metric(result, "peak_bytes")
    assert (result.series["allocated_bytes"] <= result.series["resident_bytes"]).all()


def test_s8_a_failed_report_backs_off_and_leaves_nothing_out() -> None:
    """S8: failed batches go back unflagged, and the next runs wait twice as long each."""
    machine = VirtualMachine(
        SPEC.but(delay_ns=MS), COSTS, outcome=lambda number: Outcome.FAILED if number < 3 else Outcome.DONE
    )
    machine.run()
    reporter = machine.reporter
    assert reporter is not None
    assert machine.complaints() == []
    assert reporter.failed_runs == 3
    waited = np.array(reporter.began_at[:4]) - np.array(reporter.requested_at[:4])
    assert waited == pytest.approx([MS, 20 * MS, 40 * MS, 80 * MS], abs=1e-3)
    assert machine.books.reports > 0
    machine.close()


def test_blocks_reported_again_with_no_use_in_between_are_duplicates() -> None:
    zone = Zone.private(ZoneSettings(16 * MIB, trigger="off"))
    errors: list[BaseException] = []
    vcpu = VCpu(zone, 0, WorkloadSettings("memhog", 512, 9, 0, 0, 1), on_error=errors.append, timed=False)
    vcpu.step(512)
    used = int(vcpu.held[0, 0])
    assert not errors
    untouched = used ^ 512
    batch = Batch(np.array([used, untouched], dtype=np.int64), np.array([9, 9], dtype=np.int64), last=True)
    assert survey_batch(zone.address, batch) == (1, 512, 0)
    mark_returned(zone.address, batch.pfns, batch.orders)
    assert survey_batch(zone.address, batch) == (1, 0, 1)
    zone.close()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mode": "live"}, "mode"),
        ({"policy": "nonsense"}, "policy"),
        ({"workload": "nonsense"}, "workload"),
        ({"cores": 0}, "cores"),
    ],
)
def test_a_wrong_specification_is_told(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        run_virtual(SPEC.but(**changes), COSTS)
