"""Grids: what the file says is what runs, in a stable order; what is wrong is named with what is allowed."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from common.errors import UsageError
from lab.experiment import grid as module
from lab.experiment.grid import Grid, load_grid, parse_grid
from lab.experiment.spec import RunSpec

ROOT = Path(__file__).resolve().parents[2]


def grid_of(text: str, **arguments: Any) -> Grid:
    return parse_grid(tomllib.loads(text), "sweep.toml", **arguments)


def test_every_combination_once_in_the_order_of_the_specification() -> None:
    grid = grid_of("""
        [grid]
        seed = [2, 1]
        delay = ["100ms", "2s"]
        policy = ["boundary", "off"]
        [fixed]
        memory = "64MiB"
    """)
    specs = grid.specs()
    assert len(grid) == len(specs) == len({spec.key() for spec in specs}) == 8
    assert [(spec.policy, spec.delay_ns, spec.seed) for spec in specs] == [
        (policy, delay_ns, seed)
        for policy in ("boundary", "off")
        for delay_ns in (100_000_000, 2_000_000_000)
        for seed in (2, 1)
    ]
    assert {spec.memory for spec in specs} == {64 << 20}
    assert specs[0] == RunSpec(memory=64 << 20, delay_ns=100_000_000, seed=2)


def test_every_setting_of_a_run_can_be_set_with_its_unit() -> None:
    text = """
        [grid]
        seed = [7]
        [fixed]
        policy = "off"
        workload = "churn"
        memory = "1GiB"
        vcpus = 4
        cores = 3
        min-order = 4
        work_order = 0
        capacity = 64
        delay = "250ms"
        high-water-mark = 8
        fill = 0.5
        hold = "2s"
        idle = "1m"
        duration = "30s"
        work-pages = 1000000
        pcp-batch = 31
        pcp-high = 100
        shuffle = true
        merge-likely = false
        host-zeroed = true
        inhibit-discard = true
        backend = "model"
    """
    (spec,) = grid_of(text, mode="live").specs()
    expected = RunSpec(
        mode="live",
        policy="off",
        workload="churn",
        memory=1 << 30,
        vcpus=4,
        cores=3,
        min_order=4,
        work_order=0,
        capacity=64,
        delay_ns=250_000_000,
        high_water_mark=8,
        fill=0.5,
        hold_ns=2_000_000_000,
        idle_ns=60_000_000_000,
        duration_ns=30_000_000_000,
        work_pages=1_000_000,
        pcp_batch=31,
        pcp_high=100,
        shuffle=True,
        merge_likely=False,
        host_zeroed=True,
        inhibit_discard=True,
        backend="model",
        seed=7,
    )
    assert spec == expected
    defaults = RunSpec()
    assert {field.name for field in fields(RunSpec) if getattr(spec, field.name) == getattr(defaults, field.name)} == {
        "label"
    }


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", r"\[grid\] is missing or empty"),
        ("[grid]", r"\[grid\] is missing or empty"),
        ("[fixed]\nseed = 1", r"\[grid\] is missing or empty"),
        ("seed = [1]", r"seed: no table of sweep.toml; allowed are \[grid\] and \[fixed\]"),
        ("[sweep]\nseed = [1]", "sweep: no table"),
        ("[grid]\nseed = 1", r"seed in \[grid\] of sweep.toml: 1; allowed is a list"),
        ("[grid]\nseed = []", "allowed is a list of values"),
        ("[grid]\nseed = [1, 1]", "1 is given twice"),
        ('[grid]\ndelay = ["1s", "1000ms"]', "'1000ms' is given twice"),
        ("[grid]\nseed = [1]\n[fixed]\nseed = 2", r"seed in \[fixed\] of sweep.toml: is given twice"),
        ("[grid]\nmin-order = [1]\nmin_order = [2]", "is given twice"),
        ("[grid]\nseed = [1]\n[fixed]\nfill = [0.5]", r"a list goes to \[grid\]"),
        ("[grid]\nmin_ordr = [1]", "unknown key; the nearest allowed key is min_order"),
        ("[grid]\nlabel = ['a']", "unknown key; the nearest"),
        ("[grid]\nmin_order = [11]", "11; allowed is 0 to 10"),
        ('[grid]\nmemory = ["3MiB"]', "'3MiB'; allowed is a multiple of 2MiB"),
        ("[grid]\ndelay = [5]", "5; allowed is 0 to 1h with a unit"),
        ("[grid]\nshuffle = [1]", "1; allowed is true or false"),
        ("[grid]\nseed = [true]", "True; allowed is 0 to"),
        ("[grid]\nseed = [[1]]", "allowed is 0 to"),
        ("[grid]\nseed = [2020-01-01]", "allowed is 0 to"),
        ('[grid]\npolicy = ["bounds"]', "'bounds'; allowed is boundary"),
        ("[grid]\npolicy = [1]", "1; allowed is boundary"),
        ('[grid]\nworkload = ["none"]', "'none'; allowed is memhog"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(text: str, named: str) -> None:
    with pytest.raises(UsageError, match=named) as caught:
        grid_of(text)
    assert "\n" not in str(caught.value)


def test_a_policy_of_virtual_time_only_is_refused_live() -> None:
    text = '[grid]\npolicy = ["oracle"]'
    assert grid_of(text).specs()[0].policy == "oracle"
    with pytest.raises(UsageError, match="virtual time only; leave --live away"):
        grid_of(text, mode="live")


def test_the_number_of_runs_is_bounded() -> None:
    text = f"[grid]\nseed = {list(range(1000))}\ncapacity = {list(range(1, 101))}\n"
    assert len(grid_of(text)) == module.MOST_RUNS
    with pytest.raises(UsageError, match=r"comes to 200,000 runs; allowed are 100,000"):
        grid_of(text + "min_order = [0, 9]")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "cannot be read"),
        (b"[grid", "is not TOML"),
        (b"\xff\xfe", "is not TOML"),
        (b"[grid]\nseed = " + b"[" * 100_000, "nested too deeply|is not TOML"),
    ],
)
def test_a_file_that_is_no_grid_is_one_clear_line(tmp_path: Path, content: bytes | None, named: str) -> None:
    path = tmp_path / "sweep.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=named):
        load_grid(str(path))


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_the_examples_are_grids_of_the_size_they_say(path: Path) -> None:
    grid = load_grid(str(path))
    assert len(grid.specs()) == len(grid)
    assert f"{len(grid)} runs" in path.read_text()


def test_a_device_is_no_grid() -> None:
    with pytest.raises(UsageError, match=r"^--grid: '/dev/zero'; cannot be read: is no regular file; name a TOML file"):
        load_grid("/dev/zero")


@pytest.mark.parametrize(
    "text",
    [
        "[grid]\nseed = [0x{0}]",
        "[grid]\npolicy = [0x{0}]",
        "[grid]\nseed = 0x{0}",
        "[grid]\nseed = [[0x{0}]]",
        "[grid]\nseed = [1]\n[fixed]\nvcpus = 0x{0}",
        "[grid]\nseed = [1]\n[fixed]\nvcpus = [0x{0}]",
    ],
)
def test_a_number_too_long_to_write_out_is_refused_by_its_length(text: str) -> None:
    with pytest.raises(UsageError, match="a number of 80000 bits"):
        grid_of(text.format("f" * 20_000))


def test_the_number_of_runs_is_bounded_before_any_value_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_arguments: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(module, "_value", never)
    with pytest.raises(UsageError, match="comes to 300,000 runs; allowed are 100,000"):
        parse_grid({"grid": {"seed": list(range(300_000))}}, "sweep.toml")
