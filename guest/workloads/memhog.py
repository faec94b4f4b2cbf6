"""memhog: allocate and touch N MiB, hold them, free them, be idle; again. The workload of the cover letters."""

from __future__ import annotations

import numpy as np

from common.geometry import Migratetype
from common.native import kernel
from guest.allocator.view import open_zone
from guest.workloads.engine import AGAIN, IDLE, REST, S_HELD, S_PAGES, S_PHASE, S_TURNS, acquire, release

__all__ = ["step"]

MOVABLE = int(Migratetype.MOVABLE)
GROWING, SHRINKING = 0, 1


@kernel
def step(address, ram_address, state, held, times, finding, scratch, target_pages, work_order, min_order, budget):  # type: ignore[no-untyped-def]
    """At most ``budget`` pages (and one block) of growing to ``target_pages``, or of freeing all. AGAIN, REST or IDLE.

    Blocks of ``work_order``; order 0 where there are none, as a huge-page fault falls back.
    """
    zone = open_zone(address)
    done = np.int64(0)
    while done < budget:
        if state[S_PHASE] == GROWING:
            pages = np.int64(0)
            if state[S_PAGES] + (1 << work_order) <= target_pages:
                pages = acquire(zone, address, ram_address, state, held, times, finding, scratch, work_order, MOVABLE)
            if pages == 0 and work_order > 0 and state[S_PAGES] < target_pages:
                pages = acquire(zone, address, ram_address, state, held, times, finding, scratch, np.int64(0), MOVABLE)
            if pages == 0:
                state[S_PHASE] = SHRINKING
                return REST
            done += pages
        else:
            if state[S_HELD] == 0:
                state[S_PHASE] = GROWING
                state[S_TURNS] += 1
                return IDLE
            done += release(zone, ram_address, state, held, finding, state[S_HELD] - 1, min_order)
    return AGAIN
