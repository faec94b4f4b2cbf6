"""Real processes on a machine that is against them: full, interrupted, without a clock to rely on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.live.handled import NUMBERS
from tests.live.processes import PATIENCE_S, ROOT, Lab, Process
from tests.live.test_reclaim import CHURN, end
from tests.no_wall_clock import KNOWN
from tests.small_machine import in_small_shm, needs_mount

STORM = """
import os, sys, time
pids, numbers = map(int, sys.argv[1].split(",")), list(map(int, sys.argv[2].split(",")))
pids, end, sent = list(pids), time.monotonic() + float(sys.argv[3]), 0
while time.monotonic() < end:
    for pid in pids:
        for number in numbers:
            os.kill(pid, number)
            sent += 1
    time.sleep(0.0002)  # let the handlers run between
print(sent)
"""


def storm(seconds: float, *processes: Process) -> int:
    """Send signals to all of them as fast as they are handled; how many that were."""
    pids = ",".join(str(process.process.pid) for process in processes)
    numbers = ",".join(str(int(number)) for number in NUMBERS)
    command = [sys.executable, "-c", STORM, pids, numbers, str(seconds)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE_S + seconds).stdout)


def storm_both(lab: Lab, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(Process, "runner", ("tests.live.handled",))
    host = lab.host()
    guest = lab.guest("g0", *CHURN, "--min-order", "0", "--capacity", "32")
    guest.returns(100)
    before = guest.look()
    sent = storm(seconds, host, guest)
    after = guest.look()
    assert after.returned_pages > before.returned_pages
    assert after.allocations > before.allocations
    _account, (result,) = end(host, guest)
    assert (result["ok"], result["violations"], result["failed"]) == (True, 0, 0)
    for process in (host, guest):
        handled = int(process.err.split()[-1])
        assert 100 < handled <= sent
        assert process.err == f"signals {handled}\n", "and nothing else"


def test_s6_a_signal_in_every_system_call_costs_time_and_no_byte(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    storm_both(lab, monkeypatch, 1.0)


@pytest.mark.stress
def test_s6_a_long_storm_of_signals(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    storm_both(lab, monkeypatch, 60.0)


@pytest.mark.skipif(not KNOWN, reason="system calls are known by number for x86-64 alone")
def test_host_and_guest_work_where_nobody_may_wait_by_the_wall_clock(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Process, "runner", ("tests.no_wall_clock",))
    host = lab.host()
    guest = lab.guest("g0", *CHURN, "--min-order", "0")
    guest.returns(1000)
    end(host, guest)


# A signal at any moment


def interrupted(lab: str, program: str, number: signal.Signals, moments: int) -> list[tuple[int, str]]:
    """Exit code, and standard error and names left, of each life but the first, which nobody interrupts."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.live.interrupted", program, lab, str(moments), number.name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=100 + 2 * moments,
    )
    lives = [line.split(" ", 2) for line in done.stdout.splitlines()]
    assert len(lives) == moments + 1, done.stderr
    assert lives[0][1:] == ["0", "''"]
    return [(int(code), said) for _moment, code, said in lives[1:]]


CODES: dict[tuple[str, signal.Signals], set[int]] = {
    ("guest", signal.SIGINT): {130},
    ("guest", signal.SIGTERM): {0, 143, -15},  # -15: before its first line of any consequence
    ("host", signal.SIGINT): {0, 130},  # 0: its time was up already
    ("host", signal.SIGTERM): {0, -15},
}


@pytest.mark.parametrize(("program", "number"), sorted(CODES), ids=lambda value: str(getattr(value, "name", value)))
@pytest.mark.parametrize("moments", [8, pytest.param(300, marks=pytest.mark.stress)])
def test_a_signal_at_any_moment_leaves_no_name_and_no_traceback(
    warm: None, lab_name: str, program: str, number: signal.Signals, moments: int
) -> None:
    for code, said in interrupted(lab_name, program, number, moments):
        assert said == "''"
        assert code in CODES[program, number] | {0}


# Full


FULL = """
import json, os, signal, subprocess, sys, time
guest = [sys.executable, "-m", "guest", "--host", "full", "--policy", "off", "--workload", "memhog", "--quiet",
         "--work-order", "0", "--fill", "0.9", "--hold", "1h", "--vcpus", "2"]

def start(name, *flags):
    return subprocess.Popen([*guest, "--name", name, *flags], stderr=subprocess.PIPE, text=True)

def end(name, process):
    said = process.communicate(timeout=90)[1]
    print(json.dumps([name, process.returncode, said, sorted(os.listdir("/dev/shm"))]), flush=True)

first = start("g0", "--memory", "32MiB")
deadline = time.monotonic() + 90
while os.statvfs("/dev/shm").f_bavail * 4096 > 20 << 20 and time.monotonic() < deadline:
    time.sleep(0.01)
end("refused", start("g1", "--memory", "16MiB", "--duration", "1"))
end("overcommitted", start("g1", "--memory", "32MiB", "--overcommit"))
first.send_signal(signal.SIGTERM)
end("first", first)
"""


@needs_mount
def test_a_guest_that_finds_shared_memory_full_ends_with_one_line_and_leaves_nothing(warm: None) -> None:
    done = in_small_shm("size=44M", "-c", FULL)
    ends: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        name, *rest = json.loads(line)
        ends[name] = rest
    first_names = ["fpr.full.g0.ram", "fpr.full.g0.zone"]
    code, said, names = ends["refused"]
    assert (code, names) == (3, first_names), said
    assert "promised to 1 other guests" in said or "MiB left" in said
    code, said, names = ends["overcommitted"]
    assert (code, names) == (3, first_names), said
    assert said.startswith("error: g1: /dev/shm is full: ")
    assert "remount,size=" in said
    assert said.count("\n") == 1
    assert ends["first"] == [0, "", []], done.stderr
