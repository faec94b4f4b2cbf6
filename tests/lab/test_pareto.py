"""The front against an obvious oracle, and the knee of fronts whose knee one sees."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.experiment.pareto import front, knee

COORDINATES = st.one_of(st.integers(-3, 3).map(float), st.sampled_from((math.nan, math.inf)))
DIRECTIONS = st.tuples(st.sampled_from((1, -1)), st.sampled_from((1, -1)))


def oracle(points: list[tuple[float, float]], better: tuple[int, int]) -> list[bool]:
    """Compare each with each."""

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        gains = [(a - b) * sign for a, b, sign in zip(one, other, better, strict=True)]
        return all(gain >= 0 for gain in gains) and any(gain > 0 for gain in gains)

    whole = [point for point in points if all(math.isfinite(value) for value in point)]
    return [point in whole and not any(beats(other, point) for other in whole) for point in points]


@given(st.lists(st.tuples(COORDINATES, COORDINATES), max_size=12), DIRECTIONS)
def test_front_against_an_obvious_oracle(points: list[tuple[float, float]], better: tuple[int, int]) -> None:
    assert front(points, better).tolist() == oracle(points, better)


@given(st.lists(st.tuples(COORDINATES, COORDINATES), min_size=1, max_size=12), DIRECTIONS)
def test_a_knee_is_on_the_front(points: list[tuple[float, float]], better: tuple[int, int]) -> None:
    index = knee(points, better)
    assert index is None or front(points, better)[index]


def test_the_front_of_many_points_is_found_without_comparing_each_with_each() -> None:
    x = np.arange(200_000, dtype=np.float64)
    points = np.column_stack([x, x])
    assert front(points, (-1, 1)).all()
    assert np.flatnonzero(front(points, (1, 1))).tolist() == [199_999]


@pytest.mark.parametrize("scale", [1.0, 1e9])
def test_the_knee_is_where_the_front_bends_most_whatever_the_units(scale: float) -> None:
    points = [(1.0, 1.0 * scale), (2.0, 8.0 * scale), (3.0, 9.0 * scale), (10.0, 10.0 * scale), (9.0, 1.0 * scale)]
    assert knee(points, (-1, 1)) == 1
    assert knee([(y, -x) for x, y in points], (1, 1)) == 1


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(1.0, 1.0)],
        [(1.0, 1.0), (2.0, 2.0)],
        [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)],  # straight
        [(1.0, 1.0), (2.0, 1.1), (3.0, 3.0)],  # bends the other way
        [(1.0, 1.0)] * 3,
    ],
)
def test_no_knee_where_nothing_bends(points: list[tuple[float, float]]) -> None:
    assert knee(points, (-1, 1)) is None


@pytest.mark.parametrize("better", [(1,), (1, 0), (1, 1, 1)])
def test_other_directions_are_refused(better: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="directions"):
        front([(1.0, 2.0)], better)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        front([[1.0, 2.0, 3.0]], (1, 1))
