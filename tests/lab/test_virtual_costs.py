"""Files of costs: written, read, refused."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import UsageError
from lab.virtual.costs import VERSION, Costs

COSTS = Costs.example()


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_costs_survive_a_file(tmp_path: Path) -> None:
    path = written(tmp_path / "costs.json", {"version": VERSION, "costs": COSTS.as_dict(), "machine": {}})
    assert Costs.load(path) == COSTS


def test_a_missing_file_names_the_command_that_makes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="run: python -m lab calibrate"):
        Costs.load()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no JSON"),
        ("[1, 2]", "holds no costs"),
        ({"version": VERSION}, "holds no costs"),
        ({"version": VERSION + 1, "costs": COSTS.as_dict()}, "version"),
        ({"version": VERSION, "costs": {"touch_ns": 1.0}}, "missing"),
        ({"version": VERSION, "costs": {**COSTS.as_dict(), "tax_ns": 1.0}}, "tax_ns unknown"),
        ({"version": VERSION, "costs": {**COSTS.as_dict(), "touch_ns": "1"}}, "touch_ns"),
        ({"version": VERSION, "costs": {**COSTS.as_dict(), "fault_ns": -1.0}}, "fault_ns"),
    ],
)
def test_a_bad_file_is_told_with_its_path(tmp_path: Path, content: Any, said: str) -> None:
    path = written(tmp_path / "costs.json", content)
    with pytest.raises(UsageError, match=said) as caught:
        Costs.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", [field.name for field in fields(Costs)])
def test_no_cost_may_be_negative_or_no_number(name: str) -> None:
    for value in (-0.5, float("nan"), float("inf"), True):
        with pytest.raises(UsageError, match=name):
            replace(COSTS, **{name: value})


def test_a_device_holds_no_costs() -> None:
    with pytest.raises(UsageError, match=r"^/dev/zero: is no regular file; name another file, or leave --costs away$"):
        Costs.load("/dev/zero")


def test_the_advice_for_a_bad_file_is_about_that_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "fpr-lab").mkdir()
    for bad in (
        "?",
        "{}",
        {"version": 1, "costs": {}},
        {"version": VERSION, "costs": {**COSTS.as_dict(), "step_ns": 0}},
    ):
        default, named = written(tmp_path / "fpr-lab" / "costs.json", bad), written(tmp_path / "my costs.json", bad)
        with pytest.raises(UsageError, match=r"run: python -m lab calibrate --force$"):
            Costs.load(default)
        with pytest.raises(UsageError) as caught:
            Costs.load(named)
        assert str(caught.value).endswith(
            f"leave --costs away, or run: python -m lab calibrate --out '{named}' --force"
        ), caught.value
