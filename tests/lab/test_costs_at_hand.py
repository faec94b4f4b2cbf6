"""Costs for virtual time: a file, this machine's, or measured when there are none; and real runs of the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import UsageError
from lab import cli
from lab.experiment.execute import load_costs
from lab.virtual.calibrate import Calibration
from lab.virtual.costs import VERSION, Costs, default_path

MEASURED = Calibration(Costs.example(), dict.fromkeys(Costs.example().as_dict(), 0.0), 9, {}, "2026-01-01")
SMALL = ["--memory", "16MiB", "--hold", "2ms", "--idle", "4ms", "--duration", "0.01", "--delay", "1ms"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Rounds of every calibration that was asked for, in a home without costs."""
    asked: list[int] = []

    def calibrate(rounds: int, _machine: dict[str, Any], **_more: Any) -> Calibration:
        asked.append(rounds)
        return MEASURED

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("lab.virtual.calibrate.calibrate", calibrate)
    monkeypatch.setattr("guest.warmup.warm_up", lambda: None)
    return asked


def test_without_costs_they_are_measured_once_and_kept(measured: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    assert load_costs("") == Costs.example().as_dict()
    assert capsys.readouterr().err == "measuring what things cost on this machine (once, some 15 s)\n"
    assert default_path().exists()
    assert load_costs("") == Costs.load().as_dict()
    assert len(measured) == 1
    assert capsys.readouterr().err == ""


def test_a_file_that_was_named_is_never_made(measured: list[int], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_costs(str(tmp_path / "none.json"))
    assert not measured


@pytest.fixture
def costs(tmp_path: Path) -> str:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"version": VERSION, "costs": Costs.example().as_dict()}))
    return str(path)


def test_the_oracle_is_compared_in_virtual_time(costs: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ["compare", "--virtual", "--policies", "boundary,oracle", "--repeat", "2", "--engine", "inline"]
    assert cli.main([*arguments, "--costs", costs, "--json", str(out), "--quiet", *SMALL]) == 0
    rows = json.loads(out.read_text())["comparison"]
    footprint = {row["policy"]: row["metrics"]["gib_min"]["median"] for row in rows}
    assert set(footprint) == {"boundary", "oracle", "off"}
    assert footprint["oracle"] < footprint["boundary"]


@pytest.mark.parametrize("flags", [["--live"], []])
def test_the_oracle_is_refused_where_processes_are_real(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *flags, "--policies", "boundary,oracle"]) == 2
    assert "exists in virtual time only" in capsys.readouterr().err


def test_the_oracle_is_swept(costs: str, tmp_path: Path) -> None:
    grid, out, found = tmp_path / "sweep.toml", tmp_path / "out", tmp_path / "found.json"
    fixed = 'memory = "16MiB"\nhold = "2ms"\nidle = "4ms"\nduration = "0.01"\ndelay = "1ms"\n'
    grid.write_text(f'[grid]\npolicy = ["boundary", "oracle"]\n[fixed]\n{fixed}')
    arguments = ["sweep", "--grid", str(grid), "--out", str(out), "--engine", "inline", "--quiet", "--costs", costs]
    assert cli.main([*arguments, "--json", str(found)]) == 0
    footprint = {
        result["spec"]["policy"]: result["metrics"]["gib_min"] for result in json.loads(found.read_text())["results"]
    }
    assert 0 < footprint["oracle"] < footprint["boundary"]
