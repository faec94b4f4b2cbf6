"""The hold policy: report, then keep the block out of the allocator until memory is short.

The idea of the Windows driver of 2026: a block that was given back costs a fault when it is used again, so it should be
the last to be used. Its blocks are inflated, as it were, and pressure deflates them.

* A run takes unreported blocks from the tail of each list, as ``boundary`` does, but stops where the allocator would be
  left with less than the high watermark. After the acknowledgement they are held: on no free list, never handed out.
* Pressure, an allocation that would leave less than the low watermark or would fail, takes held blocks back in the
  allocating path, oldest first, a few under each hold of the lock (``guest.allocator.held``).
* After pressure nothing more is held for a cool-down, which doubles with each pressure that comes soon after another.

Nothing is flagged: what is held is on no list, and a block that comes back is free, unreported, and still not resident.
Neither trigger nor delay of that driver is known to us; they are mainline's (any free, 2 s, 32 blocks).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.geometry import N_MIGRATETYPES, TOP_ORDER, Migratetype
from common.layout import (
    ACTIVE_PLAIN,
    INACTIVE,
    W_ACTIVE,
    W_FREE_PAGES,
    W_HIGH_WATERMARK,
    W_MIN_ORDER,
    W_NODES_VISITED,
    W_POLICY_WORDS,
    W_PRESSURE,
    W_RUNS,
)
from common.native import kernel
from guest.allocator.lists import free_list_head, previous_node
from guest.allocator.view import ctl_of
from guest.reporting.blocks import MORE, SHORT, clear_request, count_pulled, take_for_report

__all__ = ["FIRST_COOLDOWN_NS", "LONGEST_COOLDOWN_NS", "QUIET_NS", "Cooldown", "begin", "end", "pressed", "pull"]

ISOLATE = int(Migratetype.ISOLATE)

W_PRESSURE_BEFORE = W_POLICY_WORDS  # what W_PRESSURE was when the run began

FIRST_COOLDOWN_NS = 1_000_000_000
LONGEST_COOLDOWN_NS = 64_000_000_000
QUIET_NS = 64_000_000_000  # without pressure for so long, the next cool-down is the first again


@kernel
def begin(zone):  # type: ignore[no-untyped-def]
    """A run without boundaries; from here on the first pressure ends it."""
    ctl_of(zone)[W_ACTIVE] = ACTIVE_PLAIN
    ctl_of(zone)[W_RUNS] += 1
    ctl_of(zone)[W_PRESSURE_BEFORE] = ctl_of(zone)[W_PRESSURE]


@kernel
def pressed(zone):  # type: ignore[no-untyped-def]
    """True once memory was short since the run began: nothing more is to be held."""
    return ctl_of(zone)[W_PRESSURE] != ctl_of(zone)[W_PRESSURE_BEFORE]


@kernel
def pull(zone, pfns, orders, capacity):  # type: ignore[no-untyped-def]
    """Fill ``pfns`` and ``orders`` (int64[capacity]) from the tails of the lists; returns (count, SHORT or MORE).

    Highest order first, last type first, never ISOLATE (S9), and never below the high watermark. SHORT clears
    REQUESTED.
    """
    count = np.int64(0)
    order = np.int64(TOP_ORDER)
    spare = ctl_of(zone)[W_FREE_PAGES] - ctl_of(zone)[W_HIGH_WATERMARK]
    if pressed(zone):
        spare = np.int64(0)
    while order >= ctl_of(zone)[W_MIN_ORDER]:
        for back in range(N_MIGRATETYPES):
            migratetype = N_MIGRATETYPES - 1 - back
            if migratetype == ISOLATE:
                continue
            head = free_list_head(zone, order, migratetype)
            pfn = previous_node(zone, head)
            while pfn != head and count < capacity and spare >= 1 << order:
                ctl_of(zone)[W_NODES_VISITED] += 1
                take_for_report(zone, pfn, order, migratetype)
                spare -= 1 << order
                pfns[count] = pfn
                orders[count] = order
                count += 1
                pfn = previous_node(zone, head)
        order -= 1
    count_pulled(zone, count)
    if count == capacity:
        return count, MORE
    clear_request(zone)
    return count, SHORT


@kernel
def end(zone, abandon):  # type: ignore[no-untyped-def]
    """ACTIVE := 0. What is held stays so."""
    ctl_of(zone)[W_ACTIVE] = INACTIVE
    if abandon:
        clear_request(zone)


@dataclass
class Cooldown:
    """How long nothing may be held after pressure: first 1 s, doubled with each pressure up to 64 s.

    Knows no clock: the caller brings ``now_ns``, of a clock that never runs backward. Pressure during a cool-down makes
    it start over; one that comes after it doubles it, unless ``quiet_ns`` have passed since it ended.

    Attributes:
        seen: pressure counted so far; what the zone has counted already is not news.
        length_ns: of the current or last cool-down; 0 before the first pressure.
        since_ns: when it began.
    """

    first_ns: int = FIRST_COOLDOWN_NS
    longest_ns: int = LONGEST_COOLDOWN_NS
    quiet_ns: int = QUIET_NS
    seen: int = 0
    length_ns: int = 0
    since_ns: int = 0

    def note(self, pressure: int, now_ns: int) -> None:
        """Tell how often there has been pressure so far (``ZoneStatistics.pressure``)."""
        if pressure == self.seen:
            return
        self.seen = pressure
        over_ns = now_ns - self.since_ns - self.length_ns  # how long it has been over
        if self.length_ns == 0 or over_ns > self.quiet_ns:
            self.length_ns = self.first_ns
        elif over_ns >= 0:
            self.length_ns = min(2 * self.length_ns, self.longest_ns)
        self.since_ns = now_ns

    def left_ns(self, now_ns: int) -> int:
        """What is left of the cool-down; 0 when blocks may be held."""
        return max(0, self.since_ns + self.length_ns - now_ns) if self.length_ns else 0
