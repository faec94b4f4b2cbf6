"""Measures what things cost here: the live kernels in loops, and reports to a real host process.

Each round measures everything once, so that whatever disturbs the machine disturbs all of it alike; a cost is the
median over the rounds. What is a difference of two measurements is taken within a round.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import LabError
from common.statistics import new_histogram, percentiles
from guest.allocator.zone import Zone, ZoneSettings
from guest.reporting.cycle import Cycle, Outcome
from guest.workloads.vcpu import BUDGET_PAGES, VCpu, WorkloadSettings
from lab.virtual.calibrate_live import measure_live
from lab.virtual.costs import VERSION, Costs
from lab.virtual.loops import get_many, hit_many, lock_many, put_many

__all__ = ["Calibration", "Samples", "calibrate"]

Samples = dict[str, list[float]]

_MEMORY = 512 << 20
_LOCKS = 200_000
_BLOCKS = 16_384  # of order 0 in one measurement
_HITS = 32  # fewer than a batch, so that no list is refilled
_HIT_ROUNDS = 400
_HUGE_BLOCKS, _HUGE_ROUNDS = 128, 20
_BATCH = 16
_BATCHES = 40
_TOP_ORDER = 10
_HUGE_ORDER = 9
_STEPS = 200


@dataclass(frozen=True)
class Calibration:
    """Costs, and how they were come by.

    Attributes:
        spreads: of each cost, half the distance between the quartiles as a share of the median.
        machine: processor, how many, kernel. date: ISO 8601, UTC.
    """

    costs: Costs
    spreads: dict[str, float]
    rounds: int
    machine: dict[str, Any]
    date: str

    def as_dict(self) -> dict[str, Any]:
        """What the file holds; ``Costs.load`` reads it."""
        return {
            "version": VERSION,
            "machine": self.machine,
            "date": self.date,
            "rounds": self.rounds,
            "spreads": self.spreads,
            "costs": self.costs.as_dict(),
        }


def calibrate(rounds: int, machine: dict[str, Any], *, say: Callable[[str], None] = lambda _text: None) -> Calibration:
    """Measure all costs in ``rounds`` interleaved rounds, after one to warm up.

    Raises:
        LabError: a measurement failed. MachineError: memory, queues.
    """
    samples: Samples = {}
    say("allocator and cycle …")
    measure_allocator(rounds, samples)
    say("memory and messages, with a host process …")
    measure_live(rounds, samples)
    paces = samples.pop("pace_ns")
    # Of a normal distribution the quartiles are 1.349 standard deviations apart; a stray round does not move them.
    samples["pace_spread"] = [2 * _spread(paces) / 1.349]
    medians = {name: float(np.median(values)) for name, values in samples.items()}
    medians["zero_ns"] = min(medians["zero_ns"], medians["touch_ns"])
    return Calibration(
        costs=Costs.from_dict({name: round(value, 4) for name, value in medians.items()}),
        spreads={name: _spread(values) for name, values in sorted(samples.items())},
        rounds=rounds,
        machine=machine,
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _spread(values: list[float]) -> float:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return round(float((high - low) / 2 / middle), 4) if middle else 0.0


def measure_allocator(rounds: int, samples: Samples) -> None:
    """Add ``rounds`` samples of each cost of the allocator and of the cycle to ``samples``."""
    zone = Zone.private(ZoneSettings(_MEMORY))
    stepper = VCpu(zone, 0, WorkloadSettings("page-fault", 0, 0, 0, 0, 1), on_error=_raise, timed=False)
    for number in range(rounds + 1):
        found = {**_lists(zone), **_steps(stepper), **_cycle()}
        if number:
            for name, value in found.items():
                samples.setdefault(name, []).append(value)
    zone.close()


def _raise(error: BaseException) -> None:
    raise LabError(str(error)) from error


def _timed(call: Callable[[], object], operations: int) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / operations


def _pair(zone: Zone, cpu: int, order: int, blocks: int, repeats: int = 1) -> tuple[float, float]:
    """Ns of an allocation and of a free: ``blocks`` taken one by one, then freed in the same order.

    Raises:
        LabError: the zone has not so much.
    """
    pfns = np.zeros(blocks, dtype=np.int64)
    gets = puts = 0.0
    failed = 0
    for _ in range(repeats):
        start = time.perf_counter_ns()
        failed += int(get_many(zone.address, cpu, order, pfns))
        middle = time.perf_counter_ns()
        failed += int(put_many(zone.address, cpu, order, pfns))
        gets += middle - start
        puts += time.perf_counter_ns() - middle
    if failed:
        raise LabError(f"{failed} operations of the calibration failed at order {order}")
    return gets / blocks / repeats, puts / blocks / repeats


def _lists(zone: Zone) -> dict[str, float]:
    """Lock, per-CPU lists, zone."""
    lock = _timed(lambda: lock_many(zone.address, _LOCKS), _LOCKS)
    batch = ZoneSettings(_MEMORY).pcp_batch
    get_bulk, put_bulk = _pair(zone, 0, 0, _BLOCKS)
    zone.drain(0)
    hit = _hit(zone)
    zone.drain(0)
    get_zone, put_zone = _pair(zone, -1, 0, _BLOCKS)
    get_huge, put_huge = _pair(zone, -1, _HUGE_ORDER, _HUGE_BLOCKS, _HUGE_ROUNDS)
    return {
        "lock_ns": lock,
        "pcp_alloc_ns": hit,
        "pcp_free_ns": hit,
        "refill_block_ns": max(0.0, get_bulk - hit - lock / batch),
        "drain_block_ns": max(0.0, put_bulk - hit - lock / batch),
        "zone_alloc_ns": get_zone,
        "zone_free_ns": put_zone,
        "huge_alloc_ns": get_huge,
        "huge_free_ns": put_huge,
    }


def _hit(zone: Zone) -> float:
    """Ns of an allocation from a per-CPU list or a free onto it, half of what both take, with nothing to refill.

    Raises:
        LabError: one failed.
    """
    pfns = np.zeros(_HITS, dtype=np.int64)
    failed = int(hit_many(zone.address, 0, 0, pfns, 1))  # fills the list
    start = time.perf_counter_ns()
    failed += int(hit_many(zone.address, 0, 0, pfns, _HIT_ROUNDS))
    if failed:
        raise LabError(f"{failed} operations of the calibration failed on a per-CPU list")
    return (time.perf_counter_ns() - start) / (2 * _HITS * _HIT_ROUNDS)


def _steps(stepper: VCpu) -> dict[str, float]:
    """A step that finds nothing to do: page-fault over a region of no pages returns at once."""
    return {"step_ns": _timed(lambda: [stepper.step(BUDGET_PAGES) for _ in range(_STEPS)], _STEPS)}


def _cycle() -> dict[str, float]:
    """Holds of the lock by batches of 16 and of 1 block, the walk over a list, and the work outside the lock."""
    full = _holds(_BATCH)
    one = _holds(1)
    node, empty = _walk()
    pull_block = max(0.0, (full[0] - one[0]) / (_BATCH - 1))
    put_block = max(0.0, (full[1] - one[1]) / (_BATCH - 1))
    return {
        "pull_ns": max(0.0, one[0] - pull_block - empty * node),
        "pull_block_ns": pull_block,
        "put_back_ns": max(0.0, one[1] - put_block),
        "put_back_block_ns": put_block,
        "node_ns": node,
        "batch_ns": full[2],
    }


def _holds(capacity: int) -> tuple[float, float, float]:
    """Median ns of a pull and of a put back of full batches of ``capacity``, and of their work outside the lock."""
    zone = Zone.private(ZoneSettings(_MEMORY, trigger="off"))
    cycle = Cycle(zone, "boundary", capacity=capacity)
    cycle.run(lambda _batch: Outcome.DONE)
    pulls, put_backs, others = new_histogram(), new_histogram(), new_histogram()
    outside = []
    for _ in range(_BATCHES):
        taken = [zone.alloc(_TOP_ORDER) for _ in range(capacity)]
        for pfn in taken:
            assert pfn is not None
            zone.free(pfn, _TOP_ORDER)
        cycle.begin()
        cycle.pull_holds, cycle.put_back_holds = pulls, put_backs
        before = percentiles(pulls).max + percentiles(put_backs).max
        start = time.perf_counter_ns()
        batch = cycle.pull()
        if batch is None or batch.pfns.size != capacity:
            raise LabError(f"a pull of the calibration did not give {capacity} blocks")
        cycle.put_back(batch, Outcome.DONE)
        elapsed = time.perf_counter_ns() - start
        cycle.pull_holds = cycle.put_back_holds = others
        while (batch := cycle.pull()) is not None:
            cycle.put_back(batch, Outcome.DONE)
        cycle.end()
        if before:  # the first one finds cold caches
            outside.append(elapsed)
    held = percentiles(pulls).p50, percentiles(put_backs).p50
    zone.close()
    return float(held[0]), float(held[1]), max(0.0, float(np.median(outside)) - sum(held))


def _walk() -> tuple[float, int]:
    """Ns a node of a walk over reported blocks; and the nodes that the pull of one block looks at besides."""
    zone = Zone.private(ZoneSettings(_MEMORY, trigger="off"))
    taken = [zone.alloc(_HUGE_ORDER) for _ in range(zone.n_pages >> _HUGE_ORDER)]
    for pfn in taken[::2]:
        if pfn is not None:
            zone.free(pfn, _HUGE_ORDER)
    cycle = Cycle(zone, "boundary", capacity=_BATCH)
    cycle.run(lambda _batch: Outcome.DONE)
    idle_ns, idle_nodes = _pull_of_nothing(zone, cycle)
    cycle.begin()
    cycle.end()  # before a pull came up short: every list is walked by the next run
    walk_ns, walk_nodes = _pull_of_nothing(zone, cycle)
    zone.close()
    if walk_nodes <= idle_nodes:
        raise LabError("the walk of the calibration visited nothing")
    return max(0.0, (walk_ns - idle_ns) / (walk_nodes - idle_nodes)), idle_nodes


def _pull_of_nothing(zone: Zone, cycle: Cycle) -> tuple[int, int]:
    """Ns under the lock, and nodes visited, by a run that finds all reported."""
    visited = zone.statistics().nodes_visited
    holds = new_histogram()
    cycle.pull_holds = holds
    cycle.begin()
    if cycle.pull() is not None:
        raise LabError("a run of the calibration found blocks that were reported")
    cycle.end()
    return percentiles(holds).max, zone.statistics().nodes_visited - visited
