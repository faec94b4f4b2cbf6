"""Whose an allocated block is: written down beside it, so that nothing is lost with a process that dies.

The head of an allocated block is on no list, so its two link words are free: one names the per-CPU slot through which
it was allocated, the other is a word of the owner's own (page_private). Both are links again when the block is freed.
Linux keeps such records for debugging (page_owner); here they say what goes back when a process is killed
(exit_mmap), and what a guest that restarts finds to be its own.

The block that a process was just being handed, or was just giving back, belongs to neither: two journals of one record,
in the header and in each slot, name it. ``repair`` reads them.
"""

from __future__ import annotations

import numpy as np

from common.faults import NUMBERS
from common.layout import (
    ALLOCATED,
    C_OWNER_PID,
    CLAIMED,
    CPU_WORDS,
    HEADER_WORDS,
    KIND_MASK,
    ORDER_MASK,
    OWNED,
    W_IN_HAND,
    W_IN_HAND_BEFORE,
    W_IN_HAND_HEAD,
)
from common.native import barrier, exchange_i64, fault_point, kernel
from guest.allocator.view import ctl_of, links_of, open_zone, pages_of

__all__ = [
    "NOBODY",
    "find_owned",
    "hand_over_block",
    "journal_clear",
    "journal_link",
    "journal_take",
    "mark_owner",
    "owner_of",
    "private_of",
    "set_private",
    "take_slot",
]

NOBODY = -1  # slot of a block that was allocated past the slots
OWNER_WRITTEN = NUMBERS["owner.written"]


@kernel
def mark_owner(zone, pfn, cpu):  # type: ignore[no-untyped-def]
    """The allocated block at ``pfn`` is that of slot ``cpu`` (NOBODY: of none). The lock that hands it out is held."""
    links_of(zone)[2 * pfn + 1] = 0
    links_of(zone)[2 * pfn] = OWNED | (cpu + 1)


@kernel
def owner_of(zone, pfn):  # type: ignore[no-untyped-def]
    """Slot of the allocated block at ``pfn``, NOBODY, or -2 if no owner is written there."""
    word = np.int64(links_of(zone)[2 * pfn])
    return (word & ~OWNED) - 1 if word & OWNED else np.int64(-2)


@kernel
def private_of(zone, pfn):  # type: ignore[no-untyped-def]
    """The owner's own word of the allocated block at ``pfn`` (page_private)."""
    return np.int64(links_of(zone)[2 * pfn + 1])


@kernel
def set_private(zone, pfn, value):  # type: ignore[no-untyped-def]
    """Write the owner's own word, 0 to 2**32 - 1, of an allocated block (set_page_private). For its owner; no lock.

    What the owner did with the block comes before: the word then says that it is done.
    """
    barrier()
    links_of(zone)[2 * pfn + 1] = value


@kernel
def journal_take(zone, pfn):  # type: ignore[no-untyped-def]
    """The block at ``pfn``, interior as yet, is in the hands of whoever holds the zone lock."""
    ctl_of(zone)[W_IN_HAND] = pfn + 1
    barrier()  # named before it looks like somebody's


@kernel
def journal_link(zone, pfn, before, head):  # type: ignore[no-untyped-def]
    """So is this block, which node ``before`` of the per-CPU list ``head`` leads to, or will. Zone lock held."""
    ctl_of(zone)[W_IN_HAND_BEFORE] = before
    ctl_of(zone)[W_IN_HAND_HEAD] = head
    journal_take(zone, pfn)


@kernel
def journal_clear(zone):  # type: ignore[no-untyped-def]
    """It has found its place. Zone lock held."""
    barrier()
    ctl_of(zone)[W_IN_HAND] = 0
    ctl_of(zone)[W_IN_HAND_BEFORE] = -1


@kernel
def hand_over_block(zone, pfn, cpu):  # type: ignore[no-untyped-def]
    """End of an allocation past the per-CPU lists: write the owner down, and close the journal. Zone lock held."""
    mark_owner(zone, pfn, cpu)
    fault_point(OWNER_WRITTEN)
    journal_clear(zone)


@kernel
def take_slot(address, cpu, stale_pid, pid):  # type: ignore[no-untyped-def]
    """Slot ``cpu`` of process ``stale_pid``, which is dead, becomes that of ``pid``, with all its blocks. True if so.

    One atomic step, no lock: of several that find the same dead process, one gets the slot. A ``stale_pid`` of 0 takes
    a slot that nobody has.
    """
    zone = open_zone(address)
    # SAFETY: the word lies in the mapped slots; cpu is below the zone's number of them.
    return exchange_i64(zone.ctl + 8 * (HEADER_WORDS + cpu * CPU_WORDS + C_OWNER_PID), stale_pid, pid)


@kernel
def find_owned(address, cpu, first, out):  # type: ignore[no-untyped-def]
    """Blocks of slot ``cpu`` from page ``first`` on: fill ``out`` (int64[n, 3]: pfn, order, private).

    Returns (how many, the page to go on from: n_pages at the end). No lock: nobody but the slot's owner hands its
    blocks on, and that is the caller. It reads the record of each page, not of each block, since others split and merge
    meanwhile; interior pages are none.
    """
    zone = open_zone(address)
    count = np.int64(0)
    pfn = np.int64(first)
    while pfn < zone.n_pages and count < out.shape[0]:
        state = np.int64(pages_of(zone)[pfn])
        if state & (KIND_MASK | CLAIMED) == ALLOCATED and owner_of(zone, pfn) == cpu:
            out[count, 0] = pfn
            out[count, 1] = state & ORDER_MASK
            out[count, 2] = private_of(zone, pfn)
            count += 1
        pfn += 1
    return count, pfn
