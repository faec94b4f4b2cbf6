"""The reporter in virtual time: the cycle's own calls, each at its moment (mirrors ``guest.reporting.reporter``).

What drives a run depends on the policy's row: a request and the delay (v9 and its kin); the host's word, from the start
of one run to that of the next at least the delay (``host_started``); or a request, the delay, and then the host itself,
on its own processor and without messages (``host_driven``). A policy that is ``under_lock`` holds the zone lock from
begin to end. A policy that ``keeps`` its blocks lets go of them in the allocating path, at the end of a run that the
host has started, and when all is over.

A kernel call takes effect when its hold begins, and the hold lasts as long as its blocks and nodes cost.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from common.native import libc
from common.statistics import new_histogram, record
from guest.allocator import entry
from guest.reporting.cycle import RELEASE_BLOCKS, Answer, Batch, Cycle, Outcome
from lab.virtual.host import VirtualHost
from lab.virtual.survey import Survey, survey_batch
from lab.virtual.world import World

__all__ = ["VirtualReporter"]

# As in guest.reporting.reporter.
_SHORTEST_BACKOFF_NS = 0.01e9
_LONGEST_BACKOFF_NS = 10e9
_DOUBLINGS = 10
_ACCEPTED = frozenset({Outcome.DONE, Outcome.KEPT})
_NOTHING = Survey(0, 0, 0)


class VirtualReporter:
    """Drives ``cycle``.

    Args:
        delay_ns: from a request to its run; of a policy whose runs the host starts the host's period, 0: one run.
        outcome: what becomes of report number n, from 0 on; None for what the specification says.

    Attributes:
        requested_at, began_at: ns, of each run when it was asked for, and when it began.
        walk_waits: histogram of ns under the lock that were spent waiting for answers, one a walk.
    """

    def __init__(
        self,
        world: World,
        cycle: Cycle,
        host: VirtualHost,
        *,
        delay_ns: int,
        outcome: Callable[[int], Outcome] | None = None,
    ) -> None:
        self.cpu_ns = [0.0]
        self.requested_at: list[float] = []
        self.began_at: list[float] = []
        self.walk_waits = new_histogram()
        self.failed_runs = 0
        self.running = False
        self.ending = False
        self._world, self._cycle, self._host = world, cycle, host
        self._policy = cycle.policy
        self._delay_ns = delay_ns
        kept = Outcome.KEPT if world.spec.inhibit_discard else Outcome.DONE
        self._outcome = outcome or (lambda _number: kept)
        self._owner = host.cpu_ns if self._policy.host_driven else self.cpu_ns
        self._asleep = True
        self._last = Outcome.DONE  # of the last report
        self._failed_in_a_row = 0
        self._walked_ns = 0.0
        self._sent = 0
        self._nodes = 0  # visited so far
        self._returned = 0

    def begin(self) -> None:
        """Start: look for the request of the registration, or let the host start its first run."""
        if self._policy.host_started:
            self._world.clock.at(self._world.clock.now, self._command)
        else:
            self.look()

    def finish(self) -> None:
        """No new run and no new batch; the one that is out is settled first."""
        self.ending = True

    def stop(self) -> None:
        """All is over: let go of what is held, as ``Reporter.stop`` does. No time passes."""
        costs, held, holds = self._world.costs, self._world.words.held_blocks, self._put_backs()
        self._cycle.release()
        held -= self._world.words.held_blocks
        for done in range(self._put_backs() - holds):
            blocks = min(RELEASE_BLOCKS, held - done * RELEASE_BLOCKS)
            self._world.books.hold(costs.put_back_ns + blocks * costs.put_back_block_ns)

    @property
    def under_lock(self) -> bool:
        """The zone lock is held over whole runs."""
        return self._policy.under_lock

    # -- what begins a run --------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Wake up if a run is wanted and this thread sleeps."""
        world = self._world
        if self._policy.host_started or not self._asleep or not world.words.requested:
            return
        # SAFETY: the semaphore lies in the zone's mapped header.
        if libc.sem_trywait(ctypes.c_void_p(world.zone.work_address)):
            return
        self._asleep = False
        self.requested_at.append(world.clock.now)
        world.clock.at(world.clock.now + self._pause_ns(), self._begin_run)

    def _pause_ns(self) -> float:
        """From a request to its run: the delay, doubled with each run that failed in a row."""
        if not self._failed_in_a_row:
            return self._delay_ns
        backoff_ns = max(self._delay_ns, _SHORTEST_BACKOFF_NS) * 2.0**self._failed_in_a_row
        return min(backoff_ns, max(self._delay_ns, _LONGEST_BACKOFF_NS))

    def _command(self) -> None:
        """The host starts a run, by a message."""
        world, costs = self._world, self._world.costs
        if self.ending:
            return
        self.running = True
        self.requested_at.append(world.clock.now)

        def arrive() -> None:
            world.clock.work(self.cpu_ns, costs.message_guest_ns / 2, self._begin_run)

        def send() -> None:
            world.clock.at(world.clock.now + costs.message_wait_ns / 2, arrive)

        world.clock.work(self._host.cpu_ns, costs.message_host_ns / 2, send)

    # -- a run --------------------------------------------------------------------------------------------------------

    def _begin_run(self) -> None:
        world = self._world
        if self.ending:
            self.running = False
            return
        now = world.clock.now
        cooling_ns = self._cycle.cooling_ns(round(now))
        if cooling_ns > 0:  # there may be pressure again until then
            world.clock.at(now + cooling_ns, self._begin_run)
            return
        self.running = world.reporting = True
        self.began_at.append(now)
        self._last = Outcome.DONE
        self._walked_ns = 0.0
        self._nodes = world.words.nodes_visited  # a walk looks ahead from its start to its first hand-over
        self._cycle.begin()
        if self._policy.under_lock:
            world.lock.take(now, long=True)
        world.clock.work(self._owner, world.costs.lock_ns, self._pull)

    def _pull(self) -> None:
        world, costs = self._world, self._world.costs
        if self.ending:
            self._end_run()
            return
        nodes, counted = self._nodes, self._pulls()
        batch = self._cycle.pull()
        self._nodes = world.words.nodes_visited
        nodes, holds = self._nodes - nodes, self._pulls() - counted
        then = self._finish_run if batch is None else lambda: self._report(batch)
        if self._policy.under_lock:  # the blocks stay where they are: looking at them is all
            self._walked_ns += nodes * costs.node_ns
            world.clock.work(self._owner, nodes * costs.node_ns, then)
            return
        blocks = 0 if batch is None else int(batch.pfns.size)
        work = holds * costs.pull_ns + blocks * costs.pull_block_ns + max(0, nodes - blocks) * costs.node_ns
        self._hold(work / max(1, holds), holds, then)

    def _pulls(self) -> int:
        """Holds that the cycle's pulls have taken so far."""
        return int(self._cycle.pull_holds[:-1].sum())

    def _put_backs(self) -> int:
        """Holds that its put backs and its letting go of held blocks have taken so far."""
        return int(self._cycle.put_back_holds[:-1].sum())

    def _report(self, batch: Batch) -> None:
        world, costs = self._world, self._world.costs
        survey = survey_batch(world.zone.address, batch)
        books = world.books
        self._last = outcome = self._outcome(self._sent)
        self._sent += 1
        if outcome in _ACCEPTED:
            books.reports += 1
            books.blocks += int(batch.pfns.size)
            books.duplicates += survey.duplicates
        if self._policy.host_driven:
            self._host.discard(survey, lambda: self._put_back(batch, outcome))
        else:
            self._send(costs.batch_ns, survey, lambda: self._put_back(batch, outcome))

    def _send(self, work_ns: float, survey: Survey, then: Callable[[], None]) -> None:
        """A message to the host after ``work_ns`` of work, and its answer; ``then`` once that is read."""
        world, costs = self._world, self._world.costs

        def answered() -> None:
            world.clock.work(self.cpu_ns, costs.message_guest_ns / 2, then)

        world.clock.work(self.cpu_ns, work_ns + costs.message_guest_ns / 2, lambda: self._host.serve(survey, answered))

    def _put_back(self, batch: Batch, outcome: Outcome) -> None:
        costs, blocks = self._world.costs, int(batch.pfns.size)
        answer: Outcome | Answer = outcome
        if self._world.spec.host_zeroed and outcome is Outcome.DONE and not self._policy.host_driven:
            answer = Answer(outcome, np.ones(blocks, dtype=np.bool_))  # what this host discards it has proved
        self._cycle.put_back(batch, answer)
        self._note_returned()
        if self._policy.under_lock:
            self._pull()
        else:
            self._hold(costs.put_back_ns + blocks * costs.put_back_block_ns, 1, self._pull)

    def _note_returned(self) -> None:
        """Pages may have been given back: the books follow."""
        world = self._world
        returned = world.words.returned_pages
        world.books.set_resident(world.books.resident - (returned - self._returned))
        self._returned = returned
        world.books.episodes.progress(world.clock.now, returned)

    def _finish_run(self) -> None:
        """Nothing is left to pull. A run that the host has started is over when the host says so."""
        if self._policy.host_started:
            self._send(0.0, _NOTHING, self._end_run)
        else:
            self._end_run()

    def _end_run(self) -> None:
        world, costs = self._world, self._world.costs
        held, holds = world.words.held_blocks, self._put_backs()
        self._cycle.end(abandon=self._last not in _ACCEPTED)
        self._cycle.cooling_ns(round(world.clock.now))  # pressure during the run is noted while it is fresh
        held, holds = held - world.words.held_blocks, self._put_backs() - holds
        if holds:
            self._hold(costs.put_back_ns + held / holds * costs.put_back_block_ns, holds, self._ended)
        else:
            self._ended()

    def _ended(self) -> None:
        self._world.clock.work(self._owner, self._world.costs.lock_ns, self._run_over)

    def _run_over(self) -> None:
        world = self._world
        now = world.clock.now
        if self._policy.under_lock:
            held_ns = now - world.lock.taken_at
            world.books.hold(held_ns)
            record(self.walk_waits, round(max(0.0, held_ns - self._walked_ns)))
            world.lock.release()
        world.books.runs += 1
        self.running = world.reporting = False
        self._asleep = True
        failed = self._last not in _ACCEPTED
        again = failed and (self._policy.rearms or self._last is not Outcome.FAILED)
        self.failed_runs += failed
        self._failed_in_a_row = min(self._failed_in_a_row + 1, _DOUBLINGS) if again else 0
        if again and not self._policy.host_started:
            entry.locked_request(world.zone.address)
        if self._policy.host_started and self._delay_ns:
            world.clock.at(self.requested_at[-1] + self._delay_ns, self._command)
        self.look()

    def _hold(self, duration_ns: float, count: int, then: Callable[[], None]) -> None:
        """Hold the lock ``count`` times in a row for ``duration_ns`` of work each, then go on with ``then``."""
        world = self._world
        if not count:
            then()
            return
        world.lock.take(world.clock.now)

        def done() -> None:
            world.books.hold(world.clock.now - world.lock.taken_at)
            world.lock.release()
            self._hold(duration_ns, count - 1, then)

        world.clock.work(self._owner, duration_ns, done)
