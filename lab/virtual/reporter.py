"""The reporter in virtual time: the cycle's own calls, each at its moment (mirrors ``guest.reporting.reporter``).

What drives a run depends on the policy's row: a request and the delay (v9 and its kin); the host's word at every delay
(``host_started``); or the host itself, on its own processor and without messages (``host_driven``). A policy that is
``under_lock`` holds the zone lock from begin to end. A batch that a policy keeps is put back like any other as far as
this is concerned: the cycle knows what becomes of it.

A kernel call takes effect when its hold begins, and the hold lasts as long as its blocks and nodes cost.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from common.native import libc
from guest.allocator import entry
from guest.reporting.cycle import Batch, Cycle, Outcome
from lab.virtual.host import VirtualHost
from lab.virtual.survey import survey_batch
from lab.virtual.world import World

__all__ = ["VirtualReporter"]

# As in guest.reporting.reporter.
_SHORTEST_BACKOFF_NS = 0.01e9
_LONGEST_BACKOFF_NS = 10e9
_DOUBLINGS = 10


class VirtualReporter:
    """Drives ``cycle``.

    Args:
        outcome: what becomes of report number n, from 0 on; None for what the specification says.
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
        policy = cycle.policy
        self.cpu_ns = [0.0]
        self.requested_at: list[float] = []  # of each run, and
        self.began_at: list[float] = []  # when it began
        self.failed_runs = 0
        self.running = False
        self._world, self._cycle, self._host = world, cycle, host
        self._delay_ns = delay_ns
        kept = Outcome.KEPT if world.spec.inhibit_discard else Outcome.DONE
        self._outcome = outcome or (lambda _number: kept)
        self._under_lock = bool(getattr(policy, "under_lock", False))
        self._host_started = bool(getattr(policy, "host_started", False))
        self._host_driven = bool(getattr(policy, "host_driven", False))
        self._owner = host.cpu_ns if self._host_driven else self.cpu_ns
        self._asleep = True
        self.ending = False
        self._failed = False
        self._failed_in_a_row = 0
        self._run_nodes = 0
        self._sent = 0
        self._returned = 0

    @property
    def periodic(self) -> bool:
        """Runs are begun by the host's clock and not by requests."""
        return self._host_started or self._host_driven

    def begin(self) -> None:
        """Start: look for the request of the registration, or wind the host's clock."""
        if self.periodic:
            self._world.clock.at(self._world.clock.now + self._delay_ns, self._tick)
        else:
            self.look()

    def finish(self) -> None:
        """No new run and no new batch; the one that is out is settled first."""
        self.ending = True

    # -- what begins a run --------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Wake up if a run is wanted and this thread sleeps."""
        world = self._world
        if self.periodic or not self._asleep or not world.words.requested:
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

    def _tick(self) -> None:
        """The host's clock: begin a run unless one is under way."""
        world, costs = self._world, self._world.costs
        if self.ending:
            return
        # A delay of 0 means: as soon as there is time.
        world.clock.at(world.clock.now + max(float(self._delay_ns), costs.step_ns), self._tick)
        if self.running:
            return
        self.running = True
        self.requested_at.append(world.clock.now)
        if self._host_driven:
            self._begin_run()
            return

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
        self.running = world.reporting = True
        self.began_at.append(world.clock.now)
        self._failed = False
        self._run_nodes = 0
        self._cycle.begin()
        if self._under_lock:
            world.lock.take(world.clock.now, long=True)
        world.clock.work(self._owner, world.costs.lock_ns, self._pull)

    def _pull(self) -> None:
        world, costs = self._world, self._world.costs
        if self.ending:
            self._end_run()
            return
        nodes, counted = world.words.nodes_visited, self._pulls()
        batch = self._cycle.pull()
        nodes, holds = world.words.nodes_visited - nodes, self._pulls() - counted
        blocks = 0 if batch is None else int(batch.pfns.size)
        work = holds * costs.pull_ns + blocks * costs.pull_block_ns + max(0, nodes - blocks) * costs.node_ns
        then = self._end_run if batch is None else lambda: self._report(batch)
        if holds:
            self._hold(work / holds, -(-nodes // holds), holds, then)
        else:
            then()

    def _pulls(self) -> int:
        """Holds that the cycle's pulls have taken so far."""
        return int(self._cycle.pull_holds[:-1].sum())

    def _report(self, batch: Batch) -> None:
        world, costs = self._world, self._world.costs
        survey = survey_batch(world.zone.address, batch)
        books = world.books
        outcome = self._outcome(self._sent)
        self._sent += 1
        if outcome in {Outcome.DONE, Outcome.KEPT}:
            books.reports += 1
            books.blocks += int(batch.pfns.size)
            books.duplicates += survey.duplicates

        def answered() -> None:
            world.clock.work(self.cpu_ns, costs.message_guest_ns / 2, lambda: self._put_back(batch, outcome))

        def send() -> None:
            self._host.serve(survey, answered)

        if self._host_driven:
            self._host.discard(survey, lambda: self._put_back(batch, outcome))
        else:
            world.clock.work(self.cpu_ns, costs.batch_ns + costs.message_guest_ns / 2, send)

    def _put_back(self, batch: Batch, outcome: Outcome) -> None:
        costs = self._world.costs
        self._failed = outcome not in {Outcome.DONE, Outcome.KEPT}
        self._cycle.put_back(batch, outcome)
        self._note_returned()
        work = costs.put_back_ns + int(batch.pfns.size) * costs.put_back_block_ns
        self._hold(work, 0, 1, self._pull)

    def _note_returned(self) -> None:
        """Pages may have been given back: the books follow."""
        world = self._world
        returned = world.words.returned_pages
        world.books.set_resident(world.books.resident - (returned - self._returned))
        self._returned = returned
        world.books.episodes.progress(world.clock.now, returned)

    def _end_run(self) -> None:
        world, costs = self._world, self._world.costs
        out = world.words.in_flight[0]
        self._cycle.end(abandon=self._failed)
        freed = max(0, out - world.words.in_flight[0])
        if freed and not self._under_lock:  # blocks that were kept out go back under one hold
            self._hold(costs.put_back_ns + freed * costs.put_back_block_ns, 0, 1, self._run_over)
        else:
            world.clock.work(self._owner, costs.lock_ns, self._run_over)

    def _run_over(self) -> None:
        world = self._world
        if self._under_lock:
            world.books.hold(world.clock.now - world.lock.taken_at, self._run_nodes)
            world.lock.release()
        world.books.runs += 1
        self.running = world.reporting = False
        self._asleep = True
        self._failed_in_a_row = min(self._failed_in_a_row + 1, _DOUBLINGS) if self._failed else 0
        if self._failed:
            self.failed_runs += 1
            entry.locked_request(world.zone.address)
        self.look()

    def _hold(self, duration_ns: float, nodes: int, count: int, then: Callable[[], None]) -> None:
        """Hold the lock ``count`` times in a row for ``duration_ns`` of work each, then go on with ``then``.

        Inside a run that holds the lock anyway it is only work.
        """
        world = self._world
        if self._under_lock:
            self._run_nodes += nodes * count
            world.clock.work(self._owner, duration_ns * count, then)
            return
        world.lock.take(world.clock.now)

        def done() -> None:
            world.books.hold(world.clock.now - world.lock.taken_at, nodes)
            world.lock.release()
            if count > 1:
                self._hold(duration_ns, nodes, count - 1, then)
            else:
                then()

        world.clock.work(self._owner, duration_ns, done)
