"""What is computed from a run, in one place for real processes and virtual time alike. Pure functions.

Times are in s from the start of the workload, sizes in bytes. A series is a set of arrays of equal length
(float64[n]), times ascending, between whose rows values change in a straight line.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

__all__ = [
    "SHARES",
    "episodes",
    "gib_min",
    "joined",
    "stayed_bytes",
    "throughput",
    "time_to_return",
    "times_to_return",
    "without_cut_off",
]

SHARES = (0.5, 0.9, 0.99)  # of t50_s, t90_s, t99_s
_GIB_MIN = (1 << 30) * 60.0
_WAKING_S = 0.01  # a vCPU notes the end of its pause on its own, a little before or after the end of the work is noted

Array = npt.NDArray[np.float64]
Span = tuple[float, float]


def throughput(operations: Sequence[int], busy_ns: Sequence[float]) -> float | None:
    """Page operations a second of one guest while all its vCPUs work; None if none of them ever did.

    ``sum(operations) / sum(busy time) * vCPUs``: one entry a vCPU in both, ``operations`` pages allocated plus pages
    freed in steps of the workload, ``busy_ns`` the time in those steps. Pauses are left out, and so is what is freed
    at the very end, so the figure does not depend on how long a workload idles.
    """
    total_ns = sum(busy_ns)
    if total_ns <= 0:
        return None
    return sum(operations) * 1e9 / total_ns * len(busy_ns)


def episodes(idle: Iterable[Sequence[Span]]) -> list[Span]:
    """Spans in which all vCPUs are idle or done: the intersection of each one's idle spans, ascending.

    A vCPU's spans ascend and do not overlap; the last one of a vCPU that is done ends with the observation.
    Empty spans are left out.
    """
    common: list[Span] | None = None
    for spans in idle:
        common = list(spans) if common is None else _intersection(common, spans)
    return [span for span in common or [] if span[0] < span[1]]


def _intersection(one: Sequence[Span], two: Sequence[Span]) -> list[Span]:
    found = []
    left = right = 0
    while left < len(one) and right < len(two):
        start, end = max(one[left][0], two[right][0]), min(one[left][1], two[right][1])
        if start < end:
            found.append((start, end))
        if one[left][1] < two[right][1]:
            left += 1
        else:
            right += 1
    return found


def joined(spans: Sequence[Span], t_s: Array, allocated: Array, end_s: float) -> list[Span]:
    """The episodes, with those behind the one in which the work ended joined to it if nothing was freed in between.

    A vCPU that is idle when the work ends wakes up to end, and that is no new episode: what a policy leaves behind, as
    one that keeps to a watermark does, would else be an episode in which it gives nothing back.
    """
    found: list[Span] = []
    for start, end in spans:
        if found and found[-1][1] >= end_s - _WAKING_S:
            low = max(0, int(np.searchsorted(t_s, found[-1][1], side="right")) - 1)
            high = int(np.searchsorted(t_s, start, side="left")) + 1
            if np.unique(allocated[low:high]).size <= 1:
                found[-1] = (found[-1][0], end)
                continue
        found.append((start, end))
    return found


def without_cut_off(spans: Sequence[Span], least_s: float) -> list[Span]:
    """The episodes without the last if it is shorter than ``least_s``: the end of the run has cut it off."""
    return [span for at, span in enumerate(spans) if at < len(spans) - 1 or span[1] - span[0] >= least_s]


def time_to_return(t_s: Array, resident: Array, allocated: Array, episode: Span, share: float) -> float | None:
    """From the start of ``episode`` until ``share`` of what was free and resident then is given back.

    Infinite when that never came, None when there was nothing to give back.

    What is allocated is resident, and nobody allocates in an episode. So what can be given back is ``resident -
    allocated`` in the first row of the episode, and what was is by how much ``resident`` has fallen since. The answer
    is the time of the first row that has it.
    """
    first = int(np.searchsorted(t_s, episode[0], side="left"))
    end = int(np.searchsorted(t_s, episode[1], side="right"))
    if first >= end:
        return None
    free = resident[first] - allocated[first]
    if free <= 0:
        return None
    reached = np.flatnonzero(resident[first] - resident[first:end] >= share * free)
    return float(t_s[first + int(reached[0])] - episode[0]) if reached.size else math.inf


def times_to_return(
    t_s: Array, resident: Array, allocated: Array, spans: Sequence[Span], shares: Sequence[float] = SHARES
) -> tuple[float | None, ...]:
    """Of each share the median of ``time_to_return`` over the episodes; None if it was not reached in most of them.

    An episode that never reached a share counts as infinitely long, so a larger share never has the smaller median.
    """
    found = []
    for share in shares:
        times = [time_to_return(t_s, resident, allocated, span, share) for span in spans]
        median = statistics.median([time for time in times if time is not None] or [math.inf])
        found.append(None if math.isinf(median) else median)
    return tuple(found)


def gib_min(t_s: Array, resident: Array, end_s: float) -> float:
    """Integral of resident memory from the first row until ``end_s``, in GiB·min.

    ``end_s`` is the end of the work: how long a guest settles behind it depends on the policy, and a longer watch
    would count against the policy that is still giving memory back.
    """
    if not t_s.size:
        return 0.0
    inside = t_s < end_s
    times = np.append(t_s[inside], end_s)
    sizes = np.append(resident[inside], np.interp(end_s, t_s, resident))
    return float(np.trapezoid(sizes, times)) / _GIB_MIN


def stayed_bytes(returned_bytes: int, refaulted_bytes: int) -> int:
    """Of what was returned, what was not faulted in again by the end."""
    return returned_bytes - refaulted_bytes
