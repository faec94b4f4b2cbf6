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
from guest.reporting.hold import Cooldown
from guest.reporting.walk_locked import Walker

__all__ = ["MAX_CAPACITY", "RELEASE_BLOCKS", "Answer", "Batch", "Cycle", "Outcome", "RunStatistics"]

MAX_CAPACITY = 1024  # blocks a batch; 4 KiB on the wire
RELEASE_BLOCKS = 16  # held blocks that go back under one hold of the lock: v9's batch


class Outcome(Enum):
    """What became of a report."""

    DONE = "done"  # discarded; flag the blocks
    KEPT = "kept"  # acknowledged, but the host discards nothing (S12); flag the blocks, their contents stay
    SENT = "sent"  # nobody waits for an answer (hint without waiting): the host may discard at any later time
    FAILED = "failed"  # the host could not discard, or not all of it
    WITHDRAWN = "withdrawn"  # no answer in time; the report can no longer be acted upon
    UNSETTLED = "unsettled"  # no answer, and the host may still discard: the blocks stay in flight for good (S5)


_ACCEPTED = (Outcome.DONE, Outcome.KEPT, Outcome.SENT)


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
class Answer:
    """An outcome, and which blocks of the batch the host confirmed as zero: bool[n], in the batch's order (Z1).

    A bare ``Outcome`` stands for one that confirms none. The zone decides whether it makes use of it
    (``ZoneSettings.host_zeroed``). Of a report that failed, the blocks that did not fail may be confirmed all the same.
    """

    outcome: Outcome
    zeroed: np.ndarray


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
        self._cooldown = Cooldown(seen=zone.statistics().pressure) if self.policy.name == "hold" else None
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

    def cooling_ns(self, now_ns: int) -> int:
        """How long the next run has to wait because memory was short; 0 for every policy but ``hold``.

        ``now_ns``: of any clock that does not run backward, always the same. Look at it at each request and once more
        when the time is up: there may have been pressure again.
        """
        if self._cooldown is None:
            return 0
        self._cooldown.note(self.zone.statistics().pressure, now_ns)
        return self._cooldown.left_ns(now_ns)

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

    def put_back(self, batch: Batch, answer: Outcome | Answer) -> int:
        """Return a batch to the lists, or hold it; returns how many of its blocks were still in flight.

        While the blocks are in flight they are this thread's own, so their residence is settled before the lock.

        Raises:
            UsageError: ``answer.zeroed`` is not one bool a block; the blocks are back, none of them flagged or zeroed.
        """
        outcome, flag = _outcome_of(answer), False
        zeroed = np.zeros(batch.pfns.size, dtype=np.bool_)
        try:
            if isinstance(answer, Answer):
                if answer.zeroed.shape != zeroed.shape or answer.zeroed.dtype != zeroed.dtype:
                    found = f"{answer.zeroed.dtype}{list(answer.zeroed.shape)}"
                    raise UsageError(f"zeroed: {found}; allowed is bool[{zeroed.size}], one a block of the batch")
                if outcome in (Outcome.DONE, Outcome.FAILED):  # with any other nothing was discarded, whoever says what
                    zeroed = answer.zeroed
            flag = outcome in _ACCEPTED
            self._settle_residence(batch, outcome)
        finally:  # whatever the residence cost, no block stays behind
            returned = self._return_blocks(batch, zeroed, flag=flag)
        return returned

    def _settle_residence(self, batch: Batch, outcome: Outcome) -> None:
        """Write down which pages of a batch the host still holds."""
        if outcome is Outcome.DONE:
            mark_returned(self.zone.address, batch.pfns, batch.orders)
        elif outcome not in _ACCEPTED and self._residence is not None:
            for pfn, order in zip(batch.pfns.tolist(), batch.orders.tolist(), strict=True):
                present = self._residence(pfn, order)
                set_residence(self.zone.address, pfn, np.where(present, RESIDENT, RETURNED).astype(np.uint8))

    def _return_blocks(self, batch: Batch, zeroed: np.ndarray, *, flag: bool) -> int:
        """Put the blocks back on their lists, flagged or not, those of ``zeroed`` marked; how many were in flight."""
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
            zeroed,
            self.put_back_holds,
            self._scratch,
        )
        _check(returned)
        if flag and not self._more and not self.policy.one_pass and not self.policy.host_started:
            self._more = self.zone.requested()
        elif not flag:
            self._more = False
        return int(returned)

    def pause(self) -> None:
        """No more pulls until the run ends, or goes on: the host has said STOP."""
        self._more = False

    def release(self, blocks: int | None = None) -> int:
        """Free ``blocks`` held blocks at most, oldest first (None: all), RELEASE_BLOCKS a lock hold; how many."""
        released = 0
        if not self.zone.statistics().held_blocks:
            return 0
        while blocks is None or released < blocks:
            most = RELEASE_BLOCKS if blocks is None else min(RELEASE_BLOCKS, blocks - released)
            count = int(table.locked_release(self.zone.address, most, self.put_back_holds, self._scratch))
            _check(count)
            released += count
            if count < most:
                break
        return released

    def end(self, *, abandon: bool = False) -> bool:
        """Not ACTIVE any more; returns REQUESTED.

        A run may end before ``pull`` said None: what it has not reported is found by the next one. ``abandon`` drops
        the request, as after a failed report: nothing is queued for it. The end of a run that the host started frees
        all that is held.
        """
        if self._walker is not None:
            self._walker.close()
        if self.policy.host_started:
            self.release()
        requested = table.locked_end(self.zone.address, self.policy.number, abandon or self._more, abandon)
        self._more = False
        _check(requested)
        return bool(requested)

    def run(
        self, report: Callable[[Batch], Outcome | Answer], *, resume: Callable[[], bool] | None = None
    ) -> RunStatistics:
        """One whole run. ``report`` is called without the lock (S10); a failed report ends the run (S8).

        ``resume`` is called once nothing is left to pull, with what is held still held; True goes on pulling.

        A batch whose ``report`` raises is put back as withdrawn, and the run ended, before the error goes on.
        """
        visited = self.zone.statistics().nodes_visited
        batches = blocks = pages = 0
        failed = False
        self.begin()
        try:
            going_on = True
            while going_on:
                while (batch := self.pull()) is not None:
                    failed = True  # until the report has come back, and been accepted
                    failed = not self._report(batch, report)
                    batches += 1
                    blocks += batch.pfns.size
                    pages += batch.pages
                going_on = self._more = not failed and resume is not None and resume()
        finally:
            requested = self.end(abandon=failed)
        visited = self.zone.statistics().nodes_visited - visited
        return RunStatistics(batches, blocks, pages, visited, failed, requested)

    def _report(self, batch: Batch, report: Callable[[Batch], Outcome | Answer]) -> bool:
        """Report one batch and put it back, whatever ``report`` does; True if the host took it."""
        answer: Outcome | Answer = Outcome.WITHDRAWN
        try:
            answer = report(batch)
        finally:
            if _outcome_of(answer) is Outcome.UNSETTLED:
                self._more = False
            else:
                self.put_back(batch, answer)
        return _outcome_of(answer) in _ACCEPTED


def _outcome_of(answer: Outcome | Answer) -> Outcome:
    return answer.outcome if isinstance(answer, Answer) else answer


def _check(code: int) -> None:
    if code < 0:
        raise SegmentError("the zone lock is beyond recovery; end the guest and start a new one")
