"""Get and put against the same tests of llfree-c, as multiples of an uncontended lock+unlock pair of the same run.

*bulk*: allocate half the memory one block at a time, free it in the same order. *rand*: freed in random order.
*repeat*: allocate one block, free it, again. Each with and without per-CPU lists, on one thread and on two.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.kernels import get_many, lock_pairs, put_many, repeat_pairs
from benchmarks.rows import Row, median, spread
from common.errors import LabError
from guest.allocator.zone import Zone, ZoneSettings

__all__ = ["run"]

_MEMORY_BYTES = 8 << 30
# Per-CPU lists by order: batch and high mark in pages. 63 is the kernel's batch; it would move huge pages one by one.
# 32 and 64 MiB a CPU: the kernel since 6.7 tunes itself up to an eighth of the zone over the CPUs.
_PCP_PAGES = {0: (63, 8192), 9: (8 << 9, 32 << 9)}
_LOCK_PAIRS = 500_000
_REPEATS = 200_000
_ROUNDS_ORDER_9 = 32  # 2,048 blocks are over in a fraction of a millisecond
_WITH_LISTS = 0.8

# llfree-c, get + put, as a multiple of the lock pair: (test, order, threads).
_LLFREE = {
    ("bulk", 0, 1): 5.9,
    ("bulk", 0, 2): 5.4,
    ("bulk", 9, 1): 6.8,
    ("bulk", 9, 2): 7.1,
    ("rand", 0, 1): 5.9,
    ("rand", 0, 2): 8.1,
    ("rand", 9, 1): 6.6,
    ("rand", 9, 2): 9.4,
    ("repeat", 0, 1): 4.9,
    ("repeat", 0, 2): 5.0,
    ("repeat", 9, 1): 5.2,
    ("repeat", 9, 2): 4.6,
}


@dataclass(frozen=True)
class _Case:
    test: str
    order: int
    threads: int
    lists: bool

    @property
    def name(self) -> str:
        path = "per-CPU lists" if self.lists else "zone lock"
        return f"{self.test}, order {self.order}, {self.threads} thread{'s' * (self.threads > 1)}, {path}"


def _in_parallel(calls: list[Callable[[], float]]) -> float:
    """Mean of what the calls return, each on a thread of its own, started together."""
    if len(calls) == 1:
        return calls[0]()
    answers: list[float] = []
    together = threading.Barrier(len(calls))

    def body(call: Callable[[], float]) -> None:
        together.wait()
        answers.append(call())

    threads = [threading.Thread(target=body, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(answers) != len(calls):
        raise LabError("a benchmark thread failed")
    return float(np.mean(answers))


def _timed(operations: int, call: Callable[[], int]) -> float:
    """Nanoseconds an operation of ``call``, which returns how many failed."""
    start = time.perf_counter_ns()
    failed = call()
    elapsed = time.perf_counter_ns() - start
    if failed:
        raise LabError(f"{failed} operations of a benchmark failed")
    return elapsed / operations


def _measure(zone: Zone, case: _Case, random: np.random.Generator) -> float:
    """Ns of a get plus its put."""
    cpus = list(range(case.threads)) if case.lists else [-1] * case.threads
    address = zone.address
    if case.test == "repeat":
        return _in_parallel(
            [
                lambda cpu=cpu: _timed(_REPEATS, lambda: repeat_pairs(address, cpu, case.order, _REPEATS))  # type: ignore[misc]
                for cpu in cpus
            ]
        )
    blocks = (zone.n_pages >> case.order) // 2 // case.threads
    rounds = 1 if case.order == 0 else _ROUNDS_ORDER_9
    outs = [np.zeros(blocks, dtype=np.uint32) for _ in cpus]
    total = 0.0
    for _ in range(rounds):
        total += _in_parallel(
            [
                lambda cpu=cpu, out=out: _timed(blocks, lambda: get_many(address, cpu, case.order, out))  # type: ignore[misc]
                for cpu, out in zip(cpus, outs, strict=True)
            ]
        )
        puts = outs if case.test == "bulk" else [random.permutation(out) for out in outs]
        total += _in_parallel(
            [
                lambda cpu=cpu, pfns=pfns: _timed(blocks, lambda: put_many(address, cpu, case.order, pfns))  # type: ignore[misc]
                for cpu, pfns in zip(cpus, puts, strict=True)
            ]
        )
    for cpu in cpus:
        if cpu >= 0:
            zone.drain(cpu)
    return total / rounds


def run(rounds: int) -> Iterator[Row]:
    """The 24 rows, from ``rounds`` interleaved rounds after one to warm up."""
    zones = {
        order: Zone.private(ZoneSettings(_MEMORY_BYTES, pcp_batch=batch, pcp_high=high))
        for order, (batch, high) in _PCP_PAGES.items()
    }
    random = np.random.default_rng(1)
    cases = [_Case(*key, lists) for lists in (False, True) for key in _LLFREE]
    times: dict[_Case, list[float]] = {case: [] for case in cases}
    multiples: dict[_Case, list[float]] = {case: [] for case in cases}
    pairs: dict[_Case, list[float]] = {case: [] for case in cases}
    for number in range(rounds + 1):
        for case in cases:
            zone = zones[case.order]
            pair = _timed(_LOCK_PAIRS, lambda address=zone.address: lock_pairs(address, _LOCK_PAIRS) or 0)  # type: ignore[misc]
            elapsed = _measure(zone, case, random)
            if number:
                pairs[case].append(pair)
                times[case].append(elapsed)
                multiples[case].append(elapsed / pair)
    for zone in zones.values():
        zone.validate()
        zone.close()
    for case in cases:
        llfree = _LLFREE[case.test, case.order, case.threads]
        bound = llfree * (_WITH_LISTS if case.lists else 1)
        ratio = median(multiples[case])
        yield Row(
            name=case.name,
            unit="ns a get+put",
            value=median(times[case]),
            spread=spread(multiples[case]),
            against=f"lock pair {median(pairs[case]):.1f} ns; llfree-c {llfree:.1f} x",
            ratio=ratio,
            target=f"<= {bound:.2f}",
            ok=ratio <= bound,
        )
