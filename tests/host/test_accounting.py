"""Histograms, sums and snapshots."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from host.accounting import Counters, Histogram, HostStatistics


@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=200))
def test_percentiles_are_a_sixteenth_too_high_at_most(values: list[int]) -> None:
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    found = histogram.percentiles()
    ordered = sorted(values)
    for percent, edge in ((50, found.p50), (99, found.p99)):
        exact = ordered[-(-len(values) * percent // 100) - 1]
        assert exact <= edge <= exact * 17 / 16
    assert found.max == ordered[-1]


def test_an_empty_histogram_is_zero_and_a_huge_value_is_kept_in_the_last_bin() -> None:
    histogram = Histogram()
    assert histogram.percentiles() == Histogram().percentiles()
    assert (histogram.percentiles().p50, histogram.percentiles().max) == (0, 0)
    histogram.record(1 << 62)
    assert histogram.percentiles().max == 1 << 62


@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 1 << 30)), max_size=20), st.integers(0, 20))
def test_sums_of_parts_are_the_whole(events: list[tuple[int, int]], cut: int) -> None:
    parts, whole = [Counters(), Counters()], Counters()
    for index, (order, value) in enumerate(events):
        for counters in (parts[index < cut], whole):
            counters.order_histogram[order] += 1
            counters.freed_bytes += value
            counters.discard_ns.record(value)
    total = parts[0].copy()
    total.add(parts[1])
    assert total.as_dict() == whole.as_dict()


def test_a_copy_is_independent() -> None:
    counters = Counters()
    snapshot = counters.copy()
    counters.reports += 1
    counters.order_histogram[9] += 1
    counters.discard_ns.record(5)
    assert snapshot.as_dict() == Counters().as_dict()


def test_the_result_is_json_with_the_keys_of_the_contract() -> None:
    result = json.loads(json.dumps(HostStatistics(1.0, "cachestat", 0, 0, 0, Counters(), ()).as_dict()))
    assert result["ok"] is True
    assert {"ok", "duration_s", "host", "guests"} == set(result)
    assert set(result["host"]) >= {
        *("reports", "blocks", "asked_bytes", "freed_bytes", "failures", "rejected", "duplicates", "invalid_blocks"),
        *("withdrawn", "busy", "malformed", "empty_blocks", "order_histogram", "discard_ns", "pull_to_ack_ns"),
        *("guests_seen", "guests_lost", "cpu_s"),
    }
