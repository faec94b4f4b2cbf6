"""Processes of a lab: started with flags, looked at from outside, signalled, and asked for what they wrote."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import names
from common.errors import LabError
from common.queues import Queue
from common.ramobject import RamObject
from guest.allocator.zone import Zone, ZoneStatistics
from lab.nursery import Nursery, Nursling
from tests.support import leftovers, wait_until

__all__ = ["MEMORY_BYTES", "MIB", "PATIENCE_S", "ROOT", "Guest", "Lab", "Process"]

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0
MIB = 1 << 20
MEMORY_BYTES = 32 * MIB
# What a child of a nursery calls in place of a module that is run.
TARGETS = {"host": "host.cli:main", "guest": "guest.cli:main", "lab.shared_host": "lab.shared_host.__main__:main"}
# As fast as it goes: every free of order 9 asks for a run, and a run begins at once.
EAGER = ("--memory", "32MiB", "--vcpus", "1", "--delay", "0", "--high-water-mark", "0", "--quiet")


class Forked:
    """What is used here of ``subprocess.Popen``, for a child of a nursery."""

    def __init__(self, child: Nursling) -> None:
        self.pid = child.pid
        self._child = child
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        if self._code is None and not self._child.running():
            self._code = self._child.reap()
            self._child.close()
        return self._code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            self._child.send(number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = PATIENCE_S) -> int:
        """The exit code, within ``timeout`` seconds."""
        if self.poll() is None and not self._child.ended_within(timeout):
            raise subprocess.TimeoutExpired(self._child.name, timeout)
        code = self.poll()
        assert code is not None
        return code


class Process:
    """One command, its streams and its JSON in files. ``runner``: a module that runs those of the test.

    It is forked from ``nursery``, which has everything loaded: two seconds of processor time less for each.
    """

    runner: tuple[str, ...] = ()
    nursery: Nursery | None = None
    process: Forked | subprocess.Popen[bytes]

    def __init__(self, folder: Path, label: str, arguments: list[str]) -> None:
        self.label = label
        self.json_path = folder / f"{label}.json"
        target = TARGETS.get(arguments[0])
        if self.nursery is not None and target is not None and not self.runner:
            child = self.nursery.start(label, target, arguments[1:])
            self._out, self._err, self.process = child.out, child.err, Forked(child)
            return
        self._out, self._err = folder / f"{label}.out", folder / f"{label}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.runner, *arguments],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    @property
    def out(self) -> str:
        """Standard output so far."""
        return self._out.read_text()

    @property
    def err(self) -> str:
        """Standard error so far."""
        return self._err.read_text()

    def send(self, number: int) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """The exit code."""
        return self.process.wait(PATIENCE_S)

    def kill(self) -> None:
        """SIGKILL, and reaped."""
        self.process.kill()
        self.process.wait()

    def stop(self, number: int = signal.SIGTERM, code: int = 0) -> dict[str, Any]:
        """End it with a signal; what it wrote."""
        self.send(number)
        assert self.wait() == code, self.err
        return self.result()

    def result(self) -> dict[str, Any]:
        """Its JSON."""
        result: dict[str, Any] = json.loads(self.json_path.read_text())
        return result


class Guest(Process):
    """A guest, with its zone and its RAM object open here once it is there."""

    def __init__(self, lab: str, name: str, folder: Path, *flags: str) -> None:
        self.lab, self.name = lab, name
        path = folder / f"{name}.json"
        super().__init__(
            folder, name, ["guest", "--host", lab, "--name", name, "--json", str(path), "--force", *EAGER, *flags]
        )
        self._zone: Zone | None = None
        self._ram: RamObject | None = None

    def here(self) -> None:
        """Wait until its zone and RAM can be opened."""
        wait_until(self._opened, PATIENCE_S, what=f"guest {self.name}")

    def _opened(self) -> bool:
        assert self.process.poll() is None, self.err
        try:
            self._zone = self._zone or Zone.attach(self.lab, self.name, read_only=True)
            self._ram = self._ram or RamObject.open(self.lab, self.name, ram_bytes=self._zone.ram_bytes)
        except LabError:
            return False
        if self._zone.owner_pid == self.process.pid:
            return True
        self.close()  # of a dead guest of the same name
        self._zone = self._ram = None
        return False

    def look(self) -> ZoneStatistics:
        """Its counters."""
        assert self._zone is not None
        return self._zone.statistics()

    def resident_bytes(self) -> int:
        """What the operating system says."""
        assert self._ram is not None
        return self._ram.resident_bytes()

    def host_is_inside_the_gate(self) -> bool:
        """Whether somebody holds the lock on the RAM object."""
        assert self._ram is not None
        if not self._ram.try_gate():
            return True
        self._ram.ungate()
        return False

    def returns(self, more_pages: int = 1) -> None:
        """Wait until it has given back so many pages more than now."""
        goal = self.look().returned_pages + more_pages
        wait_until(lambda: self.look().returned_pages >= goal or self._dead(), PATIENCE_S, what="returned pages")

    def works(self, more_allocations: int = 200) -> None:
        """Wait until it has allocated so many times more than now."""
        goal = self.look().allocations + more_allocations
        wait_until(lambda: self.look().allocations >= goal or self._dead(), PATIENCE_S, what="allocations")

    def _dead(self) -> bool:
        assert self.process.poll() is None, self.err
        return False

    def close(self) -> None:
        """Close what is open here."""
        if self._zone is not None:
            self._zone.close()
        if self._ram is not None:
            self._ram.close()


class Lab:
    """A name, and all processes that were started under it."""

    def __init__(self, name: str, guest_names: list[str], folder: Path) -> None:
        self.name = name
        self.folder = folder
        self._guest_names = guest_names
        self._processes: list[Process] = []

    def host(self, *flags: str) -> Process:
        """A host that listens."""
        label = f"host{len(self._processes)}"
        path = self.folder / f"{label}.json"
        host = Process(self.folder, label, ["host", "--name", self.name, "--json", str(path), "--quiet", *flags])
        self._processes.append(host)
        wait_until(lambda: self._listens() or host.process.poll() is not None, PATIENCE_S, what="host")
        assert host.process.poll() is None, host.err
        return host

    def _listens(self) -> bool:
        try:
            Queue.open(names.control_queue(self.name), read=False, write=True).close()
        except LabError:
            return False
        return True

    def guest(self, name: str = "g0", *flags: str) -> Guest:
        """A guest whose memory is there."""
        self._guest_names.append(name)
        guest = Guest(self.name, name, self.folder, *flags)
        self._processes.append(guest)
        guest.here()
        return guest

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command to its end."""
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )

    def names_of(self, guest: str) -> list[str]:
        """What exists of a guest."""
        return [name for name in leftovers(self.name, [guest]) if f".{guest}." in name]

    def close(self) -> None:
        """End what still runs, guests first, so that a host removes what they leave; then the host as it should."""
        for process in sorted(self._processes, key=lambda process: not isinstance(process, Guest)):
            if process.process.poll() is None:
                process.send(signal.SIGCONT)
                process.send(signal.SIGKILL if isinstance(process, Guest) else signal.SIGTERM)
                process.wait()
            if isinstance(process, Guest):
                process.close()
