"""A soak from start to end: hosts and guests at full speed, others attached, coming and going, and eyes on all of it.

One thread and one loop: what is to happen is in a heap of moments, and in between the loop sleeps until a child ends.
What happens when is drawn from the seed; how far everybody has come by then is up to the machine.
"""

from __future__ import annotations

import heapq
import itertools
import os
import random
import secrets
import signal
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import LabError
from common.geometry import PAGE_BYTES
from common.units import format_size
from guest.allocator.zone import ZoneStatistics
from lab.children import Child, Children, Interrupts
from lab.orchestrate import warm_up
from lab.soak.cast import residents, visitor
from lab.soak.census import Census
from lab.soak.stage import Ended, Stage, lab_of
from lab.soak.verdict import Final, Findings
from lab.soak.watch import GuestWatch, Totals
from lab.summary import failure_text

__all__ = ["SoakPlan", "run_soak"]

_WARM_UP = ("-m", "guest", "--warm-up")
_SELF = "soak"  # this process, in the census
_ANY = 1 << 30  # more signals to stop than will ever come
_LOOKS = 600  # at each process, over the whole run
_GRACE_S = 120.0  # for a process that was told to stop: it settles for ten seconds at most, on a busy machine longer
_STALL_S = 120.0  # a guest whose vCPUs did nothing for so long hangs
_START_S = 300.0  # for everybody to be there, on a machine that others use too
_TOLD = (-signal.SIGTERM, 128 + signal.SIGTERM)  # of a guest that was told to end as it loaded, or had just ended
_VISITS = 200  # a visitor's longest stay is this part of the run, and two seconds at least
_STOP_EVERY_S = (1.0, 4.0)  # from one stop of a host to the next
_STOP_FOR_S = (0.02, 0.4)  # past the guests' deadline at times


@dataclass(frozen=True)
class SoakPlan:
    """What is asked for. ``guests`` stay, as many as ``visitors`` come and go; a line every ``every_s``."""

    for_s: float
    seed: int
    guests: int
    visitors: int
    every_s: float


def run_soak(plan: SoakPlan, say: Callable[[str], None]) -> Findings:
    """Run it. No process of it is left, and no name.

    Raises:
        LabError: the kernels could not be compiled, or somebody was not there in time.
    """
    lab = f"soak-{os.getpid()}-{secrets.token_hex(3)}"
    with (
        tempfile.TemporaryDirectory(prefix="fpr-soak-") as folder,
        Interrupts() as interrupts,
        Children(interrupts) as children,
    ):
        problem = warm_up(children, _WARM_UP, say=say)
        if children.interrupted:
            raise KeyboardInterrupt
        if problem is not None:
            raise LabError(problem)
        soak = _Soak(plan, Stage(children, lab, Path(folder)), say)
        try:
            return soak.to_the_end()
        finally:
            soak.close()


class _Soak:
    """The state of one ``run_soak``."""

    def __init__(self, plan: SoakPlan, stage: Stage, say: Callable[[str], None]) -> None:
        self._plan, self._stage, self._say = plan, stage, say
        self._found = Findings()
        self._moments = random.Random(plan.seed)  # noqa: S311  no secret
        self._roles = residents(plan.guests, plan.seed)
        self._labs = {role.name: lab_of(stage.lab, role.settings["policy"]) for role in self._roles}
        self._watches = {name: GuestWatch(lab, name) for name, lab in self._labs.items()}
        self._moved = {role.name: (-1, 0.0) for role in self._roles}  # page operations, and when they last changed
        self._census = Census()
        self._hosts: list[str] = []
        self._attached: list[str] = []
        self._visitors: set[str] = set()
        self._gone = Totals()  # of visitors that left
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._began_s = time.monotonic()
        self._last_told = (0.0, 0)
        self._stopping = False

    # -- life ---------------------------------------------------------------------------------------------------------

    def to_the_end(self) -> Findings:
        """Everybody in, the time, everybody out, the last looks."""
        self._start()
        self._began_s = time.monotonic()
        self._later(0.0, self._look)
        self._later(self._plan.every_s, self._tell)
        for host in self._hosts:
            self._later(self._moments.uniform(*_STOP_EVERY_S), partial(self._stop_host, host))
        for _ in range(self._plan.visitors):
            self._later(0.0, self._invite)
        self._loop(self._began_s + self._plan.for_s)
        found = self._found
        found.duration_s = time.monotonic() - self._began_s
        found.interrupted = self._stage.children.interrupted
        self._end()
        return found

    def close(self) -> None:
        """Let go of everything."""
        self._stage.close()
        for watch in self._watches.values():
            watch.close()

    def _start(self) -> None:
        stage = self._stage
        policies = [role.settings["policy"] for role in self._roles]
        if self._plan.visitors:
            policies.append("boundary")
        self._hosts = stage.start_hosts(policies)
        started: list[tuple[str, Child]] = [(name, stage.children[name]) for name in self._hosts]
        for role in self._roles:
            started.append((role.name, stage.start_guest(role.name, role.settings)))
            self._found.guests += 1
        self._await()
        for role in () if stage.children.interrupted or self._found.failures else self._roles:
            for index, what in enumerate(role.attached):
                name = f"{role.name}+{what}"
                seed = (self._plan.seed + 1000 * index + 7) % (1 << 32)
                child = stage.start_attached(name, role.name, role.settings["policy"], what, seed)
                started.append((name, child))
                self._attached.append(name)
                self._found.attached += 1
        self._await_begun(self._attached)
        self._census.follow(_SELF, os.getpid())
        for name, child in started:
            self._census.follow(name, child.process.pid)

    def _await(self) -> None:
        """Wait until each guest that stays has done something.

        Raises:
            LabError: one is not there in time, or has ended.
        """
        children, deadline_s = self._stage.children, time.monotonic() + _START_S
        waiting = dict(self._watches)
        while waiting and not children.interrupted:
            names = [*self._hosts, *self._attached, *self._watches]
            if children.running(names) != set(names):
                break
            waiting = {name: watch for name, watch in waiting.items() if not watch.totals().page_operations}
            if time.monotonic() >= deadline_s:
                late = ", ".join(waiting)
                raise LabError(f"{late}: not at work {_START_S:.0f} s after the start; use fewer --guests")
            children.wait(names, deadline_s=time.monotonic() + 0.05)
        self._collect()

    def _await_begun(self, names: Iterable[str]) -> None:
        """Wait until each of them could be told to stop."""
        children, deadline_s = self._stage.children, time.monotonic() + _START_S
        while not all(self._stage.begun(name) for name in names) and time.monotonic() < deadline_s:
            children.wait(names, deadline_s=time.monotonic() + 0.05, interrupts_known=_ANY)

    def _loop(self, until_s: float) -> None:
        children = self._stage.children
        while not children.interrupted and not self._found.failures and not self._stopping:
            now_s = time.monotonic()
            if now_s >= until_s:
                return
            while self._heap and self._heap[0][0] <= now_s:
                heapq.heappop(self._heap)[2]()
            next_s = min(until_s, self._heap[0][0] if self._heap else until_s)
            children.wait(self._everybody(), deadline_s=next_s, until=lambda _child: True)
            self._collect()

    def _everybody(self) -> list[str]:
        return [*self._hosts, *self._watches, *self._attached, *self._visitors]

    def _later(self, delay_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (time.monotonic() + delay_s, next(self._order), what))

    # -- what happens -------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """At every process and every zone."""
        now_s = time.monotonic()
        self._census.look(now_s - self._began_s)
        for name, watch in self._watches.items():
            done = watch.totals().page_operations
            before, since_s = self._moved[name]
            if done != before:
                self._moved[name] = (done, now_s)
            elif now_s - since_s > _STALL_S and name not in self._found.hung:
                self._found.hung.append(name)
                self._stopping = True
        self._later(max(0.1, self._plan.for_s / _LOOKS), self._look)

    def _tell(self) -> None:
        """A line of how it stands."""
        time_s = time.monotonic() - self._began_s
        totals = self._totals()
        told_s, told = self._last_told
        rate = (totals.page_operations - told) / max(time_s - told_s, 1e-9)
        self._last_told = (time_s, totals.page_operations)
        self._say(
            f"{time_s:7.0f} s  {totals.page_operations:.3e} page operations ({rate:,.0f} a second), "
            f"{format_size(totals.returned_bytes)} returned, {totals.refaults:,} refaults, "
            f"{self._found.guests} guests so far, {self._found.host_stops} stops, {totals.violations} violations"
        )
        self._later(self._plan.every_s, self._tell)

    def _totals(self) -> Totals:
        totals = self._gone
        for watch in self._watches.values():
            totals = totals.plus(watch.totals())
        return totals

    def _stop_host(self, host: str) -> None:
        self._stage.pause(host)
        self._found.host_stops += 1

        def go_on() -> None:
            self._stage.resume(host)
            self._later(self._moments.uniform(*_STOP_EVERY_S), partial(self._stop_host, host))

        self._later(self._moments.uniform(*_STOP_FOR_S), go_on)

    def _invite(self) -> None:
        longest_s = max(2.0, self._plan.for_s / _VISITS)
        role = visitor(f"visitor-{self._found.guests}", self._moments, longest_s)
        self._stage.start_guest(role.name, role.settings)
        self._visitors.add(role.name)
        self._labs[role.name] = lab_of(self._stage.lab, role.settings["policy"])
        self._found.guests += 1

    # -- who has ended ------------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Take the account of each that has ended; only visitors may."""
        running = self._stage.children.running(self._everybody())
        for name in [name for name in self._everybody() if name not in running]:
            ended = self._stage.ended(name)
            self._take(ended)
            if name in self._visitors:
                self._visitors.discard(name)
                self._gone = self._gone.plus(_totals_of(ended))
                self._later(0.0, self._invite)
                continue
            self._forget(name)
            if not ended.end.exit_code:
                self._found.failures.append(f"{name} ended before its time")

    def _forget(self, name: str) -> None:
        for names in (self._hosts, self._attached):
            if name in names:
                names.remove(name)
        watch = self._watches.pop(name, None)
        if watch is not None:
            watch.close()

    def _take(self, ended: Ended) -> None:
        """Count what an ended process says of itself."""
        found, account, name = self._found, ended.account, ended.end.name
        told = name in self._visitors and ended.end.exit_code in _TOLD
        if told and not account:
            return  # the run was over before it had come
        lab = self._labs.get(name)  # of a guest
        if ended.hung:
            found.hung.append(name)
        complaints = [f"{name}: {text}" for text in account.get("complaints", ())]
        found.complaints += complaints
        found.breaches += int(account.get("breaches", 0))
        found.lost_pages = max(found.lost_pages, int(account.get("lost_pages", 0)))
        for field in ("isolations", "rotations", "validations", "snapshots"):
            setattr(found, field, getattr(found, field) + int(account.get(field, 0)))
        if lab is not None:
            found.guest_ends.setdefault(lab, []).append(ended.end)
            found.validations += 1  # a guest validates as it ends
            found.violations += int(account.get("violations", 0))
        elif complaints and not account.get("breaches"):
            found.violations += len(complaints)
        if ended.end.exit_code and not told and not complaints and not ended.hung:
            found.failures.append(failure_text(name, ended.end.exit_code, ended.end.stderr_tail))
        elif not account and not ended.hung:
            found.failures.append(f"{name} left no account")

    def _end(self) -> None:
        """Attached ones first, then guests, then hosts; what is left is looked at, and then removed."""
        stage, found = self._stage, self._found
        for host in self._hosts:
            stage.resume(host)
        trends = self._census.trends()
        self._await_begun(list(self._visitors))
        for names in (list(self._attached), [*self._visitors, *self._watches], list(self._hosts)):
            late = stage.stop(names, grace_s=_GRACE_S)
            for name in names:
                ended = stage.ended(name, hung=name in late)
                if name in self._hosts:
                    self._take_host(name, ended)
                    continue
                self._take(ended)
                if name in self._visitors:
                    self._gone = self._gone.plus(_totals_of(ended))
        for name, watch in self._watches.items():
            if (seen := watch.statistics()) is not None:
                found.finals[name] = _final(seen, watch.resident_bytes())
        totals = self._totals()
        found.page_operations, found.stamped_operations = totals.page_operations, totals.stamped_operations
        found.returned_bytes = totals.returned_bytes
        found.refaults, found.repairs = totals.refaults, totals.repairs
        accounts = [end.account for ends in found.guest_ends.values() for end in ends if end.account is not None]
        found.reports = sum(int(account["reports"]) for account in accounts)
        found.names_left = stage.names_left()
        found.trends = trends

    def _take_host(self, name: str, ended: Ended) -> None:
        found = self._found
        lab = self._stage.lab if name == "host" else lab_of(self._stage.lab, "shared")
        found.host_ends[lab] = ended.end
        if ended.hung:
            found.hung.append(name)
        elif ended.end.exit_code or not ended.account:
            found.failures.append(failure_text(name, ended.end.exit_code, ended.end.stderr_tail))


def _totals_of(ended: Ended) -> Totals:
    """A visitor's part of the sums, by its own account."""
    account: dict[str, Any] = dict(ended.account)
    done = int(account.get("page_operations", 0))
    return Totals(
        page_operations=done,
        stamped_operations=done if account.get("backend") == "shared" else 0,
        returned_bytes=int(account.get("returned_bytes", 0)),
        refaults=int(account.get("refaults", 0)),
        violations=int(account.get("violations", 0)),
        repairs=int(account.get("repairs", 0)),
    )


def _final(seen: ZoneStatistics, resident_bytes: int | None) -> Final:
    return Final(
        allocated=seen.allocated_pages,
        in_flight=seen.in_flight_pages,
        held=seen.held_pages,
        counted_resident_bytes=seen.resident_pages * PAGE_BYTES,
        resident_bytes=resident_bytes,
    )
