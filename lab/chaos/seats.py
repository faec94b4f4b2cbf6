"""Who takes part: a host, and guests, each with processes that have joined it. Every one can be started anew."""

from __future__ import annotations

import contextlib
import functools
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import names
from common.errors import LabError
from common.layout import C_OWNER_PID
from common.names import SHM_DIR
from common.queues import Queue
from common.ramobject import RamObject
from guest.allocator.zone import Zone
from host.takeover import lock_object
from lab.nursery import Nursery, Nursling

__all__ = ["GUEST_POINTS", "HOST_POINTS", "Seat", "Stage", "ZoneWatch"]

_READY_S = 60.0
_LOOK_S = 0.005
# Places that a process comes to by itself, so that some deaths are where it hurts.
GUEST_POINTS = (
    "attach.owned",
    "attach.withdrawn",
    "attach.put-back",
    "queue.acks-made",
    "hello.sent",
    "report.sent:2",
    "ack.taken:3",
)
HOST_POINTS = (
    "host.named",
    "host.opened:2",
    "host.received:3",
    "host.gated:2",
    "host.punched:2",
    "host.discarded:3",
    "host.ungated:2",
    "host.answered:2",
)
# Any policy can take over from any other: what is changed at a restart is who reports, and when.
_POLICIES = ("boundary", "rotate", "skip-walk", "scan", "bitmap", "hold", "walk-locked")
_WORKLOADS = ("churn", "burst", "page-fault")


@dataclass
class Seat:
    """A place at the table, and the process that sits there now."""

    name: str
    target: str
    arguments: list[str]
    restart: list[str]  # flags of a process that takes a dead one's place
    points: tuple[str, ...]
    child: Nursling | None = None
    restarts: int = 0


@dataclass
class ZoneWatch:
    """A guest's zone and RAM, mapped or open here for as long as the run lasts, whoever dies."""

    name: str
    zone: Zone
    ram: RamObject

    def progress(self) -> int:
        """Something that grows while anybody works there."""
        now = self.zone.statistics()
        return now.allocations + now.frees

    def lost_pages(self) -> int:
        """Pages that are neither free nor isolated. Once everybody has ended, nobody has them."""
        now = self.zone.statistics()
        return now.n_pages - now.free_pages - now.isolated_pages

    def close(self) -> None:
        """Drop mapping and descriptor."""
        self.zone.close()
        self.ram.close()


class Stage:
    """All seats of one run.

    Args:
        moments: decides policies and workloads of those who are started.
    """

    def __init__(self, lab: str, nursery: Nursery, moments: random.Random, *, guests: int, joined: int) -> None:
        self.lab = lab
        self._nursery = nursery
        self._moments = moments
        self._count = 0
        self.host = Seat("host", "host.cli:main", ["--name", lab, "--quiet"], [], HOST_POINTS)
        self.mains = [self._main(f"g{index}", joined) for index in range(guests)]
        self.joined = [self._joined(seat.name, index) for seat in self.mains for index in range(joined)]
        self.watches: list[ZoneWatch] = []

    @property
    def seats(self) -> list[Seat]:
        """Everybody."""
        return [self.host, *self.mains, *self.joined]

    def _main(self, name: str, joined: int) -> Seat:
        chance = self._moments
        arguments = ["--host", self.lab, "--name", name, "--memory", "64MiB", "--vcpus", "1", "--quiet", "--keep"]
        arguments += ["--delay", "0", "--high-water-mark", "0", "--fill", "0.4", "--deadline", "50ms"]
        arguments += ["--min-order", str(chance.choice((0, 3, 9))), "--spare-slots", str(2 * joined + 2)]
        arguments += chance.choice((["--shuffle"], ["--host-zeroed"], ["--pcp-batch", "0"], ["--pcp-batch", "0"]))
        return Seat(name, "guest.cli:main", arguments, ["--attach"], GUEST_POINTS)

    def _joined(self, guest: str, index: int) -> Seat:
        arguments = ["--host", self.lab, "--name", guest, "--join", "--vcpus", "1", "--fill", "0.2", "--quiet"]
        return Seat(f"{guest}-j{index}", "guest.cli:main", [*arguments, "--idle", "10ms"], [], ())

    def start(self, seat: Seat, *, fault: str = "") -> None:
        """Start a process in ``seat``; that of a guest which was there before takes its zone over."""
        self._count += 1
        arguments = list(seat.arguments)
        if seat.restarts:
            arguments += seat.restart
        if seat is not self.host:
            arguments += ["--seed", str(self._count), "--workload", self._moments.choice(_WORKLOADS), "--idle", "20ms"]
            arguments += ["--work-order", str(self._moments.choice((0, 4, 9)))]
        if seat in self.mains:
            arguments += ["--policy", self._moments.choice(_POLICIES), "--capacity", str(self._moments.choice((4, 32)))]
        seat.restarts += 1
        seat.child = self._nursery.start(seat.name, seat.target, arguments, fault=fault)

    def open(self) -> None:
        """Start everybody and wait until the guests' zones are there."""
        self.start(self.host)
        self._until(self._host_listens, "the host")
        for seat in self.mains:
            self.start(seat)
            self._until(functools.partial(self._watch, seat.name), f"guest {seat.name}")
        for seat in self.joined:
            self.start(seat)

    def is_seated(self, seat: Seat) -> bool:
        """Whether the process has what its kind owns: the lab's name, the guest's zone, a slot of it."""
        assert seat.child is not None
        if seat is self.host:
            with contextlib.suppress(OSError):
                return Path(SHM_DIR + lock_object(self.lab)).read_text().strip() == str(seat.child.pid)
            return False
        zone = self.watch_of(seat).zone
        if seat in self.mains:
            return zone.owner() == seat.child.pid
        return any(zone.slot_word(cpu, C_OWNER_PID) == seat.child.pid for cpu in range(zone.n_cpus))

    def watch_of(self, seat: Seat) -> ZoneWatch:
        """Of the guest that ``seat`` belongs to."""
        return next(watch for watch in self.watches if watch.name == seat.name.split("-")[0])

    def _host_listens(self) -> bool:
        with contextlib.suppress(LabError):
            Queue.open(names.control_queue(self.lab), read=False, write=True).close()
            return True
        return False

    def _watch(self, name: str) -> bool:
        with contextlib.suppress(LabError):
            zone = Zone.attach(self.lab, name)
            try:
                ram = RamObject.open(self.lab, name, ram_bytes=zone.ram_bytes)
            except LabError:
                zone.close()
                raise
            self.watches.append(ZoneWatch(name, zone, ram))
            return True
        return False

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + _READY_S
        while not condition():
            for seat in self.seats:
                if seat.child is not None and not seat.child.running():
                    raise LabError(f"{seat.name} ended as it started: {seat.child.err.read_text()[-500:]}")
            if time.monotonic() > end:
                raise LabError(f"{what} was not ready after {_READY_S:.0f} s")
            time.sleep(_LOOK_S)

    def kill(self, seat: Seat) -> None:
        """SIGKILL; returns when the process is gone."""
        assert seat.child is not None
        seat.child.send(signal.SIGKILL)
        seat.child.ended_within(_READY_S)
        self.bury(seat)

    def bury(self, seat: Seat) -> int:
        """Forget a process that has ended; its exit code."""
        assert seat.child is not None
        code = seat.child.reap()
        seat.child.close()
        seat.child = None
        return code

    def close(self) -> None:
        """Kill whoever is left, drop every mapping."""
        for seat in self.seats:
            if seat.child is not None and seat.child.pidfd >= 0:
                seat.child.send(signal.SIGCONT)
                self.kill(seat)
        for watch in self.watches:
            watch.close()
