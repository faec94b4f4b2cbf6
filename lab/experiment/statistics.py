"""Median, spread and a rank test: no mean, since one disturbed run of five would move it at will."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["SIGNIFICANT", "Summary", "rank_test", "smallest_p", "summarize"]

SIGNIFICANT = 0.05
_MOST_PERMUTATIONS = 20_000  # C(16, 8) = 12,870: exact up to 8 against 8, ties or not


@dataclass(frozen=True)
class Summary:
    """One figure over the repeats of a run.

    Attributes:
        median: None when there is no value, or when more than half are missing and missing means "not reached".
        spread: half the interquartile range, quartiles interpolated linearly; None as the median, or when a quartile
            was not reached.
        values: one a repeat, in their order; None where the run could not tell.
    """

    median: float | None
    spread: float | None
    values: tuple[float | None, ...]

    @property
    def n(self) -> int:
        """Values that are there."""
        return sum(value is not None for value in self.values)


def summarize(values: Sequence[float | None], *, censored: bool = False) -> Summary:
    """Median and spread of ``values``.

    Args:
        censored: a missing value is "not reached", so later than every other, and counts as that; else it is left out.
            When all are missing there is nothing to tell either way.
    """
    numbers = _numbers(values, censored=censored)
    if not numbers:
        return Summary(None, None, tuple(values))
    ordered = sorted(numbers)
    low, median, high = (_quantile(ordered, share) for share in (0.25, 0.5, 0.75))
    spread = (high - low) / 2
    return Summary(median if math.isfinite(median) else None, spread if math.isfinite(spread) else None, tuple(values))


def rank_test(first: Sequence[float | None], second: Sequence[float | None], *, censored: bool = False) -> float | None:
    """Two-sided p of Mann and Whitney's rank test that both come from the same; exact up to 8 values against 8.

    Args:
        censored: as in ``summarize``.

    Returns:
        None when either side has no value.
    """
    ours, theirs = _numbers(first, censored=censored), _numbers(second, censored=censored)
    if not any(map(math.isfinite, ours + theirs)) or not ours or not theirs:
        return None
    together = ours + theirs
    if len(set(together)) == 1:
        return 1.0
    latest = max(filter(math.isfinite, together)) + 1.0  # ranks are all that counts
    ours, theirs = ([min(value, latest) for value in side] for side in (ours, theirs))
    from scipy import stats

    # The exact distribution of SciPy knows no ties; going through all permutations does.
    method: Literal["asymptotic", "exact"] | stats.PermutationMethod = "exact"
    if math.comb(len(together), len(ours)) > _MOST_PERMUTATIONS:
        method = "asymptotic"
    elif len(set(together)) < len(together):
        method = stats.PermutationMethod(n_resamples=_MOST_PERMUTATIONS)
    return float(stats.mannwhitneyu(ours, theirs, alternative="two-sided", method=method).pvalue)


def smallest_p(n_first: int, n_second: int) -> float:
    """The least p that so many values against so many can give: 0.1 for 3 against 3; 1 when a side has none."""
    return min(1.0, 2 / math.comb(n_first + n_second, n_first))


def _numbers(values: Sequence[float | None], *, censored: bool) -> list[float]:
    present = [float(value) for value in values if value is not None]
    return present + [math.inf] * (len(values) - len(present)) if censored else present


def _quantile(ordered: Sequence[float], share: float) -> float:
    """As ``numpy.quantile`` (linear), but between a number and infinity lies infinity, where NumPy may say NaN."""
    position = share * (len(ordered) - 1)
    index = math.floor(position)
    if position == index or math.isinf(ordered[index]):
        return ordered[index]
    return ordered[index] + (ordered[index + 1] - ordered[index]) * (position - index)
