"""How fast a processor goes from one moment to the next: never quite the same, and so in virtual time.

Without this a workload in a loop and a delay that is a multiple of its turns stay in step for ever: every run meets the
guest at the same point of its turn, which no machine does. The spread is measured; the sequence follows from the seed.
"""

from __future__ import annotations

__all__ = ["WINDOW_NS", "Pace"]

WINDOW_NS = 100_000_000  # the pace holds for so long; the spread is measured over as much
_MASK = (1 << 64) - 1
_LEAST = 0.5


class Pace:
    """Factors on the duration of one vCPU's work: 1 on average, about normal, another one in each window.

    Args:
        seed, vcpu: whose sequence it is.
        spread: standard deviation, as a share.
    """

    def __init__(self, seed: int, vcpu: int, spread: float) -> None:
        self._key = _mixed((seed << 16) + vcpu)
        self._spread = spread
        self._window = -1
        self._factor = 1.0

    def factor(self, now_ns: float) -> float:
        """The one that holds at ``now_ns``; the same each time, in whichever order it is asked."""
        window = int(now_ns // WINDOW_NS)
        if window != self._window:
            self._window = window
            # The sum of three uniform numbers less its mean has a standard deviation of one half.
            total = sum(_mixed(self._key + 3 * window + part) / 2**64 for part in range(3)) - 1.5
            self._factor = max(_LEAST, 1.0 + 2.0 * self._spread * total)
        return self._factor


def _mixed(value: int) -> int:
    """64 bits from 64 bits, each of which depends on all (the finisher of splitmix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31
