"""shared and walk-locked with real processes: bytes, deaths on either side, and an end to every wait."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from common import names
from common.errors import LabError
from guest.allocator.zone import Zone
from lab.shared_host.attached import OpenGuest
from lab.shared_host.host import lock_object
from tests.live.processes import PATIENCE_S, Guest, Lab, Process
from tests.support import wait_until

SHARED = ("--policy", "shared")
MEMHOG = ("--workload", "memhog", "--hold", "20ms", "--idle", "20ms")
CHURN = ("--workload", "churn", "--fill", "0.5", "--min-order", "0", "--vcpus", "2")
LOCKED = ("--policy", "walk-locked", "--deadline", "100ms")


def shared_host(lab: Lab, *flags: str) -> Process:
    """A host that claims, and holds its lab's lock."""
    label = f"shared{len(lab._processes)}"
    path = lab.folder / f"{label}.json"
    arguments = ["lab.shared_host", "--name", lab.name, "--every", "1ms", "--quiet", "--json", str(path), *flags]
    host = Process(lab.folder, label, arguments)
    lab._processes.append(host)
    return host


def account_of(host: Process, guest: str) -> dict[str, Any]:
    """What a host that was stopped counted for one guest."""
    account = host.stop()
    assert account["ok"]
    entries = [entry for entry in account["guests"] if entry["name"] == guest]
    assert len(entries) == 1, account
    entry: dict[str, Any] = entries[0]
    return entry


def device_pid(lab: Lab, guest: str = "g0") -> int:
    zone = Zone.attach(lab.name, guest, read_only=True)
    pid = zone.device_pid()
    zone.close()
    return pid


def gone(lab: Lab, host: Process, guest: Guest) -> None:
    """Wait until the host has noticed that a guest's process ended, and has let go of it."""
    wait_until(lambda: not lab.names_of(guest.name) or host.process.poll() is not None, PATIENCE_S, what="the end")


@pytest.mark.parametrize("work", [MEMHOG, CHURN], ids=["memhog", "churn"])
@pytest.mark.parametrize("first", ["host", "guest"])
def test_s4_s6_what_is_claimed_is_proven_and_both_sides_agree(lab: Lab, work: tuple[str, ...], first: str) -> None:
    """S4, S6: to the byte, with what was populated again; every stamp intact, every discarded page zeros."""
    early = shared_host(lab) if first == "host" else None
    guest = lab.guest("g0", *SHARED, *work)
    host = early or shared_host(lab)
    guest.returns(2000)
    wait_until(lambda: guest.look().installs > 10, PATIENCE_S, what="blocks to be asked for")
    guest.returns(2000)
    result = guest.stop()
    seen = account_of(host, "g0")
    assert result["ok"]
    assert result["violations"] == result["asks_withdrawn"] == 0
    assert seen["freed_bytes"] == result["returned_bytes"] > 0
    assert seen["installs"] == result["installs"] > 0
    assert result["installed_bytes"] <= seen["installed_bytes"]
    assert result["install_wait_ns"] > 0
    assert seen["failures"] == 0
    assert seen["final_resident_bytes"] == result["final_resident_bytes"]
    grown = result["first_touches"] + result["refaults"]
    assert grown * 4096 + result["installed_bytes"] - result["returned_bytes"] == result["final_resident_bytes"]


def test_s14_a_host_that_is_killed_is_succeeded_and_nothing_stays_in_flight(lab: Lab) -> None:
    """S14: several times, at any moment; the guest goes on without one, and its stamps are intact."""
    guest = lab.guest("g0", *SHARED, *CHURN)
    for _time in range(4):
        host = shared_host(lab)
        guest.returns(500)
        host.kill()
        guest.works()
    host = shared_host(lab)
    guest.returns(2000)
    result = guest.stop()
    seen = account_of(host, "g0")
    assert result["ok"]
    assert result["violations"] == 0
    assert seen["final_resident_bytes"] == result["final_resident_bytes"]
    grown = result["first_touches"] + result["refaults"]
    assert grown * 4096 + result["installed_bytes"] - result["returned_bytes"] == result["final_resident_bytes"]


def test_a_guest_takes_its_blocks_back_from_a_dead_host(lab: Lab) -> None:
    """No other host comes."""
    host = shared_host(lab)
    guest = lab.guest("g0", *SHARED, *CHURN)
    guest.returns(500)
    host.kill()
    wait_until(lambda: device_pid(lab) == 0, PATIENCE_S, what="the guest to notice")
    guest.works()
    wait_until(lambda: guest.look().in_flight_blocks == 0, PATIENCE_S, what="the blocks to come back")
    result = guest.stop()
    assert result["ok"]
    os.unlink(names.SHM_DIR + lock_object(lab.name))  # what a killed host leaves: its name, and nobody holds it


def test_a_host_that_is_stopped_delays_allocations_for_a_bounded_time_only(lab: Lab) -> None:
    """Memory enough for work beside a whole batch that stays in flight."""
    host = shared_host(lab)
    guest = lab.guest("g0", *SHARED, *CHURN, "--memory", "128MiB")
    guest.returns(2000)
    host.send(signal.SIGSTOP)
    guest.works()
    host.send(signal.SIGCONT)
    guest.returns(2000)
    result = guest.stop()
    assert result["ok"]
    assert account_of(host, "g0")["failures"] == 0


def test_a_guest_that_is_killed_leaves_nothing_and_the_other_goes_on(lab: Lab) -> None:
    host = shared_host(lab)
    doomed = lab.guest("g0", *SHARED, *CHURN)
    other = lab.guest("g1", *SHARED, *MEMHOG)
    doomed.returns(500)
    other.returns(500)
    doomed.kill()
    gone(lab, host, doomed)
    other.returns(2000)
    assert other.stop()["ok"]
    account = host.stop()
    assert (account["host"]["guests_seen"], account["host"]["guests_lost"]) == (2, 1)
    assert {entry["name"]: entry["state"] for entry in account["guests"]}["g0"] == "lost"


def test_only_guests_that_let_it_in_are_claimed_from(lab: Lab) -> None:
    host = shared_host(lab)
    trusting = lab.guest("g0", *SHARED, *MEMHOG)
    other = lab.guest("g1", *MEMHOG, "--policy", "off")
    trusting.returns(500)
    assert device_pid(lab, "g1") == 0
    other.works(50)
    assert other.stop()["returned_bytes"] == 0
    assert trusting.stop()["ok"]
    assert host.stop()["host"]["guests_seen"] == 1


def test_one_such_host_a_lab(lab: Lab) -> None:
    host = shared_host(lab)
    guest = lab.guest("g0", *SHARED, *MEMHOG)
    guest.returns(1)
    second = lab.command("lab.shared_host", "--name", lab.name)
    assert second.returncode == 2
    assert "has a shared host already" in second.stderr
    guest.returns(500)
    guest.stop()
    host.stop()


@pytest.mark.parametrize("kind", [names.zone_object, names.ram_object])
def test_the_objects_of_another_user_or_open_to_others_are_refused(lab: Lab, kind: Any) -> None:
    """A mode that lets others in stands for another owner too: the two are checked together."""
    guest = lab.guest("g0", *SHARED, "--workload", "none")
    wait_until(lambda: can_be_opened(lab), PATIENCE_S, what="the guest to let a host in")
    path = names.SHM_DIR + kind(lab.name, "g0")
    os.chmod(path, 0o666)  # noqa: S103  that is what must be refused
    with pytest.raises(LabError, match="must be owned by"):
        OpenGuest.open(lab.name, "g0")
    os.chmod(path, 0o600)
    OpenGuest.open(lab.name, "g0").close()
    assert guest.stop()["ok"]


def can_be_opened(lab: Lab) -> bool:
    try:
        OpenGuest.open(lab.name, "g0").close()
    except LabError:
        return False
    return True


# ---------------------------------------------------------------- walk-locked


def test_walk_locked_gives_memory_back_and_both_sides_agree(lab: Lab) -> None:
    host = lab.host()
    guest = lab.guest("g0", "--policy", "walk-locked", *MEMHOG)
    guest.returns(4000)
    result = guest.stop()
    account = host.stop()
    assert result["ok"]
    assert account["guests"][0]["freed_bytes"] == result["returned_bytes"]
    assert account["guests"][0]["final_resident_bytes"] == result["final_resident_bytes"]
    assert account["host"]["duplicates"] > 0, "what was reported is reported again"
    assert result["lock_hold_ns"]["waiting"]["max"] <= result["lock_hold_ns"]["pull"]["max"]


def test_walk_locked_survives_a_host_that_is_killed_in_the_walk(lab: Lab) -> None:
    host = lab.host("--slow", "300ms", "--slow-where", "inside")
    guest = lab.guest("g0", *LOCKED, *MEMHOG)
    wait_until(guest.host_is_inside_the_gate, PATIENCE_S, what="a walk")
    host.kill()
    guest.works(50)
    successor = lab.host()
    guest.returns(2000)
    assert guest.stop()["ok"]
    successor.stop()


@pytest.mark.parametrize("where", [pytest.param("inside", marks=pytest.mark.stress), "before"])
def test_s13_walk_locked_ends_beside_a_host_that_is_stopped_in_the_walk(lab: Lab, where: str) -> None:
    """S13, S5: the vCPUs sleep on a lock that is held for that host; a signal still ends the guest."""
    host = lab.host("--slow", "1s", "--slow-where", where)
    guest = lab.guest("g0", *LOCKED, *MEMHOG)
    if where == "inside":
        wait_until(guest.host_is_inside_the_gate, PATIENCE_S, what="a walk")
    else:
        wait_until(lambda: guest.look().active, PATIENCE_S, what="a walk")
    host.send(signal.SIGSTOP)
    result = guest.stop()
    assert result["violations"] == 0
    host.send(signal.SIGCONT)
    host.stop()
