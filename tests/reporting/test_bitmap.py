"""The bitmap policy: a bit a block set on free, scanned a lock cycle a bit, no Reported flag, lossy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from common.geometry import PAGEBLOCK_PAGES, Migratetype
from common.layout import W_POLICY_WORDS, segment_offsets
from guest.allocator.zone import Zone
from guest.reporting.bitmap import W_BITS_SCANNED
from guest.reporting.cycle import Batch, Cycle, Outcome
from guest.reporting.table import POLICIES
from tests.allocator.arrange import MIB, exhaust, make_zone
from tests.allocator.view import header_of
from tests.reporting.arrange import free_alternating, reported_heads

MOVABLE = Migratetype.MOVABLE
MARK = POLICIES["bitmap"].high_water_mark


@pytest.fixture
def zone() -> Iterator[Zone]:
    """256 MiB, 128 pageblocks; the request of the registration is pending."""
    zone = make_zone(256 * MIB, trigger="bitmap", high_water_mark=MARK)
    yield zone
    zone.validate()
    zone.close()


class Taker:
    """A host that takes everything and remembers it."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, batch: Batch) -> Outcome:
        self.batches.append(batch.pfns.tolist())
        return Outcome.DONE

    @property
    def pfns(self) -> list[int]:
        return [pfn for batch in self.batches for pfn in batch]


def reported_by(cycle: Cycle) -> list[int]:
    """One run; the pfns that it reported, in order."""
    taker = Taker()
    cycle.run(taker)
    return taker.pfns


def bits_of(zone: Zone) -> list[int]:
    """The bits that are set. The count of them, which decides about runs, agrees."""
    header = header_of(zone)
    start = segment_offsets(int(header["n_pages"]), int(header["n_cpus"])).bitmap
    raw = np.frombuffer(zone.snapshot(), dtype=np.uint8, count=zone.n_pages // 8, offset=start)
    bits = [int(bit) for bit in np.flatnonzero(np.unpackbits(raw, bitorder="little"))]
    assert int(header["policy_words"][0]) == len(bits)
    return bits


def test_the_first_run_finds_no_bit_in_memory_that_was_never_freed(zone: Zone) -> None:
    """Unlike v9: a bit is set by a free alone."""
    assert zone.statistics().requested
    assert reported_by(Cycle(zone, "bitmap")) == []
    assert not zone.statistics().requested


def test_b3_a_run_is_asked_for_at_sixteen_set_bits(zone: Zone) -> None:
    """B3 in its form for this policy: 15 must not, 16 must; a block that is freed twice sets one bit."""
    Cycle(zone, "bitmap").run(Taker())
    pfns = exhaust(zone, 9)[::2]
    for pfn in pfns[: MARK - 1]:
        zone.free(pfn, 9)
    again = zone.alloc(9)
    assert again is not None
    zone.free(again, 9)
    assert len(bits_of(zone)) == MARK - 1
    assert not zone.statistics().requested
    zone.free(pfns[MARK - 1], 9)
    assert zone.statistics().requested


def test_the_scan_reports_what_was_freed_in_the_order_of_addresses_and_clears_the_bits(zone: Zone) -> None:
    """for_each_set_bit, batches of 16."""
    freed, _buddies = free_alternating(zone, 40)
    assert bits_of(zone) == [pfn // PAGEBLOCK_PAGES for pfn in freed]
    taker = Taker()
    done = Cycle(zone, "bitmap").run(taker)
    assert taker.pfns == sorted(freed)
    assert [len(batch) for batch in taker.batches] == [16, 16, 8]
    assert bits_of(zone) == []
    assert done.nodes_visited == 40


def test_a_lock_cycle_a_bit_and_one_bit_a_hold(zone: Zone) -> None:
    """His critics' point: so many holds as bits, each short."""
    free_alternating(zone, 40)
    cycle = Cycle(zone, "bitmap")
    cycle.run(Taker())
    assert int(cycle.pull_holds[:-1].sum()) == 40
    assert zone.statistics().nodes_hold_max == 1
    n_bits = zone.n_pages // PAGEBLOCK_PAGES
    scanned = int(header_of(zone)["policy_words"][W_BITS_SCANNED - W_POLICY_WORDS])
    assert scanned == n_bits  # every bit of the zone, set or not, once


def test_s1_no_block_is_ever_flagged_and_each_free_reports_it_again(zone: Zone) -> None:
    """S1 holds emptily; the price is that nothing is remembered."""
    freed, _buddies = free_alternating(zone, 20)
    cycle = Cycle(zone, "bitmap")
    cycle.run(Taker())
    assert reported_heads(zone) == []
    assert sum(zone.statistics().reported) == 0
    assert reported_by(cycle) == []  # the bits are gone, so a second run finds nothing
    for _time in range(2):
        pfn = zone.alloc(9)
        assert pfn in freed
        zone.free(pfn, 9)
        assert reported_by(cycle) == [pfn]


def test_it_is_lossy_for_what_was_allocated_merged_or_split(zone: Zone) -> None:
    """A bit whose block is no free head any more is dropped, and counted as looked at."""
    freed, buddies = free_alternating(zone, 20)
    taken = zone.alloc(9)  # its bit stays
    zone.free(buddies[3], 9)  # merges downwards: the bit of the lower one stands for both
    zone.free(buddies[5], 9)
    split = zone.alloc(0)
    assert taken is not None
    assert split is not None
    bits = bits_of(zone)
    lost = {taken, split}
    expected = sorted(set(freed) - lost)
    done_pfns = reported_by(Cycle(zone, "bitmap"))
    assert done_pfns == expected
    assert len(bits) > len(done_pfns)
    assert bits_of(zone) == []


def test_a_merge_to_a_lower_block_leaves_a_bit_inside_it(zone: Zone) -> None:
    """The bit of the upper half names no head: dropped. The lower one's reports the whole."""
    pfns = exhaust(zone, 9)
    lower, upper = pfns[0], pfns[1]
    zone.free(upper, 9)
    zone.free(lower, 9)
    zone.free(pfns[-1], 9)  # the min watermark, one page, keeps it
    assert bits_of(zone) == [0, 1, 127]
    orders: list[int] = []

    def report(batch: Batch) -> Outcome:
        orders.extend(batch.orders.tolist())
        return Outcome.DONE

    done = Cycle(zone, "bitmap").run(report)
    assert (done.blocks, done.nodes_visited, orders) == (1, 3, [10])


def test_s9_isolated_blocks_are_never_pulled(zone: Zone) -> None:
    """S9"""
    freed, _buddies = free_alternating(zone, 5)
    zone.isolate(freed[1] // PAGEBLOCK_PAGES)
    assert reported_by(Cycle(zone, "bitmap", capacity=1)) == [freed[0], *freed[2:]]


def test_isolation_obeys_the_min_watermark() -> None:
    """__isolate_free_page: more than min has to be free without the block, as for every policy that isolates."""
    zone = make_zone(32 * MIB, trigger="bitmap", min_watermark=1024, low_watermark=1025, high_watermark=1026)
    freed, _buddies = free_alternating(zone, 4)  # 2048 pages free
    taker = Taker()
    Cycle(zone, "bitmap").run(taker)
    assert taker.pfns == freed[:1]
    zone.validate()
    zone.close()


def test_s4_s15_blocks_go_back_to_the_head_and_ask_for_nothing(zone: Zone) -> None:
    """S4, S15: FPI_SKIP_REPORT_NOTIFY alone: an ordinary free otherwise, which sets no bit."""
    freed, _buddies = free_alternating(zone, 21)
    cycle = Cycle(zone, "bitmap", capacity=20)
    cycle.begin()
    batch = cycle.pull()
    assert batch is not None
    assert zone.statistics().in_flight_blocks == 20
    assert zone.statistics().free_pages == PAGEBLOCK_PAGES
    cycle.put_back(batch, Outcome.DONE)
    assert [pfn for pfn, _flag in zone.free_list(9, MOVABLE)] == [*freed[19::-1], freed[20]]
    assert zone.statistics().free_pages == 21 * PAGEBLOCK_PAGES
    assert bits_of(zone) == [freed[20] // PAGEBLOCK_PAGES]
    assert not zone.statistics().requested
    cycle.end()


def test_s8_blocks_of_a_failed_report_go_back_and_are_lost_to_it(zone: Zone) -> None:
    """S8: back and unflagged. Their bits are gone, those that the scan had not come to are still set."""
    freed, _buddies = free_alternating(zone, 20)
    done = Cycle(zone, "bitmap").run(lambda _batch: Outcome.FAILED)
    assert (done.failed, done.batches) == (True, 1)
    assert zone.statistics().free_pages == 20 * PAGEBLOCK_PAGES
    assert bits_of(zone) == [pfn // PAGEBLOCK_PAGES for pfn in freed[16:]]


def test_p1_bits_set_behind_the_scan_are_scanned_in_the_same_run(zone: Zone) -> None:
    """P1: the request is taken when a scan begins, so that a free during it asks for another."""
    freed, buddies = free_alternating(zone, 20)
    late = buddies[:16]
    seen: list[int] = []

    def report(batch: Batch) -> Outcome:
        if not seen:
            for pfn in late:
                zone.free(pfn, 9)  # their buddies are in flight: behind the scan, no merge
        seen.extend(batch.pfns.tolist())
        return Outcome.DONE

    Cycle(zone, "bitmap").run(report)
    assert set(freed) <= set(seen)
    assert bits_of(zone) == []
    assert not zone.statistics().requested
