"""Series of readings, and the sampler over fake guests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from common import layout
from lab import samples
from lab.sampler import PageArrays, Sampler
from lab.samples import Reading, SeriesRecorder, total_peak

ZERO = Reading(0.0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


class FakeProbe:
    """A guest that is absent for ``absent`` readings and then goes through ``resident_pages``, staying at the last."""

    def __init__(self, resident_pages: list[int], *, absent: int = 0) -> None:
        self.resident_pages, self.absent = list(resident_pages), absent
        self.reads = 0
        self.closed = False
        self.now = 0

    def read(self, time_s: float) -> Reading | None:
        """See ``Probe``."""
        assert not self.closed
        self.reads += 1
        if self.reads <= self.absent:
            return None
        if len(self.resident_pages) > 1:
            self.now = self.resident_pages.pop(0)
        else:
            self.now = self.resident_pages[0]
        return replace(ZERO, time_s=time_s, resident_bytes=self.now * 4096, counted_bytes=self.now * 4096)

    def pages(self) -> PageArrays:
        """See ``Probe``."""
        states, resident = np.zeros(4096, np.uint16), np.zeros(4096, np.uint8)
        states[::1024] = layout.ALLOCATED | 10
        resident[: self.now] = layout.RESIDENT
        return states, resident

    def close(self) -> None:
        """See ``Probe``."""
        self.closed = True


class Clock:
    """A clock that goes on by a second at every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_series_hold_what_was_appended() -> None:
    recorder = SeriesRecorder()
    for index in range(10):
        recorder.append(replace(ZERO, time_s=float(index), resident_bytes=100 - index, allocated_bytes=index))
    series = recorder.series()
    assert series.time_s.tolist() == list(range(10))
    assert series.resident_bytes.tolist() == [100 - index for index in range(10)]
    assert series.allocated_bytes.tolist() == list(range(10))
    assert SeriesRecorder().series().time_s.shape == (0,)


def test_thinning_keeps_memory_bounded_the_peak_and_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_MAX_ROWS", 32)
    recorder = SeriesRecorder()
    for index in range(1000):
        recorder.append(replace(ZERO, time_s=float(index), resident_bytes=10_000 if index == 37 else index))
    series = recorder.series()
    assert len(series.time_s) <= 33
    assert series.resident_bytes.max() == 10_000
    assert series.time_s[-1] == 999
    assert (np.diff(series.time_s) > 0).all()


def test_total_peak_adds_what_was_resident_at_one_time() -> None:
    one, two = SeriesRecorder(), SeriesRecorder()
    for time_s, resident in ((0.0, 10), (1.0, 100), (2.0, 5)):
        one.append(replace(ZERO, time_s=time_s, resident_bytes=resident))
    for time_s, resident in ((0.5, 1), (1.5, 2), (2.5, 100)):
        two.append(replace(ZERO, time_s=time_s, resident_bytes=resident))
    assert total_peak([one.series(), two.series()]) == 105
    assert total_peak([]) == 0
    assert total_peak([SeriesRecorder().series()]) == 0


def test_sampler_keeps_the_map_of_the_peak_and_of_the_end() -> None:
    probe = FakeProbe([10, 400, 20], absent=2)
    sampler = Sampler({"guest-1": probe}, clock=Clock())
    for _ in range(6):
        sampler.sample("guest-1")
    seen = sampler.finish()["guest-1"]
    assert probe.closed
    assert seen.peak is not None
    assert seen.peak_map is not None
    assert seen.last is not None
    assert seen.last_map is not None
    assert seen.peak.resident_bytes == 400 * 4096 == seen.peak_map.resident_bytes
    assert seen.last.resident_bytes == 20 * 4096 == seen.last_map.resident_bytes
    assert seen.peak_map.time_s == seen.peak.time_s
    assert seen.last_map.time_s == seen.last.time_s, "the last map is from the last look, after the guest's end"


def test_a_guest_that_never_came_leaves_an_empty_observation() -> None:
    sampler = Sampler({"guest-1": FakeProbe([1], absent=10**6)}, clock=Clock())
    sampler.sample("guest-1")
    seen = sampler.finish()["guest-1"]
    assert (seen.peak, seen.last, seen.peak_map, seen.last_map) == (None, None, None, None)
    assert seen.series.time_s.shape == (0,)


def test_what_ended_the_thread_is_raised_by_finish() -> None:
    class Broken(FakeProbe):
        def read(self, time_s: float) -> Reading | None:
            raise RuntimeError("torn")

    probe = Broken([1])
    sampler = Sampler({"guest-1": probe})
    sampler.start()
    sampler._thread.join(timeout=10)
    with pytest.raises(RuntimeError, match="torn"):
        sampler.finish()
    assert probe.closed
