"""Hosts, guests and attached processes of a long run: started, signalled, ended, and asked for their accounts.

Policy-free: who is started when, stopped or killed is up to whoever drives it. A lab has one host of each kind that its
guests need; guests that trust theirs are in a lab of their own, since one host serves a name. An account is read when
its process has ended, stripped of what was recorded over time, and its file removed, so that a run of many guests
does not grow.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.names import zone_object
from common.settings import GuestSettings
from lab.children import Child, Children
from lab.flags import flags_of
from lab.hosts import HOST_DRIVEN, HOST_STARTED, host_process
from lab.leftovers import names_left, remove_names
from lab.orchestrate import ProcessPlan
from lab.outcome import ProcessEnd

__all__ = ["Ended", "Stage", "lab_of"]

_RECORDS = ("reports_timeline", "per_vcpu", "series", "lock_hold_ns", "alloc_ns", "alloc_reporting_ns")
_JOINED = {"vcpus": 1, "fill": 0.12, "work_order": 3, "hold_ns": 20_000_000, "idle_ns": 20_000_000, "quiet": True}
_HOST_EVERY_NS = {"hint": 50_000_000, "shared": 5_000_000}


@dataclass(frozen=True)
class Ended:
    """How a process ended. ``hung``: it did not within its grace, and was killed."""

    end: ProcessEnd
    hung: bool

    @property
    def account(self) -> Mapping[str, Any]:
        """What it wrote, empty if nothing."""
        return self.end.account or {}


def lab_of(lab: str, policy: str) -> str:
    """Name of the lab in which guests of ``policy`` are."""
    return f"{lab}-trust" if policy in HOST_DRIVEN else lab


class Stage:
    """All processes of a run. ``close`` removes what they left; it says what that was first, see ``names_left``."""

    def __init__(self, children: Children, lab: str, folder: Path) -> None:
        self.children = children
        self.lab = lab
        self._folder = folder
        self._plans: dict[str, ProcessPlan] = {}
        self._guests: dict[str, set[str]] = {}  # by lab: all that ever were
        self._zones: dict[str, str] = {}  # of guests and attached processes: the zone that they map
        self._paused: set[str] = set()

    # -- start --------------------------------------------------------------------------------------------------------

    def start_hosts(self, policies: Iterable[str]) -> list[str]:
        """The hosts that guests of ``policies`` need; their names here."""
        found = set(policies)
        kinds = {"host": HOST_STARTED[0]} if found - set(HOST_DRIVEN) else {}
        kinds |= {"trusted-host": HOST_DRIVEN[0]} if found & set(HOST_DRIVEN) else {}
        for name, policy in kinds.items():
            every_ns = _HOST_EVERY_NS[policy]
            lab, path = lab_of(self.lab, policy), self._path(name)
            self._start(host_process(policy, lab, path, delay_ns=every_ns, inhibit_discard=False, name=name))
            self._guests.setdefault(lab, set())
        return list(kinds)

    def start_guest(self, name: str, settings: Mapping[str, Any]) -> Child:
        """A guest of that name with ``GuestSettings`` by field name."""
        lab, path = lab_of(self.lab, settings["policy"]), self._path(name)
        own = {"host": lab, "name": name, "json": str(path), "quiet": True}
        self._guests.setdefault(lab, set()).add(name)
        self._zones[name] = zone_object(lab, name)
        return self._start(ProcessPlan(name, ("-m", "guest", *flags_of(GuestSettings, {**settings, **own})), path))

    def start_attached(self, name: str, guest: str, policy: str, what: str, seed: int) -> Child:
        """A process on the zone of a guest that is there: a workload's name, or ``compact``."""
        lab, path = lab_of(self.lab, policy), self._path(name)
        self._zones[name] = zone_object(lab, guest)
        if what == "compact":
            arguments: tuple[str, ...] = ("-m", "lab.soak.attached", lab, guest, str(seed), str(path))
        else:
            own = {"host": lab, "name": guest, "join": True, "workload": what, "seed": seed, "json": str(path)}
            arguments = ("-m", "guest", *flags_of(GuestSettings, own | _JOINED))
        return self._start(ProcessPlan(name, arguments, path))

    def _start(self, plan: ProcessPlan) -> Child:
        self._plans[plan.name] = plan
        return self.children.start(plan.name, plan.arguments)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def begun(self, name: str) -> bool:
        """Whether a guest or attached process has mapped its zone, and so hears a signal to stop, or has ended."""
        if not self.children.running([name]):
            return True
        try:
            with open(f"/proc/{self.children[name].process.pid}/maps", encoding="utf-8") as lines:
                return any(self._zones[name] in line for line in lines)
        except OSError:
            return True

    # -- signal -------------------------------------------------------------------------------------------------------

    def pause(self, name: str) -> None:
        """SIGSTOP."""
        self._paused.add(name)
        self.children.send(name, signal.SIGSTOP)

    def resume(self, name: str) -> None:
        """SIGCONT, if it was paused."""
        if name in self._paused:
            self._paused.discard(name)
            self.children.send(name, signal.SIGCONT)

    def stop(self, names: Iterable[str], *, grace_s: float) -> set[str]:
        """SIGTERM, paused ones too, and wait; those that had to be killed after ``grace_s``."""
        stopping = self.children.running(names)
        for name in stopping:
            self.resume(name)
            self.children.send(name, signal.SIGTERM)
        # A signal to us does not cut this short: it is what makes us stop, and grace has an end.
        known = 1 << 30
        deadline_s = time.monotonic() + grace_s
        self.children.wait(stopping, deadline_s=deadline_s, interrupts_known=known)
        late = self.children.running(stopping)
        self.children.kill(late)
        return late

    # -- end ----------------------------------------------------------------------------------------------------------

    def ended(self, name: str, *, hung: bool = False) -> Ended:
        """How a process that has ended did; it is forgotten here."""
        child, plan = self.children[name], self._plans.pop(name)
        end = ProcessEnd(name, child.exit_code, child.stderr_tail(), _read(plan.account))
        plan.account.unlink(missing_ok=True)
        self._paused.discard(name)
        self._zones.pop(name, None)
        self.children.forget(name)
        return Ended(end, hung)

    def names_left(self) -> list[str]:
        """What exists under the names of the labs, when all processes have ended: nothing, it should be."""
        return [name for lab, guests in self._guests.items() for name in names_left(lab, guests)]

    def close(self) -> None:
        """End what still runs and remove every name."""
        self.children.kill(list(self._plans))
        remove_names(self.names_left())


def _read(path: Path) -> dict[str, Any] | None:
    """The account in ``path`` without what it recorded over time; None if there is none."""
    try:
        account = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(account, dict):
        return None
    return {key: value for key, value in account.items() if key not in _RECORDS}
