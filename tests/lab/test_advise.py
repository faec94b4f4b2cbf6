"""``python -m lab advise``: what it chooses, from figures that can be worked out by hand, and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import UsageError
from common.geometry import Migratetype
from lab.advise.choose import Want, choose, front, knee, sensitivity, without_rebuild
from lab.advise.grid import DEFAULT, OFF, Setting, grid
from lab.advise.measure import Drop, Row, large_frees, worst_after
from lab.advise.steps import how_to_set
from lab.advise.wants import Target, parse_budget, parse_target
from lab.cli import main
from lab.replay.kernels import OP_GIVE, OP_TAKE, OP_TOUCH
from lab.replay.plan import Plan
from tests.lab.test_replay import HEAD

MIB = 1 << 20
MACHINE = ("--memory", "16MiB", "--min-free-kbytes", "32", "--engine", "inline")
GRID = ("--policies", "rotate", "--delays", "1s,2s", "--capacities", "2")


def row(setting: Setting, gib_min: float, host_s: float, refault_s: float = 0.0, **others: Any) -> Row:
    figures = {"refaults": 0, "passes": 5, "reports": 5, "reported_bytes": MIB, "end_bytes": MIB, **others}
    return Row(setting, gib_min, host_cpu_s=host_s, refault_s=refault_s, **figures)


ORDER_0 = Setting("rotate", 0, 2 * 10**9, 32)
ORDER_4 = Setting("rotate", 4, 2 * 10**9, 32)
QUICK = Setting("rotate", 9, 10**8, 32)
# From (10, 0) to (2, 8) straight: order 4 at (4, 1) is 5 beyond it, the default at (8, 0.5) 1.5, quick is behind it.
ROWS = [row(OFF, 10, 0), row(DEFAULT, 8, 0.5), row(ORDER_4, 4, 1), row(ORDER_0, 2, 6, 2), row(QUICK, 9, 4)]


def recorded(folder: Path) -> list[str]:
    """A trace and its snapshot, of 16 MiB of which the upper half is free and reported.

    At 10 s every other page of the lowest 4 MiB is freed and all of the next 4 MiB; one page in use is
    handed out at 9 s, another at 30 s. So order 9 can give back 4 MiB in one block, order 0 those and 512 single pages.
    """
    pages = [*range(0, 1024, 2), *range(1024, 2048)]
    lines = ["9.000000000 [0] 7 mm_page_alloc: pfn=0x1 order=0 migratetype=1 gfp=0x0\n"]
    for at, pfn in enumerate(pages):
        lines += [
            f"10.{2000 * at:09d} [0] 7 mm_page_free: pfn={pfn:#x} order=0\n",
            f"10.{2000 * at + 1000:09d} [0] 7 mm_page_pcpu_drain: pfn={pfn:#x} order=0 migratetype=1\n",
        ]
    lines.append("30.000000000 [0] 7 mm_page_alloc: pfn=0x3 order=0 migratetype=1 gfp=0x0\n")
    trace, start = folder / "trace.txt", folder / "start.csv"
    trace.write_text("".join(lines))
    start.write_text(f"{HEAD}2048,10,1,0\n3072,10,1,0\n")
    return [str(trace), "--start", str(start), *MACHINE]


@pytest.mark.parametrize(
    ("text", "share"), [("2% cpu", 0.02), ("0.5%", 0.005), ("100 % CPU", 1.0), ("3 % of a cpu", 0.03)]
)
def test_budgets(text: str, share: float) -> None:
    assert parse_budget(text) == share


@pytest.mark.parametrize("text", ["", "2", "2 cpu", "0% cpu", "101%", "-1%", "2% memory", "nan%"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(UsageError, match="such as '2% cpu'"):
        parse_budget(text)


def test_targets() -> None:
    assert parse_target("1.5GiB in 2s") == Target(3 << 29, 2 * 10**9)
    assert parse_target(" 512 MiB  in 250ms ") == Target(512 * MIB, 250 * 10**6)
    assert str(parse_target("1.5GiB in 2s")) == "1.5GiB in 2 s"


@pytest.mark.parametrize("text", ["", "1GiB", "1GiB in", "in 2s", "1GiB in 2", "1GB in 2s", "0 in 2s", "1GiB in 0s"])
def test_what_is_no_target(text: str) -> None:
    with pytest.raises(UsageError, match=r"1\.5GiB in 2s"):
        parse_target(text)


def test_the_grid_holds_the_default_and_no_reporting_once() -> None:
    cells = grid(("rotate",), (0, 9), (2 * 10**9,), (32,))
    assert cells == [OFF, DEFAULT, ORDER_0]


def test_the_knee_is_chosen() -> None:
    assert [one.setting for one in front(ROWS)] == [ORDER_0, ORDER_4, DEFAULT, OFF]
    found = knee(ROWS)
    assert found is not None
    assert found.setting == ORDER_4
    assert choose(ROWS, Want(100.0)).row.setting == ORDER_4


def test_without_a_knee_it_costs_no_more_than_the_default() -> None:
    rows = [row(OFF, 10, 0), row(DEFAULT, 9, 5), row(QUICK, 8, 5)]
    assert knee(rows) is None
    assert choose(rows, Want(100.0)).row.setting == QUICK


def test_where_the_default_reports_nothing_something_is_chosen() -> None:
    """What the gate of a small guest does: at order 9 nothing is reported, and that costs nothing."""
    rows = [row(OFF, 10, 0), row(DEFAULT, 10, 0, reports=0), row(ORDER_4, 7, 1), row(ORDER_0, 4, 2)]
    assert knee(rows) is None
    found = choose(rows, Want(100.0))
    assert (found.row.setting, found.met) == (ORDER_4, True)
    assert "the default reports nothing here" in found.why


def test_where_nothing_reports_that_is_said() -> None:
    high = held((9, 90), (22, 90))
    rows = [row(OFF, 10, 0), *(row(one, 10, 0, reports=0, resident=high) for one in (DEFAULT, ORDER_0))]
    found = choose(rows, Want(100.0))
    assert (found.row.setting, found.met) == (DEFAULT, False)
    assert "no setting gives anything back" in found.why
    missed = choose(rows, Want(100.0, None, parse_target("1MiB in 2s"), (Drop(10 * 10**9, 50 * MIB, 0),)))
    assert not missed.met
    assert "this reports nothing" in missed.why


def test_of_equals_the_nearest_to_the_default() -> None:
    """Policy weighs more than code, code more than the order, which is a parameter."""
    code, policy = Setting("rotate", 4, 10**9, 32), Setting("boundary", 4, 2 * 10**9, 32)
    rows = [row(one, 4, 1) for one in (policy, code, ORDER_4)]
    assert [one.setting for one in front([*rows, row(OFF, 9, 0)])] == [ORDER_4, OFF]
    assert choose([row(DEFAULT, 5, 9), *rows], Want(100.0, budget=0.02)).row.setting == ORDER_4


def test_a_setting_that_reports_nothing_is_told_as_no_reporting() -> None:
    assert [one.setting for one in front([row(DEFAULT, 10, 0), row(OFF, 10, 0)])] == [OFF]


@pytest.mark.parametrize(
    ("budget", "setting", "met"),
    [
        (0.1, ORDER_0, True),
        (0.08, ORDER_0, True),
        (0.079, ORDER_4, True),
        (0.005, DEFAULT, True),
        (0.004, DEFAULT, False),
    ],
)
def test_a_budget_takes_the_smallest_footprint_within_it(budget: float, setting: Setting, met: bool) -> None:
    """Of 100 s, order 0 costs 6 + 2 s, which is 8 %; order 4 1 %; the default 0.5 %."""
    found = choose(ROWS, Want(100.0, budget=budget))
    assert (found.row.setting, found.met) == (setting, met)


def held(*pairs: tuple[float, int]) -> list[list[float]]:
    return [[t_s, mib * MIB] for t_s, mib in pairs]


def test_a_target_takes_the_cheapest_that_falls_in_time() -> None:
    """Frees at 10 s and 20 s: the cheap one comes down late after the second, the dear one in time after both."""
    late = row(DEFAULT, 8, 0.5, resident=held((9, 90), (11, 30), (20, 90), (22, 60), (23, 30)))
    quick = row(QUICK, 7, 1.0, resident=held((9, 90), (11, 30), (20, 90), (22, 40), (23, 30)))
    dear = row(ORDER_0, 6, 9.0, resident=held((9, 90), (11, 20), (20, 90), (22, 20), (23, 20)))
    drops = [Drop(10 * 10**9, 50 * MIB, 0), Drop(20 * 10**9, 50 * MIB, 0)]
    rows = [row(OFF, 10, 0), late, quick, dear]

    def chosen(text: str, budget: float | None = None) -> tuple[Setting, bool]:
        found = choose(rows, Want(100.0, budget, parse_target(text), tuple(drops)))
        return found.row.setting, found.met

    assert worst_after(late, drops, parse_target("1MiB in 2s")) == 60 * MIB
    assert chosen("60MiB in 2s") == (DEFAULT, True)
    assert chosen("50MiB in 2s") == (QUICK, True)
    assert chosen("50MiB in 3s") == (DEFAULT, True)
    assert chosen("20MiB in 2s") == (ORDER_0, True)
    assert chosen("10MiB in 2s") == (ORDER_0, False)
    assert chosen("50MiB in 2s", budget=0.006) == (DEFAULT, False)


def test_sensitivity_follows_the_prices() -> None:
    """Order 0 costs 6 s of the host and 2 of refaults in 100: within 8 % unless a price is doubled."""
    found = sensitivity(ROWS, Want(100.0, budget=0.08))
    assert {name: choice.row.setting for name, choice in found} == {
        "a refault costs double": ORDER_4,
        "a refault costs half": ORDER_0,
        "the host's work costs double": ORDER_4,
        "the host's work costs half": ORDER_0,
    }


def test_without_a_rebuild_only_the_order_differs() -> None:
    """By the budget the quick one has the smallest footprint, but its delay is code."""
    rows = [*ROWS, row(QUICK, 1, 0.1), row(Setting("boundary", 9, 2 * 10**9, 32), 1, 0.2)]
    want = Want(100.0, budget=0.01)
    assert choose(rows, want).row.setting == QUICK
    assert without_rebuild(rows, want).row.setting == ORDER_4


def test_large_frees_are_the_largest_falls_of_memory_in_use() -> None:
    """1024 pages fall in 0.2 s, 600 at once, 100 at once: the last is less than half of the largest."""
    moves = [(1.0, OP_TAKE, 10), (5.0, OP_GIVE, 9), (5.2, OP_GIVE, 9), (6.0, OP_TOUCH, 9)]
    moves += [(20.0, OP_GIVE, 9), (20.0, OP_GIVE, 6), (30.0, OP_GIVE, 5)]
    columns = [np.array([move[at] for move in moves]) for at in range(3)]
    count = len(moves)
    plan = Plan(
        np.rint(columns[0] * 1e9).astype(np.int64),
        columns[1].astype(np.int8),
        np.zeros(count, np.int64),
        columns[2].astype(np.int8),
        np.full(count, int(Migratetype.MOVABLE), np.int8),
        [],
        0,
        0,
    )
    found = large_frees(plan, 0, 40 * 10**9, 3000 * 4096)
    assert found == [
        Drop(5_200_000_000, 1024 * 4096, 3000 * 4096),
        Drop(20_000_000_000, 576 * 4096, 2424 * 4096),
    ]


def test_the_words_say_where_to_set_it_and_what_it_does() -> None:
    text = " ".join(how_to_set(Setting("rotate", 4, 10**8, 512), row(ORDER_4, 4, 1, split_huge_pages=7)))
    for words in (
        "`page_reporting.page_reporting_order=4`",
        "kernel command line",
        "Linux 6.1 overwrites the former",
        "echo 4 > /sys/module/page_reporting/parameters/page_reporting_order",
        "compile-time constants",
        "PAGE_REPORTING_DELAY from 2 * HZ to msecs_to_jiffies(100)",
        "PAGE_REPORTING_CAPACITY from 32 to 512",
        "7 of them",
    ):
        assert words in text
    text = " ".join(how_to_set(DEFAULT, row(DEFAULT, 8, 1)))
    assert text.count("nothing to do") == 2
    assert "huge pages stay whole" in text
    text = " ".join(how_to_set(Setting("boundary", 9, 10**8, 16), row(DEFAULT, 8, 1)))
    assert "`boundary` is not in mainline" in text
    assert "page_reporting_order" not in text


def test_a_recording_gives_the_figures_worked_out_by_hand(tmp_path: Path) -> None:
    """Order 9: one report of one block of 1024 pages. Order 0: 513 blocks, 1536 pages, parts of two huge pages."""
    out = tmp_path / "out"
    code = main(["advise", *recorded(tmp_path), *GRID, "--orders", "0,9", "--out", str(out), "--quiet"])
    assert code == 0
    found = json.loads((out / "data.json").read_text())
    by_setting = {(one["policy"], one["min_order"], one["delay_ns"], one["capacity"]): one for one in found["rows"]}
    assert len(by_setting) == len(found["rows"]) == 6
    whole, parts = by_setting["rotate", 9, 10**9, 2], by_setting["rotate", 0, 10**9, 2]
    assert (whole["reports"], whole["reported_bytes"], whole["split_huge_pages"]) == (1, 4 * MIB, 0)
    assert whole["host_cpu_s"] == pytest.approx((50 + 11 + 1024 * 0.82) / 1e6)
    assert whole["end_bytes"] == 4 * MIB
    assert (parts["reported_bytes"], parts["split_huge_pages"]) == (6 * MIB, 2)
    assert parts["host_cpu_s"] == pytest.approx((50 * parts["reports"] + 513 * 11 + 1536 * 0.82) / 1e6)
    assert parts["end_bytes"] == 2 * MIB
    # The gate: 32 << 9 pages are more than the machine has.
    assert found["default"]["reports"] == 0
    assert found["default"]["gib_min"] == found["off"]["gib_min"] == pytest.approx(8 / 1024 * 21 / 60, rel=0.01)
    assert whole["gib_min"] == pytest.approx((8 * 2 + 4 * 19) / 1024 / 60, rel=0.02)
    assert found["used_end_bytes"] == 2 * MIB
    assert found["large_frees"] == [{"t_s": 10.1, "bytes": 6 * MIB, "used_bytes": 2 * MIB}]


def test_the_answer_of_a_recording_by_target_and_by_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4 MiB in 2 s after the free at 10 s: order 9 at 1 s does it and is cheaper than order 0, 2 s is too late."""
    given, answer = recorded(tmp_path), tmp_path / "answer.json"
    flags = ("--orders", "0,9", "--json", str(answer), "--force")
    assert main(["advise", *given, *GRID, *flags, "--target", "4MiB in 1500ms"]) == 0
    found = json.loads(answer.read_text())["chosen"]
    assert (found["min_order"], found["delay_ns"], found["met"]) == (9, 10**9, True)
    text = capsys.readouterr().out
    assert "**rotate, order 9, 1 s, 2**" in text
    assert "PAGE_REPORTING_DELAY from 2 * HZ to 1 * HZ" in text
    assert "reported nothing, the default among them" in text
    assert "With the kernel as it is, by the parameter alone" in text
    assert text.count("/sys/module/page_reporting/parameters/page_reporting_order") == 2, "for that order as well"
    assert "too few to tell a habit" in text
    assert main(["advise", *given, *GRID, *flags, "--target", "1MiB in 15s"]) == 0
    assert not json.loads(answer.read_text())["chosen"]["met"]
    assert "no setting can go below that" in capsys.readouterr().out
    # 21 s: 0.005 % are 1.05 ms, which one report of 0.9 ms is within and 6.9 ms and more are not.
    assert main(["advise", *given, *GRID, *flags, "--budget", "0.005% cpu"]) == 0
    found = json.loads(answer.read_text())["chosen"]
    assert (found["min_order"], found["delay_ns"]) == (9, 10**9)


def test_nothing_is_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["advise", *recorded(tmp_path), *GRID, "--orders", "9", "--out", str(out), "--quiet"]
    assert main(command) == 0
    drawn = [f"{name}.{kind}" for name in ("memory", "picture") for kind in ("png", "svg")]
    assert sorted(path.name for path in out.iterdir()) == ["answer.md", "data.json", "index.html", *drawn]
    for name in ("memory", "picture"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({name}.png)" in (out / "answer.md").read_text()
    assert "## How sure this is" in (out / "answer.md").read_text()
    before = (out / "data.json").read_bytes()
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    assert (out / "data.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--budget", "2"), "--budget"),
        (("--target", "soon"), "--target"),
        (("--target", "1MiB in 1h"), "no large free"),
        (("--orders", "0,11"), "--orders"),
        (("--orders", "0,0"), "--orders"),
        (("--delays", "2"), "--delays"),
        (("--capacities", "0"), "--capacities"),
        (("--policies", "hint"), "--policies"),
        (("--engine", "threads"), "--engine"),
        (("--start", "none.csv"), "none.csv"),
        (("--out", "{folder}/no/out"), "there is no folder"),
        (("--out", "{folder}/trace.txt"), "not a folder"),
    ],
)
def test_bad_input_is_one_line(
    flags: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = recorded(tmp_path)
    before = sorted(tmp_path.iterdir())
    filled = [flag.format(folder=tmp_path) for flag in flags]
    assert main(["advise", *given, "--json", str(tmp_path / "answer.json"), *filled]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
