"""The table of policies. To add one: its module, one entry in ``POLICIES``, and one branch in each kernel here.

Compiled code cannot call through a Python table, so the four steps are dispatched by the policy's number inside the
kernels that hold the lock. Each is lock, step, unlock; the time under the lock goes into ``holds``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.errors import UsageError
from common.layout import W_REQUESTED
from common.native import clock_ns, kernel
from common.statistics import record
from guest.allocator.buddy import unqueue_work
from guest.allocator.locked import E_LOCK, lock_zone, unlock_zone
from guest.allocator.view import ctl_of, open_zone
from guest.reporting import boundary

__all__ = ["POLICIES", "Policy", "find_policy", "locked_begin", "locked_end", "locked_pull", "locked_put_back"]


@dataclass(frozen=True)
class Policy:
    """One row of the table. Defaults are those of the kernel version that the policy mirrors."""

    number: int
    name: str
    summary: str
    trigger: str  # of ``ZoneSettings``
    delay_ns: int
    capacity: int


POLICIES = {
    policy.name: policy
    for policy in (
        Policy(0, "off", "no reporting: nothing is ever given back", "off", 0, 16),
        # v9: HZ/10, min(ring, 16), reference section 0.
        Policy(1, "boundary", "v9: flag, boundary, high-water mark", "hwm", 100_000_000, 16),
    )
}
OFF, BOUNDARY = 0, 1


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
    unlock_zone(zone)
    return 0


@kernel
def locked_pull(address, policy, pfns, orders, holds, scratch):  # type: ignore[no-untyped-def]
    """Pull one batch; returns (count or E_LOCK, SHORT or MORE).

    Args:
        pfns, orders: int64[capacity], filled. holds: histogram of ns under the lock. scratch: int64[2] for the clock.
    """
    zone = open_zone(address)
    count, state = np.int64(0), boundary.SHORT
    if policy == BOUNDARY:
        boundary.prefetch_pull(zone, pfns.size)
    if not lock_zone(zone):
        return np.int64(E_LOCK), state
    start = clock_ns(scratch)
    if policy == BOUNDARY:
        count, state = boundary.pull(zone, pfns, orders, pfns.size)
    elapsed = clock_ns(scratch) - start
    unlock_zone(zone)
    record(holds, elapsed)
    return count, state


@kernel
def locked_put_back(address, policy, pfns, orders, count, reported, holds, scratch):  # type: ignore[no-untyped-def]
    """Put one batch back; returns how many blocks were still in flight, or E_LOCK. Arguments as in ``locked_pull``."""
    zone = open_zone(address)
    returned = np.int64(0)
    if not lock_zone(zone):
        return np.int64(E_LOCK)
    start = clock_ns(scratch)
    if policy == BOUNDARY:
        returned = boundary.put_back(zone, pfns, orders, count, reported)
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
            boundary.clear_request(zone)
    unqueue_work(zone)
    requested = ctl_of(zone)[W_REQUESTED]
    unlock_zone(zone)
    return requested
