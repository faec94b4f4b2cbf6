"""Sweeps: every run exactly once, however often the sweep was stopped, killed or tried twice at a time."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from common.cli import CommandParser, run_command
from common.errors import InvariantViolation, LabError, UsageError
from lab.commands import sweep as command
from lab.experiment.directory import RunDirectory
from lab.experiment.execute import execute
from lab.experiment.grid import load_grid
from lab.experiment.metrics import RunResult
from lab.experiment.spec import RunSpec
from lab.experiment.sweep import PICTURE, run_sweep
from tests.lab.work import GATE, gated_run, is_gone, make_result, stand_in_run, violating_run
from tests.support import wait_until

ROOT = Path(__file__).resolve().parents[2]
COSTS = {"fault_ns": 500.0}
GRID = '[grid]\nseed = [1, 2, 3, 4, 5, 6]\ndelay = ["100ms", "2s"]\n[fixed]\nmemory = "64MiB"\n'


@dataclass(frozen=True)
class Place:
    """A grid file and a folder for its results."""

    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "results"

    def flags(self, *more: str) -> list[str]:
        return ["--grid", str(self.folder / "sweep.toml"), "--out", str(self.out), *more]

    def read(self, *more: str) -> command.SweepSettings:
        return command.read(parsed(self.flags(*more)))

    def sweep(self, *more: str, function: Callable[..., Any] = stand_in_run, costs: Any = COSTS) -> int:
        return run_sweep(self.read("--engine", "inline", *more), costs=costs, function=function)

    def kept(self) -> list[RunResult]:
        return [item.result for item in RunDirectory.read(str(self.out)).results()]

    def assert_complete(self) -> None:
        """Each run of the grid is there exactly once, with the result that it has when nothing is interrupted."""
        kept = {result.spec.key(): result.as_dict() for result in self.kept()}
        specs = load_grid(str(self.folder / "sweep.toml")).specs()
        assert len(self.kept()) == len(specs)
        series = {item.result.spec.key() for item in RunDirectory.read(str(self.out)).results(series=True)}
        assert series == {spec.key() for spec in specs}
        for spec in specs:
            expected = {**make_result(spec).as_dict(), "series": kept[spec.key()]["series"]}
            assert kept[spec.key()] == expected


def parsed(flags: list[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m lab sweep", description=None)
    command.add_arguments(parser)
    return parser.parse_args(flags)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "sweep.toml").write_text(GRID)
    return Place(tmp_path)


def test_a_sweep_keeps_every_run_and_tells_the_front(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.sweep("--json", str(place.folder / "all.json")) == 0
    place.assert_complete()
    out, err = capsys.readouterr()
    assert "memhog, virtual: " in out
    assert "settings are not beaten" in out
    assert "12 of 12" in err
    assert f"12 runs in {place.out}" in err
    assert (place.out / PICTURE).read_bytes().startswith(b"\x89PNG")
    document = json.loads((place.folder / "all.json").read_text())
    assert document["settings"] == load_grid(str(place.folder / "sweep.toml")).as_dict()
    assert [result["key"] for result in document["results"]] == [
        spec.key() for spec in load_grid(str(place.folder / "sweep.toml")).specs()
    ]
    assert document["fronts"][0]["configurations"] == 2
    assert document["fronts"][0]["best"]


def test_json_on_standard_output_is_alone_there(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.sweep("--json", "-", "--quiet") == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["results"]) == 12
    assert "not beaten" in err


def test_a_second_time_runs_nothing_and_says_so(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.sweep()

    def never(_payload: dict[str, Any]) -> dict[str, Any]:
        raise AssertionError

    before = (place.out / "results.jsonl").read_bytes()
    assert place.sweep(function=never) == 0
    assert (place.out / "results.jsonl").read_bytes() == before
    assert "12 of 12 runs are there" in capsys.readouterr().err


def test_an_interrupt_keeps_what_is_done_and_the_rest_follows(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    count = 0

    def interrupted(payload: dict[str, Any]) -> dict[str, Any]:
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        return stand_in_run(payload)

    assert run_command(lambda: place.sweep(function=interrupted)) == 130
    assert len(place.kept()) == 4
    assert "4 of 12 runs are kept; the same command goes on" in capsys.readouterr().err
    assert place.sweep() == 0
    place.assert_complete()
    assert count == 5


def test_a_run_that_fails_is_named_and_the_others_are_kept(place: Place) -> None:
    def failing_at(payload: dict[str, Any]) -> dict[str, Any]:
        if payload["spec"]["seed"] == 2:
            raise LabError("a job that cannot end")
        return stand_in_run(payload)

    with pytest.raises(LabError, match=r"run [0-9a-f]{16} \(memhog, boundary, .*seed=2\): a job that cannot end"):
        place.sweep(function=failing_at)
    assert {result.spec.seed for result in place.kept()} == {1}
    assert place.sweep() == 0
    place.assert_complete()


def test_violations_end_with_4_once_everything_is_written(place: Place) -> None:
    with pytest.raises(InvariantViolation, match=r"violations in run .* and 9 more"):
        place.sweep(function=violating_run)
    assert len(place.kept()) == 12
    assert (place.out / PICTURE).exists()


def test_another_grid_or_other_costs_need_force(place: Place) -> None:
    place.sweep()
    with pytest.raises(UsageError, match="other costs"):
        place.sweep(costs={"fault_ns": 1.0})
    (place.folder / "sweep.toml").write_text(GRID.replace("5, 6", "5"))
    with pytest.raises(UsageError, match=r"seed: .* there, .* here"):
        place.sweep()
    assert len(place.kept()) == 12
    assert place.sweep("--force") == 0
    place.assert_complete()


# Killed

# As `python -m lab` begins: an interrupt that a destructor swallows comes again.
PROGRAM = """
import sys
from common.cli import run_command
from common.interrupts import run_program
from lab.commands import sweep as command
from lab.experiment.sweep import run_sweep
from tests.lab.test_sweep import COSTS, parsed
from tests.lab.work import gated_run
settings = command.read(parsed(sys.argv[1:]))
run_program(lambda: run_command(lambda: run_sweep(settings, costs=COSTS, function=gated_run)))
"""


@contextmanager
def started(place: Place, *more: str) -> Iterator[subprocess.Popen[str]]:
    """The sweep as a process of its own; runs with a seed above 3 wait while the gate is there."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *place.flags(*more)],
        cwd=ROOT,
        env={**os.environ, GATE: str(place.folder / "gate")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGTERM, marks=pytest.mark.stress),
        pytest.param(signal.SIGINT, marks=pytest.mark.stress),
    ],
)
def test_a_killed_sweep_goes_on_and_does_each_run_once(place: Place, number: signal.Signals) -> None:
    gate = place.folder / "gate"
    gate.mkdir()
    results = place.out / "results.jsonl"
    with started(place, "--engine", "processes:2") as process:
        wait_until(
            lambda: results.exists() and results.read_bytes().count(b"\n") == 3 and len(os.listdir(gate)) == 2,
            60,
            what="the runs that do not wait",
        )
        with started(place, "--engine", "inline") as second:
            _, said = second.communicate(timeout=60)
        assert (second.returncode, "another process is writing to it" in said) == (2, True)
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in said
    workers = [int(name) for name in os.listdir(gate)]
    wait_until(lambda: all(is_gone(pid) for pid in workers), what="the end of the workers")
    assert {result.spec.seed for result in place.kept()} == {1, 2, 3}
    for name in os.listdir(gate):
        (gate / name).unlink()
    gate.rmdir()
    with started(place, "--engine", "processes:2") as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "3 of 12 runs are there" in said
    place.assert_complete()


# Live runs


def test_live_runs_go_one_at_a_time(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GATE, str(place.folder / "no-gate"))
    at_work = 0

    def counted(payload: dict[str, Any]) -> dict[str, Any]:
        nonlocal at_work
        assert payload["spec"]["mode"] == "live"
        assert payload["costs"] is None
        at_work += 1
        assert at_work == 1
        answer = gated_run(payload)
        at_work -= 1
        return answer

    settings = place.read("--live")
    assert settings.address == "inline"
    assert run_sweep(settings, costs=None, function=counted) == 0
    assert len(place.kept()) == 12


# The command


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--out", "x"], "--grid: missing"),
        (["--grid", "x"], "--out: missing"),
        (["--grid", "x", "--out", "y", "--live", "--engine", "dask://h:1"], "--live: runs take place one at a time"),
        (["--grid", "x", "--out", "y", "--live", "--costs", "c"], "--costs: real processes"),
        (["--grid", "x", "--out", "y", "--json", "/"], "is not a file"),
    ],
)
def test_wrong_flags_are_named(flags: list[str], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        command.read(parsed(flags))


@pytest.mark.parametrize("wrong", ["engine", "grid"])
def test_nothing_is_made_when_something_is_wrong(place: Place, wrong: str) -> None:
    settings = place.read("--engine", "cloud" if wrong == "engine" else "inline")
    if wrong == "grid":
        (place.folder / "sweep.toml").write_text("[grid]\nseed = [-1]")
    with pytest.raises(UsageError, match="allowed is"):
        run_sweep(settings, costs=COSTS, function=stand_in_run)
    assert not place.out.exists()


def test_the_command_records_its_line_and_runs_in_virtual_time(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lab.experiment.execute.execute", stand_in_run)
    monkeypatch.setattr("lab.experiment.execute.load_costs", lambda path: {"path": path})
    namespace = parsed(place.flags("--engine", "inline", "--costs", "here.json"))
    namespace.command_line = ["python", "-m", "lab", "sweep"]
    assert command.run(namespace) == 0
    directory = RunDirectory.read(str(place.out))
    assert directory.record["command"] == ["python", "-m", "lab", "sweep"]
    assert directory.costs == {"path": "here.json"}
    place.assert_complete()
    assert "not beaten" in capsys.readouterr().out


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys, argparse\n"
        "from lab.commands import sweep\n"
        "sweep.add_arguments(argparse.ArgumentParser())\n"
        "heavy = {'numpy', 'numba', 'rich', 'matplotlib', 'scipy', 'distributed'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# One run


def test_execute_goes_by_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    live, virtual, costs = (types.ModuleType(name) for name in ("run", "run", "costs"))
    live.run_live = lambda spec: make_result(spec, gib_min=1.0)  # type: ignore[attr-defined]
    virtual.run_virtual = lambda spec, given: make_result(spec, gib_min=given)  # type: ignore[attr-defined]
    costs.Costs = types.SimpleNamespace(from_dict=lambda values: values["fault_ns"])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lab.live.run", live)
    monkeypatch.setitem(sys.modules, "lab.virtual.run", virtual)
    monkeypatch.setitem(sys.modules, "lab.virtual.costs", costs)
    spec = RunSpec(mode="live")
    assert execute({"spec": spec.as_dict(), "costs": None}) == make_result(spec, gib_min=1.0).as_dict()
    assert execute({"spec": RunSpec().as_dict(), "costs": COSTS})["metrics"]["gib_min"] == 500.0
    with pytest.raises(UsageError, match="python -m lab calibrate"):
        execute({"spec": RunSpec().as_dict(), "costs": None})


@pytest.mark.parametrize("name", ["run.json", "costs.json", "results.jsonl", "pareto.png", "series/new.csv", "alias"])
def test_json_cannot_replace_what_the_sweep_keeps(place: Place, name: str) -> None:
    place.sweep()
    (place.out / "alias").symlink_to("results.jsonl")
    before = {path: path.read_bytes() for path in place.out.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"^--json: .* belongs to what --out keeps in .*; name another path"):
        place.sweep("--force", "--json", str(place.out / name))
    assert {path: path.read_bytes() for path in place.out.rglob("*") if path.is_file()} == before
    assert place.sweep("--force", "--json", str(place.out / "all.json")) == 0


def test_json_cannot_replace_the_grid(place: Place) -> None:
    with pytest.raises(UsageError, match=r"--json: .* is the file of --grid too"):
        place.sweep("--force", "--json", str(place.folder / "sweep.toml"))
    assert (place.folder / "sweep.toml").read_text() == GRID
