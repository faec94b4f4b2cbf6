"""The reporting cycle without thread, queue or clock: begin, then pull, report, put back until the policy says stop.

The reporter thread drives it live; tests, the explorer and virtual time make the same calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np

from common.errors import SegmentError, UsageError
from common.layout import RESIDENT, RETURNED
from common.statistics import new_histogram
from guest.allocator.zone import Zone
from guest.memory import mark_returned, set_residence
from guest.reporting import table
from guest.reporting.blocks import SHORT
from guest.reporting.walk_locked import Walker

__all__ = ["MAX_CAPACITY", "Batch", "Cycle", "Outcome", "RunStatistics"]

MAX_CAPACITY = 1024  # blocks a batch; 4 KiB on the wire


class Outcome(Enum):
    """What became of a report."""

    DONE = "done"  # discarded; flag the blocks
    KEPT = "kept"  # acknowledged, but the host discards nothing (S12); flag the blocks, their contents stay
    FAILED = "failed"  # the host could not discard, or not all of it
    WITHDRAWN = "withdrawn"  # no answer in time; the report can no longer be acted upon
    UNSETTLED = "unsettled"  # no answer, and the host may still discard: the blocks stay in flight for good (S5)


@dataclass(frozen=True)
class Batch:
    """Blocks in flight: first pfns and orders (int64[n] each), and whether the batch ended short (S10)."""

    pfns: np.ndarray
    orders: np.ndarray
    last: bool

    @property
    def pages(self) -> int:
        """Pages in the batch."""
        return int((1 << self.orders).sum())


@dataclass(frozen=True)
class RunStatistics:
    """One run of the cycle."""

    batches: int
    blocks: int
    pages: int
    nodes_visited: int
    failed: bool
    requested: bool  # REQUESTED as the run ended: another one is queued


class Cycle:
    """Drives one policy on one zone. One thread at a time; the kernels take the zone lock.

    Args:
        capacity: blocks a batch, 1 to MAX_CAPACITY; the policy's own by default.
        residence: called with a batch whose discard is uncertain; says which pages are still there
            (see ``guest.memory.set_residence``). Without RAM nothing can be uncertain.

    Raises:
        UsageError: no such policy or capacity.
    """

    def __init__(
        self,
        zone: Zone,
        policy: str = "boundary",
        *,
        capacity: int | None = None,
        residence: Callable[[int, int], np.ndarray] | None = None,
    ) -> None:
        self.zone = zone
        self.policy = table.find_policy(policy)
        self.capacity = self.policy.capacity if capacity is None else capacity
        if not 1 <= self.capacity <= MAX_CAPACITY:
            raise UsageError(f"capacity: {self.capacity}; allowed is 1 to {MAX_CAPACITY}")
        self.pull_holds = new_histogram()
        self.put_back_holds = new_histogram()
        self._residence = residence
        self._pfns = np.zeros(self.capacity, dtype=np.int64)
        self._orders = np.zeros(self.capacity, dtype=np.int64)
        self._scratch = np.zeros(2, dtype=np.int64)
        self._more = False
        self.walk_wait_ns = new_histogram()
        self._walker: Walker | None = None
        if self.policy.under_lock:
            self._walker = Walker(zone.address, self._pfns, self._orders, self.pull_holds, self.walk_wait_ns)

    @property
    def walk_hold_ns(self) -> np.ndarray:
        """Histogram of ns under the lock a walk, for a policy that reports under it; ``walk_wait_ns``: the part of it
        that was spent waiting for the reporter and the host. The same as ``pull_holds``.
        """
        return self.pull_holds

    def begin(self) -> None:
        """Fresh boundaries, ACTIVE. A policy that reports under the lock takes it and keeps it until the end."""
        if self._walker is not None:
            self._walker.start()
            self._more = True
            return
        _check(table.locked_begin(self.zone.address, self.policy.number))
        self._more = True

    def pull(self) -> Batch | None:
        """Take the next batch in flight; None when nothing unreported is left and nobody has asked anew."""
        if self._walker is not None:
            return self._pull_from_walk(self._walker)
        while self._more:
            count, state = table.locked_pull(
                self.zone.address, self.policy.number, self._pfns, self._orders, self.pull_holds, self._scratch
            )
            _check(count)
            # SHORT cleared REQUESTED; a free during the report may set it again, and then the loop goes on (v9).
            self._more = state != SHORT
            if count:
                return Batch(self._pfns[:count].copy(), self._orders[:count].copy(), state == SHORT)
        return None

    def _pull_from_walk(self, walker: Walker) -> Batch | None:
        count, last = walker.next() if self._more else (0, True)
        _check(count)
        if count == 0:
            self._more = False
            return None
        return Batch(self._pfns[:count].copy(), self._orders[:count].copy(), last)

    def put_back(self, batch: Batch, outcome: Outcome) -> int:
        """Return a batch to the lists; returns how many of its blocks were still in flight.

        While the blocks are in flight they are this thread's own, so their residence is settled before the lock.
        """
        try:
            self._settle_residence(batch, outcome)
        finally:  # whatever the residence cost, no block stays behind
            returned = self._return_blocks(batch, flag=outcome in (Outcome.DONE, Outcome.KEPT))
        return returned

    def _settle_residence(self, batch: Batch, outcome: Outcome) -> None:
        """Write down which pages of a batch the host still holds."""
        if outcome is Outcome.DONE:
            mark_returned(self.zone.address, batch.pfns, batch.orders)
        elif outcome is not Outcome.KEPT and self._residence is not None:
            for pfn, order in zip(batch.pfns.tolist(), batch.orders.tolist(), strict=True):
                present = self._residence(pfn, order)
                set_residence(self.zone.address, pfn, np.where(present, RESIDENT, RETURNED).astype(np.uint8))

    def _return_blocks(self, batch: Batch, *, flag: bool) -> int:
        """Put the blocks back on their lists, flagged or not; how many were still in flight."""
        if self._walker is not None and self._walker.walking:  # they have never left their lists
            self._more = flag and not batch.last
            self._walker.settle(acknowledged=flag)
            return int(batch.pfns.size)
        returned = table.locked_put_back(
            self.zone.address,
            self.policy.number,
            batch.pfns,
            batch.orders,
            batch.pfns.size,
            flag,
            self.put_back_holds,
            self._scratch,
        )
        _check(returned)
        if flag and not self._more:
            self._more = self.zone.requested()
        elif not flag:
            self._more = False
        return int(returned)

    def end(self, *, abandon: bool = False) -> bool:
        """Not ACTIVE any more; returns REQUESTED.

        A run may end before ``pull`` said None: what it has not reported is found by the next one. ``abandon`` drops
        the request, as after a failed report: nothing is queued for it.
        """
        if self._walker is not None:
            self._walker.close()
        requested = table.locked_end(self.zone.address, self.policy.number, abandon or self._more, abandon)
        self._more = False
        _check(requested)
        return bool(requested)

    def run(self, report: Callable[[Batch], Outcome]) -> RunStatistics:
        """One whole run. ``report`` is called without the lock (S10); a failed report ends the run (S8).

        A batch whose ``report`` raises is put back as withdrawn, and the run ended, before the error goes on.
        """
        visited = self.zone.statistics().nodes_visited
        batches = blocks = pages = 0
        failed = False
        self.begin()
        try:
            while (batch := self.pull()) is not None:
                outcome = Outcome.WITHDRAWN
                try:
                    outcome = report(batch)
                finally:
                    failed = outcome not in (Outcome.DONE, Outcome.KEPT)
                    if outcome is Outcome.UNSETTLED:
                        self._more = False
                    else:
                        self.put_back(batch, outcome)
                batches += 1
                blocks += batch.pfns.size
                pages += batch.pages
        finally:
            requested = self.end(abandon=failed)
        visited = self.zone.statistics().nodes_visited - visited
        return RunStatistics(batches, blocks, pages, visited, failed, requested)


def _check(code: int) -> None:
    if code < 0:
        raise SegmentError("the zone lock is beyond recovery; remove the zone and start the guest anew")
