"""The demo end to end: real processes, real queues, real memory, one result in which every byte is accounted for."""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from common.errors import UsageError
from common.names import SHM_DIR
from common.settings import DemoSettings, GuestSettings, HostSettings, add_flags, load
from lab.demo import make_plan, run_demo
from lab.orchestrate import ProcessPlan
from lab.result import GUEST_FIELDS, HOST_FIELDS
from tests.support import long_enough

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 240.0  # the first run compiles the kernels
MIB = 1 << 20
# v9 asks for a run at 32 unreported blocks of an order; a guest this small has 16 of the largest.
GUESTS = ("--guests", "2", "--memory", "64MiB", "--vcpus", "1", "--high-water-mark", "4", "--delay", "50ms")
SMALL = (*GUESTS, "--hold", "300ms", "--idle", "600ms")


def start(*arguments: str) -> subprocess.Popen[str]:
    """``run_demo.py`` with pipes for both streams."""
    return subprocess.Popen(
        [sys.executable, "run_demo.py", *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def names_left(pid: int) -> list[str]:
    """Shared-memory objects and queues of the lab that demo ``pid`` made."""
    folders = [Path(SHM_DIR), Path("/dev/mqueue")]
    return [str(path) for folder in folders if folder.is_dir() for path in folder.glob(f"fpr.demo-{pid}-*")]


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code and both streams, after everything is gone."""
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert names_left(process.pid) == []
    return process.returncode, out, err


def settings_of(cls: type[Any], process: ProcessPlan) -> Any:
    """What a host or guest reads from its command line."""
    assert process.arguments[0] == "-m"
    parser = argparse.ArgumentParser()
    add_flags(parser, cls)
    return load(cls, parser.parse_args(list(process.arguments[2:])))


def all_returned(result: dict[str, Any]) -> bool:
    """Whether every guest gave something back."""
    return all(guest["returned_bytes"] > 0 for guest in result["guests"])


def run_small(
    tmp_path: Path, *arguments: str, enough: Callable[[dict[str, Any]], bool] = lambda _result: True
) -> tuple[dict[str, Any], str]:
    """The result object and the talk of a run that must be fine, as short as is ``enough``."""
    plot = tmp_path / "demo.png"

    def run(factor: int) -> tuple[dict[str, Any], str]:
        flags = ("--duration", str(2 * factor), "--json", "-", "--plot", str(plot), "--force")
        code, out, err = finished(start(*SMALL, *flags, *arguments))
        assert code == 0, err
        assert plot.stat().st_size > 20_000
        return json.loads(out), err

    return long_enough(run, lambda ended: enough(ended[0]))


def test_every_setting_reaches_the_guests(tmp_path: Path) -> None:
    settings = DemoSettings(
        guests=2, memory=64 * MIB, vcpus=3, backend="model", policy="off", min_order=4, delay_ns=1_234_567, capacity=7,
        fill=0.123, hold_ns=5, idle_ns=0, seed=99, duration_s=0.25, shuffle=True, merge_likely=False, workload="churn",
        high_water_mark=5, deadline_ns=2_000_000, pcp_batch=0, pcp_high=9, work_order=3, inhibit_discard=True,
        host_zeroed=True, poison=170,
    )  # fmt: skip
    plan = make_plan(settings, tmp_path)
    assert settings_of(HostSettings, plan.host).inhibit_discard
    # The demo has a duration, no job, corrupts no guest on purpose, and nobody joins its guests or follows them.
    own = {
        "host",
        "name",
        "json",
        "quiet",
        "seed",
        "work_pages",
        "wait_for_ack",
        "keep",
        "attach",
        "join",
        "spare_slots",
    }
    for number, process in enumerate(plan.guests, start=1):
        guest = settings_of(GuestSettings, process)
        assert (guest.host, guest.name, guest.json) == (plan.lab, f"guest-{number}", str(process.account))
        for setting in fields(GuestSettings):
            if setting.name not in own:
                assert getattr(guest, setting.name) == getattr(settings, setting.name), setting.name
        assert guest.seed == 98 + number
    assert plan.lab != make_plan(settings, tmp_path).lab, "two runs never share a lab"


def test_seeds_of_guests_go_round(tmp_path: Path) -> None:
    plan = make_plan(DemoSettings(seed=(1 << 32) - 1, guests=3), tmp_path)
    assert [settings_of(GuestSettings, process).seed for process in plan.guests] == [(1 << 32) - 1, 0, 1]


def test_a_default_delay_is_left_to_the_policy(tmp_path: Path) -> None:
    plan = make_plan(DemoSettings(), tmp_path)
    assert settings_of(GuestSettings, plan.guests[0]).delay_ns is None


def test_what_would_spoil_the_result_is_found_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "there.png").write_text("mine")
    for settings, words in (
        (DemoSettings(plot=str(tmp_path / "demo.gif")), "ends in .png"),
        (DemoSettings(plot=str(tmp_path / "there.png")), "--force"),
        (DemoSettings(plot=str(tmp_path / "one.png"), json=str(tmp_path / "one.png")), "is the file of --json too"),
        (DemoSettings(plot=str(tmp_path / "demo.png"), json=str(tmp_path / "no" / "x.json")), "no folder"),
    ):
        with pytest.raises(UsageError, match=words):
            run_demo(settings)
    assert (tmp_path / "there.png").read_text() == "mine"


@pytest.mark.timeout(LIMIT_S)
def test_s4_s6_every_byte_is_accounted_for(tmp_path: Path) -> None:
    result, talk = run_small(tmp_path, enough=all_returned)
    assert result["ok"] is True
    assert all(check["ok"] for check in result["checks"])
    assert set(HOST_FIELDS) <= set(result["host"])
    assert len(result["guests"]) == 2
    for guest in result["guests"]:
        assert set(GUEST_FIELDS) <= set(guest)
        assert guest["memory_bytes"] == 64 * MIB
        assert guest["violations"] == 0
        assert 0 < guest["returned_bytes"] <= guest["freed_bytes"]
        assert guest["in_flight_max_blocks"] <= 16, "S10"
    assert result["host"]["freed_bytes"] == sum(guest["returned_bytes"] for guest in result["guests"])
    for words in ("guest-1: allocated", "gave back", "lock held", "picture"):
        assert words in talk
    assert "\x1b" not in talk


@pytest.mark.stress
@pytest.mark.timeout(LIMIT_S)
def test_policy_off_returns_nothing(tmp_path: Path) -> None:
    result, talk = run_small(tmp_path, "--policy", "off")
    assert result["ok"] is True
    assert result["host"]["freed_bytes"] == 0
    assert [guest["returned_bytes"] for guest in result["guests"]] == [0, 0]
    assert "gave nothing back" in talk


@pytest.mark.stress
@pytest.mark.timeout(LIMIT_S)
def test_s12_an_inhibited_host_discards_nothing(tmp_path: Path) -> None:
    result, _ = run_small(tmp_path, "--inhibit-discard", enough=lambda found: found["host"]["reports"] > 0)
    assert result["ok"] is True
    assert result["host"]["reports"] > 0
    assert result["host"]["freed_bytes"] == 0


@pytest.mark.stress
@pytest.mark.timeout(LIMIT_S)
def test_model_backend_with_churn_and_small_orders(tmp_path: Path) -> None:
    result, talk = run_small(tmp_path, "--backend", "model", "--workload", "churn", "--min-order", "3", "--quiet")
    assert result["ok"] is True
    assert talk == ""


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_cleans_up(number: signal.Signals) -> None:
    process = start(*SMALL, "--duration", "1h", "--plot", "", "--json", "-")
    assert process.stderr is not None
    while "allocated" not in (line := process.stderr.readline()):
        assert line, "it ended before a guest was seen"
    os.kill(process.pid, number)
    code, out, err = finished(process)
    assert code == 130, err
    result = json.loads(out)
    assert result["interrupted"]
    assert not result["ok"]


@pytest.mark.timeout(LIMIT_S)
def test_a_killed_guest_is_told_and_nothing_is_left() -> None:
    process = start(*SMALL, "--duration", "1h", "--plot", "", "--json", "-")
    assert process.stderr is not None
    while "guest-2: allocated" not in (line := process.stderr.readline()):
        assert line, "it ended before a guest was seen"
    (guest,) = [pid for pid in children_of(process.pid) if b"guest-2" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(guest, signal.SIGKILL)
    code, out, err = finished(process)
    assert code == 1, err
    assert "guest-2 was ended by signal 9" in err
    assert not json.loads(out)["ok"]


def children_of(pid: int) -> list[int]:
    """Direct children of a process."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def test_help_is_quick_to_answer_and_complete() -> None:
    process = start("--help")
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], LIMIT_S)[0]
    code, out, _ = finished(process)
    assert code == 0
    for flag in (
        "guests",
        "memory",
        "vcpus",
        "workload",
        "policy",
        "min-order",
        "delay",
        "capacity",
        "backend",
        "plot",
    ):
        assert f"--{flag} " in out


def test_a_wrong_setting_is_exit_code_2() -> None:
    code, out, err = finished(start("--memory", "3MiB"))
    assert (code, out) == (2, "")
    assert "3MiB" in err


@pytest.mark.parametrize("arguments", [("--no-such-flag",), ("stray",), ("--delay", "-1ms")])
def test_wrong_flags_are_one_line_and_exit_code_2(arguments: tuple[str, ...]) -> None:
    code, out, err = finished(start(*arguments))
    assert (code, out) == (2, "")
    assert arguments[0] in err
    assert "--help" in err
    assert err.count("\n") == 1


# Hint and hold differ from the others in the guest alone, which tests/live has.
@pytest.mark.parametrize(
    "policy", ["shared", pytest.param("hint", marks=pytest.mark.stress), pytest.param("hold", marks=pytest.mark.stress)]
)
def test_a_policy_with_a_host_or_a_pile_of_its_own(policy: str, tmp_path: Path) -> None:
    """Every byte is accounted for here too: claimed, hinted or held."""
    result, _ = run_small(tmp_path, "--policy", policy, "--quiet", enough=all_returned)
    assert result["ok"]
    assert all_returned(result)
