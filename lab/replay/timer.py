"""When delayed work of a Linux guest begins: the timer wheel rounds up, the more the longer the delay."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Timer"]

_LEVEL_BITS = 3  # LVL_CLK_SHIFT: a level is eight times as coarse as the one below
_LEVEL_SIZE = 64
_LEVELS = 9


@dataclass(frozen=True)
class Timer:
    """``schedule_delayed_work`` of so long a delay.

    Mirrors calc_wheel_index of kernel/time/timer.c: the delay counts from the last tick and in whole ticks, and the
    timer goes off at the next multiple of its level's granularity, never early.

    Attributes:
        delay_ns: 0: the work is queued at once.
        hz: ticks a second, CONFIG_HZ.
        phase_ns: a time on the trace's clock at which a tick fell whose number is a multiple of every granularity;
            None where nobody knows it: then the mean of what it may be is taken, half a granularity.
    """

    delay_ns: int
    hz: int = 250
    phase_ns: int | None = None

    def fires_ns(self, now_ns: int) -> int:
        """When work begins that is asked for at ``now_ns``."""
        if self.delay_ns == 0:
            return now_ns
        tick_ns = 10**9 // self.hz
        ticks = -(-self.delay_ns // tick_ns)
        level = 0
        while level < _LEVELS - 1 and ticks >= (_LEVEL_SIZE - 1) << (level * _LEVEL_BITS):
            level += 1
        shift = level * _LEVEL_BITS
        if self.phase_ns is None:
            return now_ns + ticks * tick_ns + (tick_ns << shift) // 2
        expires = (now_ns - self.phase_ns) // tick_ns + ticks
        return self.phase_ns + (((expires >> shift) + 1) << shift) * tick_ns
