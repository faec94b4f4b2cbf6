"""A vCPU: a thread that runs one workload's kernel, step by step, until it is told to stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from common.errors import LabError, UsageError
from common.ring import Ring
from common.settings import GuestSettings
from common.statistics import HISTOGRAM_WORDS
from guest.allocator.zone import Zone
from guest.inherit import Inheritance
from guest.memory import FINDING_WORDS, POISON_LOST, STAMP_LOST, ZERO_LOST
from guest.workloads import build, burst, churn, engine, memhog, page_fault

__all__ = ["WORKLOADS", "Job", "VCpu", "WorkloadSettings", "check_workload"]

# The table of workloads: to add one, write its module and one entry here.
WORKLOADS: dict[str, Any] = {
    "memhog": memhog.step,
    "page-fault": page_fault.step,
    "churn": churn.step,
    "burst": burst.step,
    "build": build.step,
}
_FINDINGS = {
    STAMP_LOST: "its stamp is gone",
    ZERO_LOST: "a page that was never used, given back or confirmed as zero does not read as zeros",
    POISON_LOST: "the poison of a freed page is gone",
}
BUDGET_PAGES = 2048  # of one step: with faults some milliseconds, so that a stop is heard soon
MAX_PAUSES = 4096  # kept of a vCPU, the newest


@dataclass(frozen=True)
class WorkloadSettings:
    """What one vCPU is to do. ``target_pages`` is its level of use; durations are in ns."""

    workload: str
    target_pages: int
    work_order: int
    hold_ns: int
    idle_ns: int
    seed: int

    @classmethod
    def of(cls, settings: GuestSettings, n_pages: int, index: int) -> Self:
        """Of vCPU ``index`` of a process with these settings, in a zone of ``n_pages``."""
        return cls(
            workload=settings.workload,
            target_pages=int(n_pages * settings.fill) // settings.vcpus,
            work_order=settings.work_order,
            hold_ns=settings.hold_ns,
            idle_ns=settings.idle_ns,
            seed=settings.seed * 1000 + index,
        )


def check_workload(name: str) -> None:
    """Raises ``UsageError`` when there is no such workload."""
    if name not in WORKLOADS:
        raise UsageError(f"workload: {name!r}; allowed are {', '.join(sorted(WORKLOADS))}")


def _nothing() -> None:
    """What happens at an idle pause that nobody watches."""


class Job:
    """A number of page operations (pages allocated plus pages freed) that vCPUs do together. For any thread.

    Attributes:
        done_ns: when the last of them was done, CLOCK_MONOTONIC; 0 before that. The vCPUs look after each step.
    """

    def __init__(self, pages: int) -> None:
        self.done_ns = 0
        self._pages = pages
        self._states: list[np.ndarray] = []
        self._lock = threading.Lock()

    def share(self, state: np.ndarray) -> None:
        """Count the operations of one vCPU more, by its state words."""
        self._states.append(state)

    def is_done(self) -> bool:
        """Whether the sum over the vCPUs has reached the number."""
        if not self.done_ns and sum(int(state[engine.S_OPERATIONS]) for state in self._states) >= self._pages:
            with self._lock:
                self.done_ns = self.done_ns or time.monotonic_ns()
        return self.done_ns > 0


class VCpu(threading.Thread):
    """One vCPU thread with a per-CPU slot of its own.

    Args:
        ram_address: where the RAM is mapped, 0 for the model backend.
        on_error: called from the thread with whatever made it give up.
        on_idle: called from the thread as each idle pause begins, and once when it has freed all at its end.
        job: shared with the other vCPUs; the thread ends when it is done.
        inherited: a slot with its blocks, of a process that died: this vCPU goes on with them.

    Attributes:
        times: int64[TIMES_ROWS, HISTOGRAM_WORDS], see ``engine``.
        busy_ns: time in steps, waiting for locks, faults and a processor included, pauses left out.
        operations: page operations of those steps; what is freed at the very end is not work.
        pauses: idle pauses, (start, end) in ns of CLOCK_MONOTONIC, at most MAX_PAUSES; holding is not being idle.
        ended_ns: when all was freed at the end; 0 before that.

    Raises:
        UsageError: no such workload. MachineError: no per-CPU slot is left.
    """

    def __init__(
        self,
        zone: Zone,
        ram_address: int,
        settings: WorkloadSettings,
        *,
        on_error: Callable[[BaseException], None],
        on_idle: Callable[[], None] = _nothing,
        job: Job | None = None,
        timed: bool = True,
        inherited: Inheritance | None = None,
    ) -> None:
        check_workload(settings.workload)
        super().__init__(name=f"vcpu-{settings.seed}", daemon=True)
        self.zone = zone
        self.settings = settings
        self.times = np.zeros((engine.TIMES_ROWS, HISTOGRAM_WORDS), dtype=np.int64)
        self.finding = np.zeros(FINDING_WORDS, dtype=np.int64)
        self.state = np.zeros(engine.STATE_WORDS, dtype=np.int64)
        self._ram_address = ram_address
        self.busy_ns = 0
        self.operations = 0
        self.pauses = Ring(MAX_PAUSES, 2)
        self.ended_ns = 0
        self._on_error = on_error
        self._on_idle = on_idle
        self._job = job
        if job is not None:
            job.share(self.state)
        self._stop_event = threading.Event()
        self._scratch = np.zeros(2, dtype=np.int64)
        smallest = 0 if settings.workload != "page-fault" else settings.work_order
        count = 0 if inherited is None else len(inherited.blocks)
        room = max(64, (settings.target_pages >> smallest) + 64, count + 64)
        self.held = np.zeros((room, engine.HELD_COLUMNS), dtype=np.int64)
        self.cpu = zone.claim_cpu(ram_address) if inherited is None else inherited.cpu
        self.state[engine.S_CPU] = self.cpu
        if inherited is not None:
            self._take_up(inherited.blocks)
        self.state[engine.S_RANDOM] = settings.seed * 2 + 1
        self.state[engine.S_TIMED] = int(timed)
        self._min_order = zone.min_order

    def _take_up(self, blocks: np.ndarray) -> None:
        """Make ``blocks`` (int64[n, 3]: pfn, order, the owner's word) this vCPU's pile.

        Their stamps are checked when they are freed, as those of any other.
        """
        count = len(blocks)
        numbers = blocks[:, 2] - 1
        self.held[:count, :2] = blocks[:, :2]
        self.held[:count, 2] = engine.tag_of(numbers, self.cpu) if count else 0
        self.state[engine.S_HELD] = count
        self.state[engine.S_PAGES] = (np.int64(1) << blocks[:, 1]).sum()
        self.state[engine.S_TAG] = numbers.max(initial=0)

    def step(self, budget: int = BUDGET_PAGES) -> int:
        """One bounded step: AGAIN, REST or IDLE."""
        return int(
            WORKLOADS[self.settings.workload](
                self.zone.address,
                self._ram_address,
                self.state,
                self.held,
                self.times,
                self.finding,
                self._scratch,
                self.settings.target_pages,
                self.settings.work_order,
                self._min_order,
                budget,
            )
        )

    def run(self) -> None:
        """Thread body: steps and pauses until stop or the job is done; then everything held is checked and freed."""
        try:
            while not self._stop_event.is_set():
                asked = self._timed_step()
                if self._job is not None and self._job.is_done():
                    break
                if asked == engine.IDLE:
                    self._idle()
                elif asked == engine.REST:
                    self._stop_event.wait(self.settings.hold_ns / 1e9)
            self.release_all()
            self.zone.release_cpu(self.cpu)
            self.ended_ns = time.monotonic_ns()
            self._on_idle()
        except (LabError, OSError) as error:
            self._on_error(error)

    def _timed_step(self) -> int:
        start = time.monotonic_ns()
        asked = self.step()
        self.busy_ns += time.monotonic_ns() - start
        self.operations = int(self.state[engine.S_OPERATIONS])
        return asked

    def _idle(self) -> None:
        self.zone.drain(self.cpu)  # what the idle kernel's refresh_cpu_vm_stats does
        start = time.monotonic_ns()
        self._on_idle()
        self._stop_event.wait(self.settings.idle_ns / 1e9)
        self.pauses.append(start, time.monotonic_ns())

    def release_all(self) -> None:
        """Check and free every block that is held."""
        engine.release_all(self.zone.address, self._ram_address, self.state, self.held, self.finding, self._min_order)

    def stop(self) -> None:
        """Ask the thread to end after its current step."""
        self._stop_event.set()

    def complaint(self) -> str:
        """What went wrong first in this vCPU's memory, or an empty string."""
        if int(self.state[engine.S_REFUSED]):
            return f"{self.name}: {int(self.state[engine.S_REFUSED])} frees of its own blocks were refused"
        kind, pfn, expected, found = (int(word) for word in self.finding)
        if not kind:
            return ""
        return f"{self.name}: pfn {pfn}: {_FINDINGS[kind]}: expected {expected:#x}, found {found:#x}"
