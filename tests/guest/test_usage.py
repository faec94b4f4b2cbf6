"""The record of a guest's memory: the steps are kept, what is marked is kept, and its size is bounded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from guest.allocator.zone import Zone
from guest.usage import COLUMNS, UsageRecorder
from tests.allocator.arrange import MIB, make_zone

PAGE = 4096


@pytest.fixture
def zone() -> Iterator[Zone]:
    fresh = make_zone(16 * MIB, pcp_batch=63)
    yield fresh
    fresh.close()


class Level:
    """A resident size that is set by hand."""

    def __init__(self, zone: Zone, **settings: int) -> None:
        self.bytes = 0
        self.recorder = UsageRecorder(zone.address, lambda: self.bytes, **settings)

    def take(self, *sizes: int, mark: bool = False) -> None:
        for size in sizes:
            self.bytes = size
            self.recorder.take(mark=mark)

    @property
    def seen(self) -> list[int]:
        return self.recorder.columns()["resident_bytes"]


def test_a_row_says_what_the_zone_says(zone: Zone) -> None:
    cpu = zone.claim_cpu()
    zone.alloc(9)
    zone.alloc(0, cpu=cpu)
    recorder = UsageRecorder(zone.address)
    recorder.take()
    statistics = zone.statistics()
    assert statistics.pcp_pages > 0, "pages on a per-CPU list are not allocated"
    row = {name: column[-1] for name, column in recorder.columns().items()}
    assert tuple(row) == COLUMNS
    assert row["allocated_bytes"] == statistics.allocated_pages * PAGE == 513 * PAGE
    assert row["reported_bytes"] == statistics.reported_pages * PAGE
    assert row["resident_bytes"] == statistics.resident_pages * PAGE
    zone.release_cpu(cpu)


def test_a_level_stretch_is_two_rows_and_a_step_stays_a_step(zone: Zone) -> None:
    level = Level(zone)
    level.take(*[5] * 100, 9, 9, 9, 2)
    assert level.seen == [5, 5, 9, 9, 2]
    times = level.recorder.columns()["t_ns"]
    assert times == sorted(times)
    assert level.recorder.peak_bytes == 9


def test_the_latest_row_is_the_last_even_if_nothing_changed(zone: Zone) -> None:
    level = Level(zone)
    level.take(5, 5)
    before = level.recorder.columns()["t_ns"]
    level.take(5, 5, 5)
    after = level.recorder.columns()["t_ns"]
    assert len(before) == len(after) == 2
    assert after[0] == before[0]
    assert after[1] > before[1]


def test_a_marked_row_is_kept_though_nothing_changed(zone: Zone) -> None:
    level = Level(zone)
    level.take(5, 5)
    level.take(5, mark=True)
    level.take(5, 5, 3)
    assert level.seen == [5, 5, 5, 5, 3]


def test_it_looks_closer_after_a_mark(zone: Zone) -> None:
    level = Level(zone)
    level.take(1)
    steady_s = level.recorder.period_s
    level.take(1, mark=True)
    assert level.recorder.period_s < steady_s


def test_it_stays_below_its_bound_and_keeps_peak_and_marks(zone: Zone) -> None:
    level = Level(zone, max_rows=64)
    for size in range(1, 2001):
        level.take(size, mark=size in (7, 501))
    assert len(level.seen) <= 65
    assert {7, 501, 2000} <= set(level.seen)
    assert level.recorder.peak_bytes == 2000
    assert level.seen == sorted(level.seen)


def test_marks_alone_do_not_exceed_the_bound_either(zone: Zone) -> None:
    level = Level(zone, max_rows=64)
    level.take(*range(1, 500), mark=True)
    assert len(level.seen) <= 65
    assert level.seen == sorted(level.seen)
