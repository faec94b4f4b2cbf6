"""The table of policies. To add one: its module, one entry in ``POLICIES``, and one branch in each kernel here.

Compiled code cannot call through a Python table, so the four steps are dispatched by the policy's number inside the
kernels that hold the lock. Each is lock, step, unlock; the time under the lock goes into ``holds``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.errors import UsageError
from common.layout import W_NODES_HOLD_MAX, W_NODES_VISITED, W_REQUESTED
from common.native import clock_ns, kernel
from common.statistics import record
from guest.allocator.buddy import FPI_SKIP_REPORT_NOTIFY, FPI_TO_TAIL, unqueue_work
from guest.allocator.locked import E_LOCK, lock_zone, unlock_zone
from guest.allocator.view import ctl_of, open_zone
from guest.reporting import bitmap, blocks, boundary, hint, hold, rotate, scan, shared, skip_walk

__all__ = [
    "POLICIES",
    "Policy",
    "find_policy",
    "locked_begin",
    "locked_end",
    "locked_pull",
    "locked_put_back",
    "locked_release",
]


@dataclass(frozen=True)
class Policy:
    """One row of the table. Defaults are those of the kernel version that the policy mirrors.

    Attributes:
        trigger: what asks for a run in the free path, a name of ``ZoneSettings``.
        high_water_mark: of that trigger: unreported free blocks, or bits set.
        keeps: after the report a block stays out of the allocator (it is held) until the policy lets go of it.
        under_lock: the zone lock is held while blocks are reported.
        host_started: a run begins when the host says so, never by a free.
        host_driven: the host makes the four steps itself; there is no reporter.
        one_pass: a run is over when a batch came up short, whatever was asked for meanwhile (mainline, M1).
        rearms: a run that failed is asked for again (v9 keeps REQUESTED; mainline waits for the next free, M3b).
        virtual_only: exists in virtual time alone.
    """

    number: int
    name: str
    summary: str
    trigger: str
    delay_ns: int
    capacity: int
    high_water_mark: int = 32
    keeps: bool = False
    under_lock: bool = False
    host_started: bool = False
    host_driven: bool = False
    one_pass: bool = False
    rearms: bool = True
    virtual_only: bool = False


POLICIES = {
    policy.name: policy
    for policy in (
        Policy(0, "off", "no reporting: nothing is ever given back", "off", 0, 16),
        # v9: HZ/10, min(ring, 16).
        Policy(1, "boundary", "v9: flag, boundary, high-water mark", "hwm", 100_000_000, 16),
        Policy(2, "scan", "v9 without the boundary: each block is searched from the tail", "hwm", 100_000_000, 16),
        # The core of v11 and v12 refuses a capacity above 32. That is a limit, not a value: the letters name no
        # capacity of the driver between v9's 16 and mainline's 32.
        Policy(3, "skip-walk", "v10 to v13: skips what is reported, min watermark", "hwm", 100_000_000, 16),
        # The high-water mark is not asked for; 2 s and 32 are mainline's.
        Policy(
            4,
            "rotate",
            "mainline: rotation, a budget a pass, low watermark",
            "any",
            2_000_000_000,
            32,
            one_pass=True,
            rearms=False,
        ),
        # The series named neither delay nor batch: those of v9, so that only what differs differs.
        Policy(
            5, "walk-locked", "v14-v29 of hinting: reported under the lock", "hwm", 100_000_000, 16, under_lock=True
        ),
        # v37 of free page hinting: no delay; the kernel sends block by block.
        Policy(
            6,
            "hint",
            "one-shot, started by the host: allocate until failure, hold until the host says done",
            "off",
            0,
            16,
            keeps=True,
            host_started=True,
            rearms=False,
        ),
        # v10 to v12 of Nitesh Narayan Lal's series: 16 bits set, reports of 16, a workqueue at once.
        Policy(7, "bitmap", "a bit a block set on free, no flag, a lock cycle a bit", "bitmap", 0, 16, 16),
        # Trigger, delay and batch of mainline, since those of the driver that it follows are not known.
        Policy(8, "hold", "report, then hold the block until memory is short", "any", 2_000_000_000, 32, keeps=True),
        # Capacity and high-water mark of v9 again; the delay is how often a host looks (its --every).
        Policy(9, "shared", "no queue: a trusted host claims", "hwm", 100_000_000, 16, host_driven=True),
    )
}
OFF, BOUNDARY, SCAN, SKIP_WALK, ROTATE, WALK_LOCKED, HINT, BITMAP, HOLD, SHARED = range(10)


def find_policy(name: str) -> Policy:
    """The policy of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in POLICIES:
        raise UsageError(f"policy: {name!r}; allowed are {', '.join(sorted(POLICIES))}")
    return POLICIES[name]


@kernel
def locked_begin(address, policy):  # type: ignore[no-untyped-def]
    """Start a run. 0 or E_LOCK."""
    zone = open_zone(address)
    if not lock_zone(zone):
        return E_LOCK
    if policy == BOUNDARY:
        boundary.begin(zone)
    elif policy == SCAN:
        scan.begin(zone)
    elif policy == SKIP_WALK:
        skip_walk.begin(zone)
    elif policy == ROTATE:
        rotate.begin(zone)
    elif policy == HINT:
        hint.begin(zone)
    elif policy == BITMAP:
        bitmap.begin(zone)
    elif policy == HOLD:
        hold.begin(zone)
    elif policy == SHARED:
        shared.begin(zone)
    unlock_zone(zone)
    return 0


@kernel
def locked_pull(address, policy, pfns, orders, holds, scratch):  # type: ignore[no-untyped-def]
    """Pull one batch; returns (count or E_LOCK, SHORT or MORE).

    Args:
        pfns, orders: int64[capacity], filled. holds: histogram of ns under the lock. scratch: int64[2] for the clock.
    """
    zone = open_zone(address)
    count, state = np.int64(0), blocks.SHORT
    if policy == BITMAP:
        return bitmap.locked_scan(zone, pfns, orders, holds, scratch)
    if policy == BOUNDARY or policy == SHARED:
        boundary.prefetch_pull(zone, pfns.size)
    if not lock_zone(zone):
        return np.int64(E_LOCK), state
    start = clock_ns(scratch)
    visited = ctl_of(zone)[W_NODES_VISITED]
    if policy == BOUNDARY:
        count, state = boundary.pull(zone, pfns, orders, pfns.size)
    elif policy == SCAN:
        count, state = scan.pull(zone, pfns, orders, pfns.size)
    elif policy == SKIP_WALK:
        count, state = skip_walk.pull(zone, pfns, orders, pfns.size)
    elif policy == ROTATE:
        count, state = rotate.pull(zone, pfns, orders, pfns.size)
    elif policy == HINT:
        count, state = hint.pull(zone, pfns, orders, pfns.size)
    elif policy == HOLD:
        count, state = hold.pull(zone, pfns, orders, pfns.size)
    elif policy == SHARED:
        count, state = shared.pull(zone, pfns, orders, pfns.size)
    visited = ctl_of(zone)[W_NODES_VISITED] - visited
    ctl_of(zone)[W_NODES_HOLD_MAX] = max(ctl_of(zone)[W_NODES_HOLD_MAX], visited)
    elapsed = clock_ns(scratch) - start
    unlock_zone(zone)
    record(holds, elapsed)
    return count, state


@kernel
def locked_put_back(address, policy, pfns, orders, count, reported, zeroed, holds, scratch):  # type: ignore[no-untyped-def]
    """Put one batch back; returns how many blocks were still in flight, or E_LOCK. Arguments as in ``locked_pull``.

    ``zeroed``: bool[count], the blocks that the host confirmed as zero (Z1).
    """
    zone = open_zone(address)
    returned = np.int64(0)
    if not lock_zone(zone):
        return np.int64(E_LOCK)
    start = clock_ns(scratch)
    blocks.mark_zeroed(zone, pfns, orders, count, zeroed)
    if BOUNDARY <= policy <= ROTATE:
        returned = blocks.put_back(zone, pfns, orders, count, reported, FPI_SKIP_REPORT_NOTIFY | FPI_TO_TAIL)
    elif policy == BITMAP:
        returned = blocks.put_back(zone, pfns, orders, count, False, FPI_SKIP_REPORT_NOTIFY)
    elif policy == HINT or policy == HOLD:
        if reported and not (policy == HOLD and hold.pressed(zone)):
            returned = blocks.hold_blocks(zone, pfns, orders, count)
        else:
            returned = blocks.put_back(zone, pfns, orders, count, False, FPI_SKIP_REPORT_NOTIFY | FPI_TO_TAIL)
    elif policy == WALK_LOCKED:  # what its walk took in flight as it had to end; it flags nothing
        returned = blocks.put_back(zone, pfns, orders, count, False, FPI_SKIP_REPORT_NOTIFY | FPI_TO_TAIL)
    elif policy == SHARED:
        returned = blocks.put_back(zone, pfns, orders, count, reported, FPI_SKIP_REPORT_NOTIFY | FPI_TO_TAIL)
    elapsed = clock_ns(scratch) - start
    unlock_zone(zone)
    record(holds, elapsed)
    return returned


@kernel
def locked_end(address, policy, early, abandon):  # type: ignore[no-untyped-def]
    """End a run, ``early`` if no pull came up short; ``abandon`` clears REQUESTED too. Returns REQUESTED or E_LOCK."""
    zone = open_zone(address)
    if not lock_zone(zone):
        return np.int64(E_LOCK)
    if policy == BOUNDARY:
        boundary.end(zone, early)
        if abandon:
            blocks.clear_request(zone)
    elif policy == SCAN or policy == SKIP_WALK:
        blocks.end_plain(zone)
        if abandon:
            blocks.clear_request(zone)
    elif policy == ROTATE:
        blocks.end_plain(zone)  # what was asked for during the run stands, however it ended (M1)
    elif policy == HINT:
        hint.end(zone)
    elif policy == BITMAP:
        bitmap.end(zone, abandon)
    elif policy == HOLD:
        hold.end(zone, abandon)
    elif policy == WALK_LOCKED and abandon:
        blocks.clear_request(zone)
    elif policy == SHARED:
        boundary.end(zone, early)
        if abandon:
            blocks.clear_request(zone)
    unqueue_work(zone)
    requested = ctl_of(zone)[W_REQUESTED]
    unlock_zone(zone)
    return requested


@kernel
def locked_release(address, most, holds, scratch):  # type: ignore[no-untyped-def]
    """Free at most ``most`` of the blocks that are held, whichever policy holds them; how many, or E_LOCK.

    Nobody is asked for a run. ``holds``, ``scratch``: as in ``locked_pull``.
    """
    zone = open_zone(address)
    if not lock_zone(zone):
        return np.int64(E_LOCK)
    start = clock_ns(scratch)
    released = blocks.release_held(zone, most, FPI_SKIP_REPORT_NOTIFY)
    elapsed = clock_ns(scratch) - start
    unlock_zone(zone)
    record(holds, elapsed)
    return released
