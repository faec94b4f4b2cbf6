"""A guest in this process, attached processes beside it, a host process in front of it, and what must hold after."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Self

import numpy as np

from common import names
from common.errors import LabError
from common.geometry import N_ORDERS, PAGE_BYTES, Migratetype
from common.layout import RESIDENT
from common.queues import Queue
from common.settings import GuestSettings
from guest.machine import Machine
from tests.support import wait_until

__all__ = ["GUEST", "Stage"]

ROOT = Path(__file__).resolve().parents[2]
GUEST = "g0"
PATIENCE_S = 60.0
MIB = 1 << 20


class Stage:
    """All parts. ``mood``: the host is ``fast``, ``jittery`` (stopped for moments) or ``stopped`` (past deadlines)."""

    def __init__(self, lab: str, folder: Path, *, mood: str, **changes: Any) -> None:
        self.lab = lab
        self.mood = mood
        self._folder = folder
        chosen: dict[str, Any] = {
            "memory": 32 * MIB,
            "vcpus": 2,
            "workload": "churn",
            "fill": 0.4,
            "delay_ns": 0,
            "high_water_mark": 0,
            "deadline_ns": 20_000_000,
            "seed": 3,
        }
        self.settings = GuestSettings(host=lab, name=GUEST, **(chosen | changes))
        self.workers: list[subprocess.Popen[str]] = []
        self._exit = contextlib.ExitStack()
        self._calm = threading.Event()

    def __enter__(self) -> Self:
        with self._exit:
            self._exit.callback(self._end_processes)
            self.host = subprocess.Popen(
                [sys.executable, "-m", "host", "--name", self.lab, "--quiet", "--json", str(self._host_json)], cwd=ROOT
            )
            wait_until(self._host_listens, PATIENCE_S, what="host")
            self.machine = self._exit.enter_context(Machine(self.settings))
            wait_until(lambda: self.machine.link.connected, PATIENCE_S, what="welcome")
            self._mood = threading.Thread(target=self._be_moody, daemon=True)
            self._mood.start()
            self._exit.callback(self._calm_down)
            self._exit = self._exit.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    @property
    def _host_json(self) -> Path:
        return self._folder / "host.json"

    def _host_listens(self) -> bool:
        with contextlib.suppress(LabError):
            Queue.open(names.control_queue(self.lab), read=False, write=True).close()
            return True
        return False

    def _be_moody(self) -> None:
        """Stop and continue the host until calmed. In between it discards something: failed runs put off the next."""
        moments = random.Random(self.settings.seed)
        longest_s = {"fast": 0.0, "jittery": 0.03, "stopped": 0.2}[self.mood]
        while longest_s and not self._calm.wait(moments.uniform(0.0, 0.02)):
            self.host.send_signal(signal.SIGSTOP)
            self._calm.wait(moments.uniform(longest_s / 5, longest_s))
            before = self.machine.zone.statistics().returned_pages
            self.host.send_signal(signal.SIGCONT)
            while self.machine.zone.statistics().returned_pages == before and not self._calm.wait(0.005):
                pass

    def _calm_down(self) -> None:
        self._calm.set()
        self._mood.join()

    def attach(self, workload: str, seed: int) -> subprocess.Popen[str]:
        """An attached process that is at work."""
        worker = subprocess.Popen(
            [sys.executable, "-m", "tests.stress.worker", self.lab, GUEST, workload, str(seed)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.workers.append(worker)
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        return worker

    def work_until(self, *, allocations: int, returned_pages: int) -> None:
        """Let everybody work until so much more has been done."""
        start = self.machine.zone.statistics()

        def done() -> bool:
            assert self.machine.error is None, self.machine.error
            now = self.machine.zone.statistics()
            return (
                now.allocations - start.allocations >= allocations
                and now.returned_pages - start.returned_pages >= returned_pages
            )

        wait_until(done, PATIENCE_S, what="work")

    def end_workers(self) -> None:
        """Every attached process frees what it holds, and has nothing to complain of."""
        for worker in self.workers:
            out, _err = worker.communicate(timeout=PATIENCE_S)
            assert out == "sound\n"
            assert worker.returncode == 0
        self.workers = []

    def finish(self) -> dict[str, Any]:
        """Stop the work, then the reporting, then the host; the host's account."""
        self.end_workers()
        self.machine.stop_work()
        self._calm_down()
        self.machine.settle()
        self.machine.stop_reporting()
        self.host.send_signal(signal.SIGTERM)
        assert self.host.wait(PATIENCE_S) == 0
        account: dict[str, Any] = json.loads(self._host_json.read_text())
        return account

    def check(self, account: dict[str, Any], *, lost_pages: int = 0) -> None:
        """What must hold when all is quiet; at most ``lost_pages`` went with processes that were killed."""
        machine = self.machine
        machine.check()
        statistics = machine.zone.statistics()
        assert statistics.violations == 0
        # S4: free and in flight and allocated is all there is, and nothing is held by anybody who lives.
        assert statistics.in_flight_pages == statistics.in_flight_blocks == 0
        assert statistics.allocated_pages + statistics.pcp_pages <= lost_pages
        on_lists = statistics.free_pages + statistics.isolated_pages + statistics.pcp_pages
        assert on_lists + statistics.allocated_pages == statistics.n_pages
        assert not statistics.active
        self._check_lists(statistics.reported)
        self._check_residence()
        (guest,) = account["guests"]
        assert account["ok"]
        assert guest["freed_bytes"] == statistics.returned_pages * PAGE_BYTES
        assert guest["rejected"] == guest["malformed"] == guest["invalid_blocks"] == guest["failures"] == 0

    def _check_lists(self, reported: tuple[int, ...]) -> None:
        """S1, S9, B1: what the lists say of Reported blocks, counted from outside the walker."""
        for order in range(N_ORDERS):
            lists = [self.machine.zone.free_list(order, kind) for kind in Migratetype]
            flagged = [pfn for entries in lists for pfn, is_reported in entries if is_reported]
            assert len(flagged) == len(set(flagged)) == reported[order]
            if order < self.settings.min_order:
                assert not flagged

    def _check_residence(self) -> None:
        """Page by page: what the guest believes to be resident is what the operating system holds."""
        machine = self.machine
        believed = machine.zone.resident_map() == RESIDENT
        assert int(believed.sum()) * PAGE_BYTES == machine.ram.resident_bytes()
        held = np.zeros(believed.size, dtype=bool)
        position, end = 0, believed.size * PAGE_BYTES
        while position < end:
            start = os.lseek(machine.ram.fileno(), position, os.SEEK_DATA)  # ends at the gate page at the latest
            position = os.lseek(machine.ram.fileno(), start, os.SEEK_HOLE)
            held[start // PAGE_BYTES : position // PAGE_BYTES] = True
        assert (believed == held).all(), np.flatnonzero(believed != held)[:16]

    def _end_processes(self) -> None:
        processes: list[subprocess.Popen[Any]] = [*self.workers, self.host]
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.send_signal(signal.SIGTERM if process is self.host else signal.SIGKILL)
                process.communicate()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
