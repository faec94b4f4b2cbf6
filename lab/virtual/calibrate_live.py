"""The costs that take real memory and a real host process: touches, faults, messages, discards."""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import signal
import threading
import time

import numpy as np

from common.errors import LabError, PeerError
from common.names import control_queue
from common.queues import Queue
from common.settings import GuestSettings
from guest.machine import Machine
from guest.memory import FINDING_WORDS
from guest.reporting.cycle import Batch, Outcome
from guest.reporting.link import Link
from host.proof import punch_hole
from lab.children import Children, Interrupts
from lab.virtual.loops import check_many, clear_many, use_many
from lab.virtual.pace import WINDOW_NS

__all__ = ["measure_live"]

_MEMORY = 512 << 20
_START_S = 30.0
_PAGE_BYTES = 4096
_TOP = 10
_PROBE_PAGES = 8192  # 32 MiB: beyond the caches of most machines
_SLOW_PAGES = 1024  # faulted in while the host discards a batch that takes longer
_BATCH = 16
_MESSAGES = 20
# Where in memory, in pages: what is touched, what a second thread touches, what is discarded.
_HERE, _THERE, _DISCARDED = 0, 16_384, 65_536
_START_OF_DISCARD_S = 0.002
_TRIES = 10


def measure_live(rounds: int, samples: dict[str, list[float]]) -> None:
    """Add ``rounds`` samples of each cost of memory and messages to ``samples``.

    Raises:
        LabError: the host does not start, or fails.
    """
    lab = f"calibrate-{secrets.token_hex(4)}"
    with Interrupts() as interrupts, Children(interrupts) as children:
        host = children.start("host", ("-m", "host", "--name", lab, "--quiet"))
        _wait_for_host(children, lab)
        settings = GuestSettings(
            host=lab, name="probe", memory=_MEMORY, policy="off", workload="none", min_order=0, vcpus=2
        )
        with Machine(settings) as machine:
            if not _link_of(machine).wait_connected():
                raise LabError("the host of the calibration did not answer")
            probe = _Probe(machine, host.process.pid)
            for number in range(rounds + 1):
                if interrupts.count:
                    raise KeyboardInterrupt
                found = {**probe.memory(), **probe.two_at_once(), **probe.messages(), **probe.beside_discards()}
                if number:
                    for name, value in found.items():
                        samples.setdefault(name, []).append(value)
        children.stop(["host"], signal.SIGTERM, grace_s=10.0)


def _wait_for_host(children: Children, lab: str) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and children.running(["host"]):
        with contextlib.suppress(PeerError):
            Queue.open(control_queue(lab), read=False, write=True).close()
            return
        time.sleep(0.01)
    raise LabError(f"the host of the calibration did not start: {children['host'].stderr_tail()}")


def _process_ns(pid: int) -> int:
    """Processor time of a whole process, ns: clock_getcpuclockid(3), the clock's number made from the pid."""
    return time.clock_gettime_ns((~pid << 3) | 2)


def _link_of(machine: Machine) -> Link:
    assert isinstance(machine.link, Link)  # the policy of the calibration is not driven by a host
    return machine.link


class _Probe:
    """A guest without a workload, whose memory is touched and reported by hand."""

    def __init__(self, machine: Machine, host_pid: int) -> None:
        self._machine = machine
        self._host_pid = host_pid
        self._finding = np.zeros(FINDING_WORDS, dtype=np.int64)
        self._touch_ns = self._fault_ns = 0.0

    def _use(self, first: int, pages: int, cpu: int = 0) -> float:
        """Ns a page of first use of ``pages`` pages from ``first`` on."""
        machine = self._machine
        start = time.perf_counter_ns()
        use_many(machine.zone.address, machine.ram_address, cpu, self._finding, first, _TOP, pages >> _TOP)
        return (time.perf_counter_ns() - start) / pages

    def _punch(self, first: int, pages: int) -> None:
        punch_hole(self._machine.ram.fileno(), first * _PAGE_BYTES, pages * _PAGE_BYTES)

    def memory(self) -> dict[str, float]:
        """One thread, and the host idle."""
        machine = self._machine
        self._use(_HERE, _PROBE_PAGES)
        touch = self._use(_HERE, _PROBE_PAGES)
        start = time.perf_counter_ns()
        blocks = _PROBE_PAGES >> _TOP
        sound = int(check_many(machine.zone.address, machine.ram_address, self._finding, _HERE, _TOP, blocks))
        check = (time.perf_counter_ns() - start) / _PROBE_PAGES
        if sound != blocks:
            raise LabError("the calibration lost a stamp in its own memory")
        start = time.perf_counter_ns()
        clear_many(machine.ram_address, _HERE, _PROBE_PAGES)
        zero = (time.perf_counter_ns() - start) / _PROBE_PAGES
        self._punch(_HERE, _PROBE_PAGES)
        fault = max(0.0, self._use(_HERE, _PROBE_PAGES) - touch)
        self._touch_ns, self._fault_ns = touch, fault
        self._use(_HERE, _PROBE_PAGES)
        return {
            "touch_ns": touch,
            "zero_ns": min(zero, touch),
            "check_ns": check,
            "fault_ns": fault,
            "first_fault_ns": max(0.0, self._fresh() - touch),
            "pace_ns": self._pace(),
        }

    def _fresh(self) -> float:
        """Ns a page of first use of memory that is new, in a mapping that is new."""
        machine = self._machine
        descriptor = os.memfd_create("fresh")
        try:
            os.ftruncate(descriptor, _PROBE_PAGES * _PAGE_BYTES)
            with mmap.mmap(descriptor, _PROBE_PAGES * _PAGE_BYTES) as mapping:
                view = np.frombuffer(mapping, dtype=np.uint8)
                # SAFETY: the view keeps the mapping, which holds as many pages as are used.
                address, blocks = int(view.ctypes.data), _PROBE_PAGES >> _TOP
                start = time.perf_counter_ns()
                use_many(machine.zone.address, address, 0, self._finding, _HERE, _TOP, blocks)
                elapsed = time.perf_counter_ns() - start
                del view
        finally:
            os.close(descriptor)
        return elapsed / _PROBE_PAGES

    def _pace(self) -> float:
        """Ns a page of first use of resident pages, over a window of ``Pace``."""
        start = time.perf_counter_ns()
        found = []
        while time.perf_counter_ns() - start < WINDOW_NS:
            found.append(self._use(_HERE, _PROBE_PAGES))
        return float(np.mean(found))

    def two_at_once(self) -> dict[str, float]:
        """Two threads: what sharing memory and faulting side by side costs. 1 with one processor, which they share."""
        if (os.cpu_count() or 1) < 2:
            return {"work_slowdown": 1.0, "fault_slowdown_vcpu": 1.0}
        self._use(_THERE, _PROBE_PAGES)
        touch = self._both()
        slowdown = max(1.0, touch / self._touch_ns)
        self._punch(_HERE, _PROBE_PAGES)
        self._punch(_THERE, _PROBE_PAGES)
        fault = max(0.0, self._both() - touch) / slowdown
        return {"work_slowdown": slowdown, "fault_slowdown_vcpu": max(1.0, fault / max(self._fault_ns, 1.0))}

    def _both(self) -> float:
        """Mean ns a page of two threads that use a range each, started together."""
        together = threading.Barrier(2)
        found: list[float] = []

        def body(first: int, cpu: int) -> None:
            together.wait()
            found.append(self._use(first, _PROBE_PAGES, cpu))

        other = threading.Thread(target=body, args=(_THERE, 1))
        other.start()
        body(_HERE, 0)
        other.join()
        return float(np.mean(found))

    # -- messages and discards ----------------------------------------------------------------------------------------

    def _report(self, order: int, blocks: int, *, populate: bool) -> tuple[float, float, float]:
        """Elapsed, guest's and host's processor ns of one report of scattered blocks.

        Raises:
            LabError: the host did not discard.
        """
        size = 1 << order
        pfns = _DISCARDED + np.arange(blocks, dtype=np.int64) * 2 * size
        if populate:
            self._populate((pfns[:, None] + np.arange(size)).ravel())
        batch = Batch(pfns, np.full(blocks, order, dtype=np.int64), last=True)
        host, guest, start = _process_ns(self._host_pid), time.process_time_ns(), time.perf_counter_ns()
        outcome = _link_of(self._machine).report(batch).outcome
        elapsed = time.perf_counter_ns() - start
        guest = time.process_time_ns() - guest
        host = _process_ns(self._host_pid) - host
        if outcome is not Outcome.DONE:
            raise LabError(f"a report of the calibration ended as {outcome.value}")
        return float(elapsed), float(guest), float(host)

    def _populate(self, pages: np.ndarray) -> None:
        np.frombuffer(self._machine.ram.map(), dtype=np.uint8)[pages * _PAGE_BYTES] = 1

    def messages(self) -> dict[str, float]:
        """A fit over reports of order 0, 9 and 10: a message, a range, a page."""
        single = np.median([self._report(0, 1, populate=False) for _ in range(_MESSAGES)], axis=0)
        rows, times = [(1.0, 1.0, 0.0)], [single[0]]
        for order, repeats in ((0, _MESSAGES), (9, 2), (10, 2)):
            taken = float(np.median([self._report(order, _BATCH, populate=True)[0] for _ in range(repeats)]))
            rows.append((1.0, float(_BATCH), float(_BATCH << order)))
            times.append(taken)
        a_range, page = _fit(np.array(rows), np.array(times))
        host = max(0.0, float(single[2]) - a_range)
        guest = float(single[1])
        wait = max(0.0, float(single[0]) - a_range - guest - host)
        return {
            "discard_range_ns": a_range,
            "discard_page_ns": page,
            "message_guest_ns": guest,
            "message_host_ns": host,
            "message_wait_ns": wait,
        }

    def beside_discards(self) -> dict[str, float]:
        """How much slower a fault is while the host discards a batch of the largest blocks."""
        if (os.cpu_count() or 1) < 2:
            return {"fault_slowdown_discard": 1.0}
        size = 1 << _TOP
        pages = _DISCARDED + np.arange(_BATCH * 2 * size)
        for _ in range(_TRIES):
            self._populate(pages)
            self._punch(_HERE, _SLOW_PAGES)
            alone = self._use(_HERE, _SLOW_PAGES)
            self._punch(_HERE, _SLOW_PAGES)
            reporting = threading.Thread(target=lambda: self._report(_TOP, _BATCH, populate=False))
            reporting.start()
            time.sleep(_START_OF_DISCARD_S)
            beside = self._use(_HERE, _SLOW_PAGES)
            within = reporting.is_alive()
            reporting.join()
            if within:
                fault = max(alone - self._touch_ns, 1.0)
                return {"fault_slowdown_discard": max(1.0, (beside - self._touch_ns) / fault)}
        return {"fault_slowdown_discard": 1.0}  # discards are over before a fault can meet one


def _fit(rows: np.ndarray, times: np.ndarray) -> tuple[float, float]:
    """What a range and a page cost, from (1, ranges, pages) a row: least squares, relative, nothing below 0.

    Relative, so that the small reports count as much as the large.
    """
    solved, *_ = np.linalg.lstsq(rows / times[:, None], np.ones(times.size), rcond=None)
    return max(0.0, float(solved[1])), max(0.0, float(solved[2]))
