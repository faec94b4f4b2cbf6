"""The figures of a run from hand-made series, to the digit."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lab.experiment import derive

MIB = float(1 << 20)
GIB = float(1 << 30)


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


# 100 MiB, 40 of them allocated: 60 can be given back, and are: 15, then 30, then 60.
T_S = column(0, 1, 2, 3, 4, 5)
RESIDENT = column(0, 100, 100, 85, 70, 40) * MIB
ALLOCATED = column(0, 100, 40, 40, 40, 40) * MIB


def test_throughput_is_that_of_all_vcpus_while_they_work() -> None:
    assert derive.throughput([3000], [2_000_000_000]) == 1500.0
    assert derive.throughput([3000, 5000], [2_000_000_000, 2_000_000_000]) == 4000.0
    assert derive.throughput([8000, 0], [4_000_000_000, 0]) == 4000.0, "one that never worked is a vCPU all the same"


@pytest.mark.parametrize("busy_ns", [[], [0], [0, 0]])
def test_no_work_has_no_throughput(busy_ns: list[int]) -> None:
    assert derive.throughput([0] * len(busy_ns), busy_ns) is None


def test_episodes_are_when_all_are_idle() -> None:
    one = [(1.0, 4.0), (6.0, 9.0), (12.0, 20.0)]
    two = [(0.0, 2.0), (3.0, 7.0), (8.0, 8.5), (11.0, 20.0)]
    assert derive.episodes([one, two]) == [(1.0, 2.0), (3.0, 4.0), (6.0, 7.0), (8.0, 8.5), (12.0, 20.0)]
    assert derive.episodes([two, one]) == derive.episodes([one, two])
    assert derive.episodes([one]) == one
    assert derive.episodes([one, two, [(3.5, 6.5)]]) == [(3.5, 4.0), (6.0, 6.5)]


def test_without_vcpus_or_pauses_there_are_no_episodes() -> None:
    assert derive.episodes([]) == []
    assert derive.episodes([[(1.0, 2.0)], []]) == []
    assert derive.episodes([[(1.0, 1.0)]]) == [], "of no length"
    assert derive.episodes([[(1.0, 2.0)], [(2.0, 3.0)]]) == []


def test_a_rest_behind_the_work_goes_on_with_the_one_before_if_nothing_was_freed() -> None:
    """A vCPU that slept when the work ended wakes up to end; one that freed something begins a new episode."""
    t_s, steady = column(0, 2, 4, 6, 8), column(9, 3, 3, 3, 3)
    spans = [(1.0, 3.0), (3.5, 5.0), (5.1, 8.0)]
    assert derive.joined(spans, t_s, steady, 5.0) == [(1.0, 3.0), (3.5, 8.0)], "work lies between the first two"
    assert derive.joined(spans, t_s, steady, 5.05) == spans, "and between the last two, if it ended there"
    assert derive.joined(spans, t_s, steady, 3.0) == [(1.0, 8.0)]
    assert derive.joined(spans, t_s, column(9, 3, 3, 0, 0), 5.0) == spans
    assert derive.joined([], t_s, steady, 5.0) == []


def test_what_the_policy_left_behind_is_no_episode_of_its_own() -> None:
    """100 of 104 are given back in 2 s; the 4 that stay would else be never given back, and the median infinite."""
    t_s, resident, allocated = column(0, 1, 2, 3, 4), column(104, 104, 4, 4, 4), np.zeros(5)
    spans = [(0.0, 3.0), (3.1, 4.0)]
    assert derive.times_to_return(t_s, resident, allocated, spans, (0.9,)) == (None,)
    joined = derive.joined(spans, t_s, allocated, 3.0)
    assert derive.times_to_return(t_s, resident, allocated, joined, (0.9,)) == (2.0,)


def test_an_episode_that_the_end_cuts_off_counts_from_a_length_on() -> None:
    spans = [(0.0, 1.0), (2.0, 3.5)]
    assert derive.without_cut_off(spans, 1.5) == spans
    assert derive.without_cut_off(spans, 1.6) == spans[:1]
    assert derive.without_cut_off([], 1.0) == []


@pytest.mark.parametrize(("share", "seconds"), [(0.25, 1.0), (0.26, 2.0), (0.5, 2.0), (0.51, 3.0), (1.0, 3.0)])
def test_time_to_return_counts_what_was_free_and_resident(share: float, seconds: float) -> None:
    assert derive.time_to_return(T_S, RESIDENT, ALLOCATED, (2.0, 5.0), share) == seconds


def test_time_to_return_counts_from_the_start_of_the_episode() -> None:
    """Which may lie a little before its first row."""
    assert derive.time_to_return(T_S, RESIDENT, ALLOCATED, (1.75, 5.0), 0.5) == 2.25


def test_a_share_that_comes_after_the_episode_is_not_reached() -> None:
    assert derive.time_to_return(T_S, RESIDENT, ALLOCATED, (2.0, 4.0), 0.5) == 2.0
    assert derive.time_to_return(T_S, RESIDENT, ALLOCATED, (2.0, 4.0), 0.9) == math.inf


def test_with_nothing_to_give_back_or_no_row_there_is_no_time() -> None:
    assert derive.time_to_return(T_S, RESIDENT, ALLOCATED, (5.0, 5.0), 0.5) is None
    assert derive.time_to_return(T_S, RESIDENT, ALLOCATED, (2.2, 2.8), 0.5) is None
    assert derive.time_to_return(T_S, RESIDENT, ALLOCATED, (7.0, 8.0), 0.5) is None


def test_times_to_return_are_medians_in_which_never_is_infinitely_long() -> None:
    t_s = column(*range(12))
    resident = column(10, 5, 0, 10, 10, 0, 10, 10, 5, 10, 10, 10)
    allocated = np.zeros(12)
    spans = [(0.0, 2.0), (3.0, 5.0), (6.0, 8.0), (9.0, 11.0)]
    # half: after 1, 2, 2 s and never; nine tenths: after 2, 2 s, never, never
    assert derive.times_to_return(t_s, resident, allocated, spans) == (2.0, None, None)
    assert derive.times_to_return(t_s, resident, allocated, spans[:3]) == (2.0, 2.0, 2.0)
    assert derive.times_to_return(t_s, resident, allocated, spans[:2], (0.5, 0.9)) == (1.5, 2.0)
    assert derive.times_to_return(t_s, resident, allocated, spans[2:], (0.5, 0.9)) == (None, None)
    assert derive.times_to_return(t_s, resident, allocated, []) == (None, None, None)


def test_gib_min_is_the_area_until_the_end_of_the_work() -> None:
    level = column(2, 2, 2) * GIB
    assert derive.gib_min(column(0, 30, 600), level, 60.0) == 2.0
    assert derive.gib_min(column(0, 30), level[:2], 60.0) == 2.0, "the last row holds on"
    assert derive.gib_min(column(0, 60, 120), column(0, 2, 0) * GIB, 120.0) == 2.0
    assert math.isclose(derive.gib_min(column(0, 60, 120), column(0, 2, 0) * GIB, 90.0), 1.75)
    assert derive.gib_min(column(), column(), 60.0) == 0.0


def test_stayed_is_what_did_not_come_back() -> None:
    assert derive.stayed_bytes(100, 30) == 70
