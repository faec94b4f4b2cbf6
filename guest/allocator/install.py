"""The asker's side of an install: wait, without a lock, until a host has populated the block, then give it back."""

from __future__ import annotations

import numpy as np

from common.layout import (
    A_OWNER,
    A_SEMAPHORE,
    A_SEQUENCE,
    A_STATE,
    ASK_FREE,
    N_ASKS,
    W_ASKING,
    W_DEVICE_PID,
    W_INSTALL_WAIT_NS,
)
from common.native import clock_ns, kernel, load_i64, semaphore_wait_us, sleep_us, thread_is_gone
from guest.allocator.asks import ask_word, end_ask
from guest.allocator.locked import lock_zone, unlock_zone
from guest.allocator.view import ctl_of

__all__ = ["FULL_WAITS", "reap_asks", "wait_for_ask", "wait_for_install"]

WAIT_US = 10_000  # one sleep; then a look whether the host lives
WAITS = 100  # a second in all: a host that is alive and does not answer is waited for no longer
FULL_US = 100  # when all asks are taken
FULL_WAITS = WAITS * WAIT_US // FULL_US  # as long as for one ask
LOOK = WAIT_US // FULL_US  # so many of these waits from one look whether an asker has died to the next


@kernel
def wait_for_install(zone, index):  # type: ignore[no-untyped-def]
    """Wait for the answer to ask ``index``, a second at most and not for a dead host, and end the ask.

    The caller holds no lock and tries its allocation again. False: the zone lock is beyond recovery.
    """
    scratch = np.zeros(2, dtype=np.int64)
    start = clock_ns(scratch)
    for _ in range(WAITS):
        # SAFETY: the semaphore and the word lie in the mapped header.
        if semaphore_wait_us(zone.ctl + 8 * (ask_word(index) + A_SEMAPHORE), WAIT_US, scratch):
            break
        host = load_i64(zone.ctl + 8 * W_DEVICE_PID)
        if host == 0 or thread_is_gone(host):
            break
    waited = clock_ns(scratch) - start
    if not lock_zone(zone):
        return False
    if is_ask_of(zone, ask_word(index), zone.thread):
        end_ask(zone, index)
    ctl_of(zone)[W_INSTALL_WAIT_NS] += waited
    unlock_zone(zone)
    return True


@kernel
def wait_for_ask(zone, waits):  # type: ignore[no-untyped-def]
    """All asks are taken, or have the memory that is wanted: the ``waits``-th short wait, from 0 on, for one to end.

    After a second of them asking ends, until a host shows itself again: a page is then populated by the fault of
    whoever touches it. The caller holds no lock. False: the zone lock is beyond recovery.
    """
    if waits % LOOK == 0 and not reap_asks(zone):
        return False
    if waits >= FULL_WAITS:
        if not lock_zone(zone):
            return False
        ctl_of(zone)[W_ASKING] = 0
        unlock_zone(zone)
    else:
        sleep_us(FULL_US)
    return True


@kernel
def is_ask_of(zone, ask, thread):  # type: ignore[no-untyped-def]
    """True when the ask is taken, by ``thread``. Zone lock held."""
    return ctl_of(zone)[ask + A_STATE] != ASK_FREE and ctl_of(zone)[ask + A_OWNER] == thread


@kernel
def reap_asks(zone):  # type: ignore[no-untyped-def]
    """End the asks of threads that are gone. The caller holds no lock. False: the zone lock is beyond recovery.

    Who is gone is found without the lock; under it the ask must still be the same one.
    """
    for index in range(N_ASKS):
        ask = ask_word(index)
        # SAFETY: the words lie in the mapped header.
        sequence = load_i64(zone.ctl + 8 * (ask + A_SEQUENCE))
        owner = load_i64(zone.ctl + 8 * (ask + A_OWNER))
        if load_i64(zone.ctl + 8 * (ask + A_STATE)) != ASK_FREE and thread_is_gone(owner):
            if not lock_zone(zone):
                return False
            if is_ask_of(zone, ask, owner) and ctl_of(zone)[ask + A_SEQUENCE] == sequence:
                end_ask(zone, index)
            unlock_zone(zone)
    return True
