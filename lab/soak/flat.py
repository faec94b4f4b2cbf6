"""Whether a figure of a process stays flat over time, judged so that a busy moment does not decide.

Only the second half of what was seen counts: a process that starts fills its caches. *Growth* is the Theil-Sen slope of
that half (the median of the slopes between all pairs of looks, which up to 29 % of outliers do not move) times its
length. Anonymous memory may grow by a sixty-fourth of itself or a MiB, whichever is more; descriptors and threads by
none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["MIN_LOOKS", "MIN_SPAN_S", "Trend", "judge_count", "judge_memory", "theil_sen"]

MIN_LOOKS = 16  # of a process; whoever was seen less often or for less long is not judged: it still loads its code
MIN_SPAN_S = 30.0
LEAST_BYTES = 1 << 20
SHARE = 64
_MOST_POINTS = 400  # pairs are the square of it


@dataclass(frozen=True)
class Trend:
    """What became of one figure of one process: bytes, or a count."""

    figure: str
    median: float
    growth: float
    bound: float

    @property
    def flat(self) -> bool:
        """Whether it grew by no more than it may."""
        return self.growth <= self.bound

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"median": self.median, "growth": self.growth, "bound": self.bound, "flat": self.flat}


def theil_sen(times: npt.ArrayLike, values: npt.ArrayLike) -> float:
    """Median of the slopes between all pairs of points, times ascending; 0 for fewer than two."""
    x, y = np.asarray(times, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(x) > _MOST_POINTS:
        kept = np.linspace(0, len(x) - 1, _MOST_POINTS).astype(np.int64)
        x, y = x[kept], y[kept]
    first, second = np.triu_indices(len(x), k=1)
    apart = x[second] - x[first]
    slopes = (y[second] - y[first])[apart > 0] / apart[apart > 0]
    return float(np.median(slopes)) if slopes.size else 0.0


def judge_memory(times_s: Sequence[float], used_bytes: Sequence[int]) -> Trend:
    """The trend of a process's anonymous memory. ``times_s``: of the looks, ascending."""
    x, y = _second_half(times_s, used_bytes)
    growth = theil_sen(x, y) * float(x[-1] - x[0])
    bound = max(LEAST_BYTES, float(np.median(y)) / SHARE)
    return Trend("memory", float(np.median(y)), growth, bound)


def judge_count(figure: str, counts: Sequence[int]) -> Trend:
    """The trend of a count: the least of its last quarter may not be above the most of its second.

    Counts move in steps as guests, reports and helpers come and go. That is no growth; what comes and stays is.
    """
    quarters = np.array_split(np.asarray(counts, dtype=np.float64), 4)
    growth = float(quarters[3].min() - quarters[1].max())
    return Trend(figure, float(np.median(counts)), max(0.0, growth), 0.0)


def _second_half(
    times_s: Sequence[float], values: Sequence[int]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    x, y = np.asarray(times_s, dtype=np.float64), np.asarray(values, dtype=np.float64)
    later = x >= (x[0] + x[-1]) / 2
    return x[later], y[later]
