"""The min watermark: the last page above it can be had, the first below it only by those who may."""

from __future__ import annotations

import pytest

from guest.reporting.cycle import Cycle, Outcome
from tests.allocator.arrange import ALLOC_NO_WATERMARKS, make_zone

N_PAGES = 4096


@pytest.mark.parametrize("order", [0, 3, 9])
def test_an_allocation_may_go_down_to_min_and_not_below(order: int) -> None:
    """__zone_watermark_ok: what is left after the allocation is held against min."""
    size = 1 << order
    zone = make_zone(min_watermark=N_PAGES - 2 * size, low_watermark=N_PAGES - size, high_watermark=N_PAGES)
    assert zone.alloc(order) is not None
    assert zone.alloc(order) is not None
    assert zone.statistics().free_pages == N_PAGES - 2 * size
    assert zone.alloc(0) is None
    urgent = zone.alloc(order, flags=ALLOC_NO_WATERMARKS)
    assert urgent is not None
    zone.free(urgent, order)
    assert zone.alloc(0) is None
    zone.validate()
    zone.close()


def test_blocks_in_flight_count_as_gone() -> None:
    """Section 1.8: v9 pulls without a look at the watermark, so an allocation meanwhile may be refused by it."""
    zone = make_zone(min_watermark=2048, low_watermark=2049, high_watermark=2050)
    cycle = Cycle(zone, "boundary", capacity=2)
    cycle.begin()
    batch = cycle.pull()
    assert batch is not None
    assert zone.statistics().free_pages == 2048
    assert zone.alloc(0) is None
    cycle.put_back(batch, Outcome.DONE)
    cycle.end()
    assert zone.alloc(0) is not None
    zone.validate()
    zone.close()
