"""build: one process after the other, as a compiler's: it grows, works on, and ends with all of its memory freed.

Sizes are drawn over a wide range, so what is free swings slowly, while in each process pages come and go fast. Between
two chunks of pages the vCPU computes (``hold_ns``), which is what makes it a build and not a loop of allocations.
"""

from __future__ import annotations

import numpy as np

from common.native import kernel
from guest.allocator.view import open_zone
from guest.workloads.churn import churn_once
from guest.workloads.engine import AGAIN, REST, S_DEBT_PAGES, S_HELD, S_PHASE, S_TURNS, random_below, release

__all__ = ["CHUNK_PAGES", "step"]

CHUNK_PAGES = 2048  # 8 MiB of page operations between two stretches of computing
SIZES = 6  # a process is as large as the level of use over a power of two: 1, 2, 4, ..., 32
MOVES = 6  # page operations of a process, in multiples of its size
EXITING = -1  # S_PHASE: the process ends; else the size of the one that runs, 0 for none yet


@kernel
def step(address, ram_address, state, held, times, finding, scratch, target_pages, work_order, min_order, budget):  # type: ignore[no-untyped-def]
    """At most ``budget`` pages (and one block), not beyond the end of a chunk. REST after a chunk, else AGAIN.

    S_DEBT_PAGES: pages that the process has still to move.
    """
    zone = open_zone(address)
    done = np.int64(0)
    while done < budget:
        if state[S_PHASE] == 0:
            state[S_PHASE] = max(target_pages >> random_below(state, SIZES), 1)
            state[S_DEBT_PAGES] = MOVES * state[S_PHASE]
        if state[S_PHASE] == EXITING:
            if state[S_HELD] == 0:
                state[S_PHASE] = 0
                state[S_TURNS] += 1
                return AGAIN
            done += release(zone, ram_address, state, held, finding, state[S_HELD] - 1, min_order)
            continue
        size = state[S_PHASE]
        pages = churn_once(
            zone, address, ram_address, state, held, times, finding, scratch, size, work_order, min_order
        )
        chunk = state[S_DEBT_PAGES] // CHUNK_PAGES
        state[S_DEBT_PAGES] -= pages
        done += pages
        if state[S_DEBT_PAGES] <= 0:
            state[S_PHASE] = EXITING
        elif state[S_DEBT_PAGES] // CHUNK_PAGES != chunk:
            return REST
    return AGAIN
