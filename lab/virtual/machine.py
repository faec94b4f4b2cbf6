"""A guest and its host in virtual time, put together as ``guest.machine`` does it, from start to settled."""

from __future__ import annotations

import os
from collections.abc import Callable

from common.errors import LabError, UsageError
from common.settings import GuestSettings
from guest.allocator import entry
from guest.allocator.zone import Zone, ZoneSettings
from guest.reporting.cycle import Cycle, Outcome
from guest.reporting.table import Policy, find_policy
from guest.workloads.vcpu import BUDGET_PAGES, WorkloadSettings, check_workload
from lab.experiment.spec import ORACLE, RunSpec
from lab.hosts import HOST_STARTED, check_host, host_period_ns
from lab.virtual.account import Books
from lab.virtual.clock import Clock
from lab.virtual.costs import Costs
from lab.virtual.counters import ZoneWords
from lab.virtual.host import VirtualHost
from lab.virtual.lock import ZoneLock
from lab.virtual.oracle import MAX_BUDGET_PAGES, Oracle
from lab.virtual.populate import Populator
from lab.virtual.reporter import VirtualReporter
from lab.virtual.vcpu import VirtualCpu
from lab.virtual.world import World

__all__ = ["VirtualMachine"]

_SPARE_SLOTS = 2  # as guest.machine
_LONGEST_SETTLING_NS = 10e9  # as guest.machine
_MARGIN_NS = 1e9
_DEADLINE_NS = GuestSettings().deadline_ns
# Pages of a step: at most those of a live step, at least _LEAST_BUDGET_PAGES, and in between so many that its touches
# alone take a tenth of the delay.
_LEAST_BUDGET_PAGES = 64
_DELAY_SHARE = 0.1
_STUCK_EVENTS = 20_000  # without a page moved: a job that cannot end


class VirtualMachine:
    """One run of ``spec``. ``run`` it once; then look at its parts.

    Args:
        outcome: see ``VirtualReporter``.

    Raises:
        UsageError: the specification names something that there is not.
    """

    def __init__(self, spec: RunSpec, costs: Costs, *, outcome: Callable[[int], Outcome] | None = None) -> None:
        check_workload(spec.workload)
        if min(spec.cores, spec.vcpus) < 1:
            raise UsageError(f"cores: {spec.cores}, vcpus: {spec.vcpus}; allowed is 1 and more")
        check_host(spec.policy, inhibit_discard=spec.inhibit_discard)
        self.spec, self.costs = spec, costs
        policy = find_policy("off" if spec.policy == ORACLE else spec.policy)
        delay_ns = policy.delay_ns if spec.delay_ns is None else spec.delay_ns
        period_ns = host_period_ns(spec.policy, spec.delay_ns)
        self.delay_ns = delay_ns if period_ns is None else period_ns
        self.zone = Zone.private(self._zone_settings(policy))
        self.words = ZoneWords(self.zone)
        self.oracle = Oracle(self.zone.n_pages, costs) if spec.policy == ORACLE else None
        self.books = Books(self._look)
        self.world = World(
            spec=spec,
            costs=costs,
            zone=self.zone,
            words=self.words,
            clock=Clock(spec.cores, slowdown=costs.work_slowdown, passing=self.books.pass_time),
            lock=ZoneLock(),
            books=self.books,
            look=self._wake_reporter,
            stop_work=self.stop_work,
            budget_pages=self._budget_pages(),
        )
        self.host = VirtualHost(self.world)
        self.reporter: VirtualReporter | None = None
        self.cycle: Cycle | None = None
        self.populator: Populator | None = None
        if policy.name != "off":
            self.cycle = Cycle(self.zone, spec.policy, capacity=spec.capacity)
            self.reporter = VirtualReporter(self.world, self.cycle, self.host, delay_ns=self.delay_ns, outcome=outcome)
            entry.register_device(self.zone.address, os.getpid(), 0)
            if policy.host_driven:
                self.populator = Populator(self.zone)
        self.vcpus = self._build_vcpus()
        self.world.lock.waiters.extend(self.vcpus)
        self.work_ended: float | None = None
        self.work_resident_ns = 0.0  # pages times ns, until the end of the work
        self.settled: float | None = None

    def _zone_settings(self, policy: Policy) -> ZoneSettings:
        spec = self.spec
        return ZoneSettings(
            memory_bytes=spec.memory,
            cpus=spec.vcpus + _SPARE_SLOTS,
            pcp_batch=spec.pcp_batch,
            pcp_high=spec.pcp_high,
            shuffle=spec.shuffle,
            merge_likely=spec.merge_likely,
            seed=spec.seed,
            min_order=spec.min_order,
            high_water_mark=policy.high_water_mark if spec.high_water_mark is None else spec.high_water_mark,
            trigger=policy.trigger,
            host_zeroed=spec.host_zeroed,
        )

    def _budget_pages(self) -> int:
        page_ns = max(self.costs.touch_ns, 1.0)
        wanted = int(_DELAY_SHARE * self.delay_ns / page_ns)
        return min(BUDGET_PAGES, MAX_BUDGET_PAGES, max(_LEAST_BUDGET_PAGES, wanted))

    def _build_vcpus(self) -> list[VirtualCpu]:
        spec = self.spec
        share = int(self.zone.n_pages * spec.fill) // spec.vcpus
        return [
            VirtualCpu(
                self.world,
                WorkloadSettings(
                    workload=spec.workload,
                    target_pages=share,
                    work_order=spec.work_order,
                    hold_ns=spec.hold_ns,
                    idle_ns=spec.idle_ns,
                    seed=spec.seed * 1000 + index,
                ),
                self.oracle,
                self.host,
            )
            for index in range(spec.vcpus)
        ]

    # -- life ---------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """From the start of the workload until the guest has settled.

        Raises:
            LabError: a job cannot get on, or this machine is too busy to answer an ask.
        """
        clock = self.world.clock
        if self.reporter is not None:
            self.reporter.begin()
        for vcpu in self.vcpus:
            vcpu.begin()
        if not self.spec.work_pages:
            clock.at(float(self.spec.duration_ns), self.stop_work)
        progress = (0, 0)
        while not self._over():
            if not clock.advance():
                raise LabError("nothing is left to happen in a virtual run that is not over")
            if self.spec.work_pages:
                progress = self._check_progress(*progress)
        self.settled = clock.now
        self.books.pass_time(clock.now)
        cut_off_ns = self.delay_ns if self.spec.policy in HOST_STARTED else 0  # nobody waits for the host's next word
        self.books.episodes.finish(clock.now, cut_off_ns)
        if self.reporter is not None:
            self.reporter.stop()
        if self.populator is not None:
            self.populator.check()

    def stop_work(self) -> None:
        """The workload is over; the vCPUs free all they hold, each after its current step."""
        world = self.world
        if world.stopping:
            return
        world.stopping = True
        self.work_ended = world.clock.now
        self.work_resident_ns = self.books.resident_ns
        if self.oracle is not None:
            self.work_resident_ns -= self.oracle.finish(world.clock.now)[1]
        for vcpu in self.vcpus:
            vcpu.stop()

    def _over(self) -> bool:
        """All vCPUs are done and the reporter has finished what was requested, or its time is up."""
        if not all(vcpu.done for vcpu in self.vcpus):
            return False
        reporter, now = self.reporter, self.world.clock.now
        if reporter is None:
            return True
        if self.settled is None:
            self.settled = now
            patience = min(self.delay_ns + _DEADLINE_NS + _MARGIN_NS, _LONGEST_SETTLING_NS)
            self.world.clock.at(now + patience, reporter.finish)
        if reporter.ending:
            return not reporter.running
        # Of a policy whose runs the host starts nothing is ever requested, and nobody waits for the next: as live.
        return not self.words.requested and not reporter.running

    def _check_progress(self, operations: int, idle_events: int) -> tuple[int, int]:
        """Operations, and how many events have passed without any more.

        Raises:
            LabError: too many.
        """
        world = self.world
        if world.operations != operations or world.stopping:
            return world.operations, 0
        if idle_events >= _STUCK_EVENTS:
            raise LabError(
                f"the job stands at {operations} of {self.spec.work_pages} page operations: no memory is to be had"
            )
        return operations, idle_events + 1

    def _look(self) -> tuple[int, int]:
        return self.world.allocated, self.words.reported_pages

    def _wake_reporter(self) -> None:
        if self.reporter is not None:
            self.reporter.look()

    # -- end ----------------------------------------------------------------------------------------------------------

    def complaints(self) -> list[str]:
        """What is wrong with the zone or the vCPUs' memory now that all is over."""
        found = [text for vcpu in self.vcpus if (text := vcpu.vcpu.complaint())]
        statistics = self.zone.statistics()
        out = self.zone.n_pages - statistics.free_pages
        if statistics.free_pages != self.zone.n_pages:
            found.append(f"{statistics.free_pages} of {self.zone.n_pages} pages are free at the end, {out} elsewhere")
        try:
            self.zone.validate()
        except LabError as error:
            found.append(str(error))
        return found

    def close(self) -> None:
        """Drop the zone."""
        if self.populator is not None:
            self.populator.close()
        if self.reporter is not None:
            entry.unregister_device(self.zone.address, os.getpid())
        del self.words, self.world.words
        self.zone.close()
