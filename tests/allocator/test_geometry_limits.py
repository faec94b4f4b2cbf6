"""From 16 MiB to large zones: what a zone costs, that it is whole, and that other sizes are refused."""

from __future__ import annotations

import pytest

from common.errors import UsageError
from common.geometry import PAGE_BYTES, PAGEBLOCK_PAGES, Migratetype
from guest.allocator.zone import Zone, ZoneSettings
from guest.reporting.cycle import Batch, Cycle, Outcome
from tests.allocator.arrange import JIT_OFF, MIB, exhaust, make_zone

GIB = 1 << 30
SIZES = [16 * MIB, 18 * MIB, 30 * MIB, 64 * MIB, 258 * MIB, GIB] + ([] if JIT_OFF else [4 * GIB + 2 * MIB, 16 * GIB])


@pytest.mark.parametrize("memory_bytes", SIZES)
def test_a_fresh_zone_is_wholly_free_in_the_largest_blocks(memory_bytes: int) -> None:
    zone = make_zone(memory_bytes)
    statistics = zone.statistics()
    n_pages = memory_bytes // PAGE_BYTES
    assert statistics.n_pages == statistics.free_pages == n_pages
    assert statistics.nr_free[10] == n_pages >> 10
    assert statistics.nr_free[9] == n_pages // PAGEBLOCK_PAGES % 2
    assert sum(statistics.nr_free[:9]) == 0
    zone.validate()
    zone.close()


@pytest.mark.parametrize("memory_bytes", SIZES)
def test_metadata_is_at_most_16_bytes_a_page_with_default_settings(memory_bytes: int) -> None:
    """The design's bound, at the smallest zone too; Linux has 64."""
    zone = Zone.private(ZoneSettings(memory_bytes=memory_bytes))
    per_page = zone.metadata_bytes / zone.statistics().n_pages
    assert len(zone.snapshot()) == zone.metadata_bytes
    zone.close()
    assert per_page <= 16


@pytest.mark.parametrize(
    "memory_bytes", [0, -1, PAGE_BYTES, 14 * MIB, 16 * MIB + PAGE_BYTES, 17 * MIB, (1 << 40) + 2 * MIB, 1 << 62]
)
def test_other_sizes_are_refused_with_what_is_allowed(memory_bytes: int) -> None:
    with pytest.raises(UsageError, match="16 MiB"):
        Zone.private(ZoneSettings(memory_bytes=memory_bytes))


def test_an_odd_pageblock_at_the_end_is_used_and_never_merges_beyond_the_zone() -> None:
    """18 MiB: the last pageblock has no buddy."""
    zone = make_zone(18 * MIB)
    pfns = exhaust(zone, 9)
    assert pfns == [pageblock * PAGEBLOCK_PAGES for pageblock in range(9)]
    for pfn in pfns:
        zone.free(pfn, 9)
    assert [pfn for pfn, _ in zone.free_list(9, Migratetype.MOVABLE)] == [8 * PAGEBLOCK_PAGES]
    assert zone.statistics().nr_free[10] == 4
    zone.validate()
    zone.close()


@pytest.mark.parametrize("memory_bytes", [16 * MIB, 18 * MIB])
def test_each_page_can_be_had_once_and_all_merge_again(memory_bytes: int) -> None:
    """S4 over the whole zone at order 0, both ends included."""
    zone = make_zone(memory_bytes)
    n_pages = memory_bytes // PAGE_BYTES
    assert exhaust(zone, 0) == list(range(n_pages))
    assert zone.statistics().free_pages == 0
    for pfn in range(0, n_pages, 2):
        zone.free(pfn)
    for pfn in range(1, n_pages, 2):
        zone.free(pfn)
    assert zone.statistics().nr_free[10] == n_pages >> 10
    zone.validate()
    zone.close()


@pytest.mark.parametrize("memory_bytes", SIZES)
def test_last_block_of_the_zone_is_reported_too(memory_bytes: int) -> None:
    zone = make_zone(memory_bytes)
    reported = 0

    def report(batch: Batch) -> Outcome:
        nonlocal reported
        reported += int((1 << batch.orders).sum())
        assert int((batch.pfns + (1 << batch.orders)).max()) <= memory_bytes // PAGE_BYTES
        return Outcome.DONE

    Cycle(zone, "boundary", capacity=64).run(report)
    assert reported == zone.statistics().reported_pages == memory_bytes // PAGE_BYTES
    zone.close()
