"""Safety, bookkeeping and progress of the cycle, one test or more for each invariant.

``policy`` goes over the policies that an invariant holds for. The boundary's own (D1 to D7) are in
test_boundary_invariants.py, those of other policies in files of their names, the repaired faults of v9 in
test_v9_faults.py, B4 and the waiting side of P2 with the reporter thread.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from common.errors import AllocatorError
from common.geometry import N_ORDERS, PAGEBLOCK_PAGES, Migratetype
from guest.allocator.zone import Zone
from guest.reporting.cycle import Batch, Outcome
from tests.allocator.arrange import ALLOC_NO_WATERMARKS, MIB, exhaust, make_zone
from tests.allocator.view import boundary_of, header_of
from tests.reporting.arrange import (
    IN_FLIGHT_KIND,
    accept,
    boundary_cycle,
    flags_of,
    free_alternating,
    kinds_of,
    policy_cycle,
    policy_zone,
    report_everything,
    reported_heads,
    unreported_heads,
)

MOVABLE, ISOLATE = Migratetype.MOVABLE, Migratetype.ISOLATE

LIKE_V9 = ("boundary", "scan", "skip-walk")  # a high-water mark; a run takes everything
ROTATE = "rotate"


@pytest.fixture(params=[*LIKE_V9, ROTATE])
def policy(request: pytest.FixtureRequest) -> str:
    """Each policy whose blocks go back to the lists after the report; a test may name fewer."""
    name: str = request.param
    return name


@pytest.fixture
def zone(policy: str) -> Iterator[Zone]:
    """64 MiB, 32 pageblocks, per-CPU lists off, a run asked for at 2 blocks."""
    zone = policy_zone(policy)
    yield zone
    zone.validate()
    zone.close()


def managed(zone: Zone) -> int:
    """Pages that the counters account for (S4)."""
    now = zone.statistics()
    return now.free_pages + now.isolated_pages + now.pcp_pages + now.in_flight_pages + now.allocated_pages


# ---------------------------------------------------------------- safety


def test_s1_reported_means_a_free_head_of_min_order_on_exactly_one_list(zone: Zone, policy: str) -> None:
    """S1: after a run over blocks of mixed orders."""
    pfns = exhaust(zone, 8)
    for pfn in (*pfns[0:40:4], *pfns[40:60], pfns[61]):
        zone.free(pfn, 8)
    report_everything(policy_cycle(zone, policy, capacity=3))
    heads = reported_heads(zone)
    listed = [
        (pfn, order)
        for order in range(N_ORDERS)
        for kind in Migratetype
        for pfn, flag in zone.free_list(order, kind)
        if flag
    ]
    assert heads, "the scene has blocks of order 9 and 10 to report"
    assert sorted(pfn for pfn, _ in listed) == heads
    assert all(order >= 9 for _, order in listed)


@pytest.mark.parametrize("min_order", [0, 5, 9, 10])
def test_s1_no_block_below_min_order_is_pulled(min_order: int, policy: str) -> None:
    """S1: fill goes down to the minimum order and no further."""
    zone = policy_zone(policy, 16 * MIB, min_order=min_order)
    held = [zone.alloc(0) for _ in range(3)]
    orders: set[int] = set()

    def report(batch: Batch) -> Outcome:
        orders.update(int(order) for order in batch.orders)
        return Outcome.DONE

    report_everything(policy_cycle(zone, policy), report)
    free = {order for order in range(N_ORDERS) if zone.statistics().nr_free[order]}
    assert None not in held
    assert orders == {order for order in free if order >= min_order}
    zone.validate()
    zone.close()


def test_s2_flag_is_lost_when_the_block_is_allocated(zone: Zone, policy: str) -> None:
    """S2: and does not come back with the free."""
    free_alternating(zone, 1)
    report_everything(policy_cycle(zone, policy))
    assert flags_of(zone) == "R"
    pfn = zone.alloc(9, flags=ALLOC_NO_WATERMARKS)
    assert pfn is not None
    assert reported_heads(zone) == []
    assert zone.statistics().reported[9] == 0
    zone.free(pfn, 9)
    assert flags_of(zone) == "U"


@pytest.mark.parametrize("order", [0, 5, 9])
def test_s2_s7_halves_of_a_split_are_not_reported(zone: Zone, order: int, policy: str) -> None:
    """S2 and S7: split halves are added anew."""
    report_everything(policy_cycle(zone, policy))
    before = zone.statistics().reported
    pfn = zone.alloc(order)
    assert pfn is not None
    after = zone.statistics().reported
    assert after[10] == before[10] - 1
    assert sum(after[:10]) == 0
    assert all(flag == (size == 10) for size in range(N_ORDERS) for _, flag in zone.free_list(size, MOVABLE))


def test_s2_s7_merge_of_a_reported_block_is_not_reported(zone: Zone, policy: str) -> None:
    """S2 and S7: a freed buddy swallows the flag."""
    freed, buddies = free_alternating(zone, 1)
    report_everything(policy_cycle(zone, policy))
    zone.free(buddies[0], 9)
    assert zone.free_list(10, MOVABLE) == [(freed[0], False)]
    assert zone.statistics().reported_pages == 0


def test_s2_flag_is_lost_by_isolation_at_the_latest_when_it_ends(zone: Zone, policy: str) -> None:
    """S2: without ACTIVE the clearing may be put off until the block leaves isolation."""
    freed, _ = free_alternating(zone, 1)
    report_everything(policy_cycle(zone, policy))
    pageblock = freed[0] // PAGEBLOCK_PAGES
    zone.isolate(pageblock)
    zone.validate()
    zone.unisolate(pageblock)
    assert zone.free_list(9, MOVABLE) == [(freed[0], False)]
    assert zone.statistics().reported[9] == 0


def test_s3_a_block_in_flight_is_on_no_list_and_is_never_handed_out(zone: Zone, policy: str) -> None:
    """S3: with all else allocated page by page, nor can any page of it be freed."""
    free_alternating(zone, 4)
    cycle = policy_cycle(zone, policy, capacity=2)
    cycle.begin()
    batch = cycle.pull()
    assert batch is not None
    flying = {int(pfn) + page for pfn in batch.pfns for page in range(PAGEBLOCK_PAGES)}
    listed = {pfn for order in range(N_ORDERS) for kind in Migratetype for pfn, _ in zone.free_list(order, kind)}
    assert not listed & flying
    assert {int(pfn) for pfn in batch.pfns} == {int(pfn) for pfn in (kinds_of(zone) == IN_FLIGHT_KIND).nonzero()[0]}
    assert len(got := exhaust(zone, 0)) == 2 * PAGEBLOCK_PAGES
    assert not set(got) & flying
    for pfn in sorted(flying)[::100]:
        with pytest.raises(AllocatorError):
            zone.free(pfn, 0)
    cycle.put_back(batch, Outcome.DONE)
    cycle.end()


def test_s3_a_block_in_flight_does_not_merge_with_a_neighbour(zone: Zone, policy: str) -> None:
    """S3: the buddy is freed while the block is out."""
    freed, buddies = free_alternating(zone, 1)
    cycle = policy_cycle(zone, policy)
    cycle.begin()
    batch = cycle.pull()
    assert batch is not None
    zone.free(buddies[0], 9)
    assert zone.free_list(9, MOVABLE) == [(buddies[0], False)]
    assert zone.statistics().nr_free[10] == 0
    assert kinds_of(zone)[freed[0]] == IN_FLIGHT_KIND
    cycle.put_back(batch, Outcome.DONE)
    cycle.end()


@pytest.mark.parametrize("outcome", list(Outcome))
def test_s4_pull_lowers_free_by_what_it_took_and_put_back_restores_it(
    zone: Zone, outcome: Outcome, policy: str
) -> None:
    """S4, sections 1.5 and 1.6: exactly, whatever came of the report, at each release of the lock."""
    zone.alloc(3)
    n_pages = zone.statistics().n_pages
    cycle = policy_cycle(zone, policy, capacity=3)
    for _ in range(3):
        cycle.begin()
        before = zone.statistics().free_pages
        batch = cycle.pull()
        assert batch is not None
        taken = int((1 << batch.orders).sum())
        assert zone.statistics().free_pages == before - taken
        assert zone.statistics().in_flight_pages == taken
        assert managed(zone) == n_pages
        cycle.put_back(batch, outcome)
        assert zone.statistics().free_pages == before
        assert zone.statistics().in_flight_pages == zone.statistics().in_flight_blocks == 0
        assert managed(zone) == n_pages
        cycle.end()


def test_s7_merge_at_put_back_is_not_reported(zone: Zone, policy: str) -> None:
    """S7: the bigger block holds memory that was never discarded."""
    freed, buddies = free_alternating(zone, 1)
    cycle = policy_cycle(zone, policy)
    cycle.begin()
    batch = cycle.pull()
    assert batch is not None
    zone.free(buddies[0], 9)
    cycle.put_back(batch, Outcome.DONE)
    assert zone.free_list(10, MOVABLE) == [(freed[0], False)]
    assert zone.statistics().reported_pages == 0
    cycle.end()


def test_s7_two_reported_blocks_that_merge_are_not_reported(zone: Zone, policy: str) -> None:
    """S7: buddies both free stay apart only at the edge of isolation; when that ends, the flags end too."""
    freed, buddies = free_alternating(zone, 1)
    report_everything(policy_cycle(zone, policy))
    zone.isolate(freed[0] // PAGEBLOCK_PAGES)
    zone.free(buddies[0], 9)
    report_everything(policy_cycle(zone, policy))
    assert zone.free_list(9, MOVABLE) == [(buddies[0], True)]
    zone.unisolate(freed[0] // PAGEBLOCK_PAGES)
    assert zone.free_list(10, MOVABLE) == [(freed[0], False)]
    assert zone.statistics().reported_pages == 0


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.WITHDRAWN])
def test_s8_blocks_of_a_failed_report_are_put_back_unflagged(zone: Zone, outcome: Outcome, policy: str) -> None:
    """S8: v15 and later; v9 flags them although nothing was discarded."""
    freed, _ = free_alternating(zone, 5)
    policy_cycle(zone, policy, capacity=2).run(lambda batch: outcome)
    assert sorted(pfn for pfn, _ in zone.free_list(9, MOVABLE)) == freed
    assert reported_heads(zone) == []
    assert zone.statistics().reported_pages == 0
    assert zone.statistics().in_flight_blocks == 0
    report_everything(policy_cycle(zone, policy, capacity=2))
    assert reported_heads(zone) == freed


def test_s9_isolated_blocks_are_never_pulled(zone: Zone, policy: str) -> None:
    """S9: even when there is nothing else."""
    freed, _ = free_alternating(zone, 4)
    for pfn in freed[:2]:
        zone.isolate(pfn // PAGEBLOCK_PAGES)
    pulled: list[int] = []

    def report(batch: Batch) -> Outcome:
        pulled.extend(int(pfn) for pfn in batch.pfns)
        return Outcome.DONE

    report_everything(policy_cycle(zone, policy, capacity=1), report)
    assert sorted(pulled) == freed[2:]
    assert sorted(pfn for pfn, flag in zone.free_list(9, ISOLATE) if not flag) == freed[:2]


@pytest.mark.parametrize(("capacity", "sizes"), [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (8, [7]), (64, [7])])
def test_s10_batches_are_full_but_the_last_which_is_marked(
    zone: Zone, capacity: int, sizes: list[int], policy: str
) -> None:
    """S10: at most ``capacity`` blocks in flight; a short batch, and only that, says it is the last.

    Mainline looks ahead: what is left at the end of a pass is the last batch, full or not.
    """
    free_alternating(zone, 7)
    seen: list[tuple[int, bool]] = []

    def report(batch: Batch) -> Outcome:
        assert zone.statistics().in_flight_blocks == len(batch.pfns) == len(batch.orders) <= capacity
        seen.append((len(batch.pfns), batch.last))
        return Outcome.DONE

    report_everything(policy_cycle(zone, policy, capacity=capacity), report)
    assert [size for size, _ in seen] == sizes
    last = [size < capacity for size in sizes]
    if policy == ROTATE:
        last = [False] * (len(sizes) - 1) + [True]
    assert [marked for _, marked in seen] == last
    assert zone.statistics().in_flight_max_blocks == max(sizes)


def test_s10_the_zone_lock_is_not_held_while_the_host_works(zone: Zone, policy: str) -> None:
    """S10: allocations and frees go on during a report."""
    free_alternating(zone, 4)
    done: list[int] = []

    def report(batch: Batch) -> Outcome:
        pfn = zone.alloc(9, flags=ALLOC_NO_WATERMARKS)
        assert pfn is not None
        assert pfn not in batch.pfns
        zone.free(pfn, 9)
        done.append(pfn)
        return Outcome.DONE

    policy_cycle(zone, policy, capacity=3).run(report)
    assert done


@pytest.mark.parametrize("policy", LIKE_V9)
def test_s15_put_back_notifies_nobody(zone: Zone, policy: str) -> None:
    """S15: a merge at put-back lifts nr_free[10] over the mark, and no run is asked for."""
    freed, buddies = free_alternating(zone, 1)
    held = exhaust_pair(zone)
    cycle = policy_cycle(zone, policy)
    cycle.begin()
    batch = cycle.pull()
    assert batch is not None
    assert batch.last
    assert not zone.statistics().requested
    zone.free(held[0], 9)
    zone.free(held[1], 9)
    zone.free(buddies[0], 9)
    assert zone.statistics().nr_free[10] == 1
    assert not zone.statistics().requested
    cycle.put_back(batch, Outcome.DONE)
    assert zone.free_list(10, MOVABLE)[-1] == (freed[0], False)
    assert zone.statistics().nr_free[10] - zone.statistics().reported[10] == 2
    assert not zone.statistics().requested
    cycle.end()


def exhaust_pair(zone: Zone) -> tuple[int, int]:
    """Two allocated buddies of order 9 far from the start of the zone (all memory is allocated at order 9)."""
    last = zone.statistics().n_pages - 2 * PAGEBLOCK_PAGES
    return last, last + PAGEBLOCK_PAGES


# ---------------------------------------------------------------- bookkeeping


def test_b1_counter_is_the_number_of_flags_on_the_lists_of_an_order(zone: Zone, policy: str) -> None:
    """B1: through a run, allocations, merges and isolation."""
    freed, buddies = free_alternating(zone, 8)

    def check() -> None:
        now = zone.statistics()
        for order in range(N_ORDERS):
            flags = [flag for kind in Migratetype for _, flag in zone.free_list(order, kind)]
            assert now.reported[order] == sum(flags)
            assert now.nr_free[order] == len(flags)
        assert now.reported_pages == sum(count << order for order, count in enumerate(now.reported))

    def report(batch: Batch) -> Outcome:
        check()
        return Outcome.DONE

    report_everything(policy_cycle(zone, policy, capacity=3), report)
    check()
    assert zone.statistics().reported[9] == 8
    zone.alloc(9, flags=ALLOC_NO_WATERMARKS)
    check()
    zone.free(buddies[3], 9)
    check()
    zone.isolate(freed[5] // PAGEBLOCK_PAGES)
    check()
    zone.unisolate(freed[5] // PAGEBLOCK_PAGES)
    check()


def test_b2_one_reference_for_the_zone_that_asks(zone: Zone, policy: str) -> None:
    """B2: taken with REQUESTED, dropped with it at underflow."""
    pfns = exhaust(zone)
    cycle = policy_cycle(zone, policy)
    cycle.run(accept)
    assert (zone.statistics().requested, int(header_of(zone)["refcnt"])) == (False, 0)
    zone.free(pfns[0], 9)
    zone.free(pfns[2], 9)
    zone.free(pfns[4], 9)
    assert (zone.statistics().requested, int(header_of(zone)["refcnt"])) == (True, 1)
    cycle.run(accept)
    assert (zone.statistics().requested, int(header_of(zone)["refcnt"])) == (False, 0)


@pytest.mark.parametrize("policy", LIKE_V9)
@pytest.mark.parametrize("high_water_mark", [1, 2, 31, 32])
def test_b3_a_run_is_asked_for_exactly_at_the_high_water_mark(high_water_mark: int, policy: str) -> None:
    """B3: one block fewer must not, that block must; counted above what is reported already."""
    zone = policy_zone(policy, 256 * MIB, high_water_mark=high_water_mark)
    pfns = exhaust(zone)[::2]
    cycle = policy_cycle(zone, policy)
    cycle.run(accept)
    for part in (pfns[:high_water_mark], pfns[32 : 32 + high_water_mark]):
        for pfn in part[:-1]:
            zone.free(pfn, 9)
            assert not zone.statistics().requested
        zone.free(part[-1], 9)
        assert zone.statistics().requested
        cycle.run(accept)
        assert not zone.statistics().requested
    zone.close()


def test_b3_default_mark_is_v9s_32() -> None:
    """B3: PAGE_REPORTING_HWM of v9."""
    zone = make_zone(256 * MIB)
    pfns = exhaust(zone)[::2]
    boundary_cycle(zone).run(accept)
    for pfn in pfns[:31]:
        zone.free(pfn, 9)
    assert not zone.statistics().requested
    zone.free(pfns[31], 9)
    assert zone.statistics().requested
    zone.close()


@pytest.mark.parametrize("trigger", ["off"])
def test_b3_no_trigger_no_request(trigger: str) -> None:
    """B3, step 1: the static key is off."""
    zone = make_zone(64 * MIB, high_water_mark=1, trigger=trigger)
    pfns = exhaust(zone)
    boundary_cycle(zone).run(accept)
    for pfn in pfns:
        zone.free(pfn, 9)
    assert not zone.statistics().requested
    zone.close()


def test_b3_frees_below_min_order_ask_for_nothing(zone: Zone, policy: str) -> None:
    """B3, step 2."""
    pfns = exhaust(zone, 8)
    report_everything(policy_cycle(zone, policy))
    for pfn in pfns[::2]:
        zone.free(pfn, 8)
    assert zone.statistics().nr_free[8] == len(pfns) // 2 > 2
    assert not zone.statistics().requested


@pytest.mark.parametrize("policy", ["boundary"])
def test_b5_boundaries_are_fresh_at_the_start_of_each_cycle_isolate_included(zone: Zone, policy: str) -> None:
    """B5, sections 1.4 and 1.8: the page that was the ISOLATE boundary is elsewhere when the next cycle starts."""
    free_alternating(zone, 6)
    cycle = policy_cycle(zone, policy, capacity=2)
    cycle.begin()
    assert zone.statistics().active
    batch = cycle.pull()
    assert batch is not None
    cycle.put_back(batch, Outcome.DONE)
    assert boundary_of(zone, 9, MOVABLE) is not None
    isolated = int(batch.pfns[0]) // PAGEBLOCK_PAGES
    zone.isolate(isolated)
    assert boundary_of(zone, 9, ISOLATE) == isolated * PAGEBLOCK_PAGES
    cycle.end()
    assert not zone.statistics().active
    zone.unisolate(isolated)
    cycle.begin()
    assert zone.statistics().active
    assert {boundary_of(zone, order, kind) for order in range(N_ORDERS) for kind in Migratetype} == {None}
    cycle.end()


# ---------------------------------------------------------------- progress


@pytest.mark.parametrize("policy", LIKE_V9)
@pytest.mark.parametrize("capacity", [1, 3, 16])
@pytest.mark.parametrize("min_order", [0, 3, 9, 10])
def test_p1_a_run_ends_with_nothing_left_unreported(capacity: int, min_order: int, policy: str) -> None:
    """P1: everything unreported is taken, what is below the high-water mark too."""
    zone = policy_zone(policy, 16 * MIB, min_order=min_order, high_water_mark=32)
    pfns = exhaust(zone, 2)
    for pfn in pfns[1::3]:
        zone.free(pfn, 2)
    for pfn in pfns[600:900:3]:
        zone.free(pfn, 2)
    policy_cycle(zone, policy, capacity=capacity).run(accept)
    assert unreported_heads(zone, min_order) == []
    assert not zone.statistics().active
    assert not zone.statistics().requested
    zone.validate()
    zone.close()


def test_p1_a_second_run_finds_nothing(zone: Zone, policy: str) -> None:
    """P1: no block is reported twice while it stays free."""
    free_alternating(zone, 6)
    cycle = policy_cycle(zone, policy)
    assert cycle.run(accept).blocks == 6
    again = cycle.run(accept)
    assert (again.blocks, again.batches) == (0, 0)


@pytest.mark.parametrize("policy", LIKE_V9)
def test_p1_frees_during_the_report_are_taken_by_the_same_run(zone: Zone, policy: str) -> None:
    """P1: REQUESTED set again while the zone is reported makes the loop go on."""
    _, buddies = free_alternating(zone, 6)
    rest = list(range(8 * PAGEBLOCK_PAGES * 2, 16 * PAGEBLOCK_PAGES * 2, 2 * PAGEBLOCK_PAGES))

    def report(batch: Batch) -> Outcome:
        if rest:
            zone.free(rest.pop(), 9)
            zone.free(rest.pop(), 9)
        return Outcome.DONE

    policy_cycle(zone, policy, capacity=16).run(report)
    assert buddies
    assert rest == []
    assert unreported_heads(zone) == []


def test_p2_a_quiet_guest_asks_for_nothing(zone: Zone, policy: str) -> None:
    """P2: neither the run itself nor allocations set REQUESTED."""
    free_alternating(zone, 8)
    report_everything(policy_cycle(zone, policy))
    assert not zone.statistics().requested
    while zone.alloc(0, flags=ALLOC_NO_WATERMARKS) is not None:
        pass
    assert not zone.statistics().requested


def test_p3_after_any_free_a_run_is_asked_for_or_few_blocks_are_unreported(zone: Zone, policy: str) -> None:
    """P3: at the order the block merged to."""
    pfns = exhaust(zone, 8)
    report_everything(policy_cycle(zone, policy))
    for step, pfn in enumerate(pfns[::3] + pfns[1::3] + pfns[2::3]):
        zone.free(pfn, 8)
        now = zone.statistics()
        grown = [order for order in range(9, N_ORDERS) if now.nr_free[order]]
        assert now.requested or all(now.nr_free[order] - now.reported[order] < 2 for order in grown)
        if step % 16 == 15:
            report_everything(policy_cycle(zone, policy, capacity=2))
