"""Scenes for the guest's tests: a host that does only what the test says, and a link or a reporter in front of it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
from collections.abc import Iterator
from typing import TypeVar

import numpy as np

from common.errors import LabError
from common.geometry import PAGE_BYTES
from common.messages import Ack, Hello, Message, Report, Status, Welcome, decode, encode
from common.names import ack_queue, report_queue
from common.queues import Queue, create_control_queue
from common.ramobject import RamObject
from guest.reporting.cycle import Answer, Batch, Outcome
from guest.reporting.link import Link

__all__ = ["GUEST", "HOUR_NS", "MIB", "N_PAGES", "PATIENCE_S", "HandHost", "Wire", "a_batch", "hello_of", "open_wire"]

MIB = 1 << 20
GUEST = "g0"
N_PAGES = 16 * MIB // PAGE_BYTES
HOUR_NS = 3600 * 10**9
PATIENCE_S = 60.0
EPOCH = 4711

Kind = TypeVar("Kind", bound=Message)


def hello_of(epoch: int = EPOCH, *, n_pages: int = N_PAGES, capacity: int = 16) -> Hello:
    """What the guest of these tests says of itself."""
    return Hello(GUEST, os.getpid(), epoch, n_pages, "shared", capacity, 9)


def a_batch(*pfns: int, order: int = 9) -> Batch:
    """A batch, as if it had been pulled."""
    firsts = np.array(pfns or (0,), dtype=np.int64)
    return Batch(firsts, np.full(firsts.size, order, dtype=np.int64), last=True)


class HandHost:
    """The host's end of everything, moved by hand. It lives as long as process ``pid`` does."""

    def __init__(self, lab: str, *, pid: int | None = None) -> None:
        self.lab = lab
        self.pid = pid or os.getpid()
        self.control = create_control_queue(lab)
        self._open: list[Queue | RamObject] = [self.control]

    def meet(self) -> Hello:
        """Hear the guest's hello, open its objects, welcome it."""
        hello = self.hear(Hello)
        self.reports = Queue.open(report_queue(self.lab, hello.guest), read=True, write=False)
        self.acks = Queue.open(ack_queue(self.lab, hello.guest), read=False, write=True)
        self.ram = RamObject.open(self.lab, hello.guest, ram_bytes=hello.n_pages * PAGE_BYTES)
        self._open += [self.reports, self.acks, self.ram]
        self.say(Welcome(self.pid, hello.epoch))
        return hello

    def hear(self, kind: type[Kind]) -> Kind:
        """The next message of the control queue, which is a ``kind``."""
        data = self.control.receive(PATIENCE_S)
        assert data is not None, "the guest said nothing"
        message = decode(data)
        assert isinstance(message, kind)
        return message

    def say(self, message: Message) -> None:
        """Put a message into the guest's ack queue."""
        self.say_bytes(encode(message))

    def say_bytes(self, data: bytes) -> None:
        """Put anything into the guest's ack queue."""
        assert self.acks.send(data, PATIENCE_S)

    def report(self) -> Report:
        """The guest's next report."""
        report = self.report_now(PATIENCE_S)
        assert report is not None, "the guest reported nothing"
        return report

    def report_now(self, timeout_s: float = 0.0) -> Report | None:
        """The guest's next report, if there is one."""
        data = self.reports.receive(timeout_s)
        if data is None:
            return None
        message = decode(data)
        assert isinstance(message, Report)
        return message

    def answer(self, report: Report, status: Status = Status.DONE, zeroed: bytes = b"") -> None:
        """Acknowledge ``report``."""
        self.say(Ack(report.epoch, report.seq, status, 0, 0, zeroed))

    def close(self) -> None:
        """Remove the control queue, close the ends of the guest's objects."""
        self.control.unlink()
        for opened in self._open:
            opened.close()
        self._open = []


class Wire:
    """A link, its RAM object, and one thread to call ``report`` from."""

    def __init__(
        self, lab: str, *, deadline_ns: int = HOUR_NS, hello: Hello | None = None, wait_for_ack: bool = True
    ) -> None:
        self.refusals: list[LabError] = []
        self.ram = RamObject.create(lab, GUEST, ram_bytes=N_PAGES * PAGE_BYTES)
        self.link = Link(
            lab,
            hello or hello_of(),
            self.ram,
            deadline_ns=deadline_ns,
            on_refused=self.refusals.append,
            wait_for_ack=wait_for_ack,
        )
        self._pool = concurrent.futures.ThreadPoolExecutor(1)

    def report(self, batch: Batch | None = None) -> concurrent.futures.Future[Outcome]:
        """Report a batch from the other thread; what became of it."""
        return self._pool.submit(lambda: self.link.report(batch or a_batch()).outcome)

    def report_in_full(self, batch: Batch) -> concurrent.futures.Future[Answer]:
        """The same, with what the host confirmed."""
        return self._pool.submit(self.link.report, batch)

    def close(self) -> None:
        """End the link, then the thread, which cannot wait for anything any more."""
        self.link.close()
        self._pool.shutdown()
        self.ram.unlink()
        self.ram.close()


@contextlib.contextmanager
def open_wire(lab: str, *, deadline_ns: int = HOUR_NS) -> Iterator[Wire]:
    """A wire that is gone afterwards."""
    wire = Wire(lab, deadline_ns=deadline_ns)
    try:
        yield wire
    finally:
        wire.close()
