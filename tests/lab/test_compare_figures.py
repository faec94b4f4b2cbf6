"""Figures of a comparison: ratios, tests, and how far virtual time is from live."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lab.experiment.comparison import TESTED, THROUGHPUT, Comparison, Row, Sample, compare_results
from lab.experiment.metrics import METRICS
from lab.experiment.spec import Mode, RunSpec
from lab.experiment.statistics import rank_test, smallest_p, summarize
from tests.lab.experiments import made_result


def samples(name: str, values: list[float | None], *, mode: Mode = "virtual", metric: str = "gib_min") -> list[Sample]:
    """One result a value; the other figures are 0."""
    return [
        Sample(name, made_result(RunSpec(mode=mode, policy=name, seed=seed), **{metric: value}), seed)
        for seed, value in enumerate(values)
    ]


def row_of(comparison: Comparison, name: str, mode: Mode = "virtual") -> Row:
    return next(row for row in comparison.rows if (row.name, row.mode) == (name, mode))


def test_median_and_spread() -> None:
    summary = summarize([5.0, 1.0, None, 2.0, 8.0, 3.0])
    assert (summary.median, summary.spread, summary.n) == (3.0, 1.5, 5)  # quartiles 2 and 5
    assert summarize([4.0]).spread == 0.0
    assert summarize([None]).median is None


def test_quartiles_are_numpys() -> None:
    generator = np.random.default_rng(3)
    for size in range(1, 12):
        values = generator.normal(size=size)
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        summary = summarize(list(values))
        assert summary.median == pytest.approx(median)
        assert summary.spread == pytest.approx((high - low) / 2)


def test_what_was_not_reached_counts_as_later_than_all() -> None:
    assert summarize([1.0, None, None], censored=True).median is None
    two = summarize([1.0, 2.0, None], censored=True)
    assert (two.median, two.spread) == (2.0, None)
    assert summarize([None, None], censored=True).median is None
    assert rank_test([1.0, 2.0, 3.0, 4.0], [None] * 4, censored=True) == pytest.approx(2 / 70)
    assert rank_test([1.0, 2.0], [None, None]) is None
    assert rank_test([None], [None], censored=True) is None


@pytest.mark.parametrize(("ours", "theirs"), [([1.0, 2, 3, 4, 5], [6.0, 7, 8, 9, 2.5]), ([3.0, 1, 2], [4.0, 6, 5])])
def test_p_is_scipys_exact_one(ours: list[float], theirs: list[float]) -> None:
    expected = stats.mannwhitneyu(ours, theirs, alternative="two-sided", method="exact").pvalue
    assert rank_test(ours, theirs) == pytest.approx(float(expected))


def test_p_with_ties_is_that_of_all_permutations() -> None:
    ours, theirs = [1.0, 2.0, 2.0, 3.0], [2.0, 4.0, 4.0, 5.0]

    def u_of(side: tuple[float, ...], other: tuple[float, ...]) -> float:
        return sum((a > b) + 0.5 * (a == b) for a in side for b in other)

    together = ours + theirs
    seen = u_of(tuple(ours), tuple(theirs))
    found = []
    for chosen in itertools.combinations(range(8), 4):
        rest = tuple(together[index] for index in range(8) if index not in chosen)
        found.append(u_of(tuple(together[index] for index in chosen), rest))
    low = sum(value <= seen for value in found) / len(found)
    high = sum(value >= seen for value in found) / len(found)
    assert rank_test(ours, theirs) == pytest.approx(min(1.0, 2 * min(low, high)))
    assert rank_test([7.0] * 5, [7.0] * 5) == 1.0


def test_many_values_take_the_normal_approximation() -> None:
    ours, theirs = [float(value) for value in range(20)], [value + 5.5 for value in range(20)]
    expected = stats.mannwhitneyu(ours, theirs, alternative="two-sided", method="asymptotic").pvalue
    assert rank_test(ours, theirs) == pytest.approx(float(expected))


def test_the_smallest_p_is_that_of_two_sides_apart() -> None:
    assert smallest_p(3, 3) == pytest.approx(0.1)
    for n in range(1, 8):
        apart = rank_test([float(value) for value in range(n)], [100.0 + value for value in range(n)])
        assert smallest_p(n, n) == pytest.approx(apart)
        assert smallest_p(n, n) == min(1.0, 2 / math.comb(2 * n, n))


def test_throughput_is_a_ratio_within_each_round() -> None:
    """The machine slows down from round to round; the ratio does not."""
    speeds = {"off": [100.0, 50.0, 10.0], "boundary": [90.0, 45.0, 9.0], "hint": [50.0, 30.0, 7.0]}
    given = [one for name, values in speeds.items() for one in samples(name, list(values), metric="page_ops_per_s")]
    comparison = compare_results(given, first="boundary", base="off")
    assert row_of(comparison, "boundary").figures[THROUGHPUT.name].summary.values == pytest.approx((90.0, 90.0, 90.0))
    assert row_of(comparison, "hint").figures[THROUGHPUT.name].summary.values == pytest.approx((50.0, 60.0, 70.0))
    assert row_of(comparison, "hint").figures[THROUGHPUT.name].summary.median == pytest.approx(60.0)
    measured = stats.mannwhitneyu(speeds["boundary"], speeds["hint"], method="exact").pvalue
    assert row_of(comparison, "hint").figures[THROUGHPUT.name].p == pytest.approx(float(measured))


def test_the_base_has_exactly_a_hundred_percent() -> None:
    values = [0.1 * 3, 1 / 3, 8_123_456.789e-3, 7.0]
    comparison = compare_results(samples("off", list(values), metric="page_ops_per_s"), first="off", base="off")
    assert row_of(comparison, "off").figures[THROUGHPUT.name].summary.values == (100.0,) * 4


def test_the_ratio_of_a_job_is_that_of_the_times() -> None:
    spec = RunSpec(work_pages=1000)
    given = [
        Sample("off", made_result(spec.but(policy="off"), job_s=10.0), 0),
        Sample("boundary", made_result(spec, job_s=12.5), 0),
    ]
    comparison = compare_results(given, first="boundary", base="off")
    assert row_of(comparison, "boundary").figures[THROUGHPUT.name].summary.median == pytest.approx(80.0)


def test_without_a_base_run_of_the_same_work_there_is_no_ratio() -> None:
    given = [
        Sample("off", made_result(RunSpec(policy="off", memory=1 << 30), page_ops_per_s=10.0), 0),
        Sample("boundary", made_result(RunSpec(), page_ops_per_s=9.0), 0),
    ]
    comparison = compare_results(given, first="boundary", base="off")
    assert row_of(comparison, "boundary").figures[THROUGHPUT.name].summary.median is None


def test_every_figure_is_there_and_the_listed_ones_are_tested_against_the_first() -> None:
    values: list[float | None] = [1.0, 2.0, 3.0, 4.0]
    given = (
        samples("boundary", values) + samples("hint", [value * 10 for value in (1, 2, 3, 4)]) + samples("off", values)
    )
    comparison = compare_results(given, first="boundary", base="off")
    for row in comparison.rows:
        assert set(row.figures) == {THROUGHPUT.name, *METRICS}
        for name, figure in row.figures.items():
            if row.name == "boundary" or name not in TESTED:
                assert figure.p is None
    expected = stats.mannwhitneyu([1, 2, 3, 4], [10, 20, 30, 40], method="exact").pvalue
    assert row_of(comparison, "hint").figures["gib_min"].p == pytest.approx(float(expected))
    assert comparison.tests == sum(figure.p is not None for row in comparison.rows for figure in row.figures.values())
    assert comparison.tests == 2 * len(TESTED)


def test_the_number_of_tests_is_said_and_too_few_runs_are() -> None:
    three = compare_results(
        samples("boundary", [1.0, 2, 3]) + samples("off", [4.0, 5, 6]), first="boundary", base="off"
    )
    notes = " ".join(three.notes())
    assert f"{three.tests} tests were made" in notes
    assert "not corrected" in notes
    assert "with 3 against 3 the smallest p that can come out is 0.1" in notes
    assert "differ by their seed and by nothing else" in notes
    four = compare_results(
        samples("boundary", [1.0, 2, 3, 4]) + samples("off", [4.0] * 4), first="boundary", base="off"
    )
    assert "Too few" not in " ".join(four.notes())
    assert four.notes()[0] == "Each figure is the median of 4 runs ± half the interquartile range."
    live = compare_results(samples("off", [1.0], mode="live"), first="off", base="off")
    assert live.notes()[0] == "Each figure is the median of 1 run ± half the interquartile range."
    assert "seed" not in " ".join(live.notes())


@pytest.mark.parametrize(
    ("live", "virtual", "percent", "far"),
    [
        (2.0, 2.1, 5.0, False),
        (40.0, 44.0, 10.0, False),
        (2.0, 2.3, 15.0, True),
        (2.0, 1.6, -20.0, True),
        (0.0, 0.0, 0.0, False),
        (0.0, 1.0, None, True),
        (None, None, None, False),
        (None, 1.0, None, True),
        (1.0, None, None, True),
    ],
)
def test_distance_of_virtual_time(live: float | None, virtual: float | None, percent: float | None, far: bool) -> None:
    given = samples("off", [live] * 3, mode="live", metric="t90_s") + samples("off", [virtual] * 3, metric="t90_s")
    comparison = compare_results(given, first="off", base="off")
    assert {one.metric for one in comparison.distances} == {THROUGHPUT.name, "gib_min", "t90_s"}
    distance = next(one for one in comparison.distances if one.metric == "t90_s")
    assert distance.percent == (None if percent is None else pytest.approx(percent))
    assert distance.is_far is far
    assert distance.as_dict()["beyond_10_percent"] is far


def test_one_mode_alone_has_no_distance() -> None:
    assert compare_results(samples("off", [1.0]), first="off", base="off").distances == ()
