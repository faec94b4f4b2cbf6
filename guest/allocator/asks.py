"""Blocks that a host is asked to populate before anybody has them (HyperAlloc's install). Zone lock held.

An ask is two lines of the header: the block, a state, a number, the asking thread and the semaphore of its answer. The
block is in flight from ``begin_ask`` to ``end_ask``, so its pages and their bytes in the resident map are the asker's
alone, and nothing of it can be handed out, merged or pulled meanwhile (S3).

At every release of the zone lock an ask that is not free names a block in flight. An asker may be killed at any moment:
the ask is filled before the block is taken and freed after it is back, and repair drops an ask without its block. One
that died while it marked the pages as installed has noted the counts that are true afterwards; repair does the rest.
"""

from __future__ import annotations

import numpy as np

from common.faults import NUMBERS
from common.layout import (
    A_INSTALLED,
    A_INSTALLS,
    A_ORDER,
    A_OWNER,
    A_PFN,
    A_REINSTALLED,
    A_SEMAPHORE,
    A_SEQUENCE,
    A_STATE,
    ANSWERED,
    ASK_FREE,
    ASK_WORDS,
    ASKED,
    COUNTED,
    HEAD_MASK,
    IN_FLIGHT,
    INSTALLED,
    MARKING,
    MT_SHIFT,
    N_ASKS,
    NEVER_TOUCHED,
    ORDER_MASK,
    REFUSED,
    RETURNED,
    W_ASK_SEQUENCE,
    W_ASKING,
    W_ASKS,
    W_ASKS_WITHDRAWN,
    W_ASKS_WORK,
    W_INSTALLED_PAGES,
    W_INSTALLS,
    W_RANDOM_STATE,
    W_REINSTALLED_PAGES,
)
from common.native import barrier, fault_point, kernel, semaphore_post, semaphore_try, word_address
from guest.allocator.buddy import FPI_SKIP_REPORT_NOTIFY
from guest.allocator.lists import free_list_head, link_after, unlink
from guest.allocator.pageblocks import free_across_pageblocks
from guest.allocator.view import ctl_of, pages_of, residence_of
from guest.reporting.blocks import leave_flight, take_for_report

__all__ = ["ASK", "AWAITED", "ask_word", "asks_pending", "begin_ask", "drop_lost_asks", "end_ask"]

ASK = -16  # from here down: minus the number of an ask; N_ASKS: all are taken, come again
AWAITED = ASK - N_ASKS - 1  # no memory, but blocks that are asked for come back: come again
MT_FIELD = 0x7
INSTALL_NOTED, INSTALL_PAGE = NUMBERS["install.noted"], NUMBERS["install.page"]
INSTALL_COUNTED = NUMBERS["install.counted"]


@kernel
def ask_word(index):  # type: ignore[no-untyped-def]
    """First word of ask ``index``."""
    return W_ASKS + index * ASK_WORDS


@kernel
def asks_pending(zone):  # type: ignore[no-untyped-def]
    """True while an ask has a block in flight: there is more memory than is free."""
    pending = 0
    for index in range(N_ASKS):
        pending += ctl_of(zone)[ask_word(index) + A_STATE] != ASK_FREE
    return pending > 0


@kernel
def begin_ask(zone, pfn):  # type: ignore[no-untyped-def]
    """Take the free block at ``pfn`` in flight and ask for it; returns ASK less the number of the ask."""
    for index in range(N_ASKS):
        ask = ask_word(index)
        if ctl_of(zone)[ask + A_STATE] == ASK_FREE:
            state = np.int64(pages_of(zone)[pfn])
            order = state & ORDER_MASK
            ctl_of(zone)[W_ASK_SEQUENCE] += 1
            ctl_of(zone)[ask + A_PFN] = pfn
            ctl_of(zone)[ask + A_ORDER] = order
            ctl_of(zone)[ask + A_SEQUENCE] = ctl_of(zone)[W_ASK_SEQUENCE]
            ctl_of(zone)[ask + A_OWNER] = zone.thread
            barrier()
            ctl_of(zone)[ask + A_STATE] = ASKED
            barrier()  # named first: a block in flight that nobody names would be taken for a host's
            take_for_report(zone, pfn, order, (state >> MT_SHIFT) & MT_FIELD)
            # SAFETY: the semaphore lies in the mapped header; posting never blocks.
            semaphore_post(word_address(zone.ctl, W_ASKS_WORK))
            return np.int64(ASK) - index
    return np.int64(ASK - N_ASKS)


@kernel
def begin_marking(zone, ask):  # type: ignore[no-untyped-def]
    """Note in an answered ask what the header's counts are once its pages are marked as installed."""
    residence = residence_of(zone)
    first = ctl_of(zone)[ask + A_PFN]
    never = np.int64(0)
    returned = np.int64(0)
    for page in range(first, first + (1 << ctl_of(zone)[ask + A_ORDER])):
        never += residence[page] == NEVER_TOUCHED
        returned += residence[page] == RETURNED
    ctl_of(zone)[ask + A_INSTALLS] = ctl_of(zone)[W_INSTALLS] + 1
    ctl_of(zone)[ask + A_INSTALLED] = ctl_of(zone)[W_INSTALLED_PAGES] + never + returned
    ctl_of(zone)[ask + A_REINSTALLED] = ctl_of(zone)[W_REINSTALLED_PAGES] + returned
    barrier()
    ctl_of(zone)[ask + A_STATE] = MARKING
    barrier()
    fault_point(INSTALL_NOTED)


@kernel
def end_marking(zone, ask):  # type: ignore[no-untyped-def]
    """Mark every page of an ask's block that was not there as installed, and count them. Done twice it is done once."""
    residence = residence_of(zone)
    first = ctl_of(zone)[ask + A_PFN]
    for page in range(first, first + (1 << ctl_of(zone)[ask + A_ORDER])):
        if residence[page] == NEVER_TOUCHED or residence[page] == RETURNED:
            residence[page] = INSTALLED
            fault_point(INSTALL_PAGE)
    barrier()
    ctl_of(zone)[W_INSTALLS] = ctl_of(zone)[ask + A_INSTALLS]
    ctl_of(zone)[W_INSTALLED_PAGES] = ctl_of(zone)[ask + A_INSTALLED]
    ctl_of(zone)[W_REINSTALLED_PAGES] = ctl_of(zone)[ask + A_REINSTALLED]
    barrier()
    ctl_of(zone)[ask + A_STATE] = COUNTED
    barrier()
    fault_point(INSTALL_COUNTED)


@kernel
def end_ask(zone, index):  # type: ignore[no-untyped-def]
    """Free the block of an ask, to the front of its list, and the ask. Answered or not: it is over.

    An ask that its owner gives up, or that was refused, ends asking until a host shows itself again: the block, like
    all others then, is populated by the fault of whoever touches it.
    That of an asker who died says nothing of the host.
    """
    ask = ask_word(index)
    pfn = ctl_of(zone)[ask + A_PFN]
    order = ctl_of(zone)[ask + A_ORDER]
    if ctl_of(zone)[ask + A_STATE] == ANSWERED:
        begin_marking(zone, ask)
        end_marking(zone, ask)
    elif ctl_of(zone)[ask + A_STATE] != COUNTED:
        ctl_of(zone)[W_ASKS_WITHDRAWN] += 1
        if ctl_of(zone)[ask + A_STATE] == REFUSED or ctl_of(zone)[ask + A_OWNER] == zone.thread:
            ctl_of(zone)[W_ASKING] = 0
    if leave_flight(zone, pfn, order):
        became, final_order = free_across_pageblocks(zone, pfn, order, FPI_SKIP_REPORT_NOTIFY, np.int64(W_RANDOM_STATE))
        # To the front, where the asker looks: behind other blocks that are not there it would ask for those first.
        unlink(zone, became)
        state = np.int64(pages_of(zone)[became])
        link_after(zone, became, free_list_head(zone, final_order, (state >> MT_SHIFT) & MT_FIELD))
    free_ask(zone, ask)


@kernel
def free_ask(zone, ask):  # type: ignore[no-untyped-def]
    """The ask is nobody's any more; its block has been seen to."""
    # SAFETY: as above. An answer that came when nobody waited any more must not answer the next ask.
    while semaphore_try(word_address(zone.ctl, ask + A_SEMAPHORE)) == 0:
        pass
    barrier()
    ctl_of(zone)[ask + A_STATE] = ASK_FREE


@kernel
def drop_lost_asks(zone):  # type: ignore[no-untyped-def]
    """Part of repair: free each ask whose block is not in flight. Who died was beginning or ending it."""
    for index in range(N_ASKS):
        ask = ask_word(index)
        if ctl_of(zone)[ask + A_STATE] == MARKING:
            end_marking(zone, ask)
        head = np.int64(pages_of(zone)[ctl_of(zone)[ask + A_PFN]]) & HEAD_MASK
        if ctl_of(zone)[ask + A_STATE] != ASK_FREE and head != IN_FLIGHT | ctl_of(zone)[ask + A_ORDER]:
            free_ask(zone, ask)
