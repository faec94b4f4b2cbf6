"""Runs a host and its guests as separate processes, watches them, and ends them in order.

Order at the end: guests first, by themselves when their time is over; then the last look at their memory, while
nothing moves; then the host, by SIGTERM, so that its account has every guest's goodbye in it. Whatever goes wrong
(a process fails, time runs out, Ctrl-C) takes the same way, only that the guests are told to stop.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lab.children import Child, Children, Interrupts
from lab.leftovers import names_left, remove_names
from lab.outcome import Account, ProcessEnd, RunOutcome
from lab.sampler import GuestProbe, Observation, Probe, Sampler
from lab.view import GuestRow, RateMeter, View

__all__ = ["LabPlan", "ProcessPlan", "run_lab", "warm_up"]

_WARM_UP = "warm-up"
_WARM_UP_LIMIT_S = 1200.0  # compiling takes two minutes of a processor, which others may want too
_START_LIMIT_S = 30.0  # beyond the guests' duration: imports, connecting, checking all memory at the end
_START_LIMIT_PER_GUEST_S = 5.0
_SETTLE_LIMIT_S = 10.0  # a guest whose time is over waits this long, whatever its delay, for its last reports


@dataclass(frozen=True)
class ProcessPlan:
    """One process: arguments for Python, and where it will write its account."""

    name: str
    arguments: tuple[str, ...]
    account: Path


@dataclass(frozen=True)
class LabPlan:
    """All processes of one run.

    Attributes:
        warm_up: Python arguments that compile the kernels, empty for none.
        watched: look at the guests from outside while they run; False leaves the processors to them.
    """

    lab: str
    backend: str
    memory_bytes: int
    duration_s: float
    warm_up: tuple[str, ...]
    host: ProcessPlan
    guests: tuple[ProcessPlan, ...]
    watched: bool = True
    start_limit_s: float = _START_LIMIT_S
    stop_limit_s: float = 10.0  # a host or guest that was told to stop has this long before it is killed


def run_lab(plan: LabPlan, view: View, *, make_probe: Callable[[str], Probe] | None = None) -> RunOutcome:
    """Run ``plan`` to its end, whatever that is; no process of it is left.

    In the main thread signals to stop end the run in order. Another thread cannot take signals: there a run goes
    on until its end, and ends with this process if that is killed.

    ``make_probe`` gives the probe of a guest by name; the default looks into its shared memory.
    """
    if make_probe is None:

        def make_probe(guest: str) -> Probe:
            return GuestProbe(plan.lab, guest, backend=plan.backend)

    with Interrupts() as interrupts:
        run = _Run(plan, view, interrupts, make_probe)
        with Children(interrupts, tick=run.tick) as children:
            run.children = children
            try:
                return run.to_the_end()
            finally:
                children.kill([_WARM_UP, *(process.name for process in (plan.host, *plan.guests))])
                _sweep(plan)


def warm_up(children: Children, arguments: tuple[str, ...], *, say: Callable[[str], None] | None = None) -> str | None:
    """Compile the kernels in one process before several need them at once; what went wrong, or None.

    A signal to stop ends it early, which looks like a failure: ask ``children.interrupted`` first.
    """
    child = children.start(_WARM_UP, arguments)
    # With a warm cache this takes a moment, not worth a word.
    if not children.wait([_WARM_UP], deadline_s=time.monotonic() + 2.0):
        if say is not None and not children.interrupted:
            say("compiling the kernels (once)…")
        children.wait([_WARM_UP], deadline_s=time.monotonic() + _WARM_UP_LIMIT_S)
    children.kill([_WARM_UP])
    return f"the kernels could not be compiled: {child.stderr_tail()}" if child.exit_code else None


class _Run:
    """The state of one ``run_lab``."""

    children: Children

    def __init__(self, plan: LabPlan, view: View, interrupts: Interrupts, make_probe: Callable[[str], Probe]) -> None:
        self._plan, self._view, self._interrupts = plan, view, interrupts
        self._guest_names = [guest.name for guest in plan.guests]
        self._make_probe = make_probe
        self._sampler: Sampler | None = None
        self._meters = {name: RateMeter() for name in self._guest_names}
        self._problem: str | None = None

    def to_the_end(self) -> RunOutcome:
        plan = self._plan
        observations: Mapping[str, Observation] = {}
        began_s = time.monotonic()
        if self._warm_up():
            watched = self._guest_names if plan.watched else []
            self._sampler = Sampler({name: self._make_probe(name) for name in watched})
            began_s = self._sampler.started_s
            try:
                self._start_and_wait()
            finally:
                observations = self._sampler.finish()
            # Goodbyes are queued before a guest exits and the host reads its queue to the end before it stops.
            self.children.stop([plan.host.name], signal.SIGTERM, grace_s=plan.stop_limit_s)
        return RunOutcome(
            lab=plan.lab,
            duration_s=time.monotonic() - began_s,
            started_s=began_s,
            host=self._end(plan.host),
            guests=tuple(self._end(guest) for guest in plan.guests),
            observations=observations,
            interrupted=self._interrupts.count > 0,
            problem=self._problem,
            watched=plan.watched,
        )

    def tick(self) -> None:
        """Show how things stand."""
        sampler = self._sampler
        if sampler is None or not self._plan.watched:
            return
        time_s = time.monotonic() - sampler.started_s
        running = self.children.running(self._guest_names)
        rows = []
        for name in self._guest_names:
            reading = sampler.latest(name)
            seen = (0.0, 0, 0) if reading is None else (reading.time_s, reading.pulled_blocks, reading.refaults)
            blocks_per_s, refaults_per_s = self._meters[name].rates(*seen)
            rows.append(
                GuestRow(
                    name, self._plan.memory_bytes, reading, blocks_per_s, refaults_per_s, ended=name not in running
                )
            )
        self._view.show(time_s, rows)

    def _warm_up(self) -> bool:
        """Compile the kernels if that is planned; False if it ended badly."""
        if not self._plan.warm_up:
            return True
        problem = warm_up(self.children, self._plan.warm_up, say=self._view.say)
        if self._interrupts.count == 0:
            self._problem = problem
        return problem is None

    def _start_and_wait(self) -> None:
        plan = self._plan
        for process in (plan.host, *plan.guests):
            self.children.start(process.name, process.arguments)
        assert self._sampler is not None
        if plan.watched:
            self._sampler.start()
        limit_s = plan.duration_s + _SETTLE_LIMIT_S + plan.start_limit_s + _START_LIMIT_PER_GUEST_S * len(plan.guests)
        deadline_s = time.monotonic() + limit_s
        if self.children.wait(self._guest_names, deadline_s=deadline_s, until=self._is_failure):
            return
        if self._problem is None and not self._interrupts.count:
            late = ", ".join(sorted(self.children.running(self._guest_names)))
            self._problem = f"{late} still ran {limit_s:.0f} s after the start, for {plan.duration_s:g} s of work"
        self.children.stop(self._guest_names, signal.SIGTERM, grace_s=plan.stop_limit_s)

    def _is_failure(self, child: Child) -> bool:
        """True if this end cuts the run short: a guest failed, or the host ended before its guests."""
        if child.name == self._plan.host.name:
            self._problem = "the host ended before its guests"
        elif child.exit_code != 0:
            self._problem = f"{child.name} failed"
        else:
            return False
        return True

    def _end(self, process: ProcessPlan) -> ProcessEnd:
        try:
            child = self.children[process.name]
        except KeyError:
            return ProcessEnd(process.name, None, "", None)
        return ProcessEnd(process.name, child.exit_code, child.stderr_tail(), _read_account(process.account))


def _read_account(path: Path) -> Account | None:
    """The JSON object in ``path``, or None if it is not there or not whole."""
    try:
        account = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return account if isinstance(account, dict) else None


def _sweep(plan: LabPlan) -> None:
    """Remove whatever is left of the lab's names, now that none of its processes runs.

    One that was killed, by us or by somebody else, could not. The lab's name is of this run alone, so nobody else has
    an object of that name.
    """
    remove_names(names_left(plan.lab, [guest.name for guest in plan.guests]))
