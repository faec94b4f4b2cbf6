"""``scan`` against ``boundary``: the same blocks in the same order, at a cost that grows with what is reported (D7)."""

from __future__ import annotations

import pytest

from common.geometry import PAGEBLOCK_PAGES, Migratetype
from guest.reporting.cycle import Batch, Outcome
from guest.reporting.table import find_policy
from tests.allocator.arrange import ALLOC_NO_WATERMARKS, MIB
from tests.reporting.arrange import (
    accept,
    flags_of,
    free_alternating,
    policy_cycle,
    policy_zone,
    report_everything,
    unreported_heads,
)

MOVABLE = Migratetype.MOVABLE
LISTS = 2 * 5  # orders 9 and 10, five types that may be pulled


def test_all_but_the_search_is_v9s() -> None:
    """Trigger, delay, capacity and mark of the table."""
    scan, boundary = find_policy("scan"), find_policy("boundary")
    same = ("trigger", "delay_ns", "capacity", "high_water_mark", "rearms", "one_pass")
    assert [getattr(scan, name) for name in same] == [getattr(boundary, name) for name in same]


@pytest.mark.parametrize("capacity", [1, 3, 16])
def test_a_run_reports_what_the_boundary_reports_in_the_same_batches(capacity: int) -> None:
    """Section 1.5: on lists of U* both take from the tail, so the batches are equal to the block."""
    batches: dict[str, list[list[int]]] = {}
    for policy in ("boundary", "scan"):
        zone = policy_zone(policy)
        free_alternating(zone, 11)
        seen = batches.setdefault(policy, [])

        def report(batch: Batch, seen: list[list[int]] = seen) -> Outcome:
            seen.append([int(pfn) for pfn in batch.pfns])
            return Outcome.DONE

        policy_cycle(zone, policy, capacity=capacity).run(report)
        zone.validate()
        zone.close()
    assert batches["scan"] == batches["boundary"] != []


def test_a_put_back_goes_to_the_true_tail() -> None:
    """D4 has no counterpart: there is no boundary to land ahead of."""
    zone = policy_zone("scan")
    free_alternating(zone, 4)
    cycle = policy_cycle(zone, "scan", capacity=2)
    cycle.begin()
    taken: list[int] = []
    while (batch := cycle.pull()) is not None:
        taken += [int(pfn) for pfn in batch.pfns]
        cycle.put_back(batch, Outcome.DONE)
        assert [pfn for pfn, _ in zone.free_list(9, MOVABLE)][-len(taken) :] == taken
        zone.validate()
    cycle.end()
    assert flags_of(zone) == "RRRR"
    zone.close()


def nodes_for(policy: str, reported: int, fresh: int) -> int:
    """Nodes looked at for ``fresh`` blocks at the head of a list whose other ``reported`` blocks are Reported."""
    zone = policy_zone(policy, (reported + fresh) * 4 * MIB, high_water_mark=1)
    freed, _ = free_alternating(zone, reported + fresh)
    held = [zone.alloc(9, flags=ALLOC_NO_WATERMARKS) for _ in range(fresh)]
    assert set(held) <= set(freed)
    cycle = policy_cycle(zone, policy)
    assert cycle.run(accept).blocks == reported
    for pfn in held:
        assert pfn is not None
        zone.free(pfn, 9)
    done = cycle.run(accept)
    assert done.blocks == fresh
    zone.validate()
    zone.close()
    return done.nodes_visited


def test_d7_the_cost_of_a_block_grows_with_what_is_reported_for_scan_and_not_for_boundary() -> None:
    """D7: O(1) a block with the boundary; without it the whole reported run, and once more to see that
    nothing is left.
    """
    fresh = 4
    shares = (8, 32, 128)
    assert len({nodes_for("boundary", reported, fresh) for reported in shares}) == 1
    assert [nodes_for("scan", reported, fresh) for reported in shares] == [
        fresh * (reported + 1) + reported for reported in shares
    ]


@pytest.mark.parametrize("blocks", [8, 32, 40, 64])
def test_d7_a_first_run_over_everything_is_quadratic(blocks: int) -> None:
    """D7: for a block of the i-th batch of 16, i * 16 blocks are walked past, all under the lock."""
    zone = policy_zone("scan", blocks * 4 * MIB)
    free_alternating(zone, blocks)
    done = policy_cycle(zone, "scan").run(accept)
    past = sum(16 * (index // 16) for index in range(blocks + 1))  # and the search that finds nothing
    assert (done.blocks, done.nodes_visited) == (blocks, past + blocks)
    full = blocks - blocks % 16
    assert zone.statistics().nodes_hold_max >= (blocks % 16 + 1) * full  # what the last pull looks at
    zone.close()


@pytest.mark.parametrize("first", range(1, 8))
def test_d6_none_is_missed_on_a_list_that_was_rotated(first: int) -> None:
    """D6: it looks at every node, so the order of the list does not matter."""
    zone = policy_zone("scan")
    freed, _ = free_alternating(zone, 4)
    policy_cycle(zone, "scan").run(accept)
    for step in range(1, 5):
        zone.free(freed[-1] + 2 * step * PAGEBLOCK_PAGES, 9)
    zone.rotate(9, MOVABLE, zone.free_list(9, MOVABLE)[first][0])
    assert policy_cycle(zone, "scan", capacity=3).run(accept).blocks == 4
    assert flags_of(zone) == "RRRRRRRR"
    zone.close()


@pytest.mark.parametrize("policy", ["scan", "skip-walk", "rotate"])
def test_a_boundary_run_after_another_policys_misses_nothing(policy: str) -> None:
    """Section 4.1: another driver may take up where the first left, whatever shape it left the lists in.

    Here ``URUR`` for two of them: an idle list reads ``URRUU`` after frees to its tail, where a merge is likely, and
    the run is stopped after one batch. A boundary that relied on the shape would find the head Reported, and stop.
    """
    zone = policy_zone(policy, 16 * MIB, min_order=4, high_water_mark=1024)
    free_alternating(zone, 2, order=4)
    cycle = policy_cycle(zone, policy, capacity=1)
    report_everything(cycle)
    for pair in (256, 512):
        zone.free(pair + 32, 4)
        zone.free(pair + 48, 4)
        zone.free(pair, 4)
    zone.free(1024, 4)
    assert flags_of(zone, 4) == "URRUU"
    cycle.begin()
    batch = cycle.pull()
    assert batch is not None
    while int(batch.orders[0]) != 4:  # the merged blocks of order 5 go first, if the highest order does
        cycle.put_back(batch, Outcome.DONE)
        batch = cycle.pull()
        assert batch is not None
    cycle.put_back(batch, Outcome.DONE)
    cycle.end()
    assert flags_of(zone, 4) == ("UURRR" if policy == "rotate" else "URRUR")
    policy_cycle(zone, "boundary").run(accept)
    assert unreported_heads(zone, 4) == []
    zone.validate()
    zone.close()
