"""The five shows: their plans, what they say of results whose answer is known, and one that is really run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from common.errors import UsageError
from lab.cli import main
from lab.commands.show import SHOWS
from lab.experiment.metrics import METRICS, SERIES, RunResult
from lab.experiment.spec import RunSpec
from lab.shows import published_sweep, reclaim_delay
from lab.shows.base import Context, Presentation, summary, value_text
from lab.shows.run import DATA, PICTURE, TABLE, load_show, run_show


def result_of(spec: RunSpec, **metrics: float | None) -> RunResult:
    return RunResult(
        spec=spec,
        metrics={name: metrics.get(name, 0.0) for name in METRICS},
        series={name: np.zeros(1) for name in SERIES},
        facts={"lock_hold_ns": {"waiting": {"max": 1_000_000}} if spec.policy == "walk-locked" else {}},
    )


class Stand:
    """Runs nothing: ``make`` says what a specification's result is."""

    def __init__(self, make: object) -> None:
        self.specs: list[RunSpec] = []
        self._make = make

    def run(self, specs: Sequence[RunSpec]) -> list[RunResult]:
        self.specs += specs
        return [self._make(spec) for spec in specs]  # type: ignore[operator]


def answer_of(name: str, make: object, rounds: int = 2) -> tuple[Presentation, list[RunSpec]]:
    stand = Stand(make)
    answer = load_show(*SHOWS[name]).answer(Context(stand.run, lambda _text: None, rounds))
    return answer, stand.specs


@pytest.mark.parametrize("name", ["cover-letters", "under-lock", "published-sweep", "reclaim-delay"])
def test_every_run_of_a_plan_is_another_and_of_the_mode_that_the_show_says(name: str) -> None:
    answer, specs = answer_of(
        name,
        lambda spec: result_of(
            spec, page_ops_per_s=1e6, job_s=1.0, gib_min=2.0, t90_s=1.0, t99_s=1.0, hold_max_ns=2e6, alloc_p999_ns=1e3
        ),
    )
    keys = [spec.key() for spec in specs]
    assert len(set(keys)) == len(keys)
    assert {spec.mode for spec in specs} == {"live" if load_show(*SHOWS[name]).live else "virtual"}
    assert {spec.seed for spec in specs} == {1, 2}
    assert answer.finding
    assert answer.tables
    assert json.dumps(answer.data, allow_nan=True)


def test_the_cover_letters_compare_with_off_in_the_same_round() -> None:
    """Round 2 is twice as fast for everybody: the ratios must not see it."""

    def make(spec: RunSpec) -> RunResult:
        share = 1.0 if spec.policy == "off" else 0.5 if spec.shuffle else 0.8
        return result_of(spec, page_ops_per_s=1e6 * spec.seed * share)

    answer, _ = answer_of("cover-letters", make)
    rows = {row[0]: row[1:] for row in answer.tables[0].rows}
    assert set(rows["off"]) == {"1.000 ± 0.000"}
    assert set(rows["boundary: on"]) == {"0.800 ± 0.000"}
    assert set(rows["rotate: on + shuffle"]) == {"0.500 ± 0.000"}
    letters = {row[0]: row[1:] for row in answer.tables[1].rows}
    assert letters["v12: on"] == ("1.009", "0.979", "0.935", "1.011")
    assert letters["v14: on + shuffle"][2] == "0.919"


def test_the_walk_under_the_lock_is_told_from_its_wait_for_the_host() -> None:
    def make(spec: RunSpec) -> RunResult:
        walked = spec.policy == "walk-locked"
        return result_of(spec, hold_max_ns=3e6 if walked else 5e3, alloc_p999_ns=2e6 if walked else 1e3)

    answer, _ = answer_of("under-lock", make)
    cells = {(row[0], row[1]): row[2:] for row in answer.tables[0].rows}
    assert cells["walk-locked", "16 GiB"][:2] == ("3.000 ± 0.000", "2.000 ± 0.000")
    assert cells["boundary", "16 GiB"][:2] == ("0.005 ± 0.000", "0.005 ± 0.000")
    assert answer.finding[0].startswith("At 1 GiB the longest hold is 3.0 ms under walk-locked")


@pytest.mark.parametrize(
    ("slow_zero", "fast_zero", "holds"),
    [((1.2, 0.8), (1.5, 0.9), ("yes", "yes", "yes")), ((1.2, 0.8), (1.1, 0.7), ("yes", "yes", "no"))],
)
def test_the_ordering_of_the_published_sweep_is_judged_claim_by_claim(
    slow_zero: tuple[float, float], fast_zero: tuple[float, float], holds: tuple[str, ...]
) -> None:
    def make(spec: RunSpec) -> RunResult:
        if spec.policy == "off":
            job, foot = 1.0, 1.0
        elif spec.min_order == 9:
            job, foot = 1.0, 0.95
        else:
            job, foot = slow_zero if spec.delay_ns == 2_000_000_000 else fast_zero
        return result_of(spec, job_s=40 * job, gib_min=400 * foot, host_cpu_s=1.0, refaults=1e6)

    answer, _ = answer_of("published-sweep", make)
    assert tuple(row[2] for row in answer.tables[1].rows) == holds


def test_the_published_figures_obey_the_claims_that_ours_are_held_to() -> None:
    figures = {key: {"job_s": row[0], "gib_min": row[1]} for key, row in published_sweep._PUBLISHED.items()}
    assert all(holds for _, _, holds in published_sweep._ordering(figures))


def test_a_setting_meets_both_goals_only_if_it_is_as_fast_and_as_sparing() -> None:
    quick, sparing = "boundary, 250 ms, mark 160", "rotate, 2 s"

    def make(spec: RunSpec) -> RunResult:
        time_s = 0.3 if spec.name in {quick, "rotate, 250 ms"} else 2.1
        faults = 100.0 if spec.name in {quick, sparing} else 900.0
        if reclaim_delay._case(spec) == "churn 1 GiB" and spec.name == quick:
            faults = 5000.0
        return result_of(spec, t90_s=time_s, t99_s=time_s, refaults=faults, page_ops_per_s=1e6)

    answer, _ = answer_of("reclaim-delay", make)
    assert answer.data["both"] == [quick]
    assert answer.data["carrying"] == []
    assert answer.tables[0].rows[0][0] == f"**{quick}**"
    assert answer.finding[1].startswith(
        "1 of 32 settings meet both goals (0.32 s and 0 thousand refaults): boundary, 250"
    )


def test_a_setting_that_never_gives_back_meets_no_goal() -> None:
    answer, _ = answer_of(
        "reclaim-delay",
        lambda spec: result_of(spec, t90_s=0.3 if spec.name == "rotate, 250 ms" else None, refaults=1.0),
    )
    assert answer.data["both"] == ["rotate, 250 ms"]
    rows = {row[0]: row for row in answer.tables[0].rows}
    assert rows["bitmap"][1] == "-"


def test_a_summary_is_median_and_half_the_quartiles_distance_of_what_is_there() -> None:
    assert summary([1.0, None, 3.0, 2.0]) == (2.0, 0.5)
    assert summary([None]) is None
    assert value_text([1000.0, 3000.0, 2000.0], 1e-3, 1) == "2.0 ± 0.5"


def test_a_show_writes_its_answer_and_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after three runs, then started again: the three are not done once more."""
    done: list[str] = []

    class Killed(Exception):
        pass

    def fake(payload: dict[str, object]) -> dict[str, object]:
        spec = RunSpec.from_dict(payload["spec"])  # type: ignore[arg-type]
        if len(done) == 3 and "again" not in done:
            raise Killed
        done.append(spec.key())
        return result_of(spec, hold_max_ns=1e6, alloc_p999_ns=1e3).as_dict()

    monkeypatch.setattr("lab.shows.run.execute", fake)

    def start() -> str:
        return run_show(
            *SHOWS["under-lock"],
            out=str(tmp_path / "show"),
            rounds=1,
            engine="inline",
            costs_path="",
            force=False,
            quiet=True,
            command=["python", "-m", "lab", "show", "under-lock"],
        )

    with pytest.raises(Killed):
        start()
    done.append("again")
    text = start()
    runs = [key for key in done if key != "again"]
    assert len(runs) == len(set(runs)) == 6
    assert (tmp_path / "show" / TABLE).read_text() == text
    assert "Made by `python -m lab show under-lock`." in text
    assert (tmp_path / "show" / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "show" / DATA).read_text())["rows"]


@pytest.mark.parametrize("rounds", ["0", "101", "-1", "x", "1.5", "9" * 9999])
def test_a_wrong_number_of_rounds_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rounds: str
) -> None:
    for name, most in ((["show", "boundary"], 100), (["calibrate"], 1000)):
        code = main([*name, f"--rounds={rounds.replace('101', '1001')}", "--out", str(tmp_path / "show")])
        assert code == UsageError.exit_code
        err = capsys.readouterr().err
        assert err.startswith("error: --rounds: '")
        assert f"; allowed is 1 to {most}\n" in err
    assert not (tmp_path / "show").exists()


def test_d7_the_boundary_show_measures_what_the_policies_do() -> None:
    """D7: on a small zone, nodes a pulled block stay with the boundary and grow without; each pulls every block."""
    from lab.shows import boundary

    small = {policy: boundary._second_run(policy, 0.0, 1) for policy in ("boundary", "scan")}
    full = {policy: boundary._second_run(policy, 0.9, 1) for policy in ("boundary", "scan")}
    assert small["boundary"].blocks == small["scan"].blocks == 256
    assert full["boundary"].nodes / full["boundary"].blocks < 4
    assert full["scan"].nodes / full["scan"].blocks > 200
    assert small["scan"].nodes > 50 * small["boundary"].nodes
