"""What it is for: memory that a guest has freed goes back to the operating system, and every byte is accounted for."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from tests.live.processes import MIB, PATIENCE_S, Guest, Lab, Process
from tests.support import wait_until

CHURN = ("--workload", "churn", "--fill", "0.5")
SHORT_TURNS = ("--workload", "memhog", "--hold", "20ms", "--idle", "20ms")


def agree(host: dict[str, Any], *guests: dict[str, Any]) -> None:
    """The accounts of both sides, byte for byte."""
    assert host["ok"]
    by_name = {entry["name"]: entry for entry in host["guests"]}
    for guest in guests:
        seen = by_name[guest["name"]]
        assert guest["ok"]
        assert guest["violations"] == 0
        assert seen["freed_bytes"] == guest["returned_bytes"]
        assert seen["final_resident_bytes"] == guest["final_resident_bytes"]
        for counter in ("failures", "rejected", "malformed", "invalid_blocks"):
            assert seen[counter] == 0, counter


def end(host: Process, *guests: Guest) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Guests, then the host; the accounts, which agree."""
    results = [guest.stop() for guest in guests]
    account = host.stop()
    agree(account, *results)
    return account, results


@pytest.mark.parametrize("first", ["host", "guest"])
def test_either_side_may_start_first(lab: Lab, first: str) -> None:
    if first == "host":
        host = lab.host()
        guest = lab.guest("g0", *SHORT_TURNS)
    else:
        guest = lab.guest("g0", *SHORT_TURNS)
        host = lab.host()
    guest.returns(2 * 16 * MIB // 4096)
    _account, (result,) = end(host, guest)
    assert result["refaults"] > 0
    assert result["reports"] > 0
    assert result["withdrawn"] <= 1  # the last one, if the end came meanwhile


def test_an_idle_guest_costs_nothing(lab: Lab) -> None:
    """Seen from outside: the memory object of a guest that has freed everything holds no page."""
    host = lab.host()
    # One block in flight at most: with all of so small a guest's memory in flight its only turn would find none.
    guest = lab.guest("g0", "--workload", "memhog", "--hold", "500ms", "--idle", "1h", "--capacity", "1")
    wait_until(lambda: guest.resident_bytes() >= 16 * MIB, PATIENCE_S, what="the work")
    wait_until(lambda: guest.resident_bytes() == 0, PATIENCE_S, what="the memory to be given back")
    # The host has discarded the last batch; the guest counts it once the acknowledgement has come.
    wait_until(lambda: guest.look().in_flight_pages == 0, PATIENCE_S, what="the last batch to be put back")
    assert guest.look().returned_pages == guest.look().first_touches
    _account, (result,) = end(host, guest)
    assert result["peak_resident_bytes"] >= 16 * MIB


def test_s4_s6_many_orders_and_several_guests(lab: Lab) -> None:
    host = lab.host()
    guests = [
        lab.guest("g0", *CHURN, "--min-order", "0", "--capacity", "32", "--vcpus", "2"),
        lab.guest("g1", "--workload", "burst", "--idle", "10ms", "--min-order", "3", "--capacity", "1"),
        lab.guest("g2", "--workload", "page-fault", "--backend", "model"),
    ]
    for guest in guests:
        guest.returns(2000)
    account, results = end_apart(host, *guests)
    assert account["host"]["guests_seen"] == 3
    assert account["host"]["guests_lost"] == 0
    agree(account, *results[:2])
    assert results[2]["violations"] == 0  # the model's bytes are claims: neither side can look at memory


def end_apart(host: Process, *guests: Guest) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    results = [guest.stop() for guest in guests]
    return host.stop(), results


def test_policy_off_gives_nothing_back(lab: Lab) -> None:
    host = lab.host()
    guest = lab.guest("g0", *SHORT_TURNS, "--policy", "off")
    guest.works(100)
    _account, (result,) = end(host, guest)
    assert result["returned_bytes"] == result["reports"] == result["refaults"] == 0
    assert result["final_resident_bytes"] == result["peak_resident_bytes"] > 0


def test_s12_an_inhibited_host_acknowledges_and_takes_nothing(lab: Lab) -> None:
    host = lab.host("--inhibit-discard")
    guest = lab.guest("g0", *SHORT_TURNS)
    wait_until(lambda: guest.look().reported_pages > 0, PATIENCE_S)
    guest.works(100)
    account, (result,) = end(host, guest)
    assert account["host"]["inhibited"] >= result["reports"] > 0  # one may be withdrawn as its answer is under way
    assert result["returned_bytes"] == result["refaults"] == 0


@pytest.mark.parametrize("backend", ["shared", "model"])
def test_z1_what_the_host_gave_back_is_not_cleared_again(lab: Lab, backend: str) -> None:
    host = lab.host()
    guest = lab.guest("g0", *SHORT_TURNS, "--host-zeroed", "--backend", backend)
    guest.returns(2 * 16 * MIB // 4096)
    result = guest.stop()
    account = host.stop()
    assert (result["ok"], result["violations"]) == (True, 0)
    assert 0 < result["zeroing_skipped_pages"] <= result["refaults"] + result["first_touches"]
    assert account["host"]["failures"] == 0


def test_z1_without_the_switch_everything_is_cleared(lab: Lab) -> None:
    host = lab.host()
    guest = lab.guest("g0", *SHORT_TURNS)
    guest.returns(2 * 16 * MIB // 4096)
    _account, (result,) = end(host, guest)
    assert result["zeroing_skipped_pages"] == 0


def test_z4_s12_a_guest_that_poisons_keeps_its_pages_and_their_poison(lab: Lab) -> None:
    host = lab.host()
    guest = lab.guest("g0", *SHORT_TURNS, "--poison", "170", "--host-zeroed")
    wait_until(lambda: guest.look().reported_pages > 0, PATIENCE_S)
    guest.works(100)
    account, (result,) = end(host, guest)
    assert account["host"]["inhibited"] >= result["reports"] > 0  # one may be withdrawn as its answer is under way
    assert result["returned_bytes"] == result["refaults"] == result["zeroing_skipped_pages"] == 0
    assert result["final_resident_bytes"] == result["peak_resident_bytes"] > 0


def test_a_killed_guest_leaves_nothing_and_the_other_goes_on(lab: Lab) -> None:
    host = lab.host()
    doomed = lab.guest("g0", *CHURN, "--min-order", "0")
    other = lab.guest("g1", *CHURN, "--min-order", "0")
    doomed.returns()
    other.returns()
    assert len(lab.names_of("g0")) == 4
    doomed.kill()
    wait_until(lambda: not lab.names_of("g0"), PATIENCE_S, what="the names of the dead guest to go")
    assert len(lab.names_of("g1")) == 4
    other.returns(500)
    account, _results = end(host, other)
    assert (account["host"]["guests_seen"], account["host"]["guests_lost"]) == (2, 1)


def test_a_killed_guest_comes_back_under_its_name(lab: Lab) -> None:
    host = lab.host()
    lab.guest("g0", *CHURN).kill()
    again = lab.guest("g0", *CHURN, "--min-order", "0")
    again.returns()
    result = again.stop()
    assert result["ok"]
    host.stop()


def test_a_killed_host_is_succeeded_and_the_guest_goes_on(lab: Lab) -> None:
    host = lab.host()
    guest = lab.guest("g0", *CHURN, "--min-order", "0")
    guest.returns(500)
    host.kill()
    guest.works()  # without a host
    successor = lab.host()
    guest.returns(16 * 1024 + 1)  # more than one batch: the last of the dead host may be counted late
    result = guest.stop()
    account = successor.stop()
    assert result["ok"]
    assert result["violations"] == 0
    assert result["connections"] >= 2
    assert account["host"]["freed_bytes"] > 0
    assert account["guests"][0]["final_resident_bytes"] == result["final_resident_bytes"]


def stop_outside_the_gate(host: Process, guest: Guest) -> None:
    """SIGSTOP at a moment when the host is not in the middle of a discard."""
    for _attempt in range(200):
        host.send(signal.SIGSTOP)
        wait_until(lambda: "T" in state_of(host), PATIENCE_S, what="the host to stop")
        if not guest.host_is_inside_the_gate():
            return
        host.send(signal.SIGCONT)
        guest.returns()
    raise AssertionError("the host is always inside the gate")


def state_of(process: Process) -> str:
    """State letter of /proc/PID/stat."""
    with open(f"/proc/{process.process.pid}/stat", encoding="ascii") as stat:
        return stat.read().rpartition(")")[2].split()[0]


def test_s5_a_host_that_was_stopped_never_takes_what_was_withdrawn(lab: Lab) -> None:
    """It wakes past the deadline with a report in its hands whose blocks the guest has long been using again."""
    host = lab.host()
    guest = lab.guest("g0", *CHURN, "--min-order", "0", "--capacity", "32", "--deadline", "50ms", "--vcpus", "2")
    guest.returns(500)
    for _time in range(3):
        stop_outside_the_gate(host, guest)
        wait_until(lambda: guest.look().in_flight_blocks == 0, PATIENCE_S, what="the blocks to come back")
        guest.works(20_000)
        host.send(signal.SIGCONT)
        guest.returns(200)
    _account, (result,) = end(host, guest)
    assert result["withdrawn"] > 0


def test_s5_a_slow_host_is_withdrawn_from_before_the_gate(lab: Lab) -> None:
    host = lab.host("--slow", "300ms", "--slow-where", "before")
    guest = lab.guest("g0", *CHURN, "--min-order", "0", "--deadline", "50ms")
    runs = guest.look().runs
    wait_until(lambda: guest.look().runs >= runs + 3, PATIENCE_S, what="runs")
    guest.works(5000)
    account, (result,) = end(host, guest)
    assert result["withdrawn"] > 0
    assert account["host"]["withdrawn"] > 0
    assert account["host"]["freed_bytes"] == 0


def test_s5_a_slow_host_is_waited_for_inside_the_gate(lab: Lab) -> None:
    host = lab.host("--slow", "300ms", "--slow-where", "inside")
    guest = lab.guest("g0", *CHURN, "--min-order", "0", "--deadline", "50ms")
    guest.returns(100)
    guest.works(5000)
    _account, (result,) = end(host, guest)
    assert result["returned_bytes"] > 0
