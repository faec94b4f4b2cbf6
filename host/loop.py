"""The event loop: sleeps until a queue, a process or a signal has something to say. Nothing is polled.

Each turn serves every ready queue once and takes one message from it, so a guest that floods delays the others by one
report of its own, never more; and once it has sent more than its rate allows, its queue is not read until it may go on
(host/limits.py). Nothing that a guest sends may raise out of a turn; a bug of ours does.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from common import faults
from common.errors import MessageError
from common.messages import BLOCK_BYTES, Goodbye, Hello, Report, RunEnd, decode
from common.queues import CONTROL_DEPTH
from host.accounting import Counters, HostStatistics
from host.batch import Discarding, process_report, reject_report
from host.commands import Commands
from host.limits import REFUSED, Bucket, price_of_unawaited
from host.proof import Proof, best_proof
from host.registry import Guest, Registry
from host.takeover import LabName, announce

__all__ = ["Host", "View"]

# Messages a second of the control queue, whose senders are unknown. A forged hello costs some 20 us, a true one some
# 200 us; the 240 guests that a host takes may all say theirs at once.
_CONTROL_PER_S = 500


class View(Protocol):
    """Somebody who looks on. ``interval_s``: least time between two looks, None: never. ``always``: even if idle."""

    interval_s: float | None
    always: bool

    def show(self, statistics: HostStatistics) -> None:
        """Draw or print."""


@dataclass(frozen=True, slots=True)
class _HeldOff:
    """A source that is not watched until ``until_s`` (monotonic); ``serve`` is what it is then watched with."""

    until_s: float
    serve: Callable[[], None]


class Host:
    """One host of one lab, from construction to ``close``. For one thread, but ``stop`` may be called from anywhere."""

    def __init__(
        self,
        lab: str,
        *,
        slow_ns: int = 0,
        slow_where: str = "before",
        inhibit_discard: bool = False,
        hint_every_ns: int = 2_000_000_000,
        max_reports_per_s: int = 10_000,
        proof: Proof | None = None,
        view: View | None = None,
    ) -> None:
        """Take the lab's name, make its control queue, tell the guests that wait.

        ``hint_every_ns``: from run to run at guests that wait for commands; 0: only once. ``max_reports_per_s``: of one
        guest; 0: no limit, also none on the control queue.

        Raises:
            NameInUseError: a live host has the name.
            MachineError: limits, permissions or space.
        """
        self._discarding = Discarding(
            slow_ns, "inside" if slow_where == "inside" else "before", inhibit_discard, self._pause
        )
        self._commands = Commands(hint_every_ns / 1e9)
        self._max_reports_per_s = max_reports_per_s
        self._clock: Callable[[], float] = time.monotonic
        self._control_bucket = Bucket(_CONTROL_PER_S, self._clock()) if max_reports_per_s else None
        self._held_off: dict[int, _HeldOff] = {}  # by descriptor: what is not watched now
        self._view = view
        self._own = Counters()
        self._changed = True
        self._stopping = False
        self._started_s = time.monotonic()
        self._cpu_before_s = time.process_time()
        self._wake_read, self.wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._closing = contextlib.ExitStack()
        self._closing.callback(os.close, self._wake_read)
        self._closing.callback(os.close, self.wake_write)
        try:
            self._name = self._closing.enter_context(LabName(lab))
            self._selector = self._closing.enter_context(contextlib.closing(selectors.DefaultSelector()))
            self.registry = Registry(lab, proof or best_proof(), opened=self._watch, closing=self._unwatch)
            self._closing.callback(self.registry.close)
            self._selector.register(self._wake_read, selectors.EVENT_READ, self._drain_wake)
            self._selector.register(self._name.control, selectors.EVENT_READ, self._serve_control)
            announce(lab)
        except BaseException:
            self._closing.close()
            raise

    def run(self, duration_s: float | None = None) -> HostStatistics:
        """Serve until ``stop``, or for ``duration_s``; the final statistics."""
        deadline = None if duration_s is None else time.monotonic() + duration_s
        next_look = time.monotonic()
        while not self._stopping:
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                break
            if self._view is not None and self._view.interval_s is not None and self._look_due() and now >= next_look:
                self._changed = False
                self._view.show(self.statistics())
                next_look = now + self._view.interval_s
            self.turn(self._patience_s(now, deadline, next_look))
        return self.statistics()

    def turn(self, timeout_s: float | None) -> None:
        """Wait until something is ready, at most ``timeout_s`` (None: for ever), and serve all of it once."""
        self._watch_again()
        for key, _events in self._selector.select(timeout_s):
            serve: Callable[[], None] = key.data
            serve()
        self._commands.start_due(self.registry.guests.values())

    def stop(self) -> None:
        """End ``run`` soon. For any thread, and for signal handlers."""
        self._stopping = True
        with contextlib.suppress(BlockingIOError):  # full: it wakes anyway
            os.write(self.wake_write, b"\0")

    def statistics(self) -> HostStatistics:
        """Snapshot."""
        total, guests = self.registry.statistics()
        total.add(self._own)
        return HostStatistics(
            duration_s=time.monotonic() - self._started_s,
            proof=self.registry.proof.name,
            guests_seen=self.registry.guests_seen,
            guests_lost=self.registry.guests_lost,
            hellos_refused=self.registry.hellos_refused,
            counters=total,
            guests=guests,
            cpu_s=time.process_time() - self._cpu_before_s,
        )

    def close(self) -> None:
        """Close all guests' ends, remove the control queue, give the name back. Idempotent."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _look_due(self) -> bool:
        return self._view is not None and (self._changed or self._view.always)

    def _patience_s(self, now: float, deadline: float | None, next_look: float) -> float | None:
        """How long a turn may wait. With no duration, nothing new to show and no run to start, for ever (P2)."""
        moments = [held.until_s for held in self._held_off.values()]
        if deadline is not None:
            moments.append(deadline)
        run_due = self._commands.next_due_s(self.registry.guests.values())
        if run_due is not None:
            moments.append(run_due)
        if self._view is not None and self._view.interval_s is not None and self._look_due():
            moments.append(next_look)
        return max(0.0, min(moments) - now) if moments else None

    def _pause(self, seconds: float) -> None:
        """Sleep, or until ``stop``; the byte stays in the pipe for the loop."""
        if not self._stopping:
            select.select([self._wake_read], [], [], seconds)

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)

    def _watch(self, guest: Guest) -> None:
        self._changed = True
        self._selector.register(guest.pidfd, selectors.EVENT_READ, lambda: self._serve_death(guest))
        if guest.bucket is None and self._max_reports_per_s:
            guest.bucket = Bucket(self._max_reports_per_s, self._clock())
        if guest.objects is not None:
            self._selector.register(guest.objects.report, selectors.EVENT_READ, lambda: self._serve_report(guest))
            self._charge(guest, 0.0)  # it may have come with an overdrawn bucket

    def _unwatch(self, guest: Guest) -> None:
        """Called once while the guest's queues are open, and once more before its pidfd is closed."""
        self._changed = True
        source = guest.pidfd if guest.objects is None else guest.objects.report.fileno()
        self._held_off.pop(source, None)
        with contextlib.suppress(KeyError):  # never watched (the kernel refused it), or held off
            self._selector.unregister(source)

    def _charge(self, guest: Guest, price: float) -> None:
        """Take ``price`` from a guest's bucket, and hold it off if that overdraws it."""
        now = self._clock()
        if guest.bucket is None or guest.objects is None or not guest.bucket.charge(price, now):
            return
        if self._hold_off(guest.objects.report.fileno(), guest.bucket.ready_s(now)):
            guest.counters.held_off += 1

    def _hold_off(self, source: int, until_s: float) -> bool:
        """Do not watch ``source`` until then; False if it is held off already, or never was watched."""
        try:
            serve = self._selector.unregister(source).data
        except KeyError:
            return False
        self._held_off[source] = _HeldOff(until_s, serve)
        return True

    def _watch_again(self) -> None:
        """Watch what has been held off for long enough."""
        now = self._clock()
        for source in [source for source, held in self._held_off.items() if held.until_s <= now]:
            self._selector.register(source, selectors.EVENT_READ, self._held_off.pop(source).serve)

    def _serve_control(self) -> None:
        """One message of the control queue."""
        data = self._name.control.receive(0)
        if data is None:
            return
        self._changed = True
        now = self._clock()
        if self._control_bucket is not None and self._control_bucket.charge(1.0, now):
            self._own.held_off += self._hold_off(self._name.control.fileno(), self._control_bucket.ready_s(now))
        try:
            message = decode(data)
        except MessageError:
            self._own.malformed += 1
            return
        match message:
            case Hello():
                guest = self.registry.hello(message)
                if guest is not None:
                    self._commands.welcomed(guest)
            case Goodbye():
                self.registry.goodbye(message)
            case _:
                self._own.malformed += 1  # well-formed, but nothing that a guest may say here

    def _serve_death(self, guest: Guest) -> None:
        """A process ended. Its goodbye, if it said one, is still in the control queue: hear that first."""
        for _message in range(CONTROL_DEPTH):
            self._serve_control()
        self.registry.died(guest)

    def _serve_report(self, guest: Guest) -> None:
        """One message of a guest's report queue."""
        if guest.objects is None or guest.objects.report.fileno() in self._held_off:
            return  # closed, or opened anew and held off, earlier in this turn
        try:
            data = guest.objects.report.receive(0)
        except OSError:
            guest.counters.failures += 1
            return
        if data is None:
            return
        self._changed = True
        awaited = guest.objects.report.waiting == 0
        refused_before = guest.counters.rejected + guest.counters.malformed
        blocks = self._serve_message(guest, data)
        refused = guest.counters.rejected + guest.counters.malformed > refused_before
        self._charge(guest, REFUSED if refused else 1.0 if awaited else price_of_unawaited(blocks))

    def _serve_message(self, guest: Guest, data: bytes) -> int:
        """What a guest has sent through its report queue; how many blocks are in it."""
        if guest.objects is None:
            return 0
        try:
            report = decode(data)
        except MessageError:
            guest.counters.malformed += 1
            return 0
        if isinstance(report, RunEnd):
            self._commands.ended(guest, report)
            return 0
        if not isinstance(report, Report):
            guest.counters.malformed += 1
            return 0
        blocks = len(report.blocks) // BLOCK_BYTES
        guest.note_resident()
        if report.epoch != guest.hello.epoch or report.seq <= guest.last_seq:
            # Of another life of this guest, or a repetition: discarding now could hit memory in use (S5).
            guest.counters.reports += 1
            guest.answer(reject_report(report, guest.counters))
            return blocks
        guest.last_seq = report.seq
        faults.reach("host.received")
        ram = guest.objects.ram
        ack = process_report(report, guest.hello, ram, guest.backend, guest.counters, self._discarding)
        faults.reach("host.ungated")
        guest.answer(ack)
        faults.reach("host.answered")
        self._count_latency(guest, report.pulled_ns)
        return blocks

    @staticmethod
    def _count_latency(guest: Guest, pulled_ns: int) -> None:
        """From pull to ack. The pull is the guest's claim: one in the future or over an hour old is ignored."""
        elapsed_ns = time.monotonic_ns() - pulled_ns
        if 0 <= elapsed_ns <= 3600 * 1_000_000_000:
            guest.counters.pull_to_ack_ns.record(elapsed_ns)
