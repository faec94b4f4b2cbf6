"""``rotate``, mainline of 2026: M1 to M6, on scenes small enough to count.

The thread's part of M1 and M3b is in test_rotate_reporter.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest

from common.geometry import PAGEBLOCK_PAGES, TOP_ORDER, Migratetype
from common.statistics import percentiles
from guest.allocator.zone import Zone
from guest.reporting.cycle import Batch, Cycle, Outcome
from guest.reporting.table import find_policy
from tests.allocator.arrange import ALLOC_NO_WATERMARKS, MIB, exhaust, make_zone
from tests.allocator.view import header_of, pageblock_types
from tests.reporting.arrange import (
    accept,
    flags_of,
    free_alternating,
    policy_cycle,
    policy_zone,
    report_everything,
    reported_heads,
    unreported_heads,
)

MOVABLE, UNMOVABLE, ISOLATE = Migratetype.MOVABLE, Migratetype.UNMOVABLE, Migratetype.ISOLATE
IDLE, REQUESTED, ACTIVE = "IDLE", "REQUESTED", "ACTIVE"
ALLOWED = {(IDLE, REQUESTED), (REQUESTED, ACTIVE), (ACTIVE, IDLE), (ACTIVE, REQUESTED)}


@pytest.fixture
def zone() -> Iterator[Zone]:
    """64 MiB, 32 pageblocks, per-CPU lists off, watermarks out of the way."""
    zone = policy_zone("rotate")
    yield zone
    zone.validate()
    zone.close()


def rotate(zone: Zone, *, capacity: int = 16) -> Cycle:
    return policy_cycle(zone, "rotate", capacity=capacity)


def entries(zone: Zone, order: int = 9, kind: Migratetype = MOVABLE) -> list[int]:
    return [pfn for pfn, _ in zone.free_list(order, kind)]


def state_of(zone: Zone) -> str:
    """``prdev->state``: a request during a run is REQUESTED."""
    now = zone.statistics()
    return REQUESTED if now.requested else ACTIVE if now.active else IDLE


def keep(batch: Batch) -> Outcome:
    """A host that acknowledges and discards nothing: as ``accept``, without a walk over the resident map."""
    assert batch.pfns.size > 0
    return Outcome.KEPT


def test_its_defaults_are_those_of_mainline() -> None:
    """Sections 0 and 4.1: 2 s, 32, any free, no re-arming after an error."""
    policy = find_policy("rotate")
    assert (policy.trigger, policy.delay_ns, policy.capacity) == ("any", 2_000_000_000, 32)
    assert policy.one_pass
    assert not policy.rearms


# ---------------------------------------------------------------- M1: states


def test_m1_the_state_moves_only_as_allowed(zone: Zone) -> None:
    """M1: over runs with frees before, during and after them, with a budget that is spent and with a failed report."""
    seen = [state_of(zone)]

    def look() -> None:
        if (now := state_of(zone)) != seen[-1]:
            seen.append(now)

    pfns = exhaust(zone)
    cycle = rotate(zone, capacity=2)
    for turn, outcome in enumerate([Outcome.DONE, Outcome.FAILED, Outcome.DONE, Outcome.DONE, Outcome.WITHDRAWN]):
        for pfn in pfns[turn::5][: 2 * turn]:
            zone.free(pfn, 9)
            look()
        cycle.begin()
        look()
        while (batch := cycle.pull()) is not None:
            look()
            if turn == 3:
                zone.free(pfns[-1], 9)
                look()
                assert zone.alloc(9, flags=ALLOC_NO_WATERMARKS) == pfns[-1]
            cycle.put_back(batch, outcome)
            look()
            if outcome is not Outcome.DONE:
                break
        cycle.end(abandon=outcome is not Outcome.DONE)
        look()
    moves = set(itertools.pairwise(seen))
    assert moves == ALLOWED


def test_m1_registration_and_any_free_of_the_minimum_order_ask(zone: Zone) -> None:
    """Section 4.1: no high-water mark."""
    assert state_of(zone) == REQUESTED
    pfns = exhaust(zone, 8)
    rotate(zone).run(accept)
    assert state_of(zone) == IDLE
    zone.free(pfns[0], 8)
    assert state_of(zone) == IDLE
    zone.free(pfns[1], 8)
    assert state_of(zone) == REQUESTED


@pytest.mark.parametrize("outcome", [Outcome.DONE, Outcome.FAILED])
def test_m1_a_request_during_a_run_is_not_lost(zone: Zone, outcome: Outcome) -> None:
    """M1: whatever came of the report; the run itself is one pass and does not go on for it."""
    freed, _ = free_alternating(zone, 4)
    extra = freed[-1] + 4 * PAGEBLOCK_PAGES
    seen: list[int] = []

    def report(batch: Batch) -> Outcome:
        seen.extend(int(pfn) for pfn in batch.pfns)
        zone.free(extra, 9)
        return outcome

    cycle = rotate(zone)
    done = cycle.run(report)
    assert sorted(seen) == freed
    assert done.batches == 1
    assert percentiles(cycle.pull_holds).count == 1  # the lock is not taken again to look
    assert done.requested
    assert state_of(zone) == REQUESTED
    assert int(header_of(zone)["refcnt"]) == 1
    assert rotate(zone).run(accept).blocks == (1 if outcome is Outcome.DONE else 5)
    assert state_of(zone) == IDLE


def test_m1_begin_answers_what_was_asked_before(zone: Zone) -> None:
    """M1: ACTIVE is set and the request cleared in one step."""
    free_alternating(zone, 2)
    cycle = rotate(zone)
    assert zone.statistics().requested
    cycle.begin()
    now = zone.statistics()
    assert (now.requested, now.active) == (False, True)
    assert int(header_of(zone)["refcnt"]) == 0
    assert not cycle.end()


def test_s15_neither_pull_nor_put_back_asks_for_a_run(zone: Zone) -> None:
    """S15: nor does a change of the pageblock beside it while the block is out."""
    freed, buddies = free_alternating(zone, 1)
    zone.isolate(buddies[0] // PAGEBLOCK_PAGES)
    cycle = rotate(zone)
    cycle.begin()
    batch = cycle.pull()
    assert batch is not None
    zone.unisolate(buddies[0] // PAGEBLOCK_PAGES)
    assert state_of(zone) == ACTIVE
    cycle.put_back(batch, Outcome.DONE)
    assert state_of(zone) == ACTIVE
    assert not cycle.end()
    assert reported_heads(zone) == freed


# ---------------------------------------------------------------- M2: budget


@pytest.mark.parametrize("capacity", [1, 2, 4])
@pytest.mark.parametrize("blocks", [1, 15, 16, 17, 31, 32, 33, 60])
def test_m2_full_reports_a_pass(blocks: int, capacity: int) -> None:
    """M2: at most ceil(nr_free / (16 * capacity)) + 1 full reports of a list; REQUESTED if it was the budget."""
    zone = policy_zone("rotate", 256 * MIB)
    free_alternating(zone, blocks)
    full = math.ceil(blocks / (16 * capacity)) + 1
    done = rotate(zone, capacity=capacity).run(keep)
    assert done.blocks == min(blocks, full * capacity)
    assert done.batches == math.ceil(done.blocks / capacity) <= full
    assert done.requested == (blocks > full * capacity)
    assert flags_of(zone).count("R") == done.blocks
    zone.validate()
    zone.close()


def test_m2_with_its_own_capacity_the_budget_is_the_kernels() -> None:
    """M2: ceil(nr_free / 512) + 1 reports of 32: 96 of 600 blocks in a pass."""
    zone = policy_zone("rotate", 16 * MIB, min_order=1)
    free_alternating(zone, 600, order=1)
    cycle = Cycle(zone, "rotate")
    done = cycle.run(keep)
    assert (done.batches, done.blocks, done.requested) == (3, 96, True)
    zone.validate()
    zone.close()


def test_m2_the_budget_counts_all_types_of_the_order(zone: Zone) -> None:
    """Section 4.1: ``nr_free`` is that of the order, isolated blocks included."""
    freed, _ = free_alternating(zone, 16)
    for pfn in freed[8:]:
        zone.isolate(pfn // PAGEBLOCK_PAGES)
    sizes: list[int] = []

    def report(batch: Batch) -> Outcome:
        sizes.append(len(batch.pfns))
        return Outcome.DONE

    rotate(zone, capacity=1).run(report)
    assert sizes == [1] * (16 // 16 + 1)


def test_m2_each_list_has_a_budget_of_its_own_and_one_batch_is_shared() -> None:
    """Section 4.1: ascending order, then type; a batch that one list leaves half full goes on with the next."""
    zone = policy_zone("rotate", 64 * MIB, min_order=8)
    pfns = exhaust(zone, 8)
    for pfn in (*pfns[0:6:2], pfns[8], pfns[9], pfns[12], pfns[13]):  # three of order 8, two of order 9
        zone.free(pfn, 8)
    zone.set_pageblock_migratetype(pfns[0] // PAGEBLOCK_PAGES, UNMOVABLE)
    seen: list[list[tuple[int, int]]] = []

    def report(batch: Batch) -> Outcome:
        seen.append([(int(pfn), int(order)) for pfn, order in zip(batch.pfns, batch.orders, strict=True)])
        return Outcome.DONE

    done = rotate(zone, capacity=4).run(report)
    # Each batch reads from the block that was isolated last: the array is filled from its end down.
    assert seen == [[(pfns[12], 9), (pfns[2], 8), (pfns[4], 8), (pfns[0], 8)], [(pfns[8], 9)]]
    assert not done.requested
    assert pageblock_types(zone)[pfns[0] // PAGEBLOCK_PAGES] == MOVABLE  # order 8: half a pageblock
    zone.validate()
    zone.close()


# ---------------------------------------------------------------- M3: rotation


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_m3_rotation_keeps_blocks_and_their_cyclic_order(zone: Zone, capacity: int) -> None:
    """M3: each pull takes the first unreported blocks and turns the rest to the first one not looked at."""
    free_alternating(zone, 12)
    cycle = rotate(zone, capacity=capacity)
    cycle.begin()
    while True:
        before = zone.free_list(9, MOVABLE)
        unreported = [pfn for pfn, flag in before if not flag]
        batch = cycle.pull()
        taken = [] if batch is None else [int(pfn) for pfn in batch.pfns]
        assert taken == unreported[: len(taken)][::-1]
        left = [pfn for pfn, _ in before if pfn not in taken]
        after = entries(zone)
        assert sorted(after) == sorted(left)
        turned = left.index(after[0])
        assert after == left[turned:] + left[:turned]
        if unreported[len(taken) :]:
            assert after[0] == unreported[len(taken)]
        if batch is None:
            break
        cycle.put_back(batch, Outcome.DONE)
        assert entries(zone) == after + taken  # put-backs at the tail, in the order of the batch (M6)
    cycle.end()


def test_m3_a_stopped_pass_leaves_the_first_unseen_block_in_front(zone: Zone) -> None:
    """M3: stopped by its budget; the next pass begins right there."""
    freed, _ = free_alternating(zone, 12)
    order = entries(zone)
    assert sorted(order) == freed
    cycle = rotate(zone, capacity=2)
    done = cycle.run(keep)
    assert (done.blocks, done.requested) == (4, True)
    assert entries(zone) == [*order[4:], order[1], order[0], order[3], order[2]]
    assert flags_of(zone) == "U" * 8 + "R" * 4
    before = zone.statistics().nodes_visited
    cycle.begin()
    batch = cycle.pull()
    assert batch is not None
    assert [int(pfn) for pfn in batch.pfns] == [order[5], order[4]]
    assert zone.statistics().nodes_visited - before == 3  # two, and the one that found the batch full
    cycle.put_back(batch, Outcome.DONE)
    cycle.end()


def test_m3_a_reported_stretch_at_the_head_is_turned_away(zone: Zone) -> None:
    """M3: compaction put it there; it is walked past once."""
    free_alternating(zone, 12)
    cycle = rotate(zone, capacity=2)
    cycle.run(keep)
    zone.rotate(9, MOVABLE, entries(zone)[8])
    assert flags_of(zone) == "R" * 4 + "U" * 8
    cycle.begin()
    batch = cycle.pull()
    assert batch is not None
    assert flags_of(zone) == "U" * 6 + "R" * 4
    cycle.put_back(batch, Outcome.DONE)
    cycle.end()


def test_m3_a_list_that_was_walked_to_its_end_is_not_turned(zone: Zone) -> None:
    """Section 4.1: there is no `next` to bring to the front."""
    free_alternating(zone, 6)
    report_everything(rotate(zone))
    order = entries(zone)
    assert rotate(zone).run(accept).blocks == 0
    assert entries(zone) == order


# ---------------------------------------------------------------- M3b: errors


@pytest.mark.parametrize("good", [0, 1])
def test_m3b_an_error_ends_the_pass_and_asks_for_nothing(zone: Zone, good: int) -> None:
    """M3b and S8: blocks back, the failed batch unflagged, no request; a later free asks."""
    freed, buddies = free_alternating(zone, 9)
    outcomes = iter([Outcome.DONE] * good + [Outcome.FAILED])
    done = rotate(zone, capacity=2).run(lambda _batch: next(outcomes))
    assert (done.batches, done.failed, done.requested) == (good + 1, True, False)
    assert sorted(entries(zone)) == freed
    assert len(reported_heads(zone)) == 2 * good
    assert state_of(zone) == IDLE
    assert zone.statistics().in_flight_blocks == 0
    zone.free(buddies[0], 9)
    assert state_of(zone) == REQUESTED
    report_everything(rotate(zone, capacity=2))
    assert unreported_heads(zone) == []


# ---------------------------------------------------------------- M4: watermarks


@pytest.mark.parametrize(("short_of", "touched"), [(0, True), (1, False)])
def test_m4_the_gate_goes_by_the_minimum_order(short_of: int, touched: bool) -> None:
    """M4: capacity << order_min, whatever the orders of the blocks."""
    capacity, free_pages = 2, 4 * PAGEBLOCK_PAGES
    low = free_pages - (capacity << 4) - 1 + short_of
    zone = make_zone(64 * MIB, trigger="any", min_order=4, low_watermark=low)
    free_alternating(zone, 4)
    assert (rotate(zone, capacity=capacity).run(keep).blocks > 0) == touched
    zone.close()


@pytest.mark.parametrize(("short_of", "touched"), [(0, True), (1, False)])
def test_m4_a_zone_at_or_below_the_gate_is_not_touched(short_of: int, touched: bool) -> None:
    """M4: low watermark + (capacity << order), which has to be exceeded."""
    capacity, free_pages = 2, 4 * PAGEBLOCK_PAGES
    low = free_pages - (capacity << 9) - 1 + short_of
    zone = make_zone(64 * MIB, trigger="any", low_watermark=low)
    free_alternating(zone, 4)
    order = entries(zone)
    done = rotate(zone, capacity=capacity).run(keep)
    assert (done.blocks > 0) == touched
    if not touched:
        assert (entries(zone), done.nodes_visited, done.requested) == (order, 0, False)
        zone.free(order[0] + PAGEBLOCK_PAGES, 9)
        assert rotate(zone, capacity=capacity).run(keep).blocks > 0
    zone.close()


def test_m4_the_gate_is_looked_at_once_a_pass() -> None:
    """Section 4.1: at the head of the zone, not before each batch; what is allocated since does not close it."""
    zone = make_zone(64 * MIB, trigger="any", low_watermark=4 * PAGEBLOCK_PAGES - (2 << 9) - 1)
    free_alternating(zone, 4)

    def report(_batch: Batch) -> Outcome:
        zone.alloc(0, flags=ALLOC_NO_WATERMARKS)
        return Outcome.DONE

    done = rotate(zone, capacity=2).run(report)
    assert done.batches > 1
    assert rotate(zone, capacity=2).run(keep).blocks == 0, "the next pass finds it closed"
    zone.close()


@pytest.mark.parametrize(("spare", "taken"), [(0, 2), (1, 3)])
def test_m4_no_isolation_below_the_min_watermark(spare: int, taken: int) -> None:
    """M4: more than min has to be free without the block. That list ends with the block in front; nothing is asked."""
    zone = make_zone(16 * MIB, trigger="any", min_watermark=1024 - spare, low_watermark=1100)
    order = entries(zone, TOP_ORDER)
    assert len(order) == 4

    def report(batch: Batch) -> Outcome:
        assert zone.statistics().free_pages > 1024 - spare
        return Outcome.DONE

    done = rotate(zone, capacity=4).run(report)
    assert (done.blocks, done.batches, done.requested) == (taken, 1, False)
    assert entries(zone, TOP_ORDER) == order[taken:] + order[:taken][::-1]
    zone.validate()
    zone.close()


# ---------------------------------------------------------------- M5: an idle guest


def passes_until_reported(zone: Zone, capacity: int) -> int:
    """Passes until no more is asked for; nothing is left unreported then."""
    cycle = rotate(zone, capacity=capacity)
    passes = 1
    while cycle.run(keep).requested:
        passes += 1
        assert passes <= 100
    assert zone.unreported_pages() == 0
    zone.validate()
    return passes


@pytest.mark.parametrize(("memory_mib", "capacity"), [(64, 1), (256, 1), (256, 2), (256, 4), (512, 1), (1024, 1)])
def test_m5_passes_over_one_list(memory_mib: int, capacity: int) -> None:
    """M5: an idle zone of one list takes ceil(n / (capacity * (ceil(n / (16 * capacity)) + 1))) passes, 16 at most."""
    zone = policy_zone("rotate", memory_mib * MIB)
    blocks = memory_mib // 4
    a_pass = capacity * (math.ceil(blocks / (16 * capacity)) + 1)
    passes = passes_until_reported(zone, capacity)
    assert passes == math.ceil(blocks / a_pass) <= 16
    zone.close()


@pytest.mark.parametrize("order", [0, 3, 9])
@pytest.mark.parametrize("capacity", [1, 4, 32])
def test_m5_passes_over_lists_of_small_blocks(order: int, capacity: int) -> None:
    """M5: as above, with every other block of an order free."""
    zone = policy_zone("rotate", 16 * MIB, min_order=order)
    blocks = min(600, 4096 >> (order + 1))
    free_alternating(zone, blocks, order=order)
    a_pass = capacity * (math.ceil(blocks / (16 * capacity)) + 1)
    assert passes_until_reported(zone, capacity) == math.ceil(blocks / a_pass) <= 16
    zone.close()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("capacity", [1, 3, 32])
def test_m5_a_fragmented_zone_takes_at_most_16_passes(seed: int, capacity: int) -> None:
    """M5: each pass takes more than a sixteenth of each list, since a full report is one of its blocks at least.

    More exactly: budget reports and one more that the list shares with those before it, so budget * capacity + 1.
    """
    zone = policy_zone("rotate", 32 * MIB, min_order=2)
    pfns = exhaust(zone, 2)
    for pfn in np.random.default_rng(seed).permutation(pfns)[: len(pfns) // 2]:
        zone.free(int(pfn), 2)
    for pageblock in range(0, 16, 5):
        zone.set_pageblock_migratetype(pageblock, UNMOVABLE)
    assert 2 <= passes_until_reported(zone, capacity) <= 16
    zone.close()


# ---------------------------------------------------------------- M6: where blocks are put


def test_m6_later_frees_are_at_the_head_and_are_found_first(zone: Zone) -> None:
    """M6: put-backs at the tail, so a later pass finds the new ones before it meets a Reported block."""
    freed, _ = free_alternating(zone, 6)
    report_everything(rotate(zone))
    fresh = [freed[-1] + 2 * step * PAGEBLOCK_PAGES for step in (1, 2)]
    for pfn in fresh:
        zone.free(pfn, 9)
    assert flags_of(zone) == "UURRRRRR"
    cycle = rotate(zone)
    cycle.begin()
    batch = cycle.pull()
    assert batch is not None
    assert [int(pfn) for pfn in batch.pfns] == fresh  # the later free was first on the list, isolated first: last here
    cycle.put_back(batch, Outcome.DONE)
    assert entries(zone)[-2:] == fresh
    cycle.end()
    assert flags_of(zone) == "R" * 8


def test_s9_a_block_isolated_in_flight_goes_to_isolate_and_stays(zone: Zone) -> None:
    """S9 with plain lists: the migratetype is read again at put-back."""
    freed, _ = free_alternating(zone, 2)
    cycle = rotate(zone)
    cycle.begin()
    batch = cycle.pull()
    assert batch is not None
    zone.isolate(freed[0] // PAGEBLOCK_PAGES)
    cycle.put_back(batch, Outcome.DONE)
    zone.validate()
    cycle.end()
    assert entries(zone, 9, ISOLATE) == [freed[0]]
    assert cycle.run(accept).blocks == 0
