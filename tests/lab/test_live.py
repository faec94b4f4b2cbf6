"""Runs of an experiment with real processes: every figure is there, and nothing is left however a run ends."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import InvariantViolation, LabError, MachineError, UsageError
from common.names import SHM_DIR
from lab.experiment.metrics import METRICS, SERIES, RunResult
from lab.experiment.spec import RunSpec
from lab.live import run
from lab.live.account import episodes_of, metrics_of, result_of, series_of
from lab.live.run import host_and_guest, run_live
from lab.orchestrate import LabPlan
from lab.outcome import ProcessEnd, RunOutcome
from tests.lab.build import agreeing_outcome, guest_account, host_account
from tests.support import leftovers, long_enough, wait_until

pytestmark = pytest.mark.timeout(400)  # the first run compiles the kernels

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 300.0
MIB = 1 << 20
MS = 1_000_000
# Two vCPUs that take turns, everything reported at once: runs are active while the other allocates.
EAGER = RunSpec(
    mode="live", memory=16 * MIB, vcpus=2, work_order=0, min_order=0, high_water_mark=0, delay_ns=0,
    hold_ns=0, idle_ns=10 * MS, duration_ns=200 * MS,
)  # fmt: skip
LONG = EAGER.but(duration_ns=3600 * 1000 * MS)


@pytest.fixture
def labs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the labs of all runs of a test; fails the test that leaves an object or queue of one behind."""
    names: list[str] = []

    def noted(spec: RunSpec, lab: str, folder: Path) -> LabPlan:
        names.append(lab)
        return host_and_guest(spec, lab, folder)

    monkeypatch.setattr(run, "host_and_guest", noted)
    yield names
    for lab in names:
        assert leftovers(lab, ["guest-1"]) == []


def numbers(result: RunResult) -> dict[str, float]:
    """The metrics that the run could tell."""
    return {name: value for name, value in result.metrics.items() if value is not None}


def assert_sound(result: RunResult) -> None:
    """What holds of every run that went well."""
    assert result.metrics["violations"] == 0
    assert result.facts["failed_checks"] == []
    assert result.facts["exit_codes"] == {"host": 0, "guest-1": 0}
    assert set(result.metrics) == set(METRICS)
    assert set(result.series) == set(SERIES)
    assert len({column.size for column in result.series.values()}) == 1
    assert (np.diff(result.series["t_s"]) >= 0).all()
    assert result.series["resident_bytes"].max() == result.metrics["peak_bytes"]
    assert RunResult.from_dict(result.as_dict()).metrics == result.metrics


def lasting(spec: RunSpec, enough: Callable[[dict[str, float]], bool]) -> RunResult:
    """A run of ``spec`` that is sound, and long enough for its metrics to be."""

    def run(factor: int) -> RunResult:
        result = run_live(spec.but(duration_ns=spec.duration_ns * factor))
        assert_sound(result)
        return result

    return long_enough(run, lambda result: enough(numbers(result)))


def test_memhog_gives_every_metric(labs: list[str]) -> None:
    """As a job, which ends by itself: the duration is not looked at."""
    result = run_live(LONG.but(work_pages=40_000, idle_ns=300 * MS))
    assert_sound(result)
    found = numbers(result)
    assert set(found) == set(METRICS)
    assert 0 < found["t50_s"] <= found["t90_s"] <= found["t99_s"]
    assert found["hold_p50_ns"] <= found["hold_p99_ns"] <= found["hold_max_ns"]
    assert found["alloc_p50_ns"] <= found["alloc_p99_ns"] <= found["alloc_p999_ns"]
    assert found["returned_bytes"] == result.facts["freed_bytes_proven"] > found["stayed_bytes"] > 0
    # All is free at the end and was given back: what stayed is what was ever touched.
    assert found["stayed_bytes"] == found["first_touches"] * 4096
    assert found["reported_blocks"] >= found["reports"] >= found["runs"] > 0
    for name in ("page_ops_per_s", "job_s", "gib_min", "refaults", "nodes_per_block", "guest_cpu_s", "host_cpu_s"):
        assert found[name] > 0, name
    assert len(labs) == 1


def test_off_reports_nothing_and_a_run_ends_when_its_time_is_over(labs: list[str]) -> None:
    result = run_live(EAGER.but(policy="off"))
    assert_sound(result)
    for name in ("reports", "reported_blocks", "runs", "returned_bytes", "refaults", "stayed_bytes", "duplicates"):
        assert result.metrics[name] == 0, name
    for name in ("job_s", "t90_s", "hold_p50_ns", "hold_max_ns", "alloc_p50_ns", "nodes_hold_max", "nodes_per_block"):
        assert result.metrics[name] is None, name
    assert result.facts["work_s"] >= EAGER.duration_ns / 1e9
    assert result.series["resident_bytes"][-1] == result.metrics["peak_bytes"]


def test_s12_an_inhibited_host_hears_of_all_and_takes_nothing(labs: list[str]) -> None:
    result = lasting(EAGER.but(inhibit_discard=True), lambda found: found["reports"] > 0)
    found = numbers(result)
    assert found["reports"] > 0
    assert found["returned_bytes"] == found["refaults"] == 0
    assert result.metrics["t50_s"] is None


def test_hint_runs_as_often_as_its_host_says(labs: list[str]) -> None:
    """Its delay is the host's period: with the default of 2 s there would be one run."""
    spec = EAGER.but(policy="hint", delay_ns=50 * MS, duration_ns=1000 * MS)
    result = lasting(spec, lambda found: found["runs"] > 2 and found["returned_bytes"] > 0)
    found = numbers(result)
    assert found["runs"] > 2
    assert found["returned_bytes"] == result.facts["freed_bytes_proven"] > 0


def test_shared_is_served_by_a_host_of_its_own_kind(labs: list[str]) -> None:
    """Claims, and pages that the host populated again, to the byte; it looks for guests four times a second."""
    spec = EAGER.but(policy="shared", delay_ns=5 * MS, duration_ns=3000 * MS)
    result = lasting(spec, lambda found: found["refaults"] > 0)
    found = numbers(result)
    assert found["returned_bytes"] == result.facts["freed_bytes_proven"] > 0
    assert found["refaults"] > 0
    assert found["stayed_bytes"] == found["returned_bytes"] - found["refaults"] * 4096 >= 0
    assert found["reports"] >= found["runs"] > 0
    assert found["hold_p50_ns"] <= found["hold_p99_ns"] <= found["hold_max_ns"]
    assert found["host_cpu_s"] > 0


def test_several_runs_at_once_in_threads_know_nothing_of_each_other(labs: list[str]) -> None:
    specs = [EAGER.but(seed=seed) for seed in (1, 2)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda spec: lasting(spec, lambda found: found["returned_bytes"] > 0), specs))
    assert len(set(labs)) == len(labs) >= 2
    for spec, result in zip(specs, results, strict=True):
        assert result.spec.seed == spec.seed
        assert numbers(result)["returned_bytes"] > 0


def test_it_runs_in_a_worker_process() -> None:
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        assert_sound(pool.submit(run_live, EAGER.but(policy="off")).result(LIMIT_S))


def test_a_guest_that_cannot_start_is_told_in_its_own_words(labs: list[str]) -> None:
    with pytest.raises(MachineError, match=r"guest-1 ended with exit code 3(.|\n)*use a smaller --memory"):
        run_live(EAGER.but(memory=1 << 40))
    assert len(labs) == 1


def test_settings_that_the_guest_refuses_are_wrong_usage(labs: list[str]) -> None:
    with pytest.raises(UsageError, match="17825792"):
        run_live(EAGER.but(memory=17 * MIB))
    assert len(labs) == 1


@pytest.mark.parametrize("changes", [{"mode": "virtual"}, {"policy": "mining"}])
def test_what_no_run_can_be_is_found_before_one_starts(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="|".join(changes.values())):
        run_live(EAGER.but(**changes))


def test_ctrl_c_ends_both_processes_and_then_the_run() -> None:
    script = f"from lab.live.run import run_live, RunSpec\nrun_live({LONG!r})"
    started = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True)

    def names() -> list[Path]:
        return list(Path(SHM_DIR).glob(f"fpr.live-{started.pid}-*.guest-1.zone"))

    try:
        wait_until(lambda: names() or started.poll() is not None, LIMIT_S, what="the guest")
        assert started.poll() is None
        started.send_signal(signal.SIGINT)
        _out, err = started.communicate(timeout=LIMIT_S)
    finally:
        started.kill()
        started.wait()
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert leftovers_of(started.pid) == []


def leftovers_of(pid: int) -> list[str]:
    """Objects and queues of all labs of process ``pid``."""
    folders = [Path(SHM_DIR), Path("/dev/mqueue")]
    return [str(path) for folder in folders if folder.is_dir() for path in folder.glob(f"fpr.live-{pid}-*")]


# How a run that did not go well is told


def ended(host: int, guest: int, *, problem: str | None, account: bool = True) -> RunOutcome:
    """An outcome in which both wrote an account (or the guest none) and ended with these codes."""
    outcome = agreeing_outcome(problem=problem, watched=False, observations={})
    theirs = ProcessEnd("guest-1", guest, "guest's words", outcome.guests[0].account if account else None)
    return replace(outcome, host=ProcessEnd("host", host, "host's words", outcome.host.account), guests=(theirs,))


@pytest.mark.parametrize(
    ("outcome", "kind", "said"),
    [
        (ended(-15, 2, problem="guest-1 failed", account=False), UsageError, "guest-1.*code 2(.|\n)*guest's words"),
        (ended(3, -15, problem="the host ended", account=False), MachineError, "host.*code 3(.|\n)*host's words"),
        (ended(-9, -15, problem="the host ended", account=False), LabError, "host was ended by signal 9"),
        (ended(-15, -6, problem="guest-1 failed", account=False), LabError, "guest-1 was ended by signal 6"),
        (ended(0, 4, problem="guest-1 failed", account=False), InvariantViolation, "guest's words"),
        (ended(0, 0, problem="guest-1 still ran"), LabError, "guest-1 still ran"),
        (ended(0, 0, problem=None, account=False), LabError, "guest-1 left no account"),
    ],
)
def test_the_error_is_that_of_the_process_that_failed_first(
    outcome: RunOutcome, kind: type[LabError], said: str
) -> None:
    with pytest.raises(kind, match=said) as raised:
        run._check(outcome)
    assert type(raised.value) is kind


def test_a_violation_that_the_guest_found_is_a_result() -> None:
    run._check(ended(0, 4, problem="guest-1 failed"))


def test_an_interrupted_run_is_an_interruption_whatever_else_it_is() -> None:
    with pytest.raises(KeyboardInterrupt):
        run._check(replace(ended(1, 1, problem="guest-1 failed"), interrupted=True))


# What is read from the accounts, exactly

S = 1_000_000_000
ACCOUNT = guest_account("guest-1") | {
    "started_ns": 100 * S,
    "work_s": 4.0,
    "job_s": None,
    "turns": 2,
    "connections": 1,
    "unreported_bytes": 0,
    "refaults": 3,
    "first_touches": 20,
    "runs": 2,
    "nodes_visited": 30,
    "nodes_hold_max": 17,
    "pulled_blocks": 12,
    "failed_allocations": 5,
    "cpu_s": 1.5,
    "alloc_ns": {"p50": 1, "p99": 2, "p999": 3, "max": 4, "count": 9},
    "alloc_reporting_ns": {"p50": 5, "p99": 6, "p999": 7, "max": 8, "count": 3},
    "zeroing_skipped_pages": 7,
    "installed_bytes": 5 * 4096,
    "reinstalled_bytes": 2 * 4096,
    "lock_hold_ns": {"all": {"p50": 10, "p99": 20, "p999": 30, "max": 40, "count": 4}},
    "per_vcpu": [
        {"busy_ns": 1 * S, "operations": 300, "pauses": [[101 * S, 103 * S]], "ended_ns": 104 * S},
        {"busy_ns": 3 * S, "operations": 500, "pauses": [[100 * S, 106 * S]], "ended_ns": 0},
    ],
    "series": {
        "t_ns": [99 * S, 101 * S, 102 * S, 104 * S, 106 * S],
        "resident_bytes": [0, 60 * MIB, 30 * MIB, 4 * MIB, 4 * MIB],
        "allocated_bytes": [0, 4 * MIB, 4 * MIB, 4 * MIB, 4 * MIB],
        "reported_bytes": [0, 0, 28 * MIB, 56 * MIB, 56 * MIB],
    },
}  # fmt: skip


def host_of_one() -> dict[str, Any]:
    account = host_account(["guest-1"])
    account["host"] |= {"duplicates": 6, "cpu_s": 0.25, "proof": "cachestat"}
    return account


def test_a_series_counts_from_the_start_of_the_work() -> None:
    series = series_of(ACCOUNT)
    assert series["t_s"].tolist() == [0.0, 1.0, 2.0, 4.0, 6.0]
    assert series["reported_bytes"].tolist() == [0.0, 0.0, 28.0 * MIB, 56.0 * MIB, 56.0 * MIB]


def test_a_vcpu_that_is_done_is_idle_from_then_on() -> None:
    """The second one was stopped in its pause and had not ended when the account was written."""
    assert episodes_of(ACCOUNT) == [(1.0, 3.0), (4.0, 6.0)]


def test_metrics_are_those_of_both_accounts() -> None:
    found = metrics_of(EAGER, host_of_one(), ACCOUNT, series_of(ACCOUNT))
    assert list(found) == list(METRICS)
    # 56 MiB were free in the first episode, 30 of them back after 1 s and no more before its end; none in the second.
    assert (found["t50_s"], found["t90_s"], found["t99_s"]) == (1.0, None, None)
    assert found["page_ops_per_s"] == 800 / 4 * 2
    # (0 + 60) / 2 over a second, (60 + 30) / 2 over one, (30 + 4) / 2 over two: 109 MiB s until the end of the work.
    assert found["gib_min"] == pytest.approx(109 / 1024 / 60)
    # Two pages that had been given back, and three that were never there, were populated before they were used.
    assert (found["refaults"], found["first_touches"]) == (3 + 2, 20 + 3)
    assert found["stayed_bytes"] == 56 * MIB - 5 * 4096
    assert found["zeroing_skipped_pages"] == 7
    assert (found["nodes_per_block"], found["nodes_hold_max"]) == (2.5, 17)
    assert (found["hold_p50_ns"], found["hold_p99_ns"], found["hold_max_ns"]) == (10, 20, 40)
    assert (found["alloc_p50_ns"], found["alloc_p99_ns"], found["alloc_p999_ns"]) == (5, 6, 7)
    assert (found["reports"], found["reported_blocks"], found["duplicates"], found["runs"]) == (2, 28, 6, 2)
    assert (found["guest_cpu_s"], found["host_cpu_s"], found["failed_allocations"]) == (1.5, 0.25, 5)
    assert found["job_s"] is None


def test_the_footprint_of_a_job_is_that_until_it_was_done() -> None:
    job = ACCOUNT | {"job_s": 2.0}
    found = metrics_of(EAGER.but(work_pages=800), host_of_one(), job, series_of(job))
    assert found["job_s"] == 2.0
    assert found["gib_min"] == pytest.approx(75 / 1024 / 60)


def test_accounts_that_disagree_are_violations() -> None:
    outcome = replace(
        agreeing_outcome(watched=False, observations={}),
        host=ProcessEnd("host", 0, "", host_of_one()),
        guests=(ProcessEnd("guest-1", 0, "", ACCOUNT),),
    )
    sound = result_of(EAGER, outcome)
    assert (sound.metrics["violations"], sound.facts["failed_checks"]) == (0, [])
    torn = ACCOUNT | {"returned_bytes": 55 * MIB}
    result = result_of(EAGER, replace(outcome, guests=(ProcessEnd("guest-1", 0, "", torn),)))
    assert result.metrics["violations"] == len(result.facts["failed_checks"]) > 0
    assert "agree on what was returned" in result.facts["failed_checks"][-1]
