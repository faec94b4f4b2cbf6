"""The host's discard path against a bare loop of the same system calls on the same memory."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.rows import Row, median, spread
from common.errors import LabError
from common.geometry import PAGE_SHIFT
from common.messages import Hello, Report, Status, pack_blocks
from common.ramobject import RamObject
from host.accounting import Counters
from host.batch import Discarding, process_report
from host.discard import BACKENDS
from host.proof import Proof, best_proof, punch_hole

__all__ = ["run"]

_MEMORY = 256 << 20
_BATCH = 16


def run(rounds: int) -> Iterator[Row]:
    """Rows for blocks of order 9 and 10, scattered (nothing to coalesce) and neighbouring."""
    for order, stride in ((9, 2), (10, 1), (0, 2)):
        yield _run_shape(order, stride, rounds)


def _run_shape(order: int, stride: int, rounds: int) -> Row:
    lab, name = f"bench-{secrets.token_hex(4)}", "discard"
    ram = RamObject.create(lab, name, ram_bytes=_MEMORY)
    try:
        proof = best_proof()
        n_pages = _MEMORY >> PAGE_SHIFT
        hello = Hello(name, os.getpid(), 1, n_pages, "shared", _BATCH, 0)
        backend = BACKENDS["shared"](ram, n_pages, proof)
        counters = Counters()
        size = 1 << order
        pfns = np.arange(0, _BATCH * stride * size, stride * size, dtype=np.int64)
        packed = pack_blocks(pfns, np.full(_BATCH, order, dtype=np.int64))
        view = np.frombuffer(ram.map(), dtype=np.uint8)
        sequence = 0

        def through_the_host() -> None:
            nonlocal sequence
            sequence += 1
            ack = process_report(Report(1, sequence, False, 0, packed), hello, ram, backend, counters, Discarding())
            if ack.status is not Status.DONE:
                raise LabError(f"a discard of the benchmark ended with {ack.status.name}")

        def bare() -> None:
            _bare_loop(ram, proof, pfns, size, coalesce=stride == 1)

        ours: list[float] = []
        theirs: list[float] = []
        for number in range(max(rounds * 4, 8)):
            calls: list[tuple[Callable[[], None], list[float]]] = [(through_the_host, ours), (bare, theirs)]
            for call, times in calls if number % 2 else reversed(calls):
                _populate(view, pfns, size)
                start = time.perf_counter_ns()
                call()
                times.append(time.perf_counter_ns() - start)
        del view
    finally:
        ram.unlink()
        ram.close()
    bytes_a_batch = _BATCH * size << PAGE_SHIFT
    ratios = [bare_ns / our_ns for our_ns, bare_ns in zip(ours, theirs, strict=True)]
    ratio = median(ratios)
    judged = order >= 9
    layout = "neighbouring" if stride == 1 else "scattered"
    return Row(
        name=f"discard of {_BATCH} {layout} blocks of order {order}",
        unit="GiB/s",
        value=bytes_a_batch / median(ours) * 1e9 / (1 << 30),
        spread=spread(ratios),
        against=f"bare {proof.name}+punch loop {bytes_a_batch / median(theirs) * 1e9 / (1 << 30):.2f} GiB/s",
        ratio=ratio,
        target=">= 0.95" if judged else None,
        ok=ratio >= 0.95 if judged else None,
    )


def _populate(view: np.ndarray, pfns: np.ndarray, size: int) -> None:
    for pfn in pfns.tolist():
        view[pfn << PAGE_SHIFT : (pfn + size) << PAGE_SHIFT : 4096] = 1


def _bare_loop(ram: RamObject, proof: Proof, pfns: np.ndarray, size: int, *, coalesce: bool) -> None:
    """The system calls that the host makes, and nothing else: gate, withdrawn word, count, punch, count."""
    ram.try_gate()
    ram.withdrawn_seq()
    starts, length = ([int(pfns[0])], size * len(pfns)) if coalesce else (pfns.tolist(), size)
    for start in starts:
        offset = start << PAGE_SHIFT
        mark, _full = proof.before(ram.fileno(), offset, length << PAGE_SHIFT)
        punch_hole(ram.fileno(), offset, length << PAGE_SHIFT)
        proof.after(ram.fileno(), offset, length << PAGE_SHIFT, mark)
    ram.ungate()
