"""The reporter thread (page_reporting_process): sleeps until a free asks for a run, waits the delay, runs the cycle.

It sleeps on the semaphore in the segment that the free path posts when the first request comes (B2), so a quiet guest
never wakes it (P2). A run that failed is asked for again when there is a host to talk to; if the host said that it
failed, and the policy is one that leaves it at that, only a later free asks (M3b).

Where the host starts the runs, its command sets REQUESTED and posts the semaphore as a free does elsewhere.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from common.errors import LabError, UsageError
from common.mutex import post_semaphore, wait_semaphore
from common.ring import Ring
from guest.allocator import entry
from guest.allocator.zone import Zone
from guest.reporting.cycle import Answer, Batch, Cycle, Outcome, RunStatistics
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
        self.timeline = Ring(_TIMELINE_LENGTH, 3)  # (CLOCK_MONOTONIC in ns, blocks, bytes) of each report
        self._link = link
        self._delay_s = delay_ns / 1e9
        self._deadline_s = link.deadline_s
        self._run_id = 0  # of the run that the host has started
        self._keep_until = 0.0
        self._on_error = on_error
        self._stop_event = threading.Event()
        self._failed_in_a_row = 0
        self._outcome = Outcome.DONE  # of the last report
        self._wakes = self._runs = self._failed_runs = self._batches = self._blocks = self._pages = 0
        holder = int(entry.register_device(zone.address, os.getpid(), 0))
        if holder > 0 and not os.path.exists(f"/proc/{holder}"):
            holder = int(entry.register_device(zone.address, os.getpid(), holder))
        if holder:
            raise UsageError(f"process {holder} reports this zone already; one reporting device a zone (-EBUSY)")
        cycle.release()  # what a dead reporter held
        if cycle.policy.host_started:
            link.on_command(lambda: entry.locked_request(zone.address))

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
                if self._stop_event.wait(max(0.0, asked + self._pause_s() - time.monotonic())) or self._cool_down():
                    return
                if self.cycle.policy.host_started:
                    self._run_command()
                else:
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

    def _cool_down(self) -> bool:
        """Sleep until the policy may take blocks again after pressure; True when stopping."""
        while (left_ns := self.cycle.cooling_ns(time.monotonic_ns())) > 0:
            if self._stop_event.wait(left_ns / 1e9):
                return True
        return False

    def _run_once(self) -> None:
        done = self.cycle.run(self._report)
        self.cycle.cooling_ns(time.monotonic_ns())  # pressure during the run is noted while it is fresh
        self._count_run(done)
        if self._asks_again(done) and not self._stop_event.is_set():
            # The blocks are back, unreported, and no free may ever come to ask for them: ask ourselves. The request
            # posts the semaphore, so the next try waits for a host and for the delay like any other.
            entry.locked_request(self.zone.address)

    def _run_command(self) -> None:
        """One run that the host has started. Its blocks are free at the end, whatever the host does."""
        self._run_id = self._link.begin_run()
        if not self._run_id:
            self.cycle.end(abandon=True)  # its host is gone: drop the request
            self._ask_for_due_run()
            return
        self._keep_until = 0.0
        done = self.cycle.run(self._report, resume=self._finish)
        self._link.settle_run(self._run_id, failed=done.failed)
        self._count_run(done)
        self._ask_for_due_run()

    def _ask_for_due_run(self) -> None:
        """A command that came meanwhile: its request may have been dropped with the one that was answered."""
        if self._link.run_is_due:
            entry.locked_request(self.zone.address)

    def _finish(self) -> bool:
        """The pass is over and its blocks are held. True: the host has started a newer run, which goes on from here.

        The deadline is one for all runs that follow on each other, so that no host can have the blocks kept for good.
        """
        self._keep_until = self._keep_until or time.monotonic() + self._deadline_s
        if not self._link.finish_run(self._run_id, self._keep_until):
            return False
        self._run_id = self._link.begin_run() or self._run_id
        return True

    def _count_run(self, done: RunStatistics) -> None:
        self._runs += 1
        self._failed_runs += done.failed
        self._failed_in_a_row = min(self._failed_in_a_row + 1, 10) if self._asks_again(done) else 0

    def _asks_again(self, done: RunStatistics) -> bool:
        """Whether a run failed and is to be asked for again by ourselves.

        A report that was withdrawn has no counterpart in the kernel, where there is always a host: asked for again.
        """
        return done.failed and (self.cycle.policy.rearms or self._outcome is not Outcome.FAILED)

    def _report(self, batch: Batch) -> Outcome | Answer:
        self._outcome = Outcome.WITHDRAWN
        if self._stop_event.is_set():
            return self._outcome  # S13: unregistering waits for this run, so it must end soon
        answer = self._link.report(batch)
        self._outcome = answer.outcome
        if self.cycle.policy.host_started and not self._link.may_go_on():
            self.cycle.pause()
        if answer.outcome in (Outcome.DONE, Outcome.KEPT, Outcome.SENT):
            self._batches += 1
            self._blocks += int(batch.pfns.size)
            self._pages += batch.pages
            self.timeline.append(time.monotonic_ns(), int(batch.pfns.size), batch.pages << 12)
        return answer

    def statistics(self) -> ReporterStatistics:
        """Counts so far."""
        return ReporterStatistics(self._wakes, self._runs, self._failed_runs, self._batches, self._blocks, self._pages)

    def hurry(self) -> None:
        """End the run that is under way, and begin no other: what is out is settled, or withdrawn."""
        self._stop_event.set()
        self._link.stop()

    def stop(self) -> None:
        """Unregister and wait: when this returns nothing is in flight or held, and nothing will be reported (S13).

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
        self.cycle.release()
