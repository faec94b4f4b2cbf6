"""Processes under the orchestrator: however they end, the outcome says so and none of them is left."""

from __future__ import annotations

import concurrent.futures
import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.names import SHM_DIR, ack_queue, control_queue, ram_object, report_queue, zone_object
from common.queues import Queue
from lab.children import Children
from lab.orchestrate import LabPlan, ProcessPlan, run_lab
from lab.outcome import RunOutcome
from lab.view import SilentView
from tests.lab.test_samples import FakeProbe
from tests.support import leftovers

DEADLINE_S = 60.0

PROLOGUE = """
import json, os, pathlib, signal, sys, time
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
def account():
    (folder / f"{name}.json").write_text(json.dumps({"name": name}))
def stop(*_):
    account()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
(folder / f"{name}.starting").write_text(str(os.getpid()))
os.rename(folder / f"{name}.starting", folder / f"{name}.pid")
def wait_for(other):
    while not (folder / f"{other}.pid").exists():
        time.sleep(0.01)
"""
GOOD_HOST = """
while True:
    signal.pause()
"""
GOOD_GUEST = """
wait_for("host")
account()
"""
OBEDIENT_GUEST = GOOD_HOST
FAILING_GUEST = """
wait_for("host")
print("cannot map 512 MiB: enlarge /dev/shm", file=sys.stderr)
sys.exit(3)
"""
STUBBORN = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
while True:
    signal.pause()
"""
INTERRUPTING_GUEST = (
    """
wait_for("host")
wait_for("guest-2")
os.kill(os.getppid(), signal.SIGINT)
"""
    + GOOD_HOST
)
STOPPED = """
os.kill(os.getpid(), signal.SIGSTOP)
"""
FORKING_GUEST = """
import subprocess
wait_for("host")
grandchild = subprocess.Popen([sys.executable, "-S", "-c", "import signal; signal.pause()"])
(folder / "grandchild.pid").write_text(str(grandchild.pid))
account()
"""


def process(folder: Path, name: str, script: str) -> ProcessPlan:
    """A fake host or guest that runs ``script``."""
    return ProcessPlan(name, ("-S", "-c", PROLOGUE + script, str(folder), name), folder / f"{name}.json")


def make_plan(folder: Path, host: str, *guests: str) -> LabPlan:
    """A plan with short limits over fake processes."""
    return LabPlan(
        lab="orchestrate-test",
        backend="model",
        memory_bytes=16 << 20,
        duration_s=0.0,
        warm_up=(),
        host=process(folder, "host", host),
        guests=tuple(process(folder, f"guest-{index}", guest) for index, guest in enumerate(guests, start=1)),
        start_limit_s=DEADLINE_S,
        stop_limit_s=DEADLINE_S,
    )


def run(plan: LabPlan) -> RunOutcome:
    """Run over fake probes."""
    return run_lab(plan, SilentView(), make_probe=lambda name: FakeProbe([1]))


def assert_none_left(folder: Path, *, expected: int) -> None:
    """Every process that wrote its number is gone; waits for those that init collects."""
    numbers = [int(path.read_text()) for path in folder.glob("*.pid")]
    assert len(numbers) == expected
    deadline_s = time.monotonic() + DEADLINE_S
    for number in numbers:
        try:
            pidfd = os.pidfd_open(number)
        except ProcessLookupError:
            continue
        try:
            ended, _, _ = select.select([pidfd], [], [], max(0.0, deadline_s - time.monotonic()))
        finally:
            os.close(pidfd)
        assert ended, f"process {number} is left"


def test_a_good_run_collects_every_account(tmp_path: Path) -> None:
    outcome = run(make_plan(tmp_path, GOOD_HOST, GOOD_GUEST, GOOD_GUEST))
    assert [(end.name, end.exit_code) for end in outcome.processes] == [("host", 0), ("guest-1", 0), ("guest-2", 0)]
    assert [end.account for end in outcome.processes] == [{"name": end.name} for end in outcome.processes]
    assert outcome.problem is None
    assert not outcome.interrupted
    assert_none_left(tmp_path, expected=3)


def test_a_failing_guest_ends_the_run_and_its_words_surface(tmp_path: Path) -> None:
    outcome = run(make_plan(tmp_path, GOOD_HOST, FAILING_GUEST, OBEDIENT_GUEST))
    failed = outcome.guests[0]
    assert failed.exit_code == 3
    assert failed.stderr_tail == "cannot map 512 MiB: enlarge /dev/shm"
    assert failed.account is None
    assert outcome.problem == "guest-1 failed"
    assert outcome.host.account == {"name": "host"}, "the host was asked to stop, not killed"
    assert outcome.guests[1].exit_code is not None
    assert not (outcome.guests[1].exit_code > 0)
    assert_none_left(tmp_path, expected=len(list(tmp_path.glob("*.pid"))))


def test_a_host_that_ends_early_ends_the_run(tmp_path: Path) -> None:
    outcome = run(make_plan(tmp_path, "wait_for('guest-1')\nsys.exit(2)", OBEDIENT_GUEST))
    assert outcome.problem == "the host ended before its guests"
    assert outcome.host.exit_code == 2
    assert_none_left(tmp_path, expected=2)


def test_a_guest_that_hangs_and_ignores_signals_is_killed(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, GOOD_HOST, STUBBORN)
    outcome = run(replace(plan, start_limit_s=-14.0, stop_limit_s=0.3))
    assert outcome.problem is not None
    assert "guest-1 still ran" in outcome.problem
    assert outcome.guests[0].exit_code is not None
    assert outcome.guests[0].exit_code < 0
    assert_none_left(tmp_path, expected=len(list(tmp_path.glob("*.pid"))))


def test_ctrl_c_stops_everyone_in_order(tmp_path: Path) -> None:
    outcome = run(make_plan(tmp_path, GOOD_HOST, INTERRUPTING_GUEST, OBEDIENT_GUEST))
    assert outcome.interrupted
    assert outcome.problem is None
    assert [end.name for end in outcome.processes if end.account is None] == []
    assert_none_left(tmp_path, expected=3)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "handlers are given back"


def test_what_a_guest_started_goes_with_it(tmp_path: Path) -> None:
    outcome = run(make_plan(tmp_path, GOOD_HOST, FORKING_GUEST))
    assert outcome.guests[0].exit_code == 0
    assert_none_left(tmp_path, expected=3)


def test_a_broken_view_leaves_no_process(tmp_path: Path) -> None:
    class BrokenView(SilentView):
        def show(self, time_s: float, rows: object) -> None:
            raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="the terminal is gone"):
        run_lab(make_plan(tmp_path, STUBBORN, STUBBORN), BrokenView(), make_probe=lambda name: FakeProbe([1]))
    assert_none_left(tmp_path, expected=len(list(tmp_path.glob("*.pid"))))


def test_a_failed_warm_up_starts_nothing(tmp_path: Path) -> None:
    plan = replace(
        make_plan(tmp_path, GOOD_HOST, GOOD_GUEST), warm_up=("-S", "-c", "raise SystemExit('no compiler here')")
    )
    outcome = run(plan)
    assert outcome.problem is not None
    assert "no compiler here" in outcome.problem
    assert [end.exit_code for end in outcome.processes] == [None, None]
    assert_none_left(tmp_path, expected=0)


def test_it_is_patient_for_the_settling_and_the_start_on_top_of_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience_s = []
    wait = Children.wait

    def noted(self: Children, names: Iterable[str], *, deadline_s: float, **others: Any) -> bool:
        patience_s.append(deadline_s - time.monotonic())
        return wait(self, names, deadline_s=deadline_s, **others)

    monkeypatch.setattr(Children, "wait", noted)
    run(replace(make_plan(tmp_path, GOOD_HOST, GOOD_GUEST), duration_s=3.0))
    assert patience_s[0] >= 3.0 + 10.0 + DEADLINE_S, "a guest settles for 10 s at most"


def test_names_of_those_that_had_to_be_killed_are_removed(tmp_path: Path, lab_name: str) -> None:
    objects = [zone_object(lab_name, "guest-1"), ram_object(lab_name, "guest-1"), f"/fpr.{lab_name}.host"]
    queues = [control_queue(lab_name), report_queue(lab_name, "guest-1"), ack_queue(lab_name, "guest-1")]
    for name in objects:
        Path(SHM_DIR + name).touch()
    for queue in queues:
        Queue.create(queue, max_messages=1, message_bytes=64).close()
    plan = replace(make_plan(tmp_path, GOOD_HOST, STUBBORN), lab=lab_name)
    outcome = run(replace(plan, start_limit_s=-14.5, stop_limit_s=0.3))
    assert outcome.guests[0].exit_code is not None
    assert outcome.guests[0].exit_code < 0
    assert leftovers(lab_name, ["guest-1"]) == []


@pytest.mark.parametrize("kind", ["OBEDIENT_GUEST", "STUBBORN", "STOPPED", "FORKING_GUEST"])
def test_children_end_when_the_orchestrator_is_killed(kind: str, tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import sys
        from pathlib import Path
        from lab import children
        from tests.lab import test_orchestrate as fakes
        children._ORPHAN_GRACE_S = 0.3 if "{kind}" == "STUBBORN" else 600.0
        fakes.run(fakes.make_plan(Path(sys.argv[1]), fakes.OBEDIENT_GUEST, fakes.{kind} + fakes.OBEDIENT_GUEST))
        """
    )
    root = Path(__file__).resolve().parents[2]
    expected = 3 if kind == "FORKING_GUEST" else 2
    victim = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=root)
    try:
        deadline_s = time.monotonic() + DEADLINE_S
        with select_on(victim) as poller:
            while len(list(tmp_path.glob("*.pid"))) < expected:
                assert time.monotonic() < deadline_s
                assert not poller.poll(20), "the orchestrator ended by itself"
    finally:
        victim.kill()
        victim.wait()
    assert_none_left(tmp_path, expected=expected)
    if kind != "STUBBORN":
        assert (tmp_path / "guest-1.json").exists(), "it had the time to end in order"


class select_on:  # noqa: N801  reads as a verb
    """A poller that tells when ``process`` ends."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._pidfd = os.pidfd_open(process.pid)

    def __enter__(self) -> select.poll:
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return poller

    def __exit__(self, *_: object) -> None:
        os.close(self._pidfd)


def test_it_runs_outside_the_main_thread_too(tmp_path: Path) -> None:
    """Where signals cannot be taken; those of the main thread are not touched."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    plans = [make_plan(folder, GOOD_HOST, GOOD_GUEST) for folder in folders]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(run, plans))
    for outcome in outcomes:
        assert outcome.problem is None
        assert [end.exit_code for end in outcome.processes] == [0, 0]
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    for folder in folders:
        assert_none_left(folder, expected=2)


def test_guests_that_nobody_watches_are_not_looked_at(tmp_path: Path) -> None:
    plan = replace(make_plan(tmp_path, GOOD_HOST, GOOD_GUEST), watched=False)

    def no_probe(name: str) -> FakeProbe:
        raise AssertionError(name)

    outcome = run_lab(plan, SilentView(), make_probe=no_probe)
    assert (outcome.watched, outcome.observations, outcome.problem) == (False, {}, None)
    assert_none_left(tmp_path, expected=2)
