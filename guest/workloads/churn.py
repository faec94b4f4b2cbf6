"""churn: mixed orders, migratetypes and lifetimes around a level of use, never idle."""

from __future__ import annotations

import numpy as np

from common.geometry import Migratetype
from common.native import kernel
from guest.allocator.view import open_zone
from guest.workloads.engine import AGAIN, S_HELD, S_PAGES, acquire, random_below, release

__all__ = ["churn_once", "step"]

MOVABLE = int(Migratetype.MOVABLE)
UNMOVABLE = int(Migratetype.UNMOVABLE)
RECLAIMABLE = int(Migratetype.RECLAIMABLE)


@kernel
def pick_order(state, work_order):  # type: ignore[no-untyped-def]
    """Half of the requests are of order 0, a quarter 1, ..., down to order 5; one in 32 is of ``work_order``."""
    draw = random_below(state, 64)
    if draw < 2:
        return work_order
    order = np.int64(0)
    while draw & 1 and order < 5:
        draw >>= 1
        order += 1
    return order


@kernel
def pick_migratetype(state):  # type: ignore[no-untyped-def]
    """Eight in ten movable, one unmovable, one reclaimable."""
    draw = random_below(state, 10)
    if draw == 0:
        return UNMOVABLE
    if draw == 1:
        return RECLAIMABLE
    return MOVABLE


@kernel
def churn_once(zone, address, ram_address, state, held, times, finding, scratch, target_pages, work_order, min_order):  # type: ignore[no-untyped-def]
    """One allocation or one free. Below the level it allocates three times in four, above it frees so. Pages moved.

    Half of the frees take a block of the newest sixteen, half any: short lives and long ones.
    """
    grow = random_below(state, 4) != 0
    if state[S_PAGES] >= target_pages:
        grow = not grow
    if grow:
        order = pick_order(state, work_order)
        pages = acquire(
            zone, address, ram_address, state, held, times, finding, scratch, order, pick_migratetype(state)
        )
        if pages > 0:
            return pages
    count = state[S_HELD]
    if count == 0:
        return np.int64(1)
    if random_below(state, 2) == 0:
        index = count - 1 - random_below(state, min(count, 16))
    else:
        index = random_below(state, count)
    return release(zone, ram_address, state, held, finding, index, min_order)


@kernel
def step(address, ram_address, state, held, times, finding, scratch, target_pages, work_order, min_order, budget):  # type: ignore[no-untyped-def]
    """At most ``budget`` pages (and one block) of churn. AGAIN."""
    zone = open_zone(address)
    done = np.int64(0)
    while done < budget:
        done += churn_once(
            zone, address, ram_address, state, held, times, finding, scratch, target_pages, work_order, min_order
        )
    return AGAIN
