"""One report, from its bytes to its acknowledgement: the rules, the gate, the discard, the account.

The guest is hostile until checked: a batch that breaks a rule anywhere is refused as a whole, and nothing of it is
discarded (S11). Order of the steps: rules, gate, withdrawn word, discard, proof, gate back, acknowledgement (S5).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from common import faults
from common.geometry import N_ORDERS, PAGE_SHIFT, TOP_ORDER
from common.messages import Ack, Hello, Report, Status, pack_zeroed, unpack_blocks
from common.ramobject import RamObject
from host.accounting import Counters
from host.discard import Backend

__all__ = ["Blocks", "Discarding", "check_blocks", "process_report", "reject_report"]

Int64Array: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Discarding:
    """How this host treats reports. ``slow_ns``, ``slow_where``: sleep at each, to see how guests fare (a test hook).

    ``inhibit``: acknowledge and discard nothing, as with pinned memory (S12). ``pause``: sleeps so many seconds, or
    until the host is to stop.
    """

    slow_ns: int = 0
    slow_where: Literal["before", "inside"] = "before"
    inhibit: bool = False
    pause: Callable[[float], None] = time.sleep


@dataclass(frozen=True, slots=True)
class Blocks:
    """A batch within the rules: pfns ``starts`` to ``ends`` (exclusive), int64[n], ascending, disjoint.

    ``orders`` stand as in the report, int64[n]; ``ascending`` is the place there of each of ``starts``, int64[n].
    """

    starts: Int64Array
    ends: Int64Array
    orders: Int64Array
    ascending: Int64Array


def check_blocks(packed: bytes, hello: Hello) -> tuple[Blocks, int]:
    """The blocks of a report and how many of them break a rule.

    The rules: at most ``capacity`` of them; order from ``min_order`` to the top; aligned to the order; inside the
    guest's memory; no overlap. With any broken, the blocks must not be used.
    """
    pfns, orders = unpack_blocks(packed)
    sizes = np.int64(1) << orders
    ends = pfns + sizes
    bad = (orders < hello.min_order) | (orders > TOP_ORDER) | ((pfns & (sizes - 1)) != 0) | (ends > hello.n_pages)
    ascending = np.argsort(pfns, kind="stable")
    starts, ends = pfns[ascending], ends[ascending]
    overlapping = starts[1:] < np.maximum.accumulate(ends)[:-1]
    bad[ascending[1:]] |= overlapping
    bad[hello.capacity :] = True
    return Blocks(starts, ends, orders, ascending), int(np.count_nonzero(bad))


def process_report(
    report: Report, hello: Hello, ram: RamObject, backend: Backend, counters: Counters, discarding: Discarding
) -> Ack:
    """Do what ``report`` asks, count it, say how it went. An ``OSError`` on the guest's object is its failure.

    A guest that poisons its free pages keeps them all, as if discarding were inhibited: a page that came back as zeros
    would look as if somebody had written to it (S12, Z4).
    """
    counters.reports += 1
    blocks, invalid = check_blocks(report.blocks, hello)
    if invalid:
        counters.invalid_blocks += invalid
        return reject_report(report, counters)
    if discarding.slow_ns and discarding.slow_where == "before":
        discarding.pause(discarding.slow_ns / 1e9)
    try:
        if not ram.try_gate():
            counters.busy += 1
            return Ack(report.epoch, report.seq, Status.BUSY, 0, 0)
        faults.reach("host.gated")
        try:
            return _discard_gated(report, hello, blocks, ram, backend, counters, discarding)
        finally:
            ram.ungate()
    except OSError:
        counters.failures += len(blocks.starts)
        return Ack(report.epoch, report.seq, Status.FAILED, 0, 0)


def reject_report(report: Report, counters: Counters) -> Ack:
    """Count a refused report; its acknowledgement."""
    counters.rejected += 1
    return Ack(report.epoch, report.seq, Status.REJECTED, 0, 0)


def _discard_gated(
    report: Report,
    hello: Hello,
    blocks: Blocks,
    ram: RamObject,
    backend: Backend,
    counters: Counters,
    discarding: Discarding,
) -> Ack:
    """The part that runs with the gate held. Only a discard that succeeded confirms its block as zero (Z1)."""
    if report.seq <= ram.withdrawn_seq():
        counters.withdrawn += 1
        return Ack(report.epoch, report.seq, Status.WITHDRAWN, 0, 0)
    if discarding.slow_ns and discarding.slow_where == "inside":
        discarding.pause(discarding.slow_ns / 1e9)
    counters.blocks += len(blocks.starts)
    counters.asked_bytes += int((blocks.ends - blocks.starts).sum()) << PAGE_SHIFT
    for order, count in enumerate(np.bincount(blocks.orders, minlength=N_ORDERS).tolist()):
        counters.order_histogram[order] += count
    if discarding.inhibit or hello.poison:
        counters.inhibited += 1
        return Ack(report.epoch, report.seq, Status.INHIBITED, 0, 0)
    started_ns = time.monotonic_ns()
    outcome = backend.discard(blocks.starts, blocks.ends)
    discard_ns = time.monotonic_ns() - started_ns
    faults.reach("host.discarded")
    counters.freed_bytes += outcome.freed_bytes
    counters.modelled_bytes += outcome.modelled_bytes
    counters.failures += outcome.failures
    counters.duplicates += outcome.duplicates
    counters.empty_blocks += outcome.empty_blocks
    counters.discard_ns.record(discard_ns)
    status = Status.FAILED if outcome.failures else Status.DONE
    zeroed = np.zeros(blocks.starts.size, dtype=np.bool_)
    zeroed[blocks.ascending] = outcome.zeroed
    return Ack(report.epoch, report.seq, status, outcome.freed_bytes, discard_ns, pack_zeroed(zeroed))
