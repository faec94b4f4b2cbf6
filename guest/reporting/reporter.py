"""The reporter thread (page_reporting_process): sleeps until a free asks for a run, waits the delay, runs the cycle.

It sleeps on the semaphore in the segment that the free path posts when the first request comes (B2), so a quiet guest
never wakes it (P2). A run that failed is asked for again when there is a host to talk to.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from common.errors import LabError, UsageError
from common.mutex import post_semaphore, wait_semaphore
from guest.allocator import entry
from guest.allocator.zone import Zone
from guest.reporting.cycle import Batch, Cycle, Outcome
from guest.reporting.link import Link

__all__ = ["Reporter", "ReporterStatistics"]

_TIMELINE_LENGTH = 20_000
_SHORTEST_BACKOFF_S = 0.01  # after a failed run; without it a delay of 0 would spin on a host that always fails
_LONGEST_BACKOFF_S = 10.0


@dataclass(frozen=True)
class ReporterStatistics:
    """Since the start. ``wakes`` counts how often the thread left its sleep (P2: 0 more while the guest is quiet)."""

    wakes: int
    runs: int
    failed_runs: int
    batches: int
    blocks: int
    pages: int


class Reporter(threading.Thread):
    """Drives a cycle against a link. One device a zone (S14).

    Args:
        delay_ns: from the request to the run (B4).
        on_error: called from the thread with what made it give up.

    Raises:
        UsageError: the zone has a reporter already.
    """

    def __init__(
        self, zone: Zone, cycle: Cycle, link: Link, *, delay_ns: int, on_error: Callable[[BaseException], None]
    ) -> None:
        super().__init__(name="reporter", daemon=True)
        self.zone = zone
        self.cycle = cycle
        self.timeline: deque[tuple[int, int, int]] = deque(maxlen=_TIMELINE_LENGTH)
        self._link = link
        self._delay_s = delay_ns / 1e9
        self._on_error = on_error
        self._stop_event = threading.Event()
        self._failed_in_a_row = 0
        self._wakes = self._runs = self._failed_runs = self._batches = self._blocks = self._pages = 0
        holder = int(entry.register_device(zone.address, os.getpid(), 0))
        if holder > 0 and not os.path.exists(f"/proc/{holder}"):
            holder = int(entry.register_device(zone.address, os.getpid(), holder))
        if holder:
            raise UsageError(f"process {holder} reports this zone already; one reporting device a zone (-EBUSY)")

    def run(self) -> None:
        """Thread body."""
        try:
            # Looked at before each sleep too: the end of a run takes posts back, that of ``stop`` among them.
            while not self._stop_event.is_set():
                wait_semaphore(self.zone.work_address)
                if self._stop_event.is_set():
                    return
                self._wakes += 1
                asked = time.monotonic()
                if not self._link.wait_connected():
                    return
                if self._stop_event.wait(max(0.0, asked + self._pause_s() - time.monotonic())):
                    return
                self._run_once()
        except (LabError, OSError) as error:
            if not self._stop_event.is_set():
                self._on_error(error)

    def _pause_s(self) -> float:
        """From a request to its run: the delay, doubled with each run that failed in a row."""
        if not self._failed_in_a_row:
            return self._delay_s
        backoff_s = max(self._delay_s, _SHORTEST_BACKOFF_S) * 2.0**self._failed_in_a_row
        return min(backoff_s, max(self._delay_s, _LONGEST_BACKOFF_S))

    def _run_once(self) -> None:
        done = self.cycle.run(self._report)
        self._runs += 1
        self._failed_in_a_row = min(self._failed_in_a_row + 1, 10) if done.failed else 0
        if done.failed:
            self._failed_runs += 1
            if self._stop_event.is_set():
                return
            # The blocks are back, unreported, and no free may ever come to ask for them: ask ourselves. The request
            # posts the semaphore, so the next try waits for a host and for the delay like any other.
            entry.locked_request(self.zone.address)

    def _report(self, batch: Batch) -> Outcome:
        if self._stop_event.is_set():
            return Outcome.WITHDRAWN  # S13: unregistering waits for this run, so it must end soon
        outcome = self._link.report(batch)
        if outcome in (Outcome.DONE, Outcome.KEPT):
            self._batches += 1
            self._blocks += int(batch.pfns.size)
            self._pages += batch.pages
            self.timeline.append((time.monotonic_ns(), int(batch.pfns.size), batch.pages << 12))
        return outcome

    def statistics(self) -> ReporterStatistics:
        """Counts so far."""
        return ReporterStatistics(self._wakes, self._runs, self._failed_runs, self._batches, self._blocks, self._pages)

    def hurry(self) -> None:
        """End the run that is under way, and begin no other: what is out is settled, or withdrawn."""
        self._stop_event.set()
        self._link.stop()

    def stop(self) -> None:
        """Unregister and wait: when this returns nothing is in flight and nothing will be reported (S13).

        The one exception: blocks that a host is discarding at this very moment and for seconds to come (it is stopped
        inside the discard) stay in flight, since they are not ours until it is through (S5).
        """
        if self.cycle.policy.under_lock:
            self.hurry()  # first: the zone lock may be held for as long as a host takes to answer
        entry.unregister_device(self.zone.address, os.getpid())
        self.hurry()
        if self.ident is not None:
            post_semaphore(self.zone.work_address)
            self.join()
