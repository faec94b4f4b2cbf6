"""burst: churn for a while, free nine tenths, be idle; again. A build machine, or an agent between two tasks."""

from __future__ import annotations

import numpy as np

from common.native import kernel
from guest.allocator.view import open_zone
from guest.workloads.churn import churn_once
from guest.workloads.engine import AGAIN, IDLE, S_DEBT_PAGES, S_HELD, S_PAGES, S_PHASE, S_TURNS, random_below, release

__all__ = ["step"]

WORKING, SHRINKING = 0, 1
WORK_FACTOR = 8  # pages moved in a work phase, in multiples of the level of use
KEPT_SHARE = 10  # one block in ten stays


@kernel
def step(address, ram_address, state, held, times, finding, scratch, target_pages, work_order, min_order, budget):  # type: ignore[no-untyped-def]
    """At most ``budget`` pages (and one block) of a phase. AGAIN, or IDLE at the end of a burst.

    S_DEBT_PAGES: pages moved so far in this work phase.
    """
    zone = open_zone(address)
    done = np.int64(0)
    while done < budget:
        if state[S_PHASE] == WORKING:
            pages = churn_once(
                zone, address, ram_address, state, held, times, finding, scratch, target_pages, work_order, min_order
            )
            state[S_DEBT_PAGES] += pages
            done += pages
            if state[S_DEBT_PAGES] >= WORK_FACTOR * target_pages:
                state[S_DEBT_PAGES] = 0
                state[S_PHASE] = SHRINKING
        else:
            if state[S_HELD] == 0 or state[S_PAGES] <= target_pages // KEPT_SHARE:
                state[S_PHASE] = WORKING
                state[S_TURNS] += 1
                return IDLE
            done += release(zone, ram_address, state, held, finding, random_below(state, state[S_HELD]), min_order)
    return AGAIN
