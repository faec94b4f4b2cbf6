"""What one step of a vCPU costs: what its counters say that it did, times the costs."""

from __future__ import annotations

from dataclasses import dataclass

from guest.workloads.vcpu import BUDGET_PAGES
from lab.virtual.costs import Costs
from lab.virtual.counters import SlotCounts

__all__ = ["Step", "price_step"]

_LOW_ORDER_PAGES = 16  # blocks below this, on average, cost what order 0 costs in the zone


@dataclass(slots=True)
class Step:
    """One step, priced.

    Attributes:
        work_ns: all of it.
        locks, allocation_locks: acquisitions of the zone lock, and those of them in an allocation.
        allocations: (latency in ns, how many), fast ones first, those that take the lock last.
        installs, installed_pages: blocks that a host populates while the vCPU waits, and their pages.
    """

    work_ns: float
    locks: int
    allocation_locks: int
    allocations: tuple[tuple[float, int], ...]
    installs: int = 0
    installed_pages: int = 0


def price_step(
    before: SlotCounts,
    after: SlotCounts,
    *,
    taken: int,
    freed: int,
    taken_block_pages: int,
    freed_block_pages: int,
    costs: Costs,
    batch: int,
    fault_factor: float,
) -> Step:
    """Price the step between two looks at the counters.

    Args:
        taken, freed: pages allocated and freed in it.
        taken_block_pages, freed_block_pages: of a block on average. Not that of this step alone: what a refill moves
            goes by it, and must not depend on how many blocks a step has.
        batch: ``pcp_batch``.
        fault_factor: by how much a fault is slower just now.
    """
    allocations = after.allocations - before.allocations
    frees = after.frees - before.frees
    refills = after.refills - before.refills
    drains = after.drains - before.drains
    zone_allocations = after.zone_allocations - before.zone_allocations
    zone_frees = after.zone_frees - before.zone_frees
    failures = after.failures - before.failures
    refaults, first_touches = after.refaults - before.refaults, after.first_touches - before.first_touches

    refill_ns = drain_ns = 0.0
    if refills:
        refill_ns = costs.lock_ns + max(batch // max(1, taken_block_pages), 2) * costs.refill_block_ns
    if drains:
        drain_ns = costs.lock_ns + max(batch // max(1, freed_block_pages), 1) * costs.drain_block_ns
    zone_ns = zone_free_ns = 0.0
    if zone_allocations:
        low = batch == 0 and taken < _LOW_ORDER_PAGES * zone_allocations  # the lists serve the low orders otherwise
        zone_ns = costs.zone_alloc_ns if low else costs.huge_alloc_ns
    if zone_frees:
        low = batch == 0 and freed < _LOW_ORDER_PAGES * zone_frees
        zone_free_ns = costs.zone_free_ns if low else costs.huge_free_ns

    moved = taken + freed
    work = (
        (moved / BUDGET_PAGES if moved else 1.0) * costs.step_ns  # a live step is of so many pages
        + allocations * costs.pcp_alloc_ns
        + frees * costs.pcp_free_ns
        + refills * refill_ns
        + drains * drain_ns
        + zone_allocations * zone_ns
        + zone_frees * zone_free_ns
        + failures * costs.lock_ns
        + taken * costs.touch_ns
        - (after.zeroed_pages - before.zeroed_pages) * costs.zero_ns
        + freed * costs.check_ns
        + (refaults * costs.fault_ns + first_touches * costs.first_fault_ns) * fault_factor
    )
    slow = min(refills, allocations)
    installs, installed_pages = after.installs - before.installs, after.installed_pages - before.installed_pages
    # Of those that look into the zone; without contention, as all of these.
    asked = min(installs, zone_allocations)
    slow_asked = min(installs - asked, slow)
    wait_ns = costs.message_wait_ns + installed_pages / installs * costs.fault_ns if installs else 0.0
    return Step(
        work_ns=work,
        locks=refills + drains + zone_allocations + zone_frees,
        allocation_locks=refills + zone_allocations,
        allocations=(
            (costs.pcp_alloc_ns, allocations - slow),
            (zone_ns, zone_allocations - asked),
            (costs.pcp_alloc_ns + refill_ns, slow - slow_asked),
            (zone_ns + wait_ns, asked),
            (costs.pcp_alloc_ns + refill_ns + wait_ns, slow_asked),
        ),
        installs=installs,
        installed_pages=installed_pages,
    )
