"""Which points no other beats, and where their line bends. Knows no runs: points are rows, axes are columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["front", "knee"]


def front(points: npt.ArrayLike, better: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Which points are on the Pareto front: no other is at least as good in both and better in one.

    Of several equal points all are on it or none; a point that is not finite is not.

    Args:
        points: float64[n, 2].
        better: for each column +1 when more is better, -1 when less is.

    Returns:
        bool[n].

    Raises:
        ValueError: another shape, or another direction.
    """
    costs = _costs(points, better)
    mask = np.zeros(len(costs), dtype=np.bool_)
    known = np.flatnonzero(np.isfinite(costs).all(axis=1))
    if not len(known):
        return mask
    order = known[np.lexsort((costs[known, 1], costs[known, 0]))]
    first, second = costs[order, 0], costs[order, 1]
    # Points that are equal in the first column stand together, the best of them in the second column in front.
    heads = np.flatnonzero(np.concatenate(([True], first[1:] > first[:-1])))
    head = np.repeat(heads, np.diff(np.append(heads, len(order))))
    before = np.concatenate(([np.inf], np.minimum.accumulate(second)))[
        head
    ]  # lowest of all that are better in the first
    mask[order] = (second == second[head]) & (second < before)
    return mask


def knee(points: npt.ArrayLike, better: Sequence[int]) -> int | None:
    """Index of the point of the front that is farthest beyond the straight line between the front's ends.

    Both axes are scaled to the front, so that units do not matter; of several the first.

    Args:
        points, better: as for ``front``, with points that are not on the front or without.

    Returns:
        None when no point is beyond that line: with fewer than three, or on a front that bends the other way.
    """
    costs = _costs(points, better)
    on_front = np.flatnonzero(front(points, better))
    if len(on_front) < 3:
        return None
    best = costs[on_front]
    low, extent = best.min(axis=0), np.ptp(best, axis=0)
    if not (extent > 0).all():
        return None
    # The front goes from (0, 1) to (1, 0); what is better lies below that diagonal.
    below = 1.0 - ((best - low) / extent).sum(axis=1)
    index = int(np.argmax(below))
    return int(on_front[index]) if below[index] > 1e-12 else None


def _costs(points: npt.ArrayLike, better: Sequence[int]) -> npt.NDArray[np.float64]:
    """The points turned so that less is better in both."""
    table = np.asarray(points, dtype=np.float64)
    if table.size == 0:
        table = table.reshape(0, 2)
    if table.ndim != 2 or table.shape[1] != 2 or len(better) != 2 or not set(better) <= {1, -1}:
        raise ValueError(f"points of shape {table.shape} with directions {list(better)}; allowed are n by 2, +1 and -1")
    return -table * np.array(better, dtype=np.float64)
