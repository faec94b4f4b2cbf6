"""Each workload in a private zone, step by step: no threads, no clock that decides."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import numpy as np
import pytest

from common.errors import LabError, MachineError, UsageError
from common.geometry import PAGE_BYTES
from common.statistics import percentiles
from guest.allocator.zone import Zone
from guest.reporting.cycle import Batch, Cycle, Outcome
from guest.workloads import engine
from guest.workloads.vcpu import WORKLOADS, Job, VCpu, WorkloadSettings
from tests.allocator.arrange import MIB, exhaust, make_zone

ALL = sorted(WORKLOADS)
TARGET_PAGES = 2048
BUDGET = 128
LARGEST_OF_CHURN = 5


class Ram:
    """Anonymous memory in the place of a RAM object; a discard is a discard."""

    def __init__(self, memory_bytes: int = 16 * MIB) -> None:
        self.map = mmap.mmap(-1, memory_bytes)  # shared: MADV_REMOVE takes pages away
        self.words = np.frombuffer(self.map, dtype=np.int64)

    @property
    def address(self) -> int:
        return int(self.words.ctypes.data)

    def discard(self, batch: Batch) -> Outcome:
        for pfn, order in zip(batch.pfns.tolist(), batch.orders.tolist(), strict=True):
            self.map.madvise(mmap.MADV_REMOVE, pfn * PAGE_BYTES, PAGE_BYTES << order)
        return Outcome.DONE


@pytest.fixture
def zone() -> Iterator[Zone]:
    fresh = make_zone(16 * MIB, pcp_batch=63, min_order=0)
    yield fresh
    fresh.close()


def make_vcpu(zone: Zone, workload: str, *, seed: int = 1, order: int = 3, ram: Ram | None = None) -> VCpu:
    settings = WorkloadSettings(workload, TARGET_PAGES, order, 0, 0, seed)
    return VCpu(zone, 0 if ram is None else ram.address, settings, on_error=fail)


def fail(error: BaseException) -> None:
    raise LabError(str(error)) from error


def trace(workload: str, seed: int, steps: int = 60) -> tuple[list[list[int]], np.ndarray]:
    """The state after each step, and the page records at the end."""
    zone = make_zone(16 * MIB, pcp_batch=63)
    vcpu = make_vcpu(zone, workload, seed=seed)
    states = []
    for _step in range(steps):
        asked = vcpu.step(BUDGET)
        states.append([asked, *vcpu.state.tolist()])
    pages = zone.page_states()
    zone.close()
    return states, pages


@pytest.mark.parametrize("workload", ALL)
def test_the_same_seed_makes_the_same_requests(workload: str) -> None:
    first, first_pages = trace(workload, seed=7)
    second, second_pages = trace(workload, seed=7)
    assert first == second
    assert (first_pages == second_pages).all()


@pytest.mark.parametrize("workload", ["burst", "churn"])
def test_another_seed_makes_others(workload: str) -> None:
    one, two = ([state[1 + engine.S_PAGES] for state in trace(workload, seed)[0]] for seed in (7, 8))
    assert one != two


@pytest.mark.parametrize("workload", ALL)
@pytest.mark.parametrize("budget", [1, BUDGET])
def test_a_step_is_bounded(zone: Zone, workload: str, budget: int) -> None:
    """At most the budget and one block more."""
    vcpu = make_vcpu(zone, workload)
    block = 1 << LARGEST_OF_CHURN
    for _step in range(100):
        before = int(vcpu.state[engine.S_OPERATIONS])
        vcpu.step(budget)
        assert int(vcpu.state[engine.S_OPERATIONS]) - before <= budget - 1 + block


@pytest.mark.parametrize("workload", ALL)
def test_everything_is_freed_and_counted(zone: Zone, workload: str) -> None:
    ram = Ram()
    vcpu = make_vcpu(zone, workload, ram=ram)
    for _step in range(80):
        vcpu.step(BUDGET)
    vcpu.release_all()
    zone.release_cpu(vcpu.cpu)
    statistics = zone.statistics()
    assert (statistics.allocated_pages, statistics.pcp_pages) == (0, 0)
    assert statistics.allocations == statistics.frees > 0
    assert statistics.allocated_bytes == statistics.freed_bytes > 0
    assert statistics.violations == 0
    assert vcpu.complaint() == ""
    zone.validate()


@pytest.mark.parametrize("workload", ALL)
@pytest.mark.parametrize("min_order", [0, 9])
def test_s5_s6_it_never_meets_what_reporting_did(workload: str, min_order: int) -> None:
    """Runs between the steps take away all that is free; what is in use keeps its stamps, the rest reads as zeros."""
    ram = Ram()
    zone = make_zone(16 * MIB, pcp_batch=63, min_order=min_order)
    vcpu = make_vcpu(zone, workload, ram=ram)
    cycle = Cycle(zone)
    for _step in range(80):
        vcpu.step(256)
        zone.drain(vcpu.cpu)
        assert not cycle.run(ram.discard).failed
    vcpu.release_all()
    zone.release_cpu(vcpu.cpu)
    statistics = zone.statistics()
    assert statistics.refaults > 0
    assert statistics.resident_pages == statistics.first_touches + statistics.refaults - statistics.returned_pages
    assert int((zone.resident_map() == 1).sum()) == statistics.resident_pages
    assert (statistics.violations, vcpu.complaint()) == (0, "")
    zone.validate()
    zone.close()


def asked_by(vcpu: VCpu, steps: int) -> list[int]:
    return [vcpu.step(BUDGET) for _step in range(steps)]


def test_memhog_grows_holds_shrinks_and_is_idle(zone: Zone) -> None:
    vcpu = make_vcpu(zone, "memhog")
    asked = asked_by(vcpu, 3 * 2 * (TARGET_PAGES // BUDGET + 2))
    pauses = [word for word in asked if word != engine.AGAIN]
    assert pauses[:4] == [engine.REST, engine.IDLE, engine.REST, engine.IDLE]
    first_rest, first_idle = asked.index(engine.REST), asked.index(engine.IDLE)
    assert TARGET_PAGES // BUDGET <= first_rest <= TARGET_PAGES // BUDGET + 1
    assert first_idle - first_rest <= TARGET_PAGES // BUDGET + 2


def test_memhog_falls_back_to_order_0_where_there_are_no_large_blocks(zone: Zone) -> None:
    pages = exhaust(zone, 0)
    for pfn in pages:
        if pfn % 512:  # one page of each pageblock stays
            zone.free(pfn)
    vcpu = make_vcpu(zone, "memhog", order=9)
    while vcpu.step() == engine.AGAIN:
        pass
    assert int(vcpu.state[engine.S_PAGES]) == TARGET_PAGES
    assert not vcpu.held[:TARGET_PAGES, 1].any()


@pytest.mark.parametrize("workload", ["churn", "page-fault"])
def test_some_workloads_are_never_idle(zone: Zone, workload: str) -> None:
    assert set(asked_by(make_vcpu(zone, workload), 100)) == {engine.AGAIN}


def test_page_fault_frees_in_the_order_in_which_it_touched(zone: Zone) -> None:
    vcpu = make_vcpu(zone, "page-fault")
    filled: list[int] = []
    while int(vcpu.state[engine.S_PAGES]) < TARGET_PAGES:
        vcpu.step(1)
    filled = vcpu.held[: TARGET_PAGES >> 3, 0].tolist()
    freed: list[int] = []
    while int(vcpu.state[engine.S_TURNS]) == 0:
        before = set(vcpu.held[: int(vcpu.state[engine.S_HELD]), 0].tolist())
        vcpu.step(1)
        freed += sorted(before - set(vcpu.held[: int(vcpu.state[engine.S_HELD]), 0].tolist()))
    assert freed == filled


def test_burst_shrinks_to_a_tenth_before_it_is_idle(zone: Zone) -> None:
    vcpu = make_vcpu(zone, "burst")
    for _step in range(1000):
        if vcpu.step(BUDGET) == engine.IDLE:
            break
    assert int(vcpu.state[engine.S_TURNS]) == 1
    assert 0 < int(vcpu.state[engine.S_PAGES]) <= TARGET_PAGES // 10


def test_build_frees_a_whole_process_before_the_next_begins_and_computes_between_chunks(zone: Zone) -> None:
    """Every process moves six times its size; no more than its size is ever held; it rests after each chunk."""
    vcpu = make_vcpu(zone, "build")
    rests = most = 0
    while int(vcpu.state[engine.S_TURNS]) < 3:
        size = int(vcpu.state[engine.S_PHASE])
        rests += vcpu.step(BUDGET) == engine.REST
        held = int(vcpu.state[engine.S_PAGES])
        most = max(most, held)
        if size > 0:
            assert held <= size + (1 << 9), "a block beyond the size of the process at most"
    assert most > 0
    assert rests > 0
    assert int(vcpu.state[engine.S_OPERATIONS]) >= 6 * most
    vcpu.release_all()
    zone.release_cpu(vcpu.cpu)
    zone.validate()


def test_churn_stays_around_its_level(zone: Zone) -> None:
    vcpu = make_vcpu(zone, "churn")
    asked_by(vcpu, 400)
    assert 0.9 * TARGET_PAGES <= int(vcpu.state[engine.S_PAGES]) <= 1.1 * TARGET_PAGES
    orders = vcpu.held[: int(vcpu.state[engine.S_HELD]), 1]
    assert set(orders.tolist()) == set(range(LARGEST_OF_CHURN + 1))


def test_a_lost_stamp_is_complained_of(zone: Zone) -> None:
    ram = Ram()
    vcpu = make_vcpu(zone, "churn", ram=ram)
    vcpu.step(BUDGET)
    pfn = int(vcpu.held[0, 0])
    ram.words[pfn * 512] ^= 1
    vcpu.release_all()
    assert f"pfn {pfn}: its stamp is gone" in vcpu.complaint()
    assert zone.statistics().violations == 1


def test_a_page_that_is_not_zero_is_complained_of(zone: Zone) -> None:
    ram = Ram()
    ram.words[:] = 3
    vcpu = make_vcpu(zone, "memhog", ram=ram)
    vcpu.step(1)
    assert "does not read as zeros" in vcpu.complaint()


def test_a_refused_free_of_its_own_block_is_complained_of(zone: Zone) -> None:
    vcpu = make_vcpu(zone, "memhog", order=9)
    vcpu.step(1)
    zone.free(int(vcpu.held[0, 0]), int(vcpu.held[0, 1]))
    vcpu.release_all()
    assert "1 frees of its own blocks were refused" in vcpu.complaint()


def test_an_unknown_workload_and_too_many_vcpus_are_refused(zone: Zone) -> None:
    with pytest.raises(UsageError, match="mining"):
        make_vcpu(zone, "mining")
    for _cpu in range(zone.n_cpus):
        make_vcpu(zone, "churn")
    with pytest.raises(MachineError, match="slots"):
        make_vcpu(zone, "churn")


def test_allocation_times_are_told_apart_by_whether_a_run_is_active(zone: Zone) -> None:
    vcpu = make_vcpu(zone, "memhog")
    cycle = Cycle(zone)
    vcpu.step(BUDGET)
    quiet = vcpu.times[engine.T_QUIET].sum()
    assert quiet > 0
    assert not vcpu.times[engine.T_REPORTING].any()
    cycle.begin()
    vcpu.step(BUDGET)
    cycle.end()
    assert vcpu.times[engine.T_QUIET].sum() == quiet
    assert percentiles(vcpu.times[engine.T_REPORTING]).count == BUDGET >> 3
    vcpu.step(BUDGET)
    assert percentiles(vcpu.times[engine.T_REPORTING]).count == BUDGET >> 3
    assert percentiles(*vcpu.times).count == 3 * BUDGET >> 3


def test_untimed_it_counts_no_times(zone: Zone) -> None:
    settings = WorkloadSettings("memhog", TARGET_PAGES, 3, 0, 0, 1)
    vcpu = VCpu(zone, 0, settings, on_error=fail, timed=False)
    vcpu.step(BUDGET)
    assert int(vcpu.state[engine.S_OPERATIONS]) > 0
    assert not vcpu.times.any()


def test_a_job_is_done_when_the_sum_over_its_vcpus_is(zone: Zone) -> None:
    job = Job(3 * BUDGET)
    settings = WorkloadSettings("memhog", TARGET_PAGES, 3, 0, 0, 1)
    one, two = (VCpu(zone, 0, settings, on_error=fail, job=job) for _ in range(2))
    one.step(BUDGET)
    two.step(BUDGET)
    assert not job.is_done()
    assert job.done_ns == 0
    one.step(BUDGET)
    assert job.is_done()
    first_ns = job.done_ns
    two.step(BUDGET)
    assert job.is_done()
    assert job.done_ns == first_ns > 0


def test_a_thread_tells_when_it_worked_and_when_it_was_idle(zone: Zone) -> None:
    """Holding is not being idle, and what is freed at the end is not work."""
    idled: list[int] = []
    job = Job(8 * TARGET_PAGES)  # four turns of allocating and freeing
    vcpu = VCpu(
        zone,
        0,
        WorkloadSettings("memhog", TARGET_PAGES, 3, 0, 0, 1),
        on_error=fail,
        on_idle=lambda: idled.append(int(vcpu.state[engine.S_HELD])),
        job=job,
    )
    vcpu.start()
    vcpu.join()
    turns = int(vcpu.state[engine.S_TURNS])
    assert turns >= 3
    assert len(vcpu.pauses) in (turns - 1, turns)  # it does not idle any more after the last page of the job
    assert idled == [0] * (len(vcpu.pauses) + 1), "nothing is held whenever it says that it is idle"
    ends = [moment for pause in vcpu.pauses.rows() for moment in pause]
    assert ends == sorted(ends)
    assert ends[-1] <= vcpu.ended_ns
    assert job.done_ns <= vcpu.ended_ns
    assert vcpu.busy_ns > 0
    assert 8 * TARGET_PAGES <= vcpu.operations <= int(vcpu.state[engine.S_OPERATIONS])
