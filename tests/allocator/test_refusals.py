"""A wrong free is refused by its cause and changes nothing: the segment is the same byte for byte."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from common.errors import AllocatorError, DoubleFreeError, OutOfRangeError, WrongOrderError
from common.geometry import Migratetype
from guest.allocator.zone import Zone
from guest.reporting.cycle import Cycle, Outcome
from tests.allocator.arrange import exhaust, make_zone

N_PAGES = 4096


@pytest.fixture
def zone() -> Iterator[Zone]:
    """16 MiB, per-CPU lists off."""
    with_lists_off = make_zone()
    yield with_lists_off
    with_lists_off.validate()
    with_lists_off.close()


def refused(zone: Zone, error: type[AllocatorError], pfn: int, order: int, *, cpu: int = -1) -> None:
    """``free(pfn, order)`` raises ``error``, says what it was about, and leaves the segment alone."""
    before = zone.snapshot()
    with pytest.raises(error) as caught:
        zone.free(pfn, order, cpu=cpu)
    assert type(caught.value) is error
    assert str(pfn) in str(caught.value)
    assert zone.snapshot() == before


def taken(zone: Zone, order: int) -> int:
    """First page of a fresh block."""
    pfn = zone.alloc(order)
    assert pfn is not None
    return pfn


@pytest.mark.parametrize("order", [0, 1, 3, 8, 9, 10])
def test_double_free(zone: Zone, order: int) -> None:
    pfn = taken(zone, order)
    zone.free(pfn, order)
    refused(zone, DoubleFreeError, pfn, order)


@pytest.mark.parametrize("order", [0, 9, 10])
def test_free_of_a_page_that_was_never_allocated(zone: Zone, order: int) -> None:
    refused(zone, DoubleFreeError, 3072, order)


@pytest.mark.parametrize(("allocated", "freed"), [(0, 3), (3, 0), (3, 2), (9, 10), (10, 9), (9, 0), (0, 9)])
def test_wrong_order(zone: Zone, allocated: int, freed: int) -> None:
    pfn = taken(zone, allocated)
    assert pfn % (1 << freed) == 0, "the first block of a fresh zone is aligned to everything"
    refused(zone, WrongOrderError, pfn, freed)
    zone.free(pfn, allocated)


@pytest.mark.parametrize("pfn", [-1, -(1 << 40), N_PAGES, N_PAGES + 1, 1 << 28, (1 << 63) - 1])
def test_pfn_out_of_range(zone: Zone, pfn: int) -> None:
    refused(zone, OutOfRangeError, pfn, 0)


@pytest.mark.parametrize("order", [-1, 11, 63, 64])
def test_order_out_of_range(zone: Zone, order: int) -> None:
    pfn = taken(zone, 0)
    refused(zone, OutOfRangeError, pfn, order)


@pytest.mark.parametrize("order", [-1, 11, 64])
def test_alloc_of_an_impossible_order_changes_nothing(zone: Zone, order: int) -> None:
    before = zone.snapshot()
    with pytest.raises(OutOfRangeError):
        zone.alloc(order)
    assert zone.snapshot() == before


@pytest.mark.parametrize("order", [1, 4, 9, 10])
def test_pfn_not_aligned_to_its_order(zone: Zone, order: int) -> None:
    pfn = taken(zone, order)
    refused(zone, OutOfRangeError, pfn + 1, order)


@pytest.mark.parametrize(("order", "inside"), [(3, 1), (3, 4), (9, 256), (10, 512)])
def test_page_inside_an_allocated_block(zone: Zone, order: int, inside: int) -> None:
    pfn = taken(zone, order)
    refused(zone, DoubleFreeError, pfn + inside, 0)


@pytest.mark.parametrize("inside", [0, 1, 511])
def test_page_inside_a_free_block(zone: Zone, inside: int) -> None:
    refused(zone, DoubleFreeError, 3072 + inside, 0)


@pytest.mark.parametrize(("inside", "order"), [(0, 9), (0, 0), (1, 0), (256, 8)])
def test_block_in_flight(zone: Zone, inside: int, order: int) -> None:
    """S3: a block in flight belongs to nobody who could free it."""
    pfns = exhaust(zone)
    zone.free(pfns[2], 9)
    cycle = Cycle(zone, "boundary", capacity=4)
    cycle.begin()
    batch = cycle.pull()
    assert batch is not None
    assert list(batch.pfns) == [pfns[2]]
    refused(zone, DoubleFreeError, pfns[2] + inside, order)
    cycle.put_back(batch, Outcome.DONE)
    cycle.end()


@pytest.mark.parametrize("order", [0, 3])
def test_double_free_of_a_page_on_a_per_cpu_list(order: int) -> None:
    zone = make_zone(pcp_batch=7)
    pfn = zone.alloc(order, cpu=0)
    assert pfn is not None
    zone.free(pfn, order, cpu=0)
    refused(zone, DoubleFreeError, pfn, order, cpu=0)
    refused(zone, DoubleFreeError, pfn, order, cpu=1)
    refused(zone, DoubleFreeError, pfn, order)
    zone.validate()
    zone.close()


def test_every_free_of_an_untouched_zone_is_refused(zone: Zone) -> None:
    """Sampled over the zone: each pfn at each order it is aligned to."""
    before = zone.snapshot()
    for pfn in range(0, N_PAGES, 127):
        for order in range(11):
            with pytest.raises(AllocatorError):
                zone.free(pfn, order)
    assert zone.snapshot() == before


def test_refused_frees_are_not_counted(zone: Zone) -> None:
    pfn = taken(zone, 2)
    before = zone.statistics()
    for wrong in (pfn + 1, pfn - 1, N_PAGES):
        with pytest.raises(AllocatorError):
            zone.free(wrong, 0)
    assert zone.statistics() == before


def test_no_memory_is_an_answer_and_not_an_error(zone: Zone) -> None:
    """Exhausted: None at every order, and the zone is unchanged but for the count of failures."""
    exhaust(zone, 0)
    lists = [zone.free_list(order, kind) for order in range(11) for kind in Migratetype]
    states = zone.page_states()
    for order in range(11):
        assert zone.alloc(order) is None
    assert [zone.free_list(order, kind) for order in range(11) for kind in Migratetype] == lists
    assert np.array_equal(zone.page_states(), states)
