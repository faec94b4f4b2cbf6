"""The asker's side of an install: wait, without a lock, until a host has populated the block, then give it back."""

from __future__ import annotations

import numpy as np

from common.layout import A_SEMAPHORE, N_ASKS, W_DEVICE_PID, W_INSTALL_WAIT_NS
from common.native import clock_ns, kernel, load_i64, semaphore_wait_us, sleep_us, thread_is_gone
from guest.allocator.asks import ask_word, end_ask
from guest.allocator.locked import lock_zone, unlock_zone
from guest.allocator.view import ctl_of

__all__ = ["wait_for_install"]

WAIT_US = 10_000  # one sleep; then a look whether the host lives
WAITS = 100  # a second in all: a host that is alive and does not answer is waited for no longer
FULL_US = 100  # when all asks are taken


@kernel
def wait_for_install(zone, index):  # type: ignore[no-untyped-def]
    """Wait for the answer to ask ``index``, a second at most and not for a dead host, and end the ask.

    The caller holds no lock and tries its allocation again. False: the zone lock is beyond recovery.
    """
    if index >= N_ASKS:
        sleep_us(FULL_US)
        return True
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
    end_ask(zone, index)
    ctl_of(zone)[W_INSTALL_WAIT_NS] += waited
    unlock_zone(zone)
    return True
