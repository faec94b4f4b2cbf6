"""Every policy's own row in virtual time: what each promises holds there as it does live."""

from __future__ import annotations

import json

import numpy as np
import pytest

from common.errors import UsageError
from common.geometry import PAGEBLOCK_ORDER
from guest.reporting.table import POLICIES
from lab.experiment.metrics import RunResult
from lab.experiment.spec import RunSpec
from lab.virtual.costs import Costs
from lab.virtual.counters import SlotCounts
from lab.virtual.machine import VirtualMachine
from lab.virtual.price import price_step
from lab.virtual.run import run_virtual

pytestmark = pytest.mark.timeout(400)  # without the compiler churn takes its time

MIB = 1 << 20
MS = 1_000_000
COSTS = Costs.example()
SPEC = RunSpec(
    memory=32 * MIB,
    vcpus=2,
    high_water_mark=2,
    capacity=2,
    hold_ns=5 * MS,
    idle_ns=20 * MS,
    duration_ns=40 * MS,
    delay_ns=2 * MS,
)
WORK = {
    "memhog": SPEC,
    "churn": SPEC.but(workload="churn", vcpus=1, work_order=0, duration_ns=8 * MS, delay_ns=MS, min_order=4, fill=0.2),
}
REPORTING = [name for name in POLICIES if name != "off"]


def ran(spec: RunSpec) -> RunResult:
    """The result, in which nothing may be wrong."""
    result = run_virtual(spec, COSTS)
    assert result.facts["complaints"] == []
    return result


def metric(result: RunResult, name: str) -> float:
    value = result.metrics[name]
    assert value is not None, name
    return value


def assert_delays(machine: VirtualMachine, delay_ns: int) -> None:
    """B4, by what begins a run."""
    reporter, cycle = machine.reporter, machine.cycle
    assert reporter is not None
    assert cycle is not None
    began = np.array(reporter.began_at)
    requested = np.array(reporter.requested_at[: len(began)])
    assert len(began)
    if cycle.policy.host_started:  # a message after the host's clock, which goes from start to start
        assert (np.diff(requested) >= delay_ns - 1e-3).all()
        assert (began > requested).all()
    elif cycle.policy.name == "hold":  # or once it has cooled down
        assert (began - requested >= delay_ns - 1e-3).all()
        assert began[0] - requested[0] == pytest.approx(delay_ns, abs=1e-3)
    else:
        assert began - requested == pytest.approx(delay_ns, abs=1e-3)


@pytest.mark.parametrize("workload", WORK)
@pytest.mark.parametrize("policy", REPORTING)
def test_b4_s4_every_policy_gives_back_and_leaves_a_whole_zone(policy: str, workload: str) -> None:
    """S4, B4: all is free at the end and validate() finds nothing; the same again to the byte; the delay to the ns."""
    spec = WORK[workload].but(policy=policy)
    if policy == "hint" and workload == "churn":
        spec = spec.but(work_order=10, fill=0.4)  # it takes whole blocks of the top order only
    result = ran(spec)
    assert metric(result, "returned_bytes") > 0
    assert metric(result, "reports") > 0
    assert metric(result, "hold_max_ns") >= metric(result, "hold_p50_ns") > 0
    machine = VirtualMachine(spec, COSTS)
    try:
        machine.run()
        machine.zone.validate()
        statistics = machine.zone.statistics()
        assert statistics.free_pages == machine.zone.n_pages
        assert statistics.held_blocks == statistics.in_flight_blocks == statistics.allocated_pages == 0
        assert machine.books.resident == statistics.resident_pages
        assert_delays(machine, machine.delay_ns)
    finally:
        machine.close()
    assert json.dumps(ran(spec).as_dict()) == json.dumps(result.as_dict())


def test_walk_locked_lets_allocations_wait() -> None:
    """Every walk holds the lock until the host has answered for the last block; whoever allocates waits as long."""
    spec = SPEC.but(memory=128 * MIB, capacity=16)
    locked, boundary = (ran(spec.but(policy=policy)) for policy in ("walk-locked", "boundary"))
    assert metric(locked, "alloc_p999_ns") > 100 * metric(boundary, "alloc_p999_ns")
    assert metric(locked, "hold_max_ns") > 100 * metric(boundary, "hold_max_ns")
    assert metric(locked, "nodes_hold_max") == (128 * MIB) >> 22  # every block of the top order, when all is free
    waiting = locked.facts["lock_hold_ns"]["waiting"]
    assert waiting["count"] == locked.metrics["runs"]
    assert 0 < waiting["p50"] <= metric(locked, "hold_max_ns")


def test_hint_follows_the_hosts_clock_and_0_is_once() -> None:
    often, once = (ran(SPEC.but(policy="hint", delay_ns=delay_ns)) for delay_ns in (4 * MS, 0))
    assert metric(often, "runs") > metric(once, "runs") == 1
    assert ran(SPEC.but(policy="hint", delay_ns=None)).metrics["runs"] == 1  # the host's 2 s
    assert metric(often, "duplicates") > 0  # no flag: what is free is hinted again


def test_hold_waits_after_pressure() -> None:
    """Its runs come after the cool-down of a second, of which this run has no more than the first."""
    machine = VirtualMachine(SPEC.but(policy="hold", fill=0.9, duration_ns=200 * MS), COSTS)
    machine.run()
    assert machine.zone.statistics().pressure > 0
    assert machine.reporter is not None
    waited = np.array(machine.reporter.began_at) - np.array(
        machine.reporter.requested_at[: len(machine.reporter.began_at)]
    )
    assert waited.max() > 500 * MS
    assert machine.complaints() == []
    machine.close()


def test_shared_has_its_pages_populated_before_they_are_used() -> None:
    """No touch ever faults; what came back was asked for, and counts as refaults all the same."""
    machine = VirtualMachine(SPEC.but(policy="shared"), COSTS)
    machine.run()
    statistics = machine.zone.statistics()
    assert statistics.installs > 0
    assert statistics.asks_withdrawn == 0
    assert statistics.installed_pages > statistics.reinstalled_pages > 0
    assert machine.reporter is not None
    assert machine.reporter.cpu_ns[0] == 0  # there is none: the host works
    assert machine.host.cpu_ns[0] > 0
    machine.close()
    result = ran(SPEC.but(policy="shared"))
    assert metric(result, "refaults") >= statistics.reinstalled_pages
    stayed = metric(result, "returned_bytes") - metric(result, "refaults") * 4096
    assert metric(result, "stayed_bytes") == stayed


def test_shared_without_discards_is_no_such_host() -> None:
    with pytest.raises(UsageError, match="always discards"):
        run_virtual(SPEC.but(policy="shared", inhibit_discard=True), COSTS)


def test_z1_what_was_discarded_is_not_cleared_again() -> None:
    """Z1: every page that a confirmed block brings is cheaper by its clearing; without the switch none is."""
    with_it, without = (ran(SPEC.but(host_zeroed=switch)) for switch in (True, False))
    assert metric(with_it, "zeroing_skipped_pages") > 0
    assert without.metrics["zeroing_skipped_pages"] == 0
    assert ran(SPEC.but(host_zeroed=True, inhibit_discard=True)).metrics["zeroing_skipped_pages"] == 0
    nothing = SlotCounts(*[0] * len(SlotCounts._fields))
    works = [
        price_step(
            nothing,
            nothing._replace(zeroed_pages=zeroed),
            taken=512,
            freed=0,
            taken_block_pages=512,
            freed_block_pages=1,
            costs=COSTS,
            batch=63,
            fault_factor=1.0,
        ).work_ns
        for zeroed in (0, 512)
    ]
    assert works[0] - works[1] == pytest.approx(512 * COSTS.zero_ns)


def test_off_has_no_figures_of_the_lock() -> None:
    result = ran(SPEC.but(policy="off"))
    for name in ("hold_p50_ns", "hold_p99_ns", "hold_max_ns", "nodes_hold_max", "nodes_per_block"):
        assert result.metrics[name] is None, name


def test_the_footprint_ends_with_the_work() -> None:
    """Settling is not counted: with discards inhibited all stays, so a longer delay adds nothing to the integral."""
    spec = SPEC.but(inhibit_discard=True)
    short, long = (ran(spec.but(delay_ns=delay_ns)) for delay_ns in (300 * MS, 900 * MS))
    assert long.facts["settled_s"] > short.facts["settled_s"] + 0.5
    assert short.metrics["gib_min"] == long.metrics["gib_min"]


def test_the_length_of_steps_costs_nothing() -> None:
    """A policy without a delay has shorter steps: the same work is priced the same but for the rounding of a batch."""
    job = WORK["churn"].but(policy="off", work_pages=20_000)
    times = []
    for budget in (64, 2048):
        machine = VirtualMachine(job, COSTS)
        machine.world.budget_pages = budget
        machine.run()
        assert machine.work_ended is not None
        times.append(machine.work_ended)
        machine.close()
    assert times[0] == pytest.approx(times[1], rel=0.03)


def test_hold_gives_back_all_but_its_watermark_in_the_one_rest_that_follows() -> None:
    """What it keeps to the high watermark is not given back, and is no rest of its own when the work ends."""
    spec = SPEC.but(policy="hold", vcpus=1, fill=0.7, hold_ns=5 * MS, idle_ns=4_000 * MS, duration_ns=900 * MS)
    result = ran(spec.but(delay_ns=100 * MS))
    assert result.facts["episodes"] == 1
    assert 0 < metric(result, "t50_s") <= metric(result, "t90_s") < 0.1, "the delay, and a run"
    assert result.metrics["t99_s"] is None, "the watermark is more than a hundredth of so small a guest"


@pytest.mark.parametrize("policy", ["boundary", "rotate"])
def test_an_allocation_fails_only_while_large_blocks_are_in_flight(policy: str) -> None:
    """S10: what is in flight is missing, at most ``capacity`` blocks, and the largest go first. With one at a time none
    fails, as without reporting.
    """
    crowded = RunSpec(
        policy=policy,
        workload="churn",
        memory=256 * MIB,
        vcpus=1,
        fill=0.85,
        high_water_mark=2,
        capacity=16,
        duration_ns=150 * MS,
        delay_ns=20 * MS,
    )
    for spec in (crowded.but(capacity=1), crowded.but(policy="off")):
        assert metric(ran(spec), "failed_allocations") == 0
    machine = VirtualMachine(crowded, COSTS)
    advance, failed, missing = machine.world.clock.advance, 0, []

    def watched() -> bool:
        nonlocal failed
        before = machine.zone.statistics().in_flight_pages
        going_on = advance()
        if machine.words.failed_allocations > failed:
            failed = machine.words.failed_allocations
            missing.append(before)
        return going_on

    machine.world.clock.advance = watched  # type: ignore[method-assign]
    machine.run()
    machine.close()
    assert failed > 0
    assert min(missing) >= 1 << PAGEBLOCK_ORDER, "a block that would have done was out each time"
