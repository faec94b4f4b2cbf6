"""A vCPU in virtual time: the production kernels step by step, each step priced by what it did.

A step takes effect when it begins and lasts as long as its work takes; its budget of pages is small against the delay,
and smaller while a run is under way, so that frees and allocations fall between the pull and the put back of a batch
as they do live. Pauses, drains and the end are those of ``guest.workloads.vcpu.VCpu.run``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from common.errors import LabError
from guest.workloads import engine
from guest.workloads.vcpu import VCpu, WorkloadSettings
from lab.virtual.clock import Task
from lab.virtual.host import VirtualHost
from lab.virtual.oracle import Oracle
from lab.virtual.pace import Pace
from lab.virtual.price import Step, price_step
from lab.virtual.world import World

__all__ = ["VirtualCpu"]

_REPORTING_BUDGET_PAGES = 128  # tens of us without faults: some steps to a report's round trip
_NEVER = math.inf


def _raise(error: BaseException) -> None:
    raise LabError(str(error)) from error


class VirtualCpu:
    """One vCPU. ``begin`` it, and the clock does the rest."""

    def __init__(self, world: World, settings: WorkloadSettings, oracle: Oracle | None, host: VirtualHost) -> None:
        self.vcpu = VCpu(world.zone, 0, settings, on_error=_raise, timed=False)
        self.cpu_ns = [0.0]
        self.done = False
        self.work_ended = 0.0
        self.work_operations = 0
        self.paused_ns = 0.0
        self._world = world
        self._oracle = oracle
        self._host = host
        if oracle is not None:
            self.vcpu.state[engine.S_JOURNAL] = oracle.journal_address
        self._pace = Pace(settings.seed, self.vcpu.cpu, world.costs.pace_spread)
        self._pages = 0
        self._moved = [0, 0, 0, 0]  # since the start: pages taken, in so many blocks; pages freed, in so many blocks
        self._leaving = False
        self._pause = 0  # number of the pause that is on; a timer of an earlier one is void
        self._pausing = ""
        self._paused_at = 0.0
        # The step that is being worked off, and what the lock does to it.
        self._task: Task | None = None
        self._step = Step(0.0, 0, 0, ())
        self._then: Callable[[], None] = self._next
        self._mark = self._until_lock = _NEVER
        self._on_allocation = self._counted = False
        self._waiting_since = -1.0
        self._overdue = 0.0
        self._carried = 0.0  # how long the next step has waited for the lock before it could begin

    def begin(self) -> None:
        """Start at the clock's present."""
        self._world.running += 1
        self._world.clock.at(self._world.clock.now, lambda: self._enter(self._next))

    def stop(self) -> None:
        """The workload is over: whoever pauses wakes up; whoever works finishes its step."""
        if self._pausing:
            self._resume(self._pause)

    # -- steps --------------------------------------------------------------------------------------------------------

    def _next(self) -> None:
        """At the border between two steps."""
        world = self._world
        if world.stopping:
            self._leave()
            return
        budget = min(_REPORTING_BUDGET_PAGES, world.budget_pages) if world.reporting else world.budget_pages
        asked = engine.AGAIN

        def kernel() -> None:
            nonlocal asked
            asked = self.vcpu.step(budget)

        step = self._priced(kernel)
        self._perform(step, lambda: self._stepped(asked))

    def _priced(self, kernel: Callable[[], None]) -> Step:
        """Run a kernel and price what it did; the books and whoever waits for a request are told."""
        world, vcpu = self._world, self.vcpu
        state, pages, operations = vcpu.state, self._pages, int(vcpu.state[engine.S_OPERATIONS])
        before = world.words.slot(vcpu.cpu)
        kernel()
        after = world.words.slot(vcpu.cpu)
        self._pages = int(state[engine.S_PAGES])
        moved = int(state[engine.S_OPERATIONS]) - operations
        taken = (moved + self._pages - pages) // 2
        costs = world.costs
        factor = costs.fault_slowdown_vcpu ** (world.running - 1)
        if world.discarding:
            factor *= costs.fault_slowdown_discard
        batch = world.spec.pcp_batch
        counts = (
            taken,
            after.allocations - before.allocations + after.zone_allocations - before.zone_allocations,
            moved - taken,
            after.frees - before.frees + after.zone_frees - before.zone_frees,
        )
        self._moved = [sum(pair) for pair in zip(self._moved, counts, strict=True)]
        taken_block_pages = self._moved[0] // max(1, self._moved[1])
        freed_block_pages = self._moved[2] // max(1, self._moved[3])
        step = price_step(
            before,
            after,
            taken=taken,
            freed=moved - taken,
            taken_block_pages=taken_block_pages,
            freed_block_pages=freed_block_pages,
            costs=costs,
            batch=batch,
            fault_factor=factor,
        )
        step.work_ns *= self._pace.factor(world.clock.now)
        world.allocated += self._pages - pages
        touched = after.refaults - before.refaults + after.first_touches - before.first_touches + step.installed_pages
        if touched:
            world.books.set_resident(world.books.resident + touched)
        if self._oracle is not None:
            step.work_ns += self._oracle.settle(world.clock.now, step.work_ns, moved, world.allocated)
        world.look()
        return step

    def _count_latencies(self) -> None:
        """Count the step's allocations once, if any part of it falls into a run."""
        if self._world.reporting and not self._counted:
            self._counted = True
            for latency, count in self._step.allocations:
                self._world.books.latencies.add(latency, count)

    def _stepped(self, asked: int) -> None:
        """The work of a workload's step is done."""
        world = self._world
        operations = int(self.vcpu.state[engine.S_OPERATIONS])
        world.operations += operations - self.work_operations
        self.work_operations = operations
        if world.spec.work_pages and world.operations >= world.spec.work_pages and not world.stopping:
            world.stop_work()
        if world.stopping:
            self._next()
        elif asked == engine.IDLE:
            self._drain(lambda: self._rest("idle", world.spec.idle_ns))
        elif asked == engine.REST:
            self._rest("rest", world.spec.hold_ns)
        else:
            self._next()

    def _drain(self, then: Callable[[], None]) -> None:
        """Give what the per-CPU lists hold back to the zone."""
        world = self._world
        listed = world.words.listed_pages(self.vcpu.cpu)
        world.zone.drain(self.vcpu.cpu)
        world.look()
        blocks = max(1, listed >> min(world.spec.work_order, 3)) if listed else 0
        work = world.costs.lock_ns + blocks * world.costs.drain_block_ns
        self._perform(Step(work, int(listed > 0), 0, ()), then)

    # -- pauses -------------------------------------------------------------------------------------------------------

    def _rest(self, kind: str, duration_ns: int) -> None:
        """Pause of the workload's own will."""
        world = self._world
        if world.stopping:  # it was told to stop while it drained
            self._next()
            return
        self._pause += 1
        self._pausing, self._paused_at = kind, world.clock.now
        world.running -= 1
        if kind == "idle":
            world.rest()
        number = self._pause
        world.clock.at(world.clock.now + duration_ns, lambda: self._resume(number))

    def _resume(self, number: int) -> None:
        """End pause ``number``, if it is still on."""
        if number != self._pause or not self._pausing:
            return
        world = self._world
        self.paused_ns += world.clock.now - self._paused_at
        world.running += 1
        if self._pausing == "idle":
            world.wake()
        self._pausing = ""
        self._enter(self._next)

    # -- the end ------------------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        """Free all that is held, in steps like any other, then drain."""
        world, vcpu = self._world, self.vcpu
        if not self._leaving:
            self._leaving = True
            self.work_ended = world.clock.now
        held = int(vcpu.state[engine.S_HELD])
        if held == 0:
            self._drain(self._end)
            return
        budget = min(_REPORTING_BUDGET_PAGES, world.budget_pages) if world.reporting else world.budget_pages
        count = max(1, min(held, budget * held // max(1, self._pages)))
        step = self._priced(lambda: self._release_newest(held, count))
        self._perform(step, self._leave)

    def _release_newest(self, held: int, count: int) -> None:
        """``release_all`` of the newest ``count`` of ``held`` blocks: the kernel sees no more of the pile."""
        vcpu = self.vcpu
        vcpu.state[engine.S_HELD] = count
        rest = held - count
        engine.release_all(
            vcpu.zone.address, 0, vcpu.state, vcpu.held[rest:held], vcpu.finding, self._world.zone.min_order
        )
        vcpu.state[engine.S_HELD] = rest

    def _end(self) -> None:
        world = self._world
        world.zone.release_cpu(self.vcpu.cpu)
        self.done = True
        world.running -= 1
        world.rest()

    # -- work, and the lock -------------------------------------------------------------------------------------------

    def _perform(self, step: Step, then: Callable[[], None]) -> None:
        """Work a step off, wait for what it asked a host for, then call ``then``."""
        self._step, self._then, self._counted = step, then, False
        if step.installs:
            self._then = lambda: self._await_install(step, then)
        self._count_latencies()
        if self._carried:
            self._count_carried()
        self._work(step.work_ns)

    def _await_install(self, step: Step, then: Callable[[], None]) -> None:
        world = self._world

        def populated() -> None:
            world.running += 1
            self._enter(then)

        world.running -= 1
        self._host.install(step.installs, step.installed_pages, populated)

    def _enter(self, then: Callable[[], None]) -> None:
        """Begin what may need the lock: at once, or, while it is held over a whole run, when that is over.

        Its kernel would wait for the real lock, which the walk's thread has.
        """
        world = self._world
        if world.lock.long:
            self._then = then
            self._waiting_since, self._overdue = world.clock.now, 0.0
            world.running -= 1
        else:
            then()

    def _work(self, amount: float) -> None:
        world = self._world
        self._task = world.clock.work(self.cpu_ns, amount, self._worked)
        self._mark = self._until_lock = _NEVER
        if world.lock.held:
            self.lock_taken()

    def _worked(self) -> None:
        """The step's work is done, unless it should have waited for the lock on the way."""
        world = self._world
        self._task = None
        if world.lock.held:
            overdue = self._mark - self._until_lock if self._until_lock < self._mark < _NEVER else 0.0
            if overdue > 0:
                self._waiting_since, self._overdue = world.clock.now, overdue
                world.running -= 1
                return
        self._enter(self._then)

    def lock_taken(self) -> None:
        """See ``lab.virtual.lock``: how much work is left until the next acquisition."""
        self._mark = self._until_lock = _NEVER
        self._on_allocation = False
        locks = self._step.locks
        if self._task is None:
            return
        self._count_latencies()
        if not locks:
            return
        self._mark = self._task.remaining
        distance = self._step.work_ns / locks
        done = max(0.0, self._step.work_ns - self._mark)
        index = math.ceil(done / distance - 0.5)
        if index < locks:
            self._until_lock = (index + 0.5) * distance - done
            share = self._step.allocation_locks
            self._on_allocation = (index + 1) * share // locks > index * share // locks

    def lock_released(self) -> None:
        """Whoever ran into the lock meanwhile goes on from there."""
        world = self._world
        if self._waiting_since >= 0:
            waited = world.clock.now - self._waiting_since + self._overdue / world.clock.rate
            self._waiting_since = -1.0
            world.running += 1
            if self._overdue > 0:
                self._count_wait(waited)
                self._work(self._overdue)
            else:
                self._carried += waited
                then = self._then
                world.clock.at(world.clock.now, lambda: self._enter(then))
        elif self._task is not None and self._mark < _NEVER:
            overdue = self._mark - self._task.remaining - self._until_lock
            if overdue > 0:
                self._task.remaining += overdue
                self._count_wait(overdue / world.clock.rate)
        self._mark = self._until_lock = _NEVER

    def _count_carried(self) -> None:
        """The first acquisition of this step has waited: count it, if it is an allocation's.

        It was asked for while the run was on, whatever of the step comes after that.
        """
        waited, self._carried = self._carried, 0.0
        slow = next((latency for latency, count in reversed(self._step.allocations) if count), None)
        if slow is not None and 2 * self._step.allocation_locks >= self._step.locks > 0:
            self._world.books.latencies.add(slow, -int(self._counted))
            self._world.books.latencies.add(slow + waited, 1)

    def _count_wait(self, waited: float) -> None:
        """Count one of the step's slow allocations with its wait instead of without."""
        if not self._on_allocation:
            return
        slow = next((latency for latency, count in reversed(self._step.allocations) if count), None)
        if slow is not None:
            self._world.books.latencies.add(slow, -1)
            self._world.books.latencies.add(slow + waited, 1)
