"""A million wrong messages to a host process of its own: it takes them, weighs the same, and the neighbour is served.

Half of them go to the control queue. The limit on what a guest may send is off, so that all of them are read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.geometry import PAGE_BYTES
from common.names import control_queue
from common.queues import Queue
from tests.fuzz.mutate import Mutator
from tests.host.stand_in import PATIENCE_S, StandIn
from tests.host.test_process import has_control_queue
from tests.support import wait_until

__all__ = ["Outcome", "run_flood"]

_A_REPORT_EVERY = 200  # messages, of the neighbour
_SOON_S = 0.2
_MOST_GROWTH_BYTES = 8 << 20  # of the host, from a tenth of the flood on; the allocator keeps some air


@dataclass(frozen=True)
class Outcome:
    """What came of a flood. ``growth_bytes``: of the host's resident memory, between a tenth of it and its end."""

    messages: int
    seconds: float
    malformed: int
    rejected: int
    hellos_refused: int
    reports: int
    resident_bytes: int
    growth_bytes: int
    neighbour_reports: int
    neighbour_freed_bytes: int
    sound: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return asdict(self)


def run_flood(lab: str, *, messages: int, seed: int) -> Outcome:
    """Start a host, send it ``messages`` wrong ones, end it; the outcome."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "host.json"
        flags = ("--name", lab, "--json", str(path), "--quiet", "--max-reports-per-s", "0")
        with subprocess.Popen([sys.executable, "-m", "host", *flags]) as host:
            try:
                wait_until(lambda: has_control_queue(lab), what="a host")
                started = time.monotonic()
                with StandIn(lab, "g0", epoch=7) as sender, StandIn(lab, "g1", epoch=8) as neighbour:
                    growth = _flood(sender, neighbour, host.pid, messages, seed)
                    neighbour.goodbye()
                seconds = time.monotonic() - started
                resident = _resident_bytes(host.pid)
            finally:
                host.terminate()
            code = host.wait(PATIENCE_S)
        return _judge(json.loads(path.read_text()), code, messages, seconds, resident, growth)


def _flood(sender: StandIn, neighbour: StandIn, host_pid: int, messages: int, seed: int) -> int:
    """Send them; by how many bytes the host grew meanwhile. The neighbour's answers and memory are checked."""
    mutator = Mutator(seed, sender.said)
    for guest in (sender, neighbour):
        guest.touch()
        guest.hello()
        guest.welcomed()
    before = 0
    with Queue.open(control_queue(sender.lab), read=False, write=True) as control:
        for number in range(messages):
            queue = control if number % 2 else sender.reports
            data = mutator.message()
            while len(data) > queue.message_bytes:
                data = mutator.message()
            _send(sender, queue, data)
            while sender.acks.receive(0) is not None:
                pass
            if number % _A_REPORT_EVERY == 0:
                _serve(neighbour)
            if number == messages // 10:
                before = _resident_bytes(host_pid)
        wait_until(lambda: not control.waiting and not sender.reports.waiting, what="a host that has read it all")
    return _resident_bytes(host_pid) - before


def _serve(neighbour: StandIn) -> None:
    """A block that it uses is given back, to the byte, and nothing else of it."""
    neighbour.memory[:1024] = 0x5A
    neighbour.report((0, 10))
    ack = neighbour.acknowledged()
    assert ack.freed_bytes == 1024 * PAGE_BYTES
    assert not neighbour.memory[:1024].any()
    assert (neighbour.memory[1024:] == 0xA5).all()


def _send(sender: StandIn, queue: Queue, data: bytes) -> None:
    """Put ``data`` into the queue. A goodbye of its own may have been among what it sent: then it says hello again."""
    deadline = time.monotonic() + PATIENCE_S
    while not queue.send(data, _SOON_S):
        assert time.monotonic() < deadline, "the host does not read"
        sender.hello()


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def _judge(result: dict[str, Any], code: int, messages: int, seconds: float, resident: int, growth: int) -> Outcome:
    counted = result["host"]
    (neighbour,) = (guest for guest in result["guests"] if guest["name"] == "g1")
    reports = -(-messages // _A_REPORT_EVERY)
    sound = (
        code == 0
        and growth <= _MOST_GROWTH_BYTES
        and counted["failures"] == 0
        and (neighbour["reports"], neighbour["rejected"], neighbour["malformed"]) == (reports, 0, 0)
        and neighbour["freed_bytes"] == reports * 1024 * PAGE_BYTES
    )
    return Outcome(
        messages=messages,
        seconds=seconds,
        malformed=counted["malformed"],
        rejected=counted["rejected"],
        hellos_refused=counted["hellos_refused"],
        reports=counted["reports"],
        resident_bytes=resident,
        growth_bytes=growth,
        neighbour_reports=neighbour["reports"],
        neighbour_freed_bytes=neighbour["freed_bytes"],
        sound=sound,
    )
