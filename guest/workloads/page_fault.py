"""page-fault: the shapes of will-it-scale's page_fault1 (huge pages) and page_fault2 (4 KiB): touch a region, unmap it.

Never idle: what it measures is the cost of faults, and of reporting beside them.
"""

from __future__ import annotations

import numpy as np

from common.geometry import Migratetype
from common.native import kernel
from guest.allocator.view import open_zone
from guest.workloads.engine import AGAIN, S_DEBT_PAGES, S_HELD, S_PAGES, S_TURNS, acquire, release

__all__ = ["REGION_PAGES", "step"]

MOVABLE = int(Migratetype.MOVABLE)
REGION_PAGES = 128 << 20 >> 12  # MEMSIZE of will-it-scale's page_fault1.c: 128 MiB a task


@kernel
def step(address, ram_address, state, held, times, finding, scratch, target_pages, work_order, min_order, budget):  # type: ignore[no-untyped-def]
    """At most ``budget`` pages (and one block) of filling the region, then of freeing it first to last. AGAIN.

    S_DEBT_PAGES: blocks of a full region that are still to be freed.
    """
    zone = open_zone(address)
    region = min(target_pages, REGION_PAGES)
    done = np.int64(0)
    while done < budget:
        if state[S_DEBT_PAGES] == 0:
            pages = np.int64(0)
            if state[S_PAGES] + (1 << work_order) <= region:
                pages = acquire(zone, address, ram_address, state, held, times, finding, scratch, work_order, MOVABLE)
            if pages == 0:
                state[S_DEBT_PAGES] = state[S_HELD]
                if state[S_HELD] == 0:
                    return AGAIN  # no memory at all just now: let others run
            done += pages
        else:
            # The pile is freed in the order in which it was filled (munmap goes upwards): release() moves the last
            # block into the hole, so the blocks behind are first turned round once, at the first free.
            done += release_in_order(zone, ram_address, state, held, finding, min_order)
    return AGAIN


@kernel
def release_in_order(zone, ram_address, state, held, finding, min_order):  # type: ignore[no-untyped-def]
    """Free the oldest block of the region; returns its pages."""
    if state[S_DEBT_PAGES] == state[S_HELD]:
        reverse(held, state[S_HELD])
        state[S_DEBT_PAGES] += 1  # one more than the pile: turned round already
    pages = release(zone, ram_address, state, held, finding, state[S_HELD] - 1, min_order)
    state[S_DEBT_PAGES] -= 1
    if state[S_HELD] == 0:
        state[S_DEBT_PAGES] = 0
        state[S_TURNS] += 1
    return pages


@kernel
def reverse(held, count):  # type: ignore[no-untyped-def]
    """Turn the first ``count`` blocks of the pile round."""
    for index in range(count // 2):
        mirror = count - 1 - index
        for column in range(held.shape[1]):
            held[index, column], held[mirror, column] = held[mirror, column], held[index, column]
