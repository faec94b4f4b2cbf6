"""A row of the table, and how medians and spreads are taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

__all__ = ["Row", "median", "spread"]


@dataclass(frozen=True)
class Row:
    """One figure beside what it is held against.

    Attributes:
        value: median over interleaved runs, in ``unit``.
        spread: half the distance between the quartiles, as a share of the median, of the figure that is judged.
        against: what ``ratio`` compares with, in words and with its figure.
        target: bound on ``ratio`` (or on ``value`` where there is no ratio), with its sense; None for information only.
        ok: the bound is met; None when there is none.
    """

    name: str
    unit: str
    value: float
    spread: float
    against: str
    ratio: float | None
    target: str | None
    ok: bool | None

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return asdict(self)


def median(samples: Sequence[float]) -> float:
    """Median of ``samples``."""
    return float(np.median(samples))


def spread(samples: Sequence[float]) -> float:
    """Half the interquartile range over the median; 0 for a median of 0."""
    low, middle, high = np.percentile(samples, [25, 50, 75])
    return float((high - low) / 2 / middle) if middle else 0.0
