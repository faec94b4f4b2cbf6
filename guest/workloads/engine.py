"""What every workload is made of: allocate-use-remember and check-free-forget, on a vCPU thread without the GIL.

A vCPU owns four arrays. ``held`` is its pile of blocks, ``state`` its words (see ``S_*``), ``times`` two histograms of
allocation times (see ``T_*``), ``finding`` the first violation it met. The clock is read for ``times`` only and decides
nothing, so the same seed makes the same requests.
"""

from __future__ import annotations

import numpy as np

from common.layout import C_ALLOCATED_BYTES, C_FREED_BYTES, W_ACTIVE, W_POISON
from common.native import clock_ns, kernel, load_i64, view_i64
from common.statistics import record
from guest.allocator.owners import set_private
from guest.allocator.percpu import alloc_pages, cpu_slot, free_pages
from guest.allocator.shuffle import next_random
from guest.allocator.view import ctl_of, open_zone
from guest.memory import check_stamps, poison_pages, use_pages

__all__ = [
    "AGAIN",
    "HELD_COLUMNS",
    "IDLE",
    "JOURNAL_WORDS",
    "REST",
    "STATE_WORDS",
    "S_CPU",
    "S_DEBT_PAGES",
    "S_FREED_BIG_PAGES",
    "S_HELD",
    "S_JOURNAL",
    "S_OPERATIONS",
    "S_PAGES",
    "S_PHASE",
    "S_RANDOM",
    "S_REFUSED",
    "S_TAG",
    "S_TIMED",
    "S_TURNS",
    "TIMES_ROWS",
    "T_QUIET",
    "T_REPORTING",
    "acquire",
    "random_below",
    "release",
    "release_all",
    "tag_of",
]

# Words of a vCPU's state, int64[STATE_WORDS].
S_RANDOM = 0  # generator
S_TAG = 1  # last allocation tag handed out
S_HELD = 2  # blocks on the pile
S_PAGES = 3  # pages on the pile
S_PHASE = 4  # the workload's own
S_OPERATIONS = 5  # page operations done: pages allocated plus pages freed
S_REFUSED = 6  # frees that the allocator refused: a bug, so it is counted as a violation by the caller
S_CPU = 7  # per-CPU slot
S_TURNS = 8  # the workload's own: cycles completed
S_DEBT_PAGES = 9  # the workload's own
S_FREED_BIG_PAGES = 10  # pages freed in blocks of at least the minimum order
S_TIMED = 11  # 1: measure allocation times
S_JOURNAL = 12  # address of a journal, int64[JOURNAL_WORDS]; 0: none is kept
STATE_WORDS = 16
JOURNAL_WORDS = 4096  # how many entries there are, then the entries; whoever reads it empties it

# Rows of ``times``, int64[TIMES_ROWS, HISTOGRAM_WORDS]. An allocation is counted in one of them; all is their sum.
T_QUIET = 0  # it began while no reporting run was active
T_REPORTING = 1  # it began while one was
TIMES_ROWS = 2

HELD_COLUMNS = 3  # pfn, order, tag
_N_TAGS = 1 << 27  # a vCPU's own share of the 34-bit tags; it wraps after as many allocations

# What a step asks of its thread.
AGAIN = 0  # call me again at once
REST = 1  # hold what you have for a while, then call me
IDLE = 2  # be idle for a while (the thread drains its per-CPU lists), then call me


@kernel
def random_below(state, bound):  # type: ignore[no-untyped-def]
    """Next random integer in [0, bound)."""
    state[S_RANDOM] = next_random(state[S_RANDOM])
    return (state[S_RANDOM] >> 20) % bound


@kernel
def tag_of(number, cpu):  # type: ignore[no-untyped-def]
    """Tag of allocation ``number`` of slot ``cpu``: seven bits tell the slot, so no two live blocks of different vCPUs
    share one; 1 keeps it from being 0.
    """
    return (number << 7 | (cpu & 127)) + 1


@kernel
def note_block(state, pfn, order, freed):  # type: ignore[no-untyped-def]
    """Write a block that was just acquired or released into the journal: ``pfn << 8 | order << 1 | freed``.

    An entry for which there is no room is counted and not written, so that the reader knows.
    """
    # SAFETY: whoever set the word owns the array, and keeps it for as long as the vCPU steps.
    journal = view_i64(state[S_JOURNAL], JOURNAL_WORDS)
    count = journal[0] + 1
    if count < JOURNAL_WORDS:
        journal[count] = pfn << 8 | order << 1 | freed
    journal[0] = count


@kernel
def acquire(zone, address, ram_address, state, held, times, finding, scratch, order, migratetype):  # type: ignore[no-untyped-def]
    """Allocate a block, use every page of it, push it on the pile. Pages, 0 when there is no memory or no room."""
    count = state[S_HELD]
    if count >= held.shape[0]:
        return np.int64(0)
    cpu = state[S_CPU]
    if state[S_TIMED]:
        # SAFETY: a word of the header, which is mapped as long as the zone is; the reporter's thread writes it.
        row = T_REPORTING if load_i64(address + 8 * W_ACTIVE) != 0 else T_QUIET
        start = clock_ns(scratch)
        pfn = alloc_pages(zone, cpu, order, migratetype, 0)
        record(times[row], clock_ns(scratch) - start)
    else:
        pfn = alloc_pages(zone, cpu, order, migratetype, 0)
    if pfn < 0:
        return np.int64(0)
    state[S_TAG] = (state[S_TAG] + 1) % _N_TAGS
    tag = tag_of(state[S_TAG], cpu)
    slot = cpu_slot(cpu)
    use_pages(zone, address, ram_address, slot, finding, pfn, order, tag)
    set_private(zone, pfn, state[S_TAG] + 1)  # from here on it is used, and carries its stamps
    held[count, 0] = pfn
    held[count, 1] = order
    held[count, 2] = tag
    pages = np.int64(1) << order
    state[S_HELD] = count + 1
    state[S_PAGES] += pages
    state[S_OPERATIONS] += pages
    ctl_of(zone)[slot + C_ALLOCATED_BYTES] += pages << 12
    if state[S_JOURNAL] != 0:
        note_block(state, pfn, order, 0)
    return pages


@kernel
def release(zone, ram_address, state, held, finding, index, min_order):  # type: ignore[no-untyped-def]
    """Check and free the block at ``index`` of the pile, poisoned if the zone asks for it; the last one takes its
    place. Returns its pages.
    """
    pfn, order, tag = held[index, 0], held[index, 1], held[index, 2]
    cpu = state[S_CPU]
    slot = cpu_slot(cpu)
    check_stamps(zone, ram_address, slot, finding, pfn, order, tag)
    set_private(zone, pfn, 0)
    if ctl_of(zone)[W_POISON] != 0:
        poison_pages(zone, ram_address, pfn, order)
    if free_pages(zone, cpu, pfn, order) != 0:
        state[S_REFUSED] += 1
    last = state[S_HELD] - 1
    held[index, 0], held[index, 1], held[index, 2] = held[last, 0], held[last, 1], held[last, 2]
    pages = np.int64(1) << order
    state[S_HELD] = last
    state[S_PAGES] -= pages
    state[S_OPERATIONS] += pages
    if order >= min_order:
        state[S_FREED_BIG_PAGES] += pages
    ctl_of(zone)[slot + C_FREED_BYTES] += pages << 12
    if state[S_JOURNAL] != 0:
        note_block(state, pfn, order, 1)
    return pages


@kernel
def release_all(address, ram_address, state, held, finding, min_order):  # type: ignore[no-untyped-def]
    """Check and free the whole pile, newest first."""
    zone = open_zone(address)
    while state[S_HELD] > 0:
        release(zone, ram_address, state, held, finding, state[S_HELD] - 1, min_order)
