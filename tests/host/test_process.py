"""The host as a process: started, stopped, killed, with guests that come, go and die."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import PeerError
from common.geometry import PAGE_BYTES
from common.messages import Announce, Status, Welcome
from common.names import SHM_DIR, control_queue
from common.queues import Queue
from tests.host.stand_in import N_PAGES, StandIn
from tests.support import leftovers, remove_leftovers, wait_until

PATIENCE_S = 60.0


def has_control_queue(lab: str) -> bool:
    try:
        Queue.open(control_queue(lab), read=False, write=True).close()
    except PeerError:
        return False
    return True


class HostProcess:
    """``python -m host`` with its result in a file."""

    def __init__(self, lab: str, folder: Path, *flags: str) -> None:
        self.lab = lab
        self.result_path = folder / "host.json"
        command = [sys.executable, "-m", "host", "--name", lab, "--json", str(self.result_path), "--force", *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: has_control_queue(lab) or self.process.poll() is not None, PATIENCE_S, what="host")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    def result(self) -> dict[str, Any]:
        """What it wrote."""
        result: dict[str, Any] = json.loads(self.result_path.read_text())
        return result

    def end(self) -> None:
        """However the test went."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def host(lab_name: str, tmp_path: Path) -> Iterator[HostProcess]:
    running = HostProcess(lab_name, tmp_path)
    yield running
    running.end()


@contextlib.contextmanager
def guest_process(lab: str, name: str = "g0", backend: str = "shared") -> Iterator[subprocess.Popen[str]]:
    """A guest in a process of its own that has been welcomed, all its memory touched."""
    command = [sys.executable, "-m", "tests.host.stand_in", lab, name, backend]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Welcome(")
        try:
            yield process
        finally:
            process.kill()


def tell(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdin is not None
    process.stdin.write(word + "\n")
    process.stdin.flush()
    process.wait(PATIENCE_S)


def names_left(lab: str, *guests: str) -> list[str]:
    return [name for name in leftovers(lab, guests) if any(f".{guest}." in name for guest in guests)]


def test_a_guest_reports_and_memory_really_goes_back(host: HostProcess) -> None:
    with StandIn(host.lab) as guest:
        guest.touch()
        guest.hello()
        assert guest.welcomed() == Welcome(host.process.pid, guest.said.epoch)
        guest.report((0, 10), (1024, 10), (3072, 9))
        ack = guest.acknowledged()
        assert (ack.status, ack.freed_bytes) == (Status.DONE, 2560 * PAGE_BYTES)
        assert guest.ram.resident_bytes() == (N_PAGES - 2560) * PAGE_BYTES
        assert (guest.memory[:1024] == 0).all()  # reading faults: these are resident again
        assert (guest.memory[2048:3072] == 0xA5).all()
        guest.goodbye()
        assert host.stop() == 0
    result = host.result()
    assert result["ok"]
    assert result["host"]["freed_bytes"] == result["host"]["asked_bytes"] == 2560 * PAGE_BYTES
    assert result["host"]["order_histogram"] == {"9": 1, "10": 2}
    (counted,) = result["guests"]
    assert counted["peak_resident_bytes"] == N_PAGES * PAGE_BYTES
    # The account balances: 4096 pages touched, 2560 freed, 1024 touched again (the others read were never given back).
    touched_again = 1024
    assert counted["final_resident_bytes"] == (N_PAGES - 2560 + touched_again) * PAGE_BYTES


def test_a_killed_guest_leaves_nothing_and_the_others_go_on(host: HostProcess) -> None:
    with guest_process(host.lab, "g0") as doomed, guest_process(host.lab, "g1"), StandIn(host.lab, "g2") as other:
        assert len(names_left(host.lab, "g0")) == 4
        doomed.kill()
        wait_until(lambda: not names_left(host.lab, "g0"))
        assert len(names_left(host.lab, "g1")) == 4
        other.touch()
        other.hello()
        other.welcomed()
        other.report((0, 9))
        assert other.acknowledged().status is Status.DONE
    wait_until(lambda: not names_left(host.lab, "g1"))
    assert host.stop() == 0
    result = host.result()
    assert (result["host"]["guests_seen"], result["host"]["guests_lost"]) == (3, 2)
    lost = [guest for guest in result["guests"] if guest["state"] == "lost"]
    assert [guest["name"] for guest in lost] == ["g0", "g1"]
    assert all(guest["final_resident_bytes"] == N_PAGES * PAGE_BYTES for guest in lost)


def test_a_guest_that_says_goodbye_and_dies_is_cleaned_up_but_not_lost(host: HostProcess) -> None:
    with guest_process(host.lab) as process:
        tell(process, "goodbye")  # ends without removing its names
    wait_until(lambda: not names_left(host.lab, "g0"))
    assert host.stop() == 0
    result = host.result()
    assert result["host"]["guests_lost"] == 0
    assert [guest["state"] for guest in result["guests"]] == ["left"]


def test_a_guest_that_restarts_under_its_name_keeps_its_new_objects(host: HostProcess) -> None:
    with guest_process(host.lab) as process:
        host.process.send_signal(signal.SIGSTOP)  # so that it hears of the death and the hello in one turn
        process.kill()
        process.wait()
        remove_leftovers(names_left(host.lab, "g0"))
        with StandIn(host.lab, epoch=7) as again:
            again.hello()
            host.process.send_signal(signal.SIGCONT)
            assert again.welcomed() == Welcome(host.process.pid, 7)
            again.report((0, 9))
            assert again.acknowledged().status is Status.DONE
            assert len(names_left(host.lab, "g0")) == 4
    assert host.stop() == 0
    assert host.result()["host"]["guests_lost"] == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_it_cleanly_with_its_result(host: HostProcess, number: int, code: int) -> None:
    assert host.stop(number) == code
    assert host.result()["ok"]
    assert not leftovers(host.lab)


def test_a_signal_while_it_starts_ends_it_cleanly(lab_name: str) -> None:
    """The name is taken, nobody listens yet: the signal must not be lost, and must not leave the name behind."""
    program = (
        "import os, signal, sys, host.cli, host.takeover\n"
        "announce = host.takeover.announce\n"
        "import host.loop\n"
        "host.loop.announce = lambda lab: os.kill(os.getpid(), signal.SIGTERM) or announce(lab)\n"
        f"sys.exit(host.cli.main(['--name', '{lab_name}', '--quiet']))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=PATIENCE_S)
    assert done.returncode == 0
    assert not leftovers(lab_name)


def test_a_duration_ends_it(lab_name: str, tmp_path: Path) -> None:
    host = HostProcess(lab_name, tmp_path, "--duration", "0.1", "--quiet")
    assert host.process.wait(PATIENCE_S) == 0
    assert host.process.stderr is not None
    assert host.process.stderr.read() == ""
    assert host.result()["duration_s"] >= 0.1
    host.end()


def test_a_second_host_is_refused(host: HostProcess, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "host", "--name", host.lab]
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert second.returncode == 2
    assert f"pid {host.process.pid}" in second.stderr
    assert second.stderr.count("\n") == 1
    assert has_control_queue(host.lab)
    assert host.stop() == 0


def test_a_killed_host_is_succeeded_and_its_guests_are_told(host: HostProcess, tmp_path: Path) -> None:
    with StandIn(host.lab) as guest:
        guest.touch()
        guest.hello()
        guest.welcomed()
        host.process.kill()
        host.process.wait()
        guest.report((0, 9))
        successor = HostProcess(host.lab, tmp_path)
        try:
            assert guest.heard() == Announce(successor.process.pid)
            guest.hello()
            assert guest.welcomed() == Welcome(successor.process.pid, guest.said.epoch)
            assert guest.acknowledged().status is Status.DONE
            assert successor.stop() == 0
        finally:
            successor.end()
    assert successor.result()["host"]["freed_bytes"] == 512 * PAGE_BYTES


def test_s5_a_stopped_host_never_discards_what_was_withdrawn(host: HostProcess) -> None:
    with StandIn(host.lab) as guest:
        guest.touch()
        guest.hello()
        guest.welcomed()
        host.process.send_signal(signal.SIGSTOP)
        guest.report((0, 10))
        assert guest.ram.try_gate()
        guest.ram.withdraw(guest.seq)
        guest.ram.ungate()
        guest.memory[:1024] = 0x5A  # the guest has its block back and uses it
        host.process.send_signal(signal.SIGCONT)
        assert guest.acknowledged().status is Status.WITHDRAWN
        assert (guest.memory[:1024] == 0x5A).all()
    assert host.stop() == 0
    assert (host.result()["host"]["withdrawn"], host.result()["host"]["freed_bytes"]) == (1, 0)


def test_flags_that_are_wrong_are_named(tmp_path: Path) -> None:
    existing = tmp_path / "kept.json"
    existing.write_text("kept")
    for flags in (["--name", "A B"], ["--json", str(existing)], ["--slow", "5"]):
        command = [sys.executable, "-m", "host", "--quiet", "--duration", "0.01", *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
        assert done.returncode == 2, flags
        assert flags[0].strip("-") in done.stderr or "--force" in done.stderr
    assert existing.read_text() == "kept"


def test_json_on_standard_output_is_one_object(lab_name: str) -> None:
    command = [sys.executable, "-m", "host", "--name", lab_name, "--duration", "0.05", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    assert json.loads(done.stdout)["guests"] == []
    assert done.stderr.startswith(f"host {lab_name}: 0 guests")
    assert not os.path.exists(f"{SHM_DIR}/fpr.{lab_name}.host")


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['host', '--help']\n"
        "try:\n    import host.cli; host.cli.main()\nexcept SystemExit: pass\n"
        "print(sorted({'numpy', 'numba', 'rich', 'matplotlib', 'msgpack'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.endswith("[]\n")


def test_no_host_process_loads_compiled_code(lab_name: str) -> None:
    program = (
        "import sys, host.cli\n"
        f"host.cli.main(['--name', '{lab_name}', '--duration', '0.01', '--quiet'])\n"
        "print('numba' in sys.modules, 'guest' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False False\n"
