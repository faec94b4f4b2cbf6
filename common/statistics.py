"""Histograms, and what is read from them: one frozen snapshot that terminal, JSON and tests all use."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from common.native import kernel

__all__ = ["HISTOGRAM_WORDS", "Percentiles", "new_histogram", "percentiles", "record"]

# Log-linear bins: 16 a power of two (at most 1/16 = 6.25 % too high), up to 2**47 ns. The last word is the maximum.
_SUB_BITS = 4
_SUB = 1 << _SUB_BITS
_N_BINS = 44 * _SUB
HISTOGRAM_WORDS = _N_BINS + 1


@dataclass(frozen=True)
class Percentiles:
    """Of one histogram, in ns; p50, p99 and p999 (99.9 %) are upper edges of their bins, max is exact. Zeros: empty."""

    p50: int
    p99: int
    p999: int
    max: int
    count: int

    def as_dict(self) -> dict[str, int]:
        """Plain dictionary for JSON."""
        return asdict(self)


def new_histogram() -> np.ndarray:
    """An empty histogram, int64[HISTOGRAM_WORDS]; written by one thread at a time."""
    return np.zeros(HISTOGRAM_WORDS, dtype=np.int64)


@kernel
def record(histogram, value):  # type: ignore[no-untyped-def]  # numba infers
    """Count ``value`` (ns, negative counts as 0)."""
    value = max(value, 0)
    histogram[_N_BINS] = max(histogram[_N_BINS], value)
    scale = 0
    rest = value
    while rest >= 2 * _SUB:
        rest >>= 1
        scale += 1
    index = scale * _SUB + rest
    if index >= _N_BINS:
        index = _N_BINS - 1
    histogram[index] += 1


def _upper_edge(index: int) -> int:
    """Largest value that falls into bin ``index``."""
    if index < 2 * _SUB:
        return index
    scale = index // _SUB - 1
    return ((index - scale * _SUB + 1) << scale) - 1


def percentiles(*histograms: np.ndarray) -> Percentiles:
    """Percentiles over the sum of ``histograms`` (int64[HISTOGRAM_WORDS] each)."""
    if not histograms:
        return Percentiles(0, 0, 0, 0, 0)
    maximum = max(int(histogram[_N_BINS]) for histogram in histograms)
    bins = np.sum([histogram[:_N_BINS] for histogram in histograms], axis=0)
    count = int(bins.sum())
    if not count:
        return Percentiles(0, 0, 0, 0, 0)
    cumulative = np.cumsum(bins)

    def at(share: float) -> int:
        index = int(np.searchsorted(cumulative, max(1, share * count)))
        return min(_upper_edge(index), maximum)

    return Percentiles(at(0.50), at(0.99), at(0.999), maximum, count)
