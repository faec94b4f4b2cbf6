"""How long a report takes, there and back, beside a guest that floods the host: against the same guest alone.

The host, the flood and the guest that is measured are processes of their own. The flood is stopped (SIGSTOP) in every
other slice, so that both slices of a round see the same machine.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import numpy as np

from benchmarks.live import LiveHost, live_host
from benchmarks.rows import Row, median, spread
from common.errors import LabError
from common.geometry import PAGE_BYTES
from common.messages import Ack, Hello, Report, Welcome, decode, encode, pack_blocks
from common.names import control_queue
from common.queues import Queue, create_ack_queue, create_report_queue
from common.ramobject import RamObject

__all__ = ["run"]

_N_PAGES = (16 << 20) // PAGE_BYTES
_CAPACITY = 16
_REPORTS_A_SLICE = 300
_SETTLING_S = 0.3  # for the flood to use up what its bucket has gained while it was stopped
_PATIENCE_S = 20.0
_LOOK_S = 0.1  # how soon a flood that is held off sees that it is to end
_TARGET = 1.25
_FLOODS = {"rubbish": "rubbish", "unawaited": "reports that do not wait"}


class _Guest:
    """As little of a guest as a host takes for one: objects, a hello, reports. None of its memory is populated."""

    def __init__(self, lab: str, name: str) -> None:
        hello = Hello(name, os.getpid(), int.from_bytes(os.urandom(4)) + 1, _N_PAGES, "shared", _CAPACITY, 0)
        self._hello = hello
        self._seq = 0
        self._ram = RamObject.create(lab, name, ram_bytes=_N_PAGES * PAGE_BYTES)
        self._ram.say(encode(hello))
        self.reports = create_report_queue(lab, name, capacity=_CAPACITY)
        self.acks = create_ack_queue(lab, name)
        with Queue.open(control_queue(lab), read=False, write=True) as control:
            control.send(encode(hello), _PATIENCE_S)
        if not isinstance(self._heard(), Welcome):
            raise LabError("the host did not welcome the guest of the benchmark")

    def _heard(self) -> object:
        data = self.acks.receive(_PATIENCE_S)
        if data is None:
            raise LabError("the host did not answer the guest of the benchmark")
        return decode(data)

    def next_report(self) -> bytes:
        """A report of 16 small blocks."""
        self._seq += 1
        pfns = np.arange(0, 2 * _CAPACITY, 2, dtype=np.int64)
        blocks = pack_blocks(pfns, np.zeros(_CAPACITY, dtype=np.int64))
        return encode(Report(self._hello.epoch, self._seq, True, time.monotonic_ns(), blocks))

    def there_and_back_ns(self) -> int:
        """Of one report, from its sending to its acknowledgement."""
        data = self.next_report()
        started = time.perf_counter_ns()
        self.reports.send(data, _PATIENCE_S)
        answer = self._heard()
        elapsed = time.perf_counter_ns() - started
        if not isinstance(answer, Ack) or answer.seq != self._seq:
            raise LabError("the host answered another report than that of the benchmark")
        return elapsed

    def close(self) -> None:
        """Remove its names."""
        for queue in (self.reports, self.acks):
            queue.unlink()
            queue.close()
        self._ram.unlink()
        self._ram.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run(rounds: int) -> Iterator[Row]:
    """Rows for each kind of flood, with the default limit, and without one for comparison."""
    for flood, words in _FLOODS.items():
        for flags, limit in (((), "default limit"), (("--max-reports-per-s", "0"), "no limit")):
            alone, beside = _measure(flood, flags, rounds)
            ratios = [loud / quiet for loud, quiet in zip(beside, alone, strict=True)]
            judged = not flags
            yield Row(
                name=f"a report beside a flood of {words}, {limit}",
                unit="us, median there and back",
                value=median(beside),
                spread=spread(ratios),
                against=f"alone: {median(alone):.0f} us",
                ratio=median(ratios),
                target=f"<= {_TARGET}" if judged else None,
                ok=median(ratios) <= _TARGET if judged else None,
            )


def _measure(flood: str, flags: tuple[str, ...], rounds: int) -> tuple[list[float], list[float]]:
    """Medians of each round's slices in us: alone, and beside the flood."""
    alone, beside = [], []
    with live_host(*flags) as host, _Guest(host.lab, "measured") as guest, _flooding(host, flood) as process:
        for number in range(rounds + 1):
            process.send_signal(signal.SIGSTOP)
            quiet = _slice_us(guest)
            process.send_signal(signal.SIGCONT)
            loud = _slice_us(guest)
            if number:
                alone.append(quiet)
                beside.append(loud)
        process.send_signal(signal.SIGCONT)
    return alone, beside


def _slice_us(guest: _Guest) -> float:
    time.sleep(_SETTLING_S)
    return median([guest.there_and_back_ns() for _report in range(_REPORTS_A_SLICE)]) / 1e3


@contextlib.contextmanager
def _flooding(host: LiveHost, flood: str) -> Iterator[subprocess.Popen[bytes]]:
    """A guest in a process of its own that sends as fast as its queue takes it, until the end of the block."""
    command = [sys.executable, "-m", "benchmarks.neighbour", host.lab, flood]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:  # noqa: S603  our own
        try:
            if process.stdout is None or process.stdout.readline() != b"here\n":
                raise LabError("the flood of the benchmark did not start")
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()


def _flood(lab: str, kind: str) -> None:
    """Until SIGTERM. What it is answered is taken out, so that it does not even lose that."""
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: stopping.set())
    with _Guest(lab, "flood") as guest:
        sys.stdout.write("here\n")
        sys.stdout.flush()
        while not stopping.is_set():
            guest.reports.send(b"rubbish" if kind == "rubbish" else guest.next_report(), _LOOK_S)
            while guest.acks.receive(0) is not None:
                pass


if __name__ == "__main__":
    _flood(sys.argv[1], sys.argv[2])
