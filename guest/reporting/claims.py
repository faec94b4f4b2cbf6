"""Who claims from a zone of the policy ``shared``: taking it over from a host that died, and the guest's look at it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from common.errors import SegmentError
from common.layout import RESIDENT, RETURNED
from common.native import thread_is_gone
from common.statistics import new_histogram
from guest.allocator import entry
from guest.allocator.zone import Zone
from guest.inherit import finish_settling
from guest.memory import set_residence
from guest.reporting import shared, table
from guest.reporting.link import LinkStatistics

__all__ = ["Claims", "take_over"]

Residence: TypeAlias = Callable[[int, int], np.ndarray]

_QUIET_S = 5.0  # how long a guest that ends waits for its host to put back what it has
_LOOK_S = 0.01


def take_over(zone: Zone, pid: int, residence: Residence | None, *, stale_pid: int = 0) -> int:
    """Become the device of a zone whose device died, or which has none, and put back what the dead one had in flight.

    The blocks come back unflagged, and the resident map follows what is really there: how far the dead one came nobody
    knows, but for the block that it was marking, which its journal names. Asks of threads that are gone are ended.
    Takes the zone lock, never for longer than one walk over the page records.

    Args:
        pid: of the new device.
        residence: as for ``Cycle``; None without RAM.
        stale_pid: a device that the caller knows to be dead.

    Returns:
        0, or the pid of the device that lives and keeps the zone (S14).

    Raises:
        SegmentError: the zone lock is beyond recovery.
    """
    if stale_pid:
        _check(shared.refuse_asks(zone.address))  # who waits for the dead one need not
    holder = int(_check(entry.register_device(zone.address, pid, stale_pid)))
    if holder:
        return holder
    finish_settling(zone, residence)
    _check(shared.end_lost_asks(zone.address))
    number = table.find_policy("shared").number
    pfns, orders = np.zeros(1024, dtype=np.int64), np.zeros(1024, dtype=np.int64)
    holds, scratch = new_histogram(), np.zeros(2, dtype=np.int64)
    while count := int(_check(shared.find_in_flight(zone.address, pfns, orders))):
        if residence is not None:
            for pfn, order in zip(pfns[:count].tolist(), orders[:count].tolist(), strict=True):
                now = np.where(residence(pfn, order), RESIDENT, RETURNED).astype(np.uint8)
                set_residence(zone.address, pfn, now)
        none = np.zeros(count, dtype=np.bool_)
        _check(table.locked_put_back(zone.address, number, pfns, orders, count, False, none, holds, scratch))
    return 0


def _check(code: int) -> int:
    if code < 0:
        raise SegmentError("the zone lock is beyond recovery; end the guest and start a new one")
    return int(code)


class Claims:
    """A guest's end of this policy, in the place of a link: no queue and no thread, only a look at who claims.

    ``check`` is called now and then (the guest's main thread looks at its memory anyway): when the host has died it
    takes its blocks back.
    """

    def __init__(self, zone: Zone, residence: Residence | None) -> None:
        self._zone = zone
        self._residence = residence
        self._lock = threading.Lock()
        self._hosts: set[int] = set()

    def start(self) -> None:
        """Let a host in."""
        _check(shared.set_open(self._zone.address, 1))

    def stop(self) -> None:
        """Let no host claim any more and wait until none has anything in flight: seconds at most, or until it dies.

        A host that is stopped in the midst of a discard keeps those blocks in flight: they are its own until it is
        through (S5).
        """
        _check(shared.set_open(self._zone.address, 0))
        end = time.monotonic() + _QUIET_S
        pause = threading.Event()
        while time.monotonic() < end:
            self.check()
            now = self._zone.statistics()
            if not now.active and not now.in_flight_blocks:
                break
            pause.wait(_LOOK_S)
        _check(shared.refuse_asks(self._zone.address))

    def close(self) -> None:
        """Nothing is open here."""

    @property
    def connected(self) -> bool:
        """A host claims from this zone, and lives."""
        device = self._zone.device_pid()
        return device not in (0, os.getpid()) and not thread_is_gone(device)

    def check(self) -> None:
        """If the host has died, put back what it had in flight; a host that comes later finds the zone free."""
        device = self._zone.device_pid()
        if not device:
            return
        self._hosts.add(device)
        if not thread_is_gone(device):
            return
        with self._lock:
            if take_over(self._zone, os.getpid(), self._residence, stale_pid=device) == 0:
                _check(entry.unregister_device(self._zone.address, os.getpid()))

    def statistics(self) -> LinkStatistics:
        """Hosts that were seen; nothing is ever sent."""
        return LinkStatistics(len(self._hosts), 0, 0, 0, 0, 0, 0, 0)
