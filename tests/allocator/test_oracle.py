"""The oracle itself: consistent under anything, and right on the cases one can work out by hand."""

from __future__ import annotations

import random

import pytest

from tests.allocator.oracle import CMA, ISOLATE, MOVABLE, RECLAIMABLE, UNMOVABLE, OracleZone
from tests.allocator.shape import shape_of


def emptied(n_pages: int = 4096) -> OracleZone:
    """A zone that is allocated in whole pageblocks."""
    oracle = OracleZone(n_pages)
    while oracle.alloc(9, MOVABLE) is not None:
        pass
    return oracle


def test_expand_keeps_the_lower_half_and_queues_the_upper_halves() -> None:
    oracle = OracleZone(4096)
    assert oracle.alloc(8, MOVABLE) == 0
    assert oracle.free_list(8, MOVABLE) == [(256, False)]
    assert oracle.free_list(9, MOVABLE) == [(512, False)]
    assert [pfn for pfn, _ in oracle.free_list(10, MOVABLE)] == [1024, 2048, 3072]


def test_merge_undoes_split() -> None:
    oracle = OracleZone(4096)
    pfn = oracle.alloc(0, UNMOVABLE)
    assert pfn is not None
    assert oracle.fell_back
    oracle.free(pfn, 0)
    assert oracle.nr_free(10) == 4


def test_s7_merge_at_put_back_is_not_reported() -> None:
    oracle = emptied()
    oracle.free(0, 9)
    oracle.begin()
    batch, last = oracle.pull(4)
    assert (batch, last) == ([(0, 9)], True)
    oracle.free(512, 9)
    oracle.put_back(batch, done=True)
    assert oracle.free_list(10, MOVABLE) == [(0, False)]


def test_boundary_walks_up_and_restart_takes_tail_then_head() -> None:
    """Alexander's picture of v9's cover letter."""
    oracle = emptied(16 * 512)
    for pageblock in (0, 2, 4):
        oracle.free(pageblock * 512, 9)
    oracle.begin()
    batch, _ = oracle.pull(2)
    assert batch == [(0, 9), (1024, 9)]
    oracle.put_back(batch, done=True)
    assert oracle.free_list(9, MOVABLE) == [(2048, False), (1024, True), (0, True)]
    assert oracle.boundary[9, MOVABLE] == 1024
    batch, last = oracle.pull(2)
    assert (batch, last) == ([(2048, 9)], True)
    oracle.put_back(batch, done=True)
    oracle.end()
    oracle.free(6 * 512, 9)
    oracle.begin()
    assert oracle.pull(2) == ([(6 * 512, 9)], True)


def test_merge_stops_at_an_isolated_pageblock_and_goes_on_when_it_leaves() -> None:
    oracle = emptied()
    oracle.isolate(1)
    oracle.free(512, 9)
    oracle.free(0, 9)
    assert oracle.free_list(9, ISOLATE) == [(512, False)]
    assert oracle.free_list(9, MOVABLE) == [(0, False)]
    oracle.unisolate(1)
    assert oracle.free_list(10, MOVABLE) == [(0, False)]


def test_shape() -> None:
    assert shape_of([False, False, True, False]) == "URU"
    assert shape_of([]) == ""


@pytest.mark.parametrize("seed", range(8))
def test_random_walk_keeps_the_oracles_own_invariants(seed: int) -> None:
    """The oracle under random operations, fallback and rotation included; P1 at the end of each run."""
    rng = random.Random(seed)
    oracle = OracleZone(
        4096, min_order=rng.choice((0, 5, 9, 10)), high_water_mark=rng.randint(1, 4), min_watermark=rng.choice((0, 64))
    )
    if seed % 2:
        oracle.set_pageblock_migratetype(2, CMA)
        oracle.set_pageblock_migratetype(3, CMA)
    batch: list[tuple[int, int]] = []
    for step in range(600):
        _one_step(oracle, rng, batch)
        if step % 10 == 0:
            oracle.validate()
    if batch:
        oracle.put_back(batch, done=True)
    oracle.begin()
    last = False
    while not last:
        pulled, last = oracle.pull(8)
        oracle.put_back(pulled, done=True)
    oracle.validate()
    kinds = (
        block.migratetype for block in oracle.blocks.values() if block.order >= oracle.min_order and not block.reported
    )
    assert set(kinds) <= {ISOLATE}


def _one_step(oracle: OracleZone, rng: random.Random, batch: list[tuple[int, int]]) -> None:
    action = rng.random()
    if action < 0.45:
        oracle.alloc(rng.choice((0, 0, 1, 3, 5, 8, 9, 10)), rng.choice((UNMOVABLE, MOVABLE, RECLAIMABLE)))
    elif action < 0.8 and oracle.allocated:
        pfn = rng.choice(sorted(oracle.allocated))
        oracle.free(pfn, oracle.allocated[pfn][0])
    elif action < 0.85:
        pageblock = rng.randrange(len(oracle.pageblocks))
        if oracle.pageblocks[pageblock] == ISOLATE:
            oracle.unisolate(pageblock)
        else:
            oracle.isolate(pageblock)
    elif action < 0.88:
        order, kind = rng.choice(sorted(key for key, entries in oracle.lists.items() if entries) or [(0, 0)])
        if entries := oracle.lists[order, kind]:
            oracle.rotate(order, kind, rng.choice(entries))
    elif not oracle.active:
        oracle.begin()
    elif batch:
        oracle.put_back(batch, done=rng.random() < 0.8)
        batch.clear()
    elif rng.random() < 0.2:
        oracle.end()
    else:
        batch.extend(oracle.pull(rng.randint(1, 5))[0])
