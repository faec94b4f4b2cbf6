"""What the reporter and the host do. The reporter mirrors ``Cycle`` and ``Reporter``; a test holds it to the former.

One report is out at most. The host receives it, takes the gate, and discards; or fails in the middle, keeps everything,
or says nothing at all. A report is withdrawn at any moment but while the host is inside the gate, also when an answer
is under way that nobody has read.
"""

from __future__ import annotations

import numpy as np

from common.geometry import Migratetype
from common.layout import (
    A_SEQUENCE,
    FREE,
    HEAD_MASK,
    IN_FLIGHT,
    KIND_MASK,
    MT_MASK,
    MT_SHIFT,
    ORDER_MASK,
    RESIDENT,
    RETURNED,
    W_HELD_BLOCKS,
    W_MIN_ORDER,
    W_REQUESTED,
    W_WORK,
)
from common.native import kernel, semaphore_post, semaphore_try, store_i64, word_address
from guest.allocator.asks import ask_word
from guest.allocator.entry import locked_request, register_device, unregister_device
from guest.allocator.validate import note
from guest.allocator.view import ctl_of, pages_of
from guest.memory import mark_returned, set_residence
from guest.reporting.blocks import SHORT
from guest.reporting.cycle import RELEASE_BLOCKS
from guest.reporting.shared import answer_ask, set_asking
from guest.reporting.table import (
    HINT,
    ROTATE,
    WALK_LOCKED,
    locked_begin,
    locked_end,
    locked_pull,
    locked_put_back,
    locked_release,
)
from guest.reporting.walk_locked import GO_ON, M_COMMAND, M_DRAINED, M_FILLED, walk
from guest.reporting.walk_locked import KEEP as KEEP_BLOCKS
from lab.explore.words import (
    ACK_DONE,
    ACK_FAILED,
    ACK_KEPT,
    ACK_NONE,
    BATCH,
    CONTENT_MASK,
    ENDING,
    IDLE,
    K_CAPACITY,
    K_PID,
    K_POLICY,
    KEPT,
    MOST_BLOCKS,
    OWNER_MASK,
    REARMING,
    RUN,
    STOPPED,
    X_ACK,
    X_BLOCKS,
    X_COUNT,
    X_DISCARDED,
    X_FAILED,
    X_HOST,
    X_MORE,
    X_PHASE,
)

__all__ = [
    "WITHDRAWN",
    "answer",
    "answer_one",
    "begin",
    "end",
    "pull",
    "put_back",
    "rearm",
    "register",
    "release",
    "show",
    "stop",
    "walk_all",
    "withdraw",
]

ISOLATE = int(Migratetype.ISOLATE)
WITHDRAWN = 4  # X_FAILED: the report was withdrawn


@kernel
def wake(zone, found):  # type: ignore[no-untyped-def]
    """Take one from the semaphore that the free path posts."""
    # SAFETY: the semaphore lies in the mapped header.
    if semaphore_try(word_address(zone.ctl, W_WORK)) != 0:
        note(found, 49, 0, 0)


@kernel
def begin(address, zone, scenario, hand, found):  # type: ignore[no-untyped-def]
    """The reporter wakes and begins a run."""
    wake(zone, found)
    if locked_begin(address, scenario[K_POLICY]) != 0:
        note(found, 45, 0, 0)
    hand[X_PHASE] = RUN
    hand[X_MORE] = 1
    hand[X_FAILED] = 0


@kernel
def pull(address, scenario, hand, pfns, orders, holds, scratch, found):  # type: ignore[no-untyped-def]
    """One pull (``Cycle.pull``). Returns SHORT or MORE."""
    count, state = locked_pull(address, scenario[K_POLICY], pfns, orders, holds, scratch)
    if count < 0 or count > scenario[K_CAPACITY]:
        note(found, 50, count, scenario[K_CAPACITY])
        return SHORT
    hand[X_MORE] = state != SHORT
    hand[X_COUNT] = count
    for index in range(count):
        hand[X_BLOCKS + index] = pfns[index]
        hand[X_BLOCKS + MOST_BLOCKS + index] = orders[index]
    if count > 0:
        hand[X_PHASE] = BATCH
        hand[X_HOST] = count
    elif not hand[X_MORE]:
        hand[X_PHASE] = ENDING
    return state


@kernel
def discard(ram, pfn, order, found):  # type: ignore[no-untyped-def]
    """Make a block zeros, as far as the host is concerned; nobody may have it (S5, S6)."""
    for page in range(pfn, pfn + (1 << order)):
        if np.int64(ram[page]) & OWNER_MASK:
            note(found, 51, page, np.int64(ram[page]) & OWNER_MASK)
        ram[page] = np.int64(ram[page]) & ~(CONTENT_MASK | KEPT)


@kernel
def answer(zone, hand, ram, discarded, kept, found):  # type: ignore[no-untyped-def]
    """The host discards the first ``discarded`` blocks, or keeps all of them, and answers.

    One step from the gate to the answer: nothing is withdrawn in between, and only the discard is seen by others.
    """
    for index in range(hand[X_HOST]):
        pfn = hand[X_BLOCKS + index]
        order = hand[X_BLOCKS + MOST_BLOCKS + index]
        if kept:
            for page in range(pfn, pfn + (1 << order)):
                ram[page] = np.int64(ram[page]) | KEPT
        elif index < discarded:
            if np.int64(pages_of(zone)[pfn]) & HEAD_MASK != IN_FLIGHT | order:
                note(found, 52, pfn, order)
            discard(ram, pfn, order, found)
    hand[X_DISCARDED] = 0 if kept else discarded
    if kept:
        hand[X_ACK] = ACK_KEPT
    else:
        hand[X_ACK] = ACK_DONE if discarded == hand[X_HOST] else ACK_FAILED
    hand[X_HOST] = 0


@kernel
def settle_residence(address, ram, pfns, orders, count, done):  # type: ignore[no-untyped-def]
    """``Cycle._settle_residence``: all of it is gone, or what is there is looked at page by page."""
    if done:
        mark_returned(address, pfns[:count], orders[:count])
        return
    for index in range(count):
        now = np.empty(1 << orders[index], dtype=np.uint8)
        for page in range(now.size):
            now[page] = RESIDENT if np.int64(ram[pfns[index] + page]) & CONTENT_MASK else RETURNED
        set_residence(address, pfns[index], now)


@kernel
def put_back(address, zone, scenario, hand, ram, ack, pfns, orders, holds, scratch, found):  # type: ignore[no-untyped-def]
    """The batch goes back (``Cycle.put_back``). ``ack``: the answer that was read, ACK_NONE for withdrawn.

    A report that was withdrawn, or answered, is not the host's any more.
    """
    count = hand[X_COUNT]
    zeroed = np.zeros(count, dtype=np.bool_)
    for index in range(count):
        pfns[index] = hand[X_BLOCKS + index]
        orders[index] = hand[X_BLOCKS + MOST_BLOCKS + index]
        zeroed[index] = (ack == ACK_DONE or ack == ACK_FAILED) and index < hand[X_DISCARDED]
    accepted = ack == ACK_DONE or ack == ACK_KEPT
    if ack != ACK_KEPT:
        settle_residence(address, ram, pfns, orders, count, ack == ACK_DONE)
    policy = scenario[K_POLICY]
    returned = locked_put_back(address, policy, pfns, orders, count, accepted, zeroed, holds, scratch)
    if returned != count:
        note(found, 53, returned, count)
    clear_batch(hand)
    if not accepted:
        hand[X_MORE] = 0
        hand[X_FAILED] = ACK_FAILED if ack == ACK_FAILED else WITHDRAWN
    elif policy == WALK_LOCKED:  # the walk is over, and was not acknowledged while it was on
        hand[X_MORE] = 0
        hand[X_FAILED] = WITHDRAWN
    elif not hand[X_MORE] and policy != ROTATE and policy != HINT:  # neither one_pass nor host_started
        hand[X_MORE] = ctl_of(zone)[W_REQUESTED] != 0
    hand[X_PHASE] = RUN if hand[X_MORE] else ENDING


@kernel
def withdraw(hand):  # type: ignore[no-untyped-def]
    """The gate is closed, and the number of the report written behind it: the host will find it withdrawn."""
    hand[X_HOST] = 0


@kernel
def clear_batch(hand):  # type: ignore[no-untyped-def]
    """Nothing in hand. What the host has been told stays so, should it not have answered: it would still discard."""
    if hand[X_HOST] == 0:
        for index in range(2 * MOST_BLOCKS):
            hand[X_BLOCKS + index] = 0
    hand[X_COUNT] = 0
    hand[X_DISCARDED] = 0
    hand[X_ACK] = ACK_NONE


@kernel
def end(address, scenario, hand, found):  # type: ignore[no-untyped-def]
    """The end of a run (``Cycle.end``), and what the reporter does about a run that failed."""
    policy = scenario[K_POLICY]
    failed = hand[X_FAILED] != 0
    if locked_end(address, policy, failed or hand[X_MORE] != 0, failed) < 0:
        note(found, 45, 0, 0)
    again = failed and policy != HINT and not (policy == ROTATE and hand[X_FAILED] == ACK_FAILED)
    hand[X_PHASE] = REARMING if again else IDLE
    hand[X_MORE] = 0
    hand[X_FAILED] = 0


@kernel
def rearm(address, hand, found):  # type: ignore[no-untyped-def]
    """Ask for the run that failed once more (``Reporter._run_once``)."""
    if locked_request(address) != 0:
        note(found, 45, 0, 0)
    hand[X_PHASE] = IDLE


@kernel
def stop(address, scenario, hand, found):  # type: ignore[no-untyped-def]
    """The reporter leaves, in the middle of a run if there is one: unregistered first, then the end, early."""
    if unregister_device(address, scenario[K_PID]) != 0:
        note(found, 45, 0, 0)
    if hand[X_PHASE] == RUN and locked_end(address, scenario[K_POLICY], hand[X_MORE] != 0, False) < 0:
        note(found, 45, 0, 0)
    hand[X_PHASE] = STOPPED
    hand[X_MORE] = 0


@kernel
def register(address, scenario, hand, found):  # type: ignore[no-untyped-def]
    """Another reporter registers, and asks for a first run."""
    if register_device(address, scenario[K_PID], np.int64(0)) != 0:
        note(found, 45, 0, 0)
    hand[X_PHASE] = IDLE


@kernel
def release(address, zone, holds, scratch, found):  # type: ignore[no-untyped-def]
    """Held blocks go back, one chunk."""
    before = ctl_of(zone)[W_HELD_BLOCKS]
    released = locked_release(address, np.int64(RELEASE_BLOCKS), holds, scratch)
    if released != min(before, np.int64(RELEASE_BLOCKS)):
        note(found, 54, before, released)


@kernel
def walk_all(address, zone, hand, ram, mailbox, pfns, orders, holds, scratch, command, found):  # type: ignore[no-untyped-def]
    """The whole walk under the lock, each batch given the answer ``command``, for which nobody has to wait.

    GO_ON: the host has discarded all that was handed over, which is all that is free of the minimum order and more.
    STOP: nothing. KEEP: nobody knows; the first batch is in flight now, and the host inside the gate.
    """
    wake(zone, found)
    if command == GO_ON:
        for pfn in range(zone.n_pages):
            state = np.int64(pages_of(zone)[pfn])
            order = state & ORDER_MASK
            if (
                state & KIND_MASK == FREE
                and order >= ctl_of(zone)[W_MIN_ORDER]
                and (state & MT_MASK) >> MT_SHIFT != ISOLATE
            ):
                discard(ram, pfn, order, found)
                pfns[0] = pfn
                orders[0] = order
                mark_returned(address, pfns[:1], orders[:1])
    # SAFETY: the mailbox outlives the call; nobody waits at its semaphores.
    pfns[:] = -1
    for _ in range(zone.n_pages + 1):
        semaphore_post(word_address(mailbox, M_DRAINED))
    store_i64(mailbox + 8 * M_COMMAND, np.int64(command))
    walk(address, mailbox, pfns, orders, holds, holds, scratch)
    while semaphore_try(word_address(mailbox, M_DRAINED)) == 0:
        pass
    while semaphore_try(word_address(mailbox, M_FILLED)) == 0:
        pass
    hand[X_FAILED] = 0 if command == GO_ON else WITHDRAWN
    hand[X_PHASE] = ENDING
    if command == KEEP_BLOCKS:
        for index in range(pfns.size):
            if pfns[index] >= 0:
                hand[X_BLOCKS + hand[X_COUNT]] = pfns[index]
                hand[X_BLOCKS + MOST_BLOCKS + hand[X_COUNT]] = orders[index]
                hand[X_COUNT] += 1
        if hand[X_COUNT] > 0:
            hand[X_PHASE] = BATCH
            hand[X_HOST] = hand[X_COUNT]


@kernel
def answer_one(address, zone, index, populated, found):  # type: ignore[no-untyped-def]
    """The host answers an ask, with the number that it carries now."""
    sequence = ctl_of(zone)[ask_word(index) + A_SEQUENCE]
    if answer_ask(address, index, sequence, populated) != 1:
        note(found, 46, index, populated)


@kernel
def show(address, scenario, found):  # type: ignore[no-untyped-def]
    """The host shows that it answers asks."""
    if set_asking(address, scenario[K_PID]) != 0:
        note(found, 45, 0, 0)
