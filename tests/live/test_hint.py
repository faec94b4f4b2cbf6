"""The hint policy between real processes: runs that the host starts, its death, and what not waiting does."""

from __future__ import annotations

import signal

from tests.live.processes import MIB, PATIENCE_S, Lab
from tests.live.test_reclaim import agree
from tests.support import wait_until

HINT = ("--policy", "hint")
# Memory that is freed is soon in use again, and all of it: what the host takes late is taken from somebody.
BUSY = ("--workload", "memhog", "--fill", "0.9", "--hold", "1ms", "--idle", "1ms", "--memory", "32MiB")


def test_the_host_starts_runs_again_and_again_and_the_memory_comes_back(lab: Lab) -> None:
    host = lab.host("--hint-every", "20ms")
    guest = lab.guest("g0", *HINT, "--workload", "memhog", "--hold", "20ms", "--idle", "200ms")
    guest.returns(16 * MIB // 4096)
    wait_until(lambda: guest.look().runs >= 5, PATIENCE_S, what="runs")
    guest.works()
    result = guest.stop()
    account = host.stop()
    agree(account, result)
    assert account["host"]["commands"] >= result["commands"] >= result["runs"] >= 5
    assert result["reports"] > 0
    assert result["withdrawn"] == 0


def test_no_run_without_a_command(lab: Lab) -> None:
    """Every 0 is once: the run of the welcome is the only one, however much is freed."""
    host = lab.host("--hint-every", "0")
    guest = lab.guest("g0", *HINT, "--workload", "memhog", "--hold", "1ms", "--idle", "1ms")
    wait_until(lambda: guest.look().runs == 1 and not guest.look().active, PATIENCE_S, what="the run")
    guest.works(500)
    result = guest.stop()
    account = host.stop()
    agree(account, result)
    assert (account["host"]["commands"], result["commands"], result["runs"]) == (2, 2, 1)  # and its DONE


def test_s3_a_host_that_dies_in_a_run_leaves_nothing_held(lab: Lab) -> None:
    host = lab.host("--slow", "1h", "--slow-where", "before")
    guest = lab.guest("g0", *HINT, "--workload", "none", "--capacity", "1", "--deadline", "1h")
    wait_until(lambda: guest.look().in_flight_blocks == 1, PATIENCE_S, what="a report that waits")
    host.kill()
    wait_until(lambda: guest.look().in_flight_blocks == 0 and not guest.look().active, PATIENCE_S, what="the end")
    assert guest.look().held_pages == 0
    assert guest.look().free_pages == guest.look().n_pages
    successor = lab.host("--hint-every", "20ms")
    wait_until(lambda: guest.look().runs >= 3, PATIENCE_S, what="runs of the next host")
    guest.stop()
    successor.stop()


def test_s3_a_stopped_host_has_the_blocks_for_a_deadline_and_no_longer(lab: Lab) -> None:
    """Whatever the moment: in a report or before DONE. Inside the gate it may still discard, so they wait (S5)."""
    host = lab.host("--hint-every", "1ms")
    guest = lab.guest("g0", *HINT, "--workload", "none", "--capacity", "1", "--deadline", "50ms")
    for turn in range(4):
        wait_until(lambda goal=2 * turn + 1: guest.look().runs >= goal, PATIENCE_S, what="a run")  # type: ignore[misc]
        host.send(signal.SIGSTOP)
        wait_until(
            lambda: (
                guest.host_is_inside_the_gate()
                or guest.look().held_blocks == guest.look().in_flight_blocks == guest.look().active == 0
            ),
            PATIENCE_S,
            what="the blocks to come back",
        )
        host.send(signal.SIGCONT)
    result = guest.stop()
    host.stop()
    assert result["ok"]


def test_s5_without_waiting_a_slow_host_corrupts_the_guest_and_the_stamps_tell(lab: Lab) -> None:
    """The host discards what has long been handed out again; the same guest that waits is sound (the next test)."""
    host = lab.host("--slow", "200ms", "--hint-every", "1ms")
    guest = lab.guest("g0", *HINT, "--no-wait-for-ack", *BUSY)
    wait_until(lambda: guest.look().violations > 0, PATIENCE_S, what="a stamp that is gone")
    guest.send(signal.SIGTERM)
    assert guest.wait() == 4
    assert "pfn" in guest.err
    assert "its stamp is gone" in guest.err
    assert guest.result()["returned_bytes"] == 0  # what the host took it never told
    host.stop()


def test_s5_the_same_guest_that_waits_is_sound(lab: Lab) -> None:
    host = lab.host("--slow", "200ms", "--hint-every", "1ms")
    guest = lab.guest("g0", *HINT, *BUSY)
    guest.returns(8 * MIB // 4096)
    refaults = guest.look().refaults
    wait_until(lambda: guest.look().refaults > refaults, PATIENCE_S, what="pages that were given back in use again")
    guest.returns(8 * MIB // 4096)
    result = guest.stop()
    agree(host.stop(), result)
    assert result["withdrawn"] <= 1  # what was out as it was told to stop


def test_not_waiting_is_for_hint_alone(lab: Lab) -> None:
    refused = lab.command("guest", "--no-wait-for-ack", "--policy", "boundary")
    assert refused.returncode == 2
    assert "hint" in refused.stderr
