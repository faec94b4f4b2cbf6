"""The loop: wait a moment, kill somebody, look at every zone, start somebody anew; at the end let all end in order."""

from __future__ import annotations

import contextlib
import random
import secrets
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.errors import InvariantViolation
from common.geometry import PAGE_BYTES, TOP_ORDER
from common.layout import INSTALLED, RESIDENT
from common.names import SHM_DIR
from guest.memory import present_pages
from lab.chaos.seats import Seat, Stage, ZoneWatch
from lab.children import Interrupts
from lab.nursery import Nursery

__all__ = ["ChaosResult", "Plan", "run_chaos"]

PATIENCE_S = 30.0  # from here on a process that does nothing counts as hung
_LOOK_S = 0.001
_SIGKILLED = -signal.SIGKILL
_IN_ORDER = {0, _SIGKILLED}  # as all end who are told to: at once, or at a named place on the way
_SUCCESSORS = 5
_LONGEST_PAUSE_S = 0.03
_LONGEST_STOP_S = 0.1  # of a host that is stopped and continued
_KEPT_COMPLAINTS = 20


@dataclass(frozen=True)
class Plan:
    """What a run is to do. ``joined``: processes that join each guest."""

    kills: int
    seed: int
    guests: int = 2
    joined: int = 1


@dataclass
class ChaosResult:
    """What came of a run.

    Attributes:
        kills: processes that were killed, by us or at a named place, by kind: host, guest, joined.
        repairs: zones that were rebuilt because a process died with the lock.
        longest_stop_s: longest time from a kill until somebody worked in that zone again. Of a guest whose every
            process is dead that includes the start of its successor.
        lost_pages: pages that nobody had after all had ended. violations: contents that were wrong, found by stamps or
            as pages that were not zero. breaches: of the contract, found by walking the zones.
        names_left: shared objects and queues that were left behind. hung: processes that did nothing for half a minute.
        unsound: processes that ended by themselves, neither in order nor at a named place.
        page_operations: pages allocated plus pages freed, by all processes, those that were killed too.
    """

    kills: int = 0
    killed: dict[str, int] = field(default_factory=dict)
    named_places: int = 0
    stops: int = 0
    repairs: int = 0
    restarts: int = 0
    longest_stop_s: float = 0.0
    lost_pages: int = 0
    violations: int = 0
    breaches: int = 0
    names_left: int = 0
    hung: int = 0
    unsound: int = 0
    page_operations: int = 0
    pulled_blocks: int = 0
    returned_pages: int = 0
    duration_s: float = 0.0
    seed: int = 0
    complaints: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing was lost, nothing was wrong, nobody hung."""
        return not (self.lost_pages or self.violations or self.breaches or self.names_left or self.hung or self.unsound)

    def complain(self, text: str) -> None:
        """Keep what was found, up to a bound."""
        if len(self.complaints) < _KEPT_COMPLAINTS:
            self.complaints.append(text)


def run_chaos(plan: Plan, tell: Callable[[ChaosResult], None] = lambda _result: None) -> ChaosResult:
    """Kill ``plan.kills`` processes, and see what is left. Ctrl-C ends it early and in order.

    ``tell``: called after each kill.

    Raises:
        LabError, MachineError: it could not be started.
    """
    lab = f"chaos-{secrets.token_hex(4)}"
    with (
        tempfile.TemporaryDirectory(prefix="fpr-chaos-") as folder,
        Nursery(Path(folder), fault="later") as nursery,  # first: Ctrl-C ends it while it compiles
        Interrupts() as interrupts,
    ):
        moments = random.Random(plan.seed)  # noqa: S311  a run is repeated by its seed
        run = _Run(plan, Stage(lab, nursery, moments, guests=plan.guests, joined=plan.joined))
        try:
            run.stage.open()
            while run.result.kills < plan.kills and not interrupts.count and not run.result.hung:
                run.once()
                tell(run.result)
            run.end()
        finally:
            run.stage.close()
            run.count_names(lab)
    return run.result


class _Run:
    """One run. The order of the kills follows from the seed; what they hit does not."""

    def __init__(self, plan: Plan, stage: Stage) -> None:
        self.stage = stage
        self.result = ChaosResult(seed=plan.seed)
        self._plan = plan
        self._moments = random.Random(plan.seed + 1)  # noqa: S311  as above
        self._killed: Counter[str] = Counter()
        self._started = time.monotonic()

    def once(self) -> None:
        """One kill and what follows."""
        self._pause()
        victim = self._choose()
        if victim is self.stage.host and self._moments.random() < 0.3:
            self._stop_host()
            return
        before = {watch.name: watch.progress() for watch in self.stage.watches}
        moment = time.monotonic()
        self.stage.kill(victim)
        self._count(victim)
        self._look()
        self._restart(victim)
        self._bury_those_who_died_by_themselves()
        for watch in self._concerned(victim):
            self._wait_for_progress(watch, before[watch.name], moment)
        self.result.duration_s = time.monotonic() - self._started

    def _pause(self) -> None:
        time.sleep(self._moments.uniform(0.0, _LONGEST_PAUSE_S))

    def _choose(self) -> Seat:
        kind = self._moments.random()
        if kind < 0.25:
            return self.stage.host
        return self._moments.choice(self.stage.mains if kind < 0.6 or not self.stage.joined else self.stage.joined)

    def _stop_host(self) -> None:
        """A host that is stopped for a moment: past the guests' deadlines, mostly, and at any place."""
        assert self.stage.host.child is not None
        self.result.stops += 1
        self.stage.host.child.send(signal.SIGSTOP)
        time.sleep(self._moments.uniform(0.0, _LONGEST_STOP_S))
        self.stage.host.child.send(signal.SIGCONT)

    def _count(self, seat: Seat) -> None:
        self.result.kills += 1
        kind = "host" if seat is self.stage.host else "guest" if seat in self.stage.mains else "joined"
        self._killed[kind] += 1
        self.result.killed = dict(self._killed)

    def _restart(self, seat: Seat) -> None:
        """In every fifth place the new process is to die at a place that it comes to by itself."""
        fault = self._moments.choice(seat.points) if seat.points and self._moments.random() < 0.2 else ""
        self.stage.start(seat, fault=fault)
        self.result.restarts += 1

    def _bury_those_who_died_by_themselves(self) -> None:
        for seat in self.stage.seats:
            if seat.child is None or seat.child.running():
                continue
            err = seat.child.err
            code = self.stage.bury(seat)
            if code == _SIGKILLED:
                self.result.named_places += 1
                self._count(seat)
            elif not self._may_end(seat, err):
                self.result.unsound += 1
                self.result.complain(f"{seat.name} ended with {code}: {err.read_text()[-300:].strip()}")
            self.stage.start(seat)
            self.result.restarts += 1

    def _may_end(self, seat: Seat, err: Path) -> bool:
        """A guest that comes back while a host is stopped inside its gate says so and leaves; it is tried again."""
        return seat in self.stage.mains and "in the midst of a discard" in err.read_text()

    def _concerned(self, victim: Seat) -> list[ZoneWatch]:
        if victim is self.stage.host:
            return self.stage.watches
        return [watch for watch in self.stage.watches if victim.name.split("-")[0] == watch.name]

    def _look(self) -> None:
        """Take every lock of every zone, repair what the dead held, and walk everything."""
        for watch in self.stage.watches:
            try:
                watch.zone.validate()
            except InvariantViolation as error:
                self.result.breaches += 1
                self.result.complain(f"{watch.name}: {error}")

    def _wait_for_progress(self, watch: ZoneWatch, before: int, moment: float) -> None:
        """Somebody works in that zone again; those who die at named places on the way are started anew."""
        while watch.progress() <= before:
            if time.monotonic() > moment + PATIENCE_S:
                self.result.hung += 1
                self.result.complain(f"{watch.name}: nobody has worked there for {PATIENCE_S:.0f} s")
                return
            self._bury_those_who_died_by_themselves()
            time.sleep(_LOOK_S)
        self.result.longest_stop_s = max(self.result.longest_stop_s, time.monotonic() - moment)

    # -- the end ------------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """Let everybody end in order, those who joined first, and look at what is left."""
        self._bury_those_who_died_by_themselves()
        self._end_in_order(self.stage.joined)
        for seat in (*self.stage.mains, self.stage.host):
            self._end_seat(seat)
        for watch in self.stage.watches:
            self._check_what_is_left(watch)
        self.result.duration_s = time.monotonic() - self._started

    def _end_seat(self, seat: Seat) -> None:
        """One that comes to its named place on the way leaves all to the next."""
        for _ in range(_SUCCESSORS):
            self._wait_until_seated(seat)
            if seat in self.stage.mains:
                watch = self.stage.watch_of(seat)
                self._wait_for_progress(watch, watch.progress(), time.monotonic())
            if self.result.hung or self._end_in_order([seat]) == {0}:
                return
            self.stage.start(seat)

    def _wait_until_seated(self, seat: Seat) -> None:
        """Until it has what it owns: before, a signal ends it at once, and what the dead left stays for another."""
        end = time.monotonic() + PATIENCE_S
        while seat.child is None or not self.stage.is_seated(seat):
            self._bury_those_who_died_by_themselves()
            if time.monotonic() > end:
                self.result.hung += 1
                self.result.complain(f"{seat.name} did not take its place")
                return
            time.sleep(_LOOK_S)

    def _end_in_order(self, seats: list[Seat]) -> set[int]:
        """Their exit codes."""
        codes = set()
        for seat in seats:
            self._wait_until_seated(seat)
        for seat in seats:
            assert seat.child is not None
            seat.child.send(signal.SIGTERM)
        for seat in seats:
            assert seat.child is not None
            if not seat.child.ended_within(PATIENCE_S):
                self.result.hung += 1
                self.result.complain(f"{seat.name} did not end")
                self.stage.kill(seat)
                continue
            err = seat.child.err
            code = self.stage.bury(seat)
            codes.add(code)
            if code not in _IN_ORDER:
                self.result.unsound += 1
                self.result.complain(f"{seat.name} ended with {code}: {err.read_text()[-300:].strip()}")
        return codes

    def _check_what_is_left(self, watch: ZoneWatch) -> None:
        try:
            watch.zone.validate()
        except InvariantViolation as error:
            self.result.breaches += 1
            self.result.complain(f"{watch.name}, at the end: {error}")
        now = watch.zone.statistics()
        self.result.repairs += now.repairs
        self.result.violations += now.violations
        self.result.returned_pages += now.returned_pages
        self.result.pulled_blocks += now.pulled_blocks
        self.result.page_operations += (now.allocated_bytes + now.freed_bytes) // PAGE_BYTES
        lost = watch.lost_pages()
        if lost:
            self.result.lost_pages += lost
            self.result.complain(f"{watch.name}: {lost} pages are nobody's: {now}")
        believed = np.isin(watch.zone.resident_map(), (RESIDENT, INSTALLED))
        there = np.concatenate(
            [present_pages(watch.ram.fileno(), pfn, TOP_ORDER) for pfn in range(0, now.n_pages, 1 << TOP_ORDER)]
        )
        if (wrong := int((believed != there).sum())) or now.resident_pages != int(there.sum()):
            self.result.breaches += 1
            self.result.complain(
                f"{watch.name}: the map is wrong about {wrong} pages; counted {now.resident_pages}, there {there.sum()}"
            )

    def count_names(self, lab: str) -> None:
        """Names of this run that exist although everybody has ended."""
        left = []
        for folder in (SHM_DIR, "/dev/mqueue"):
            with contextlib.suppress(OSError):
                left += [str(path) for path in Path(folder).iterdir() if path.name.startswith(f"fpr.{lab}.")]
        self.result.names_left = len(left)
        for name in left:
            self.result.complain(f"left behind: {name}")
