"""A hand-written guest: real memory, real queues, and whatever it is told to say. Also runs as a process of its own.

``python -m tests.host.stand_in LAB NAME BACKEND`` makes its objects, says hello, touches all memory, prints what it is
answered, and then does what it reads, a word a line: ``goodbye`` or ``leave`` (removes its names and ends).
"""

from __future__ import annotations

import contextlib
import os
import sys
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from common.geometry import PAGE_BYTES
from common.messages import (
    Ack,
    Announce,
    BackendName,
    Goodbye,
    Hello,
    Message,
    Report,
    Welcome,
    decode,
    encode,
    pack_blocks,
)
from common.names import SHM_DIR, control_queue, zone_object
from common.queues import Queue, create_ack_queue, create_report_queue
from common.ramobject import RamObject

__all__ = ["N_PAGES", "PATIENCE_S", "StandIn"]

N_PAGES = (16 << 20) // PAGE_BYTES
PATIENCE_S = 60.0


class StandIn:
    """A guest of ``lab``. Its memory is ``memory``, uint8[pages, 4096]; no pages with the model backend."""

    def __init__(
        self,
        lab: str,
        name: str = "g0",
        *,
        backend: BackendName = "shared",
        n_pages: int = N_PAGES,
        capacity: int = 16,
        min_order: int = 0,
        epoch: int = 1,
        pid: int | None = None,
    ) -> None:
        self.lab = lab
        self.said = Hello(name, pid or os.getpid(), epoch, n_pages, backend, capacity, min_order)
        self.seq = 0
        self.ram = RamObject.create(lab, name, ram_bytes=n_pages * PAGE_BYTES if backend == "shared" else 0)
        raw = np.frombuffer(self.ram.map(), dtype=np.uint8) if backend == "shared" else np.zeros(0, dtype=np.uint8)
        self.memory: npt.NDArray[np.uint8] = raw.reshape(-1, PAGE_BYTES)
        self.reports = create_report_queue(lab, name, capacity=capacity)
        self.acks = create_ack_queue(lab, name)
        self.zone_path = SHM_DIR + zone_object(lab, name)
        # The host must know it by name only.
        os.close(os.open(self.zone_path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))

    def say(self, message: Message) -> None:
        """Send to the host's control queue. Its own hello stands in its gate page first, or nobody would believe it."""
        if isinstance(message, Hello) and message.guest == self.said.guest:
            self.ram.say(encode(message))
        self.forge(message)

    def forge(self, message: Message) -> None:
        """Send to the host's control queue, and that is all: in whose name ever."""
        with Queue.open(control_queue(self.lab), read=False, write=True) as control:
            assert control.send(encode(message), PATIENCE_S)

    def hello(self) -> None:
        """Say hello."""
        self.say(self.said)

    def goodbye(self) -> None:
        """Say goodbye."""
        self.say(Goodbye(self.said.guest, self.said.pid, self.said.epoch))

    def touch(self, stamp: int = 0xA5) -> None:
        """Write to every page."""
        self.memory[:] = stamp

    def report(
        self, *blocks: tuple[int, int], seq: int | None = None, epoch: int | None = None, now_ns: int = 0
    ) -> int:
        """Send blocks of (pfn, order); the sequence number."""
        self.seq = self.seq + 1 if seq is None else seq
        pfns = np.array([pfn for pfn, _order in blocks], dtype=np.int64)
        orders = np.array([order for _pfn, order in blocks], dtype=np.int64)
        report = Report(epoch or self.said.epoch, self.seq, True, now_ns, pack_blocks(pfns, orders))
        assert self.reports.send(encode(report), PATIENCE_S)
        return self.seq

    def heard(self, timeout_s: float = PATIENCE_S) -> Message:
        """The next answer."""
        data = self.acks.receive(timeout_s)
        assert data is not None, "the host did not answer"
        return decode(data)

    def welcomed(self) -> Welcome:
        """The answer to a hello. An announcement before it is no answer: the host was starting at the same moment."""
        answer = self.heard()
        while isinstance(answer, Announce):
            answer = self.heard()
        assert isinstance(answer, Welcome)
        return answer

    def acknowledged(self, timeout_s: float = PATIENCE_S) -> Ack:
        """The next answer, which is an acknowledgement of the last report."""
        ack = self.heard(timeout_s)
        assert isinstance(ack, Ack)
        assert ack.seq == self.seq
        return ack

    def remove(self) -> None:
        """Remove all names."""
        self.ram.unlink()
        self.reports.unlink()
        self.acks.unlink()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.zone_path)

    def close(self) -> None:
        """Remove all names and close everything."""
        self.remove()
        self.ram.close()
        self.reports.close()
        self.acks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _main(lab: str, name: str, backend: BackendName) -> None:
    guest = StandIn(lab, name, backend=backend)
    guest.touch()
    guest.hello()
    sys.stdout.write(f"{guest.welcomed()}\n")
    sys.stdout.flush()
    for word in sys.stdin:
        if word == "goodbye\n":
            guest.goodbye()
            return
        if word == "leave\n":
            guest.close()
            return


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], "model" if sys.argv[3] == "model" else "shared")
