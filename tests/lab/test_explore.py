"""The explorer finds nothing in the kernels as they are, finds every bug that is planted, and is the real reporter.

Each test starts one process with small pageblocks and plain kernels, where there is nothing to compile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import geometry, layout
from common.errors import InvariantViolation, UsageError
from common.geometry import PAGEBLOCK_ORDER_VARIABLE
from lab.cli import main
from lab.explore.bugs import BUGS
from lab.explore.state import _check_fields, packing_of
from lab.explore.trace import as_test, parse_step, replay, step_text

pytestmark = pytest.mark.timeout(300)  # plain kernels are slow where the machine is busy

ROOT = Path(__file__).resolve().parents[2]
TRACES = json.loads(Path(__file__).with_name("explore_traces.json").read_text())
SMALL = os.environ | {PAGEBLOCK_ORDER_VARIABLE: "2", "NUMBA_DISABLE_JIT": "1"}


def child(*arguments: str) -> Any:
    """What ``explore_child`` prints."""
    command = [sys.executable, "-m", "tests.lab.explore_child", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=SMALL, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@cache
def searches() -> dict[str, dict[str, Any]]:
    """By bug, the search that found it."""
    command = [sys.executable, "-m", "lab", "explore", "--bug", "all", "--json", "-"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=280)
    return {one["bug"]: one for one in json.loads(done.stdout)["explorations"]}


# ---------------------------------------------------------------- the kernels as they are


def test_no_policy_breaks_the_contract_within_two_steps_of_a_root() -> None:
    """S1-S10, S12-S15, B1-B3, B5, D1-D6, P1-P3, M1-M4, Z1-Z4: `make explore` goes as deep as five minutes allow."""
    found = child("bounded", "2")
    assert [one["policy"] for one in found] == list(_live())
    for one in found:
        assert one["breaches"] == [], one["trace"]
        assert (one["why"], one["depth"]) == ("depth", 2)
        assert one["states"] == sum(one["levels"]) > 300


def _live() -> tuple[str, ...]:
    from lab.explore.scenario import LIVE_POLICIES

    return LIVE_POLICIES


def test_every_live_policy_is_explored() -> None:
    from guest.reporting.table import POLICIES

    assert {*_live()} == {name for name, row in POLICIES.items() if not row.virtual_only} - {"off"}


def test_the_reporter_of_the_explorer_is_the_cycle() -> None:
    """The same steps through ``Zone`` and ``Cycle`` leave the same bytes, after each step, under each policy."""
    found = child("mirrored", "60")
    assert set(found) == {*_live()}, found
    taken = {name: sum(one[name] for one in found.values()) for name in found["boundary"]}
    assert all(taken[name] for name in ("begin", "pull", "answer", "keep", "put_back", "withdraw", "end", "walk"))


def test_s9_a_free_that_meets_an_isolation_leaves_no_page_on_a_per_cpu_list() -> None:
    """The moment between a free's first look and its slot lock: inside a step, so the search does not go there."""
    assert child("between") is False


# ---------------------------------------------------------------- it can fail


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    """v9's four faults, D3, S5, and one more for each promise: named by its identifier."""
    found = searches()[bug]
    assert found["why"] == "violation"
    named = {breach.partition(":")[0] for breach in found["breaches"]}
    assert named & {*BUGS[bug].breaks}, found["breaches"]


def test_the_traces_kept_pass_on_the_kernels_as_they_are() -> None:
    assert {one["bug"] for one in TRACES} == {*BUGS}
    assert child("sound") == dict.fromkeys(BUGS, "")


def test_the_traces_kept_fail_with_their_bugs() -> None:
    found = child("planted")
    for one in TRACES:
        assert any(f"{name}:" in found[one["bug"]] for name in BUGS[one["bug"]].breaks), (one["bug"], found[one["bug"]])


def test_no_shorter_trace_is_known_than_the_one_kept() -> None:
    for one in TRACES:
        assert len(one["trace"]) == len(searches()[one["bug"]]["trace"]), one["bug"]


# ---------------------------------------------------------------- traces as text


def test_a_step_is_text_and_back() -> None:
    for text in ("begin", "alloc 1 0", "free_past 12", "rotate 3 1", "walk 2"):
        assert step_text(parse_step(text)) == text


@pytest.mark.parametrize("text", ["jump", "alloc 1", "free 64", "begin 1", "free x"])
def test_what_is_no_step_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="allowed"):
        parse_step(text)


def test_what_is_found_is_written_as_a_test_that_runs(tmp_path: Path) -> None:
    """On sound kernels it passes; a trace that is not possible says so."""
    text = as_test("sample", {"policy": "boundary"}, map(parse_step, ["begin", "pull", "withdraw"]), ["S8: sample"])
    file = tmp_path / "test_sample.py"
    file.write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stdout
    with pytest.raises(InvariantViolation, match="step 0"):
        replay(policy="boundary", trace=["pull"])


# ---------------------------------------------------------------- small pageblocks, and the command


def test_the_default_geometry_is_that_of_x86() -> None:
    assert (geometry.PAGEBLOCK_ORDER, geometry.TOP_ORDER, geometry.MIN_MEMORY_BYTES) == (9, 10, 16 << 20)
    assert (layout.N_FREE_LISTS, layout.FREE_HEAD_NODES, layout.PCP_LOW_ORDERS, layout.N_PCP_LISTS) == (66, 72, 4, 14)
    assert layout.HEADER_DTYPE.itemsize % 64 == 0


def test_a_pageblock_order_that_is_not_allowed_is_refused() -> None:
    environment = os.environ | {PAGEBLOCK_ORDER_VARIABLE: "1"}
    command = [sys.executable, "-m", "lab", "explore", "--depth", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {PAGEBLOCK_ORDER_VARIABLE}: '1'; allowed is 2 to 9")


def test_a_field_that_nobody_classified_is_refused() -> None:
    """What is new in the segment is state, constant or neither; the explorer does not guess."""
    packing_of(16, 1)
    with pytest.raises(UsageError, match="header field novelty"):
        _check_fields("header", np.dtype([("magic", "<i8"), ("novelty", "<i8")]), ["magic"])


@pytest.mark.parametrize(
    "arguments", [["--policy", "oracle"], ["--pages", "7"], ["--for", "soon"], ["--bug", "none-such"], ["--depth", "0"]]
)
def test_wrong_usage_of_the_command(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["explore", *arguments]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ")
    assert "allowed" in err or "choose" in err


def test_a_result_in_json_and_for_people(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["explore", "--policy", "shared", "--plain", "--depth", "1", "--json", "-", "--quiet"]) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)["explorations"][0]
    assert (found["policy"], found["depth"], found["pageblock_order"], found["why"]) == ("shared", 1, 2, "depth")
    assert f"shared: {found['states']} states" in err


@pytest.mark.stress
@pytest.mark.timeout(3600)
def test_a_minute_of_every_policy_compiled(tmp_path: Path) -> None:
    """As `make explore`, a minute each: some hundred thousand states, every step checked."""
    path = tmp_path / "found.json"
    command = [sys.executable, "-m", "lab", "explore", "--policy", "all", "--for", "1m", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for one in json.loads(path.read_text())["explorations"]:
        assert one["breaches"] == []
        assert one["states"] > 100_000
        assert one["depth"] >= 3
