"""A guest put together and taken apart in this process: names, tables, errors, results."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from common import names, settings
from common.errors import InvariantViolation, NameInUseError, UsageError
from common.messages import MAX_CAPACITY as MAX_WIRE_CAPACITY
from common.messages import BackendName
from common.queues import create_ack_queue, create_report_queue
from common.ramobject import RamObject
from common.settings import GuestSettings
from guest.allocator.zone import Zone, ZoneSettings
from guest.machine import GuestResult, Machine
from guest.reporting.cycle import MAX_CAPACITY
from guest.reporting.table import POLICIES
from guest.workloads import engine
from guest.workloads.vcpu import WORKLOADS
from host.discard import BACKENDS
from tests.support import leftovers, wait_until

MIB = 1 << 20
GUEST = "g0"


def small(lab: str, **changes: Any) -> GuestSettings:
    """A guest of 16 MiB that works as fast as it can."""
    chosen: dict[str, Any] = {"memory": 16 * MIB, "vcpus": 1, "workload": "churn", "deadline_ns": 10**8, "fill": 0.5}
    return GuestSettings(host=lab, name=GUEST, **(chosen | changes))


def leave_names(lab: str, owner_pid: int) -> None:
    """What a guest leaves behind that dies without a host."""
    zone = Zone.create(lab, GUEST, settings=ZoneSettings(16 * MIB))
    zone._segment.header["owner_pid"] = owner_pid
    zone.close()
    RamObject.create(lab, GUEST, ram_bytes=16 * MIB).close()
    create_ack_queue(lab, GUEST).close()
    create_report_queue(lab, GUEST, capacity=16).close()


def a_dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


# The tables


def test_the_settings_name_exactly_what_the_guest_and_the_host_have() -> None:
    assert set(settings.POLICIES) == set(POLICIES)
    assert set(settings.WORKLOADS) - {"none"} == set(WORKLOADS)
    assert set(settings.BACKENDS) == set(get_args(BackendName)) == set(BACKENDS)
    assert MAX_CAPACITY == MAX_WIRE_CAPACITY


def test_default_settings_are_those_of_the_default_policy() -> None:
    default = GuestSettings()
    policy = POLICIES[default.policy]
    assert default.capacity is default.high_water_mark is default.delay_ns is None  # those of the policy
    assert (default.min_order, policy.capacity, policy.high_water_mark, policy.delay_ns) == (9, 16, 32, 100_000_000)
    GuestSettings(capacity=MAX_CAPACITY)
    with pytest.raises(UsageError):
        GuestSettings(capacity=MAX_CAPACITY + 1)


# Names


def test_the_names_of_a_dead_guest_are_taken_over(lab_name: str) -> None:
    leave_names(lab_name, a_dead_pid())
    assert len(leftovers(lab_name, [GUEST])) == 4
    with Machine(small(lab_name)) as machine:
        assert machine.zone.owner_pid != 0
    assert leftovers(lab_name, [GUEST]) == []


@pytest.mark.parametrize("kind", [names.ram_object, names.report_queue])
def test_a_death_between_two_steps_of_creation_is_cleaned_up(lab_name: str, kind: Any) -> None:
    """Some names without the zone: whoever removes them began with it."""
    if kind is names.ram_object:
        RamObject.create(lab_name, GUEST, ram_bytes=16 * MIB).close()
    else:
        create_report_queue(lab_name, GUEST, capacity=1).close()
        create_ack_queue(lab_name, GUEST).close()
    with Machine(small(lab_name)) as machine:
        assert len(leftovers(lab_name, [GUEST])) == 4
        machine.zone.validate()
    assert leftovers(lab_name, [GUEST]) == []


def test_the_name_of_a_live_guest_is_refused_and_left_alone(lab_name: str) -> None:
    with Machine(small(lab_name)) as first:
        before = leftovers(lab_name, [GUEST])
        with pytest.raises(NameInUseError, match=f"{first.zone.owner_pid}.*choose another --name"):
            Machine(small(lab_name))
        assert leftovers(lab_name, [GUEST]) == before


def test_a_damaged_zone_of_a_dead_guest_is_replaced(lab_name: str) -> None:
    damaged = Path(names.SHM_DIR + names.zone_object(lab_name, GUEST))
    damaged.write_bytes(b"not a zone")
    with Machine(small(lab_name)) as machine:
        machine.zone.validate()
    assert not damaged.exists()


@pytest.mark.parametrize("broken", ["memory", "vcpus"])
def test_a_machine_that_cannot_be_built_leaves_nothing(
    lab_name: str, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(_machine: Machine, *_arguments: Any) -> None:
        raise UsageError("not today")

    if broken == "vcpus":
        monkeypatch.setattr(Machine, "_build_vcpus", fail)
    else:
        monkeypatch.setattr(RamObject, "map", fail)
    with pytest.raises(UsageError):
        Machine(small(lab_name))
    assert leftovers(lab_name, [GUEST]) == []


def test_wrong_settings_are_found_before_anything_is_made(lab_name: str) -> None:
    for lab, changes in (("A B", {}), (lab_name, {"capacity": 0}), (lab_name, {"fill": 0.99})):
        with pytest.raises(UsageError):
            Machine(small(lab, **changes))


# A life


@pytest.mark.parametrize("backend", ["shared", "model"])
def test_a_life_without_a_host_returns_nothing_and_loses_nothing(lab_name: str, backend: str) -> None:
    with Machine(small(lab_name, backend=backend)) as machine:
        wait_until(lambda: machine.sample()[0].frees > 200)
        machine.stop_work()
        machine.settle()  # at once: nobody is there
        machine.stop_reporting()
        machine.check()
        result = machine.result()
    assert isinstance(result, GuestResult)
    assert result.ok
    assert result.freed_bytes > 0
    assert result.allocations == result.frees > 200
    assert (result.returned_bytes, result.reports, result.connections, result.violations) == (0, 0, 0, 0)
    assert result.final_resident_bytes == result.first_touches * 4096 <= result.peak_resident_bytes
    assert result.alloc_ns["count"] > 0
    assert result.settings["backend"] == backend


def test_the_residence_of_an_uncertain_block_is_read_from_the_object(lab_name: str) -> None:
    with Machine(small(lab_name, workload="none")) as machine:
        assert machine._ram_view is not None
        for page in (0, 3, 4, 511, 513):
            machine._ram_view[page * 4096] = 1
        assert machine._residence(0, 9).nonzero()[0].tolist() == [0, 3, 4, 511]
        assert machine._residence(512, 9).nonzero()[0].tolist() == [1]
        assert machine._residence(1024, 10).sum() == 0
        assert machine._residence(machine.zone.n_pages - 1024, 10).sum() == 0
        assert machine._residence(3, 0).all()


def test_policy_off_has_no_reporter(lab_name: str) -> None:
    with Machine(small(lab_name, policy="off")) as machine:
        assert machine.reporter is None
        wait_until(lambda: machine.sample()[0].frees > 50)
        machine.stop_work()
        machine.settle()
        machine.stop_reporting()
        assert machine.result().ok


def test_an_error_of_any_thread_ends_the_wait_and_the_result_is_not_ok(lab_name: str) -> None:
    with Machine(small(lab_name)) as machine:
        machine.fail(UsageError("first"))
        machine.fail(UsageError("second"))
        machine.wait(None)
        machine.stop_work()
        assert not machine.result().ok
        assert str(machine.error) == "first"


def test_s6_a_violation_is_an_invariant_violation_and_not_a_log_line(lab_name: str) -> None:
    with Machine(small(lab_name, workload="none")) as machine:
        machine.settings = dataclasses.replace(machine.settings, workload="churn")
        machine._build_vcpus()  # and nobody starts it
        (vcpu,) = machine.vcpus
        vcpu.step(64)
        assert machine._ram_view is not None
        machine._ram_view[int(vcpu.held[0, 0]) * 4096] ^= 1
        vcpu.release_all()
        assert int(vcpu.state[engine.S_HELD]) == 0
        with pytest.raises(InvariantViolation, match="stamp"):
            machine.check()
        result = machine.result()
        assert (result.ok, result.violations) == (False, 1)
        machine.vcpus.clear()


# What an experiment reads


def test_a_job_ends_the_wait_and_says_how_long_it_took(lab_name: str) -> None:
    goal = 3000
    with Machine(small(lab_name, vcpus=2, work_pages=goal, policy="off")) as machine:
        machine.wait(None)
        machine.stop_work()
        result = machine.result()
    assert result.ok
    assert result.job_s is not None
    assert 0 < result.job_s <= result.work_s <= result.duration_s
    assert goal <= sum(vcpu["operations"] for vcpu in result.per_vcpu) <= result.page_operations


def test_without_a_job_there_is_no_time_of_one(lab_name: str) -> None:
    with Machine(small(lab_name)) as machine:
        machine.wait(0.0)
        machine.stop_work()
        assert machine.result().job_s is None
    unfinished = small(lab_name, workload="none", work_pages=1)
    with Machine(unfinished) as machine:
        machine.wait(0.0)
        assert machine.result().job_s is None


def test_its_memory_is_recorded_until_all_is_freed(lab_name: str) -> None:
    idle_often = small(lab_name, workload="memhog", work_order=0, hold_ns=0, idle_ns=10**6, vcpus=2)
    with Machine(idle_often) as machine:
        wait_until(lambda: all(len(vcpu.pauses) >= 2 for vcpu in machine.vcpus))
        machine.stop_work()
        result = machine.result()
    series = result.series
    assert len({len(column) for column in series.values()}) == 1
    assert series["t_ns"] == sorted(series["t_ns"])
    assert series["t_ns"][0] <= result.started_ns <= min(vcpu["ended_ns"] for vcpu in result.per_vcpu)
    assert series["t_ns"][-1] >= max(vcpu["ended_ns"] for vcpu in result.per_vcpu)
    assert series["allocated_bytes"][-1] == 0
    assert series["resident_bytes"][-1] == result.final_resident_bytes
    assert max(series["resident_bytes"]) == result.peak_resident_bytes == result.first_touches * 4096
    for vcpu in result.per_vcpu:
        assert vcpu["busy_ns"] > 0
        (start_ns, end_ns), *_others = vcpu["pauses"]
        assert result.started_ns <= start_ns < end_ns < vcpu["ended_ns"]
        assert any(start_ns <= t_ns <= end_ns for t_ns in series["t_ns"]), "a row from its very beginning"
    assert result.cpu_s > 0
    assert result.lock_hold_ns["all"]["count"] == 0
    assert result.alloc_reporting_ns["count"] == 0
    assert result.failed_allocations == 0, "a fill of one half leaves room"
