"""Percentiles of a histogram against those of the values themselves."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from common.statistics import new_histogram, percentiles, record


@given(st.lists(st.integers(0, 1 << 44), min_size=1, max_size=60))
def test_percentiles_are_a_sixteenth_too_high_at_most(values: list[int]) -> None:
    histogram = new_histogram()
    for value in values:
        record(histogram, value)
    found = percentiles(histogram)
    ordered = sorted(values)
    for share, edge in ((0.5, found.p50), (0.99, found.p99), (0.999, found.p999)):
        exact = ordered[max(1, int(np.ceil(share * len(values)))) - 1]
        assert exact <= edge <= exact * 17 / 16
    assert (found.max, found.count) == (max(values), len(values))


def test_the_999th_of_a_thousand_is_told_from_the_990th_and_the_last() -> None:
    one, two = new_histogram(), new_histogram()
    for value in [10] * 990 + [20] * 8:
        record(one, value)
    for value in [30, 1000]:
        record(two, value)
    assert percentiles(one, two).as_dict() == {"p50": 10, "p99": 10, "p999": 30, "max": 1000, "count": 1000}
    assert percentiles(two, one) == percentiles(one, two)


def test_nothing_counted_is_all_zeros() -> None:
    assert set(percentiles().as_dict().values()) == set(percentiles(new_histogram()).as_dict().values()) == {0}
