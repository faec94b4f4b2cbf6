"""The callback iterator (Wei Wang, v14 to v29 of free page hinting): blocks are reported under the zone lock.

``walk`` mirrors walk_free_mem_block(opaque, min_order, callback): the zone lock is held while every free block, from
the top order down to the minimum, every type but ISOLATE, is handed to the reporter, and until the host has
acknowledged the last of them. The blocks stay on their lists: only the lock keeps the guest from using what the host
discards. The original, which served migration, needed no answer; here memory is given back, so the walk waits for each
batch. So S10 is broken by design, and every allocation that needs the zone waits for the host. There is no Reported
flag: each run reports everything again, and nothing is ever "reported already" for the high-water mark.

Lock, work and unlock are one kernel here too: it runs in a thread of its own, without the GIL, and meets the reporter
at two semaphores, so no Python runs on the thread that holds the lock. The two sides alternate strictly: the walk moves
only inside ``Walker.next``, ``Walker.settle`` and ``Walker.close``, so what it visits does not depend on time.

A report that fails ends the walk. Blocks that a host may still discard when the walk has to end are taken off their
lists first (in flight), as with every other policy (S5).
"""

from __future__ import annotations

import threading

import numpy as np

from common.faults import NUMBERS
from common.geometry import N_MIGRATETYPES, TOP_ORDER, Migratetype
from common.layout import (
    ACTIVE_PLAIN,
    HANDED,
    INACTIVE,
    MT_SHIFT,
    W_ACTIVE,
    W_MIN_ORDER,
    W_NODES_HOLD_MAX,
    W_NODES_VISITED,
    W_PULLED_BLOCKS,
    W_RUNS,
)
from common.mutex import initialise_semaphore, post_semaphore, wait_semaphore
from common.native import (
    clock_ns,
    fault_point,
    kernel,
    load_i64,
    semaphore_post,
    semaphore_wait,
    store_i64,
    word_address,
)
from common.statistics import record
from guest.allocator.lists import free_list_head, next_node
from guest.allocator.locked import E_LOCK, lock_zone, unlock_zone
from guest.allocator.view import ctl_of, open_zone, pages_of
from guest.reporting.blocks import clear_request, take_for_report

__all__ = ["Walker", "walk"]

ISOLATE = int(Migratetype.ISOLATE)
MT_FIELD = 0x7
WALK_HANDED = NUMBERS["walk.handed"]

# Words of the mailbox between the walk and the reporter, int64[MAILBOX_WORDS]. A semaphore takes eight.
M_FILLED = 0  # sem_t: the walk has something to say
M_DRAINED = 8  # sem_t: the reporter has answered
M_COUNT = 16  # blocks handed over; 0: the walk is over and the lock released; E_LOCK
M_SHORT = 17  # 1: the last blocks of this walk
M_COMMAND = 18  # the answer
MAILBOX_WORDS = 24

GO_ON = 0  # acknowledged: next blocks
STOP = 1  # not acknowledged, and nothing will be discarded any more: unlock
KEEP = 2  # nobody knows: take these blocks in flight, then unlock


@kernel
def mark_handed(zone, pfns, count, handed):  # type: ignore[no-untyped-def]
    """Note on blocks that stay on their lists that a host has them (HANDED), or that it is through with them (0).

    Should this process die now, the lock is free and the host still discards: repair takes them off the lists (S5).
    """
    for index in range(count):
        pages_of(zone)[pfns[index]] = np.int64(pages_of(zone)[pfns[index]]) & ~HANDED | handed


@kernel
def hand_over(zone, mailbox, pfns, orders, count, short, scratch):  # type: ignore[no-untyped-def]
    """Give ``count`` blocks to the reporter and sleep until it answers; returns (answer, ns waited). Lock held."""
    ctl_of(zone)[W_PULLED_BLOCKS] += count
    mark_handed(zone, pfns, count, HANDED)
    fault_point(WALK_HANDED)
    start = clock_ns(scratch)
    store_i64(mailbox + 8 * M_COUNT, np.int64(count))
    store_i64(mailbox + 8 * M_SHORT, np.int64(short))
    # SAFETY: the mailbox outlives the thread, which its Walker joins; sem_wait fails for a signal only (EINTR).
    semaphore_post(word_address(mailbox, M_FILLED))
    while semaphore_wait(word_address(mailbox, M_DRAINED)) != 0:
        pass
    waited = clock_ns(scratch) - start
    answer = load_i64(mailbox + 8 * M_COMMAND)
    if answer == KEEP:
        take_in_flight(zone, pfns, orders, count)
    else:
        mark_handed(zone, pfns, count, 0)
    return answer, waited


@kernel
def take_in_flight(zone, pfns, orders, count):  # type: ignore[no-untyped-def]
    """Take blocks that are still on their lists off them, in flight: a host may discard them at any time (S5)."""
    for index in range(count):
        state = np.int64(pages_of(zone)[pfns[index]])
        take_for_report(zone, pfns[index], orders[index], (state >> MT_SHIFT) & MT_FIELD)


@kernel
def visit_all(zone, mailbox, pfns, orders, scratch):  # type: ignore[no-untyped-def]
    """Every free block of at least the minimum order, in batches of ``pfns.size``; lock held.

    Returns (the last answer, nodes visited, ns waited).
    """
    answer = np.int64(GO_ON)
    count = np.int64(0)
    visited = np.int64(0)
    waited = np.int64(0)
    order = np.int64(TOP_ORDER)
    while order >= ctl_of(zone)[W_MIN_ORDER] and answer == GO_ON:
        for migratetype in range(N_MIGRATETYPES):
            if migratetype == ISOLATE:
                continue
            head = free_list_head(zone, order, migratetype)
            pfn = next_node(zone, head)
            while pfn != head and answer == GO_ON:
                pfns[count] = pfn
                orders[count] = order
                count += 1
                visited += 1
                ctl_of(zone)[W_NODES_VISITED] += 1
                if count == pfns.size:
                    answer, slept = hand_over(zone, mailbox, pfns, orders, count, 0, scratch)
                    waited += slept
                    count = np.int64(0)
                pfn = next_node(zone, pfn) if answer == GO_ON else head
            if answer != GO_ON:
                break
        order -= 1
    if count > 0 and answer == GO_ON:
        answer, slept = hand_over(zone, mailbox, pfns, orders, count, 1, scratch)
        waited += slept
    return answer, visited, waited


@kernel
def walk(address, mailbox, pfns, orders, holds, waits, scratch):  # type: ignore[no-untyped-def]
    """The whole walk: lock, visit, unlock, then say that it is over.

    Args:
        mailbox: address of int64[MAILBOX_WORDS]. pfns, orders: int64[capacity], the batch handed over. holds, waits:
            histograms of ns under the lock and of its part that was spent waiting for answers. scratch: int64[2].
    """
    zone = open_zone(address)
    over = np.int64(E_LOCK)
    if lock_zone(zone):
        start = clock_ns(scratch)
        ctl_of(zone)[W_ACTIVE] = ACTIVE_PLAIN
        ctl_of(zone)[W_RUNS] += 1
        answer, visited, waited = visit_all(zone, mailbox, pfns, orders, scratch)
        ctl_of(zone)[W_NODES_HOLD_MAX] = max(ctl_of(zone)[W_NODES_HOLD_MAX], visited)
        if answer == GO_ON:
            clear_request(zone)  # nobody could ask anew meanwhile
        ctl_of(zone)[W_ACTIVE] = INACTIVE
        elapsed = clock_ns(scratch) - start
        unlock_zone(zone)
        record(holds, elapsed)
        record(waits, waited)
        over = np.int64(0)
    store_i64(mailbox + 8 * M_COUNT, over)
    # SAFETY: as in hand_over.
    semaphore_post(word_address(mailbox, M_FILLED))


class Walker:
    """The walk of one cycle and its mailbox. For the thread that drives the cycle.

    From ``start`` until ``next`` has answered 0, ``settle`` was given the last blocks, or ``close`` has returned, the
    zone lock is held or waited for: whoever drives the cycle must not take it meanwhile.

    Args:
        pfns, orders: int64[capacity]; filled by ``next``.
        holds, waits: histograms, see ``walk``.
    """

    def __init__(
        self, address: int, pfns: np.ndarray, orders: np.ndarray, holds: np.ndarray, waits: np.ndarray
    ) -> None:
        # Eight words more than needed: a semaphore is aligned to a cache line, as those of a segment are.
        self._words = np.zeros(MAILBOX_WORDS + 8, dtype=np.int64)
        skipped = -(int(self._words.ctypes.data) // 8) % 8
        self._words = self._words[skipped : skipped + MAILBOX_WORDS]
        self._mailbox = int(self._words.ctypes.data)
        initialise_semaphore(self._mailbox + 8 * M_FILLED)
        initialise_semaphore(self._mailbox + 8 * M_DRAINED)
        self._arguments = (address, self._mailbox, pfns, orders, holds, waits, np.zeros(2, dtype=np.int64))
        self._thread: threading.Thread | None = None
        self._unanswered = False
        self._settled = False

    @property
    def walking(self) -> bool:
        """A walk was started and has not ended."""
        return self._thread is not None

    def start(self) -> None:
        """Begin a walk; the lock is taken as soon as it is free."""
        self.close()
        # A daemon: a process that leaves in the middle does not wait for a host.
        self._thread = threading.Thread(target=walk, args=self._arguments, name="walk", daemon=True)
        self._thread.start()

    def next(self) -> tuple[int, bool]:
        """The next blocks: how many, and whether they are the last. 0: the walk is over. E_LOCK: the lock is lost.

        Blocks that were handed over before count as acknowledged.
        """
        if self._thread is None:
            return 0, True
        if self._unanswered:
            self._answer(GO_ON)
        wait_semaphore(self._mailbox + 8 * M_FILLED)
        count, short = int(self._words[M_COUNT]), bool(self._words[M_SHORT])
        if count <= 0:
            self._join()
            return count, True
        self._unanswered = True
        return count, short

    def settle(self, *, acknowledged: bool) -> None:
        """The host's answer for what was handed over. Not acknowledged, or the last: the lock is free afterwards."""
        if not acknowledged:
            self._end(STOP)
        elif self._words[M_SHORT]:
            self.next()  # the walk ends by itself, and its request is answered
        else:
            self._settled = True

    def close(self) -> None:
        """End the walk at once. Blocks that were handed over and never settled stay in flight (S5)."""
        self._end(STOP if self._settled else KEEP)

    def _end(self, answer: int) -> None:
        while self._thread is not None:
            if not self._unanswered:
                wait_semaphore(self._mailbox + 8 * M_FILLED)
                if self._words[M_COUNT] <= 0:
                    self._join()
                    return
                answer = STOP  # nobody has seen these
            self._answer(answer)

    def _answer(self, answer: int) -> None:
        self._words[M_COMMAND] = answer
        self._unanswered = self._settled = False
        post_semaphore(self._mailbox + 8 * M_DRAINED)

    def _join(self) -> None:
        assert self._thread is not None
        self._thread.join()
        self._thread = None
