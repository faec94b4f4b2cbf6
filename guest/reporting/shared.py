"""No queue at all (the idea of HyperAlloc, EuroSys 2025): a host that the guest trusts claims free blocks itself.

The host maps the zone segment and drives a ``Cycle`` of this policy: a pull claims blocks, with the lock held for that
alone; it discards them, and puts them back flagged. So here Reported means *claimed*, and the boundary finds what is
not. There is no message, nobody waits for an acknowledgement, and nothing can be withdrawn.

The guest asks for a block back before anybody has it (``guest.allocator.asks``), so a page is there before it is used,
as DMA needs. What is asked for is what the resident map says is not there, not what is flagged: a claimed block that
merged, moved or was split has lost its flag and not its hole. The whole free block is asked for at once.

A host may die at any moment. Its blocks are then in flight with nobody to put them back; ``claims.take_over`` finds
them in the page records and does, for the next host, or for the guest as soon as it sees the death. Until there is a
host again nothing is asked for, and a touch populates a page by a fault.

The guest opens its zone to a host (``open_to_host``); a zone that is not open is not claimed from.
"""

from __future__ import annotations

import numpy as np

from common.layout import (
    A_ORDER,
    A_PFN,
    A_SEMAPHORE,
    A_SEQUENCE,
    A_STATE,
    ANSWERED,
    ASK_FREE,
    ASKED,
    IN_FLIGHT,
    KIND_MASK,
    N_ASKS,
    ORDER_MASK,
    REFUSED,
    W_ASKING,
    W_DEVICE_PID,
    W_OPEN_TO_HOST,
    W_REPORTING_ENABLED,
)
from common.native import kernel, semaphore_post, word_address
from guest.allocator.asks import ask_word
from guest.allocator.install import reap_asks
from guest.allocator.locked import E_LOCK, lock_zone, unlock_zone
from guest.allocator.view import ctl_of, open_zone, pages_of
from guest.reporting import blocks, boundary

__all__ = [
    "ASK_COLUMNS",
    "answer_ask",
    "begin",
    "collect_asks",
    "end_lost_asks",
    "find_in_flight",
    "is_awaited",
    "pull",
    "refuse_asks",
    "set_asking",
    "set_open",
]

ASK_COLUMNS = 4  # of ``collect_asks``: number of the ask, first pfn, order, sequence


@kernel
def begin(zone):  # type: ignore[no-untyped-def]
    """Fresh boundaries: what is claimed is found as v9 finds what is reported. Zone lock held."""
    boundary.begin(zone)


@kernel
def pull(zone, pfns, orders, capacity):  # type: ignore[no-untyped-def]
    """Claim blocks: ``boundary.pull``, and nothing from a zone that the guest has closed. Zone lock held."""
    if not ctl_of(zone)[W_OPEN_TO_HOST]:
        return np.int64(0), blocks.SHORT
    return boundary.pull(zone, pfns, orders, capacity)


@kernel
def is_asked_for(zone, pfn):  # type: ignore[no-untyped-def]
    """True when the block in flight at ``pfn`` is that of an ask. Zone lock held."""
    for index in range(N_ASKS):
        ask = ask_word(index)
        if ctl_of(zone)[ask + A_STATE] != ASK_FREE and ctl_of(zone)[ask + A_PFN] == pfn:
            return True
    return False


@kernel
def find_in_flight(address, pfns, orders):  # type: ignore[no-untyped-def]
    """Fill ``pfns`` and ``orders`` (int64[]) with blocks in flight that nobody asked for, as many as fit, or E_LOCK.

    Walks every page record once, as repair does, under the lock.
    """
    zone = open_zone(address)
    if not lock_zone(zone):
        return np.int64(E_LOCK)
    count = np.int64(0)
    pfn = np.int64(0)
    while pfn < zone.n_pages and count < pfns.size:
        state = np.int64(pages_of(zone)[pfn])
        if state & KIND_MASK == IN_FLIGHT and not is_asked_for(zone, pfn):
            pfns[count] = pfn
            orders[count] = state & ORDER_MASK
            count += 1
        pfn += 1 << (state & ORDER_MASK)
    unlock_zone(zone)
    return count


@kernel
def collect_asks(address, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` (int64[N_ASKS, ASK_COLUMNS]) with the asks that wait for an answer; how many, or E_LOCK."""
    zone = open_zone(address)
    if not lock_zone(zone):
        return np.int64(E_LOCK)
    count = np.int64(0)
    for index in range(N_ASKS):
        ask = ask_word(index)
        if ctl_of(zone)[ask + A_STATE] == ASKED:
            out[count, 0] = index
            out[count, 1] = ctl_of(zone)[ask + A_PFN]
            out[count, 2] = ctl_of(zone)[ask + A_ORDER]
            out[count, 3] = ctl_of(zone)[ask + A_SEQUENCE]
            count += 1
    unlock_zone(zone)
    return count


@kernel
def is_awaited(address, index, sequence):  # type: ignore[no-untyped-def]
    """1 if that ask still waits for an answer: its block is in flight, and nobody claims it. 0 if not; E_LOCK."""
    zone = open_zone(address)
    if not lock_zone(zone):
        return np.int64(E_LOCK)
    ask = ask_word(index)
    awaited = ctl_of(zone)[ask + A_STATE] == ASKED and ctl_of(zone)[ask + A_SEQUENCE] == sequence
    unlock_zone(zone)
    return np.int64(awaited)


@kernel
def answer_ask(address, index, sequence, populated):  # type: ignore[no-untyped-def]
    """Answer an ask: its block is there, or is refused. 1; 0 if the asker has given up; E_LOCK.

    Populating a block that the guest uses again does no harm, so an answer that comes late is merely counted.
    """
    zone = open_zone(address)
    if not lock_zone(zone):
        return np.int64(E_LOCK)
    ask = ask_word(index)
    waited_for = ctl_of(zone)[ask + A_STATE] == ASKED and ctl_of(zone)[ask + A_SEQUENCE] == sequence
    if waited_for:
        ctl_of(zone)[ask + A_STATE] = ANSWERED if populated else REFUSED
        # SAFETY: the semaphore lies in the mapped header; posting never blocks.
        semaphore_post(word_address(zone.ctl, ask + A_SEMAPHORE))
    unlock_zone(zone)
    return np.int64(waited_for)


@kernel
def refuse_asks(address):  # type: ignore[no-untyped-def]
    """Nobody answers any more: refuse what is asked for, so that no allocation waits for it. 0 or E_LOCK."""
    zone = open_zone(address)
    if not lock_zone(zone):
        return E_LOCK
    ctl_of(zone)[W_ASKING] = 0
    for index in range(N_ASKS):
        ask = ask_word(index)
        if ctl_of(zone)[ask + A_STATE] == ASKED:
            ctl_of(zone)[ask + A_STATE] = REFUSED
            # SAFETY: as above.
            semaphore_post(word_address(zone.ctl, ask + A_SEMAPHORE))
    unlock_zone(zone)
    return 0


@kernel
def end_lost_asks(address):  # type: ignore[no-untyped-def]
    """End the asks of threads that are gone; their blocks go back. 0 or E_LOCK."""
    return 0 if reap_asks(open_zone(address)) else E_LOCK


@kernel
def set_asking(address, pid):  # type: ignore[no-untyped-def]
    """From now on what is not there is asked for, if ``pid`` is the registered device. 0 or E_LOCK."""
    zone = open_zone(address)
    if not lock_zone(zone):
        return E_LOCK
    if ctl_of(zone)[W_DEVICE_PID] == pid:
        ctl_of(zone)[W_ASKING] = 1
    unlock_zone(zone)
    return 0


@kernel
def set_open(address, value):  # type: ignore[no-untyped-def]
    """Open the zone to a host, or close it: no pull takes anything afterwards. 0 or E_LOCK."""
    zone = open_zone(address)
    if not lock_zone(zone):
        return E_LOCK
    ctl_of(zone)[W_OPEN_TO_HOST] = value
    if not value:
        ctl_of(zone)[W_REPORTING_ENABLED] = 0
    unlock_zone(zone)
    return 0
