"""The guest's end of the wire: hello, reports, acknowledgements, and the certainty that a withdrawn report is dead.

A thread sleeps on the acknowledgement queue, on the host's pidfd and on a wake-up descriptor; nothing is polled while
the guest is idle. The reporter thread calls ``report`` and waits on a condition.

Invariants:

* At most one report is out (S10). It is answered, or withdrawn, before its blocks go back.
* A report is withdrawn by closing the *gate*: the host discards only while it holds a lock on the RAM object and only
  what is not withdrawn there; so once this end has held that lock and written the report's number, no discard for it
  can begin, however late the host wakes (S5). While the host holds the gate the blocks stay in flight.
* An acknowledgement counts only with this process's epoch and the number that is waited for, and only if what it
  confirms as zero is one bit a block of that report, or nothing (Z1).
* A host's command counts only with this epoch, on a connection, and if its run is newer than every one before it; one
  that has not been begun yet is replaced by the next. So a host that floods, repeats or never ends its commands costs
  time, and keeps no block for longer than a deadline.
* Of what a host floods it with, the thread takes one queueful a turn, then looks whether it is to end; announcements,
  however many, are answered by one hello.

Without waiting (``wait_for_ack`` False) the first two do not hold, on purpose: a report is sent and forgotten.

Rejected: a deadline in the message (the host can be stopped between looking at the clock and discarding); taking the
message back out of the queue (tells nothing once the host has received it).
"""

from __future__ import annotations

import contextlib
import os
import selectors
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from common import faults, messages, names
from common.errors import LabError, MachineError, MessageError, PeerError, UsageError
from common.messages import CMD_DONE, CMD_FIRST_RUN, Status
from common.queues import ACK_DEPTH, Queue, create_ack_queue, create_report_queue
from common.ramobject import RamObject
from guest.reporting.cycle import Answer, Batch, Outcome

__all__ = ["Link", "LinkStatistics"]

# How long a guest that has no host stands in line at a full control queue, between two looks at its own. In line: the
# kernel serves those who wait in the order in which they came, so that no flood of hellos keeps anybody out for good.
_HELLO_PATIENCE_S = 1.0
_HELLO_RETRY_S = 1.0  # the same of a guest that has a host, which does not stand in line
_GATE_RETRY_S = 0.02  # only while the host sits inside the gate past the deadline
_END_RETRY_S = 0.1  # only while the end of a run could not be sent because the report queue was full
_STOP_GRACE_S = 5.0  # how long a stopping guest waits for a host that sits inside the gate

_OUTCOMES = {
    Status.DONE: Outcome.DONE,
    Status.INHIBITED: Outcome.KEPT,
    Status.FAILED: Outcome.FAILED,
    Status.REJECTED: Outcome.FAILED,
    Status.BUSY: Outcome.FAILED,
    Status.WITHDRAWN: Outcome.WITHDRAWN,
}


@dataclass(frozen=True)
class LinkStatistics:
    """Counts since the link was opened."""

    connections: int
    reports: int
    withdrawn: int
    failed: int
    stale_acks: int
    malformed: int
    commands: int
    stale_commands: int


class Link:
    """Connection of one guest to the host of its lab. ``start`` it, then ``report`` from one thread.

    Args:
        hello: what the guest says of itself.
        on_refused: called from the link's thread when a host refuses this guest, with the reason.
        deadline_ns: how long a report may wait for its acknowledgement, and the end of a run for the host's DONE.
        wait_for_ack: False sends reports and waits for nothing: the host may discard what is long in use again.
        last_sequence: number that the reports follow on; what the process before this one withdrew up to.

    Raises:
        MachineError: queues exhausted. NameInUseError: the queues of this name exist.
    """

    def __init__(
        self,
        lab: str,
        hello: messages.Hello,
        ram: RamObject,
        *,
        deadline_ns: int,
        on_refused: Callable[[LabError], None],
        wait_for_ack: bool = True,
        last_sequence: int = 0,
    ) -> None:
        self._lab = lab
        self._hello = hello
        self._ram = ram
        self.deadline_s = deadline_ns / 1e9
        self._on_refused = on_refused
        self._wait_for_ack = wait_for_ack
        self._on_command: Callable[[], object] = bool  # nobody
        self._condition = threading.Condition()
        self._host_pidfd = -1
        self._connections = self._reports = self._withdrawn = self._failed = self._stale = self._malformed = 0
        self._sequence = last_sequence
        self._ack: messages.Ack | None = None
        self._awaited = 0
        self._awaited_blocks = 0
        self._commands = self._stale_commands = 0
        self._newest_run = self._due_run = 0  # ids: the newest run of this connection, and the one not begun yet
        self._order: int | None = None  # STOP or DONE, since the run in progress began
        self._unsent_end = 0
        self._stopping = False
        self._refused = False
        self._hello_due = False
        self._selector: selectors.BaseSelector = selectors.DefaultSelector()  # the listening thread brings its own
        self._selector.close()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        ram.say(messages.encode(hello))
        self._acks = create_ack_queue(lab, hello.guest)
        faults.reach("queue.acks-made")
        try:
            self._out = create_report_queue(lab, hello.guest, capacity=hello.capacity)
        except BaseException:
            self._acks.unlink()
            self._acks.close()
            os.close(self._wake)
            raise
        self._thread = threading.Thread(target=self._listen, name="link", daemon=True)

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Say hello and listen."""
        self._hello_due = True
        self._thread.start()

    def stop(self) -> None:
        """Make every wait return soon; ``report`` still settles what is out."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()

    def close(self) -> None:
        """Say goodbye, end the thread, remove the queues."""
        self.stop()
        with contextlib.suppress(LabError):
            self._send_control(messages.Goodbye(self._hello.guest, self._hello.pid, self._hello.epoch))
        os.eventfd_write(self._wake, 1)
        if self._thread.ident is not None:
            self._thread.join()
        for queue in (self._acks, self._out):
            queue.unlink()
            queue.close()
        self._drop_host()
        os.close(self._wake)

    @property
    def connected(self) -> bool:
        """A host has welcomed this guest and still lives."""
        return self._host_pidfd >= 0

    def statistics(self) -> LinkStatistics:
        """Counts so far."""
        return LinkStatistics(
            self._connections,
            self._reports,
            self._withdrawn,
            self._failed,
            self._stale,
            self._malformed,
            self._commands,
            self._stale_commands,
        )

    def wait_connected(self) -> bool:
        """Sleep until a host is there; False when stopping."""
        with self._condition:
            self._condition.wait_for(lambda: self.connected or self._stopping)
            return not self._stopping

    # -- reports, on the reporter's thread ----------------------------------------------------------------------------

    def report(self, batch: Batch) -> Answer:
        """Send one batch and settle it: acknowledged, failed, or withdrawn for certain. Sleeps; holds no zone lock."""
        none = np.zeros(batch.pfns.size, dtype=np.bool_)
        with self._condition:
            if not self.connected:
                return Answer(Outcome.WITHDRAWN, none)  # nothing was sent, so there is nothing to withdraw
            self._sequence += 1
            sequence = self._awaited = self._sequence
            self._awaited_blocks = none.size
            self._ack = None
        self._reports += 1
        deadline = time.monotonic() + self.deadline_s
        message = messages.encode(
            messages.Report(
                epoch=self._hello.epoch,
                seq=sequence,
                last=batch.last,
                pulled_ns=time.monotonic_ns(),
                blocks=messages.pack_blocks(batch.pfns, batch.orders),
            )
        )
        sent = self._out.send(message, self.deadline_s)
        faults.reach("report.sent")
        if not self._wait_for_ack:
            with self._condition:
                self._awaited = 0  # its acknowledgement will be one of nobody's
            return Answer(Outcome.SENT if sent else Outcome.WITHDRAWN, none)  # unsent, it is nowhere
        if sent:
            with self._condition:
                self._condition.wait_for(
                    lambda: self._ack is not None or not self.connected or self._stopping,
                    max(0.0, deadline - time.monotonic()),
                )
        outcome, ack = self._settle(sequence)
        faults.reach("ack.taken")
        return Answer(outcome, none if ack is None else messages.unpack_zeroed(ack.zeroed, none.size))

    def _settle(self, sequence: int) -> tuple[Outcome, messages.Ack | None]:
        """The outcome of the report that is out, and its answer; withdraws it if there is no answer yet.

        UNSETTLED only when stopping, and only while the host sits inside the gate for longer than the grace.
        """
        stop_by = None
        while True:
            with self._condition:
                ack = self._ack
            if ack is None and self._ram.try_gate():
                try:
                    self._ram.withdraw(sequence)
                finally:
                    self._ram.ungate()
                self._take_back()
                with self._condition:
                    # An answer that was under way while the gate was closed still counts: the discard was whole.
                    self._condition.wait_for(lambda: self._ack is not None, 0)
                    ack, self._awaited = self._ack, 0
                if ack is None:
                    self._withdrawn += 1
                    return Outcome.WITHDRAWN, None
            if ack is not None:
                with self._condition:
                    self._awaited = 0  # the same answer once more is stale
                outcome = _OUTCOMES[ack.status]
                if outcome is Outcome.FAILED:
                    self._failed += 1
                elif outcome is Outcome.WITHDRAWN:
                    self._withdrawn += 1
                return outcome, ack
            # The host is inside the gate: it is discarding these blocks, or stopped while it does. They stay in flight.
            with self._condition:
                self._condition.wait_for(lambda: self._ack is not None, _GATE_RETRY_S)
                if self._stopping:
                    stop_by = stop_by or time.monotonic() + _STOP_GRACE_S
                    if time.monotonic() > stop_by:
                        return Outcome.UNSETTLED, None

    def _take_back(self) -> None:
        """Empty the report queue of what nobody has received: it is withdrawn."""
        while self._out.receive(0) is not None:
            pass

    # -- runs that the host starts, on the reporter's thread ----------------------------------------------------------

    def on_command(self, call: Callable[[], object]) -> None:
        """From now on, call this from the link's thread when the host has started a run."""
        self._on_command = call

    @property
    def run_is_due(self) -> bool:
        """The host has started a run that nobody has begun."""
        return self._due_run > 0

    def begin_run(self) -> int:
        """Id of the run that the host has started last; 0 if it has been begun already, or its host is gone."""
        with self._condition:
            run, self._due_run, self._order = self._due_run, 0, None
            return run

    def may_go_on(self) -> bool:
        """Whether the run in progress is still wanted: not stopped, not done, not overtaken by a newer one."""
        return self.connected and self._order is None and not self._due_run and not self._stopping

    def finish_run(self, run: int, until_s: float) -> bool:
        """Tell the host that ``run`` is complete, and wait for its DONE, until ``until_s`` (monotonic) at most.

        True: it has started a newer run instead, for which what is held may be kept.
        """
        if not self._wait_for_ack:
            self._unsent_end = run  # its blocks go first
            return False
        self._send_end(run, until_s - time.monotonic())
        with self._condition:
            self._condition.wait_for(
                lambda: self._order == CMD_DONE or self._due_run or not self.connected or self._stopping,
                max(0.0, until_s - time.monotonic()),
            )
            return self._due_run > 0 and self._order != CMD_DONE and not self._stopping

    def _send_end(self, run: int, timeout_s: float) -> None:
        message = messages.encode(messages.RunEnd(self._hello.epoch, run))
        self._unsent_end = 0 if self._out.send(message, max(0.0, timeout_s)) else run

    def settle_run(self, run: int, *, failed: bool) -> None:
        """After the blocks of ``run`` are free: tell the host, if it has not been told, as soon as the queue has room.

        It starts no other before. Sleeps on the queue while the host does not read it; a host that is gone is not told.
        """
        if failed:
            self._unsent_end = run
        while self._unsent_end and self.connected and not self._stopping:
            self._send_end(self._unsent_end, _END_RETRY_S)
        self._unsent_end = 0

    # -- the listening thread -----------------------------------------------------------------------------------------

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            self._selector = selector
            selector.register(self._acks.fileno(), selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            while True:
                if self._hello_due:
                    self._say_hello()
                for key, _events in selector.select(self._patience_s()):
                    if key.fd == self._acks.fileno():
                        self._hear_acks()
                    elif key.data == self._connections and self.connected:
                        self._drop_host()
                        self._hello_due = True  # another host may have started already
                with self._condition:
                    if self._stopping and self._woken():
                        return

    def _patience_s(self) -> float | None:
        """How long to sleep: for ever, unless a hello is due; one that has just stood in line does so again."""
        if not self._hello_due:
            return None
        return _HELLO_RETRY_S if self.connected or self._stopping else 0.0

    def _woken(self) -> bool:
        try:
            return bool(os.eventfd_read(self._wake))
        except BlockingIOError:
            return False

    def _hear_acks(self) -> None:
        """One queueful at most: a host that fills it as fast as we read must not keep us from ending."""
        for _message in range(ACK_DEPTH):
            data = self._acks.receive(0)
            if data is None:
                return
            try:
                self._handle(messages.decode(data))
            except MessageError:
                self._malformed += 1

    def _handle(self, message: messages.Message) -> None:
        if isinstance(message, messages.Ack):
            with self._condition:
                if message.epoch == self._hello.epoch and message.seq == self._awaited:
                    messages.unpack_zeroed(message.zeroed, self._awaited_blocks)  # or it is no answer to this report
                    self._ack, self._awaited = message, 0  # the first answer counts: another one of the host is stale
                    self._condition.notify_all()
                else:
                    self._stale += 1
        elif isinstance(message, messages.Command):
            self._hear_command(message)
        elif isinstance(message, messages.Welcome) and message.epoch == self._hello.epoch:
            self._meet_host(message.host_pid)
        elif isinstance(message, messages.Announce):
            self._hello_due = True
        elif isinstance(message, messages.Refuse) and not self.connected:  # whom it has welcomed it cannot refuse
            if not self._refused:
                self._refused = True
                self._on_refused(UsageError(f"the host refused guest {self._hello.guest!r}: {message.reason}"))
        else:
            self._malformed += 1

    def _hear_command(self, command: messages.Command) -> None:
        """Note what the host orders; who begins a run is called outside the lock."""
        with self._condition:
            of_ours = self._hello.commands and command.epoch == self._hello.epoch and self.connected
            is_run = command.id >= CMD_FIRST_RUN
            if not of_ours or (is_run and command.id <= self._newest_run):
                self._stale_commands += 1
                return
            self._commands += 1
            if is_run:
                self._newest_run = self._due_run = command.id
            else:
                self._order = command.id
            self._condition.notify_all()
        if is_run:
            self._on_command()

    def _meet_host(self, pid: int) -> None:
        """Watch the host's process; the number of this connection tells its end from that of an earlier host."""
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return  # it is gone again
        self._drop_host()
        with self._condition:
            self._host_pidfd = pidfd
            self._connections += 1
            self._condition.notify_all()
        self._selector.register(pidfd, selectors.EVENT_READ, self._connections)

    def _drop_host(self) -> None:
        with self._condition:
            old, self._host_pidfd = self._host_pidfd, -1
            self._newest_run = self._due_run = 0
            self._condition.notify_all()
        if old >= 0:
            with contextlib.suppress(KeyError, ValueError, OSError):  # closed with its thread already
                self._selector.unregister(old)
            os.close(old)

    def _say_hello(self) -> None:
        """Send the hello if a control queue is there. If none is, the host that makes one will announce itself."""
        with contextlib.suppress(PeerError, MachineError):
            in_line_s = 0.0 if self.connected or self._stopping else _HELLO_PATIENCE_S
            self._hello_due = not self._send_control(self._hello, in_line_s)
            faults.reach("hello.sent")
            return
        self._hello_due = False

    def _send_control(self, message: messages.Message, timeout_s: float = 0.0) -> bool:
        """True if sent, False if the queue stays full. Raises ``PeerError`` or ``MachineError`` when there is none."""
        with Queue.open(names.control_queue(self._lab), read=False, write=True) as control:
            data = messages.encode(message)
            return control.send(data, 0) or (timeout_s > 0 and control.stand_in_line(data, timeout_s))
