"""The soak: whether what is not flat is found, what its actors find, what decides, and one of some seconds."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common import layout
from common.names import SHM_DIR
from common.settings import POLICIES, GuestSettings, add_flags, load
from guest.allocator.zone import Zone, ZoneSettings
from guest.reporting.cycle import Cycle, Outcome
from lab.outcome import ProcessEnd
from lab.soak.attached import Compactor, lost_pages
from lab.soak.cast import MOST_RESIDENTS, residents, visitor
from lab.soak.census import Census, Track, look_at
from lab.soak.flat import MIN_LOOKS, Trend, judge_count, judge_memory, theil_sen
from lab.soak.stage import Stage
from lab.soak.verdict import Final, Findings, exit_code, summary, summary_text
from tests.lab.build import guest_account, host_account
from tests.support import wait_until

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 280.0
MIB = 1 << 20
HOUR_S = np.linspace(0.0, 3600.0, 600)


# What is flat


def noisy(level_bytes: float, leak_bytes_per_s: float = 0.0, noise_bytes: float = MIB / 4) -> list[int]:
    """Memory over an hour, with noise and one look in eight that is 30 MiB above."""
    noise = np.random.default_rng(7).normal(0, noise_bytes, HOUR_S.size)
    busy = np.where(np.arange(HOUR_S.size) % 8 == 3, 30 * MIB, 0)
    return [int(value) for value in level_bytes + leak_bytes_per_s * HOUR_S + noise + busy]


def test_the_slope_is_that_of_most_pairs() -> None:
    times = np.arange(50.0)
    values = 3 * times + 5
    values[::5] += 1000
    assert theil_sen(times, values) == pytest.approx(3)
    assert theil_sen([1.0], [5.0]) == theil_sen([1.0, 1.0], [5.0, 9.0]) == 0


def test_noise_about_a_level_is_flat() -> None:
    trend = judge_memory(HOUR_S.tolist(), noisy(150 * MIB))
    assert trend.flat
    assert trend.median == pytest.approx(150 * MIB, rel=0.01)


@pytest.mark.parametrize("leak", [2048, 4096, 65536])
def test_a_leak_is_found_through_noise(leak: int) -> None:
    """Two KiB a second are 3.5 MiB in the half that counts."""
    trend = judge_memory(HOUR_S.tolist(), noisy(150 * MIB, leak))
    assert not trend.flat
    assert trend.growth == pytest.approx(1800 * leak, rel=0.15)


def test_what_a_process_fills_at_its_start_is_no_leak() -> None:
    filling = np.minimum(HOUR_S, 1500) * 20_000
    assert judge_memory(HOUR_S.tolist(), (100 * MIB + filling).astype(int).tolist()).flat


def test_one_descriptor_more_is_found_and_coming_and_going_is_not() -> None:
    assert judge_count("descriptors", [20] * 400).flat
    assert not judge_count("descriptors", [20 + (index > 250) for index in range(400)]).flat
    moments = random.Random(3)
    coming = [20 + moments.choice((0, 4, 4, 4)) for _ in range(400)]
    assert judge_count("descriptors", coming).flat
    leaking = judge_count("descriptors", [count + index // 20 for index, count in enumerate(coming)])
    assert not leaking.flat
    assert leaking.growth >= 1


def test_who_was_seen_seldom_or_briefly_is_not_judged() -> None:
    track, brief = Track(1), Track(1)
    look = look_at(os.getpid())
    assert look is not None
    for index in range(10 * MIN_LOOKS):
        brief.add(index / 10, look)
    assert brief.trends() == ()
    for index in range(MIN_LOOKS - 1):
        track.add(float(index), look)
    assert track.trends() == ()
    track.add(99.0, look)
    assert all(trend.flat for trend in track.trends())


STAND_IN = """
import os, sys
leaks, kept = sys.argv[1] == "leaks", []
for line in sys.stdin:
    if leaks:
        kept.append((b"x" * (256 << 10), os.open("/dev/null", os.O_RDONLY)))
    print("done", flush=True)
"""


@pytest.fixture
def stand_ins() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """One that keeps 256 KiB and a descriptor at each line that it is sent, and one that does not."""
    processes = {
        kind: subprocess.Popen(
            [sys.executable, "-c", STAND_IN, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for kind in ("leaks", "steady")
    }
    yield processes
    for process in processes.values():
        process.communicate()


def test_a_leaking_process_is_found_beside_a_steady_one(stand_ins: dict[str, subprocess.Popen[str]]) -> None:
    census = Census()
    for kind, process in stand_ins.items():
        census.follow(kind, process.pid)
    for moment in range(3 * MIN_LOOKS):
        for process in stand_ins.values():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"
        census.look(float(moment))
    found = {kind: {trend.figure: trend for trend in trends} for kind, trends in census.trends().items()}
    assert all(trend.flat for trend in found["steady"].values())
    assert {name: trend.flat for name, trend in found["leaks"].items()} == {
        "memory": False, "descriptors": False, "threads": True
    }  # fmt: skip
    assert found["leaks"]["memory"].growth > 3 * MIB


def test_a_process_that_has_ended_is_not_there() -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert look_at(process.pid) is None, "a zombie"
    assert look_at(process.pid) is None


# Who takes part


def test_everybody_that_stays_is_of_another_policy_and_can_be() -> None:
    roles = residents(MOST_RESIDENTS, 5)
    assert {role.settings["policy"] for role in roles} == set(POLICIES) - {"off"}
    assert len({role.settings["seed"] for role in roles}) == len(roles)
    for role in roles:
        assert len([what for what in role.attached if what != "compact"]) <= 2, "slots for others"
        GuestSettings(host="lab", name=role.name, **role.settings)


def test_who_joins_is_started_as_a_guest_takes_it(tmp_path: Path) -> None:
    """In the lab of the guest that it joins."""
    started: list[Sequence[str]] = []
    children: Any = SimpleNamespace(start=lambda name, arguments: started.append(arguments))
    stage = Stage(children, "soak-test", tmp_path)
    stage.start_attached("a+churn", "a", "boundary", "churn", 5)
    stage.start_attached("b+churn", "b", "shared", "churn", 6)
    stage.start_attached("a+compact", "a", "boundary", "compact", 7)
    parser = argparse.ArgumentParser()
    add_flags(parser, GuestSettings)
    joined = [load(GuestSettings, parser.parse_args(list(arguments[2:]))) for arguments in started[:2]]
    assert [(one.join, one.host, one.name, one.seed) for one in joined] == [
        (True, "soak-test", "a", 5),
        (True, "soak-test-trust", "b", 6),
    ]
    assert started[2][:5] == ("-m", "lab.soak.attached", "soak-test", "a", "7")


def test_visitors_are_drawn_from_the_seed() -> None:
    drawn = [visitor(f"v{index}", random.Random(index), 8.0) for index in range(50)]
    assert drawn == [visitor(f"v{index}", random.Random(index), 8.0) for index in range(50)]
    for role in drawn:
        GuestSettings(host="lab", name=role.name, **role.settings)
        assert 2.0 <= role.settings["duration_s"] <= 8.0


# Who looks


@pytest.fixture
def zone() -> Iterator[Zone]:
    opened = Zone.private(ZoneSettings(16 * MIB, cpus=2, min_order=9, high_water_mark=0))
    yield opened
    opened.close()


def test_s4_no_page_is_lost_wherever_pages_are(zone: Zone) -> None:
    """Allocated, on per-CPU lists, isolated, in flight; and one that a counter has lost is found."""
    zone.isolate(7)
    cpu = zone.claim_cpu()
    for order in (0, 0, 3, 9):
        assert zone.alloc(order, cpu=cpu) is not None
    cycle = Cycle(zone, "boundary", capacity=1)
    cycle.begin()
    batch = cycle.pull()
    assert batch is not None
    snapshot = zone.snapshot()
    assert zone.statistics().in_flight_pages > 0
    assert zone.statistics().pcp_pages > 0
    assert lost_pages(snapshot) == 0
    words = np.frombuffer(snapshot, dtype=np.int64).copy()
    words[layout.W_FREE_PAGES] -= 1
    assert lost_pages(words.tobytes()) == 1
    cycle.put_back(batch, Outcome.DONE)
    cycle.end()


def test_the_compactor_works_looks_and_tells_a_breach(zone: Zone) -> None:
    stop = threading.Event()
    stop.set()  # it does not sleep then
    compactor = Compactor(zone, seed=1)
    for _ in range(40):
        compactor.step(stop)
    account = compactor.account()
    assert account["isolations"] > 0
    assert account["rotations"] > 0
    assert account["validations"] == account["snapshots"] > 0
    assert account["breaches"] == account["lost_pages"] == 0
    zone.validate()
    zone._segment.header["free_pages"] -= 3
    compactor.look()
    account = compactor.account()
    assert account["breaches"] == 1
    assert account["lost_pages"] == 3
    assert "S4" in account["complaints"][0]


# What decides


def measured() -> tuple[Trend, ...]:
    """Trends as a census makes them, of a process that does nothing."""
    track = Track(1, array("d", range(0, 4 * MIN_LOOKS, 4)))
    for column in (track.anonymous_bytes, track.descriptors, track.threads):
        column.extend([30] * MIN_LOOKS)
    return track.trends()


def sound() -> Findings:
    """A run that went well: two guests whose accounts agree with the host's."""
    names = ["guest-1", "guest-2"]
    return Findings(
        duration_s=10.0,
        page_operations=5_000_000,
        stamped_operations=4_000_000,
        guests=2,
        host_ends={"soak": ProcessEnd("host", 0, "", host_account(names))},
        guest_ends={"soak": [ProcessEnd(name, 0, "", guest_account(name)) for name in names]},
        finals={name: Final(0, 0, 0, 4 * MIB, 4 * MIB) for name in names},
        trends={"host": measured()},
    )


def spoil_accounts(found: Findings) -> None:
    account = dict(found.guest_ends["soak"][0].account or {})
    account["returned_bytes"] += 4096
    found.guest_ends["soak"][0] = ProcessEnd("guest-1", 0, "", account)


@pytest.mark.parametrize(("reports", "stays", "code"), [(0, False, 0), (1, False, 4), (0, True, 4)])
def test_a_visitor_may_leave_before_a_stopped_host_has_read_its_hello(reports: int, stays: bool, code: int) -> None:
    """Who reported something, or stays, has to be known."""
    found = replace(sound(), hung=[], names_left=[])
    nothing = {"reports": reports, "returned_bytes": 0, "final_resident_bytes": 0, "reported_bytes": 0, "blocks": 0}
    account = guest_account("visitor-3") | nothing
    found.guest_ends["soak"].append(ProcessEnd("visitor-3", 0, "", account))
    if stays:
        found.finals["visitor-3"] = Final(0, 0, 0, 0, 0)
    assert exit_code(found, summary(found, {"seed": 1})) == code


def leak(found: Findings) -> None:
    found.trends = {"host": (Trend("memory", 30e6, 2e6, 1e6), *measured()[1:])}


@pytest.mark.parametrize(
    ("spoil", "code", "word"),
    [
        (lambda found: None, 0, "all"),
        (lambda found: setattr(found, "violations", 1), 4, "violations"),
        (lambda found: setattr(found, "breaches", 1), 4, "breaches"),
        (lambda found: setattr(found, "lost_pages", 1), 4, "lost pages"),
        (lambda found: found.hung.append("host"), 4, "hung"),
        (lambda found: found.names_left.append("/fpr.x"), 4, "/fpr.x"),
        (lambda found: found.finals.update(a=Final(1, 0, 0, 0, None)), 4, "every page is free"),
        (lambda found: found.finals.update(a=Final(0, 0, 0, 4096, 0)), 4, "the machine holds"),
        (spoil_accounts, 4, "agree on what was returned"),
        (leak, 4, "host: memory flat"),
        (lambda found: found.failures.append("guest-1 was ended by signal 9"), 1, "signal 9"),
        (lambda found: setattr(found, "interrupted", True), 130, "page operations"),
    ],
)
def test_whatever_does_not_hold_decides(spoil: Callable[[Findings], None], code: int, word: str) -> None:
    found = replace(sound(), hung=[], names_left=[])
    spoil(found)
    result = summary(found, {"seed": 1})
    assert exit_code(found, result) == code
    assert result["ok"] is (code == 0)
    assert word in "\n".join(summary_text(result))
    json.dumps(result, allow_nan=False)


# All of it


def start(*arguments: str) -> subprocess.Popen[str]:
    """The command, with pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "lab", "soak", *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code and both streams; nothing is left."""
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert names_of(process.pid) == []
    return process.returncode, out, err


def names_of(pid: int) -> list[str]:
    folders = [Path(SHM_DIR), Path("/dev/mqueue")]
    return [str(path) for folder in folders if folder.is_dir() for path in folder.glob(f"fpr.soak-{pid}-*")]


@pytest.mark.parametrize(
    ("flags", "word"),
    [(("--for", "1s"), "1s"), (("--guests", "0"), "--guests"), (("--visitors", "9"), "9"), (("--seed", "-1"), "-1")],
)
def test_wrong_settings_are_one_line_and_exit_code_2(flags: tuple[str, str], word: str) -> None:
    code, out, err = finished(start(*flags))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert word in err


def run(*flags: str) -> dict[str, Any]:
    """The result of a soak that went well."""
    code, out, err = finished(start("--json", "-", *flags))
    assert code == 0, err
    result: dict[str, Any] = json.loads(out)
    assert result["ok"]
    assert result["failed"] == result["failures"] == []
    for figure in ("violations", "breaches", "lost_pages", "names_left", "hung"):
        assert result[figure] == 0
    assert "page operations" in err
    return result


@pytest.mark.timeout(LIMIT_S)
def test_s4_b1_some_seconds_of_everything(tmp_path: Path) -> None:
    """A guest, three attached processes, a visitor at a time, and a host that is stopped now and then."""
    result = run("--for", "5s", "--guests", "1", "--seed", "3")
    assert result["page_operations"] >= result["stamped_operations"] > 0
    assert result["validations"] > 0
    assert result["attached"] == 3
    assert result["guests"] >= 2
    assert {"soak", "host", "boundary", "boundary+churn", "boundary+burst", "boundary+compact"} == set(
        result["processes"]
    )


@pytest.mark.stress
@pytest.mark.timeout(900)
def test_a_minute_of_everything() -> None:
    result = run("--for", "60s", "--visitors", "2")
    assert result["guests"] > MOST_RESIDENTS + 4
    assert result["refaults"] > 0
    assert result["returned_bytes"] > 0
    assert all(result["processes"].values()), "everybody is judged"


@pytest.mark.stress
@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, 1), (signal.SIGINT, 130)])
def test_a_guest_that_dies_or_ctrl_c_ends_it_with_nothing_left(number: signal.Signals, code: int) -> None:
    process = start("--for", "1h", "--guests", "2", "--visitors", "0")

    def guest() -> int:
        for entry in filter(str.isdigit, os.listdir("/proc")):
            line = Path(f"/proc/{entry}/cmdline")
            words = line.read_bytes().split(b"\0") if line.exists() else []
            if b"guest" in words and b"rotate" in words and f"soak-{process.pid}-".encode() in line.read_bytes():
                return int(entry)
        return 0

    wait_until(lambda: len([name for name in names_of(process.pid) if name.endswith(".zone")]) == 2, LIMIT_S)
    wait_until(guest, LIMIT_S, what="the guest")
    os.kill(guest() if number == signal.SIGKILL else process.pid, number)
    ended, _out, err = finished(process)
    assert ended == code, err
