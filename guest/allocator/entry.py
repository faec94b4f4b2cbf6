"""Entry kernels: what Python calls with the address of a segment. Set-up, allocation, snapshots, slots."""

from __future__ import annotations

import numpy as np

from common.faults import NUMBERS
from common.geometry import N_MIGRATETYPES, N_ORDERS, TOP_ORDER, Migratetype
from common.layout import (
    C_OF_GUEST,
    C_OWNER_PID,
    C_RANDOM_STATE,
    N_PCP_LISTS,
    TRIGGER_BITMAP,
    TRIGGER_OFF,
    W_ACTIVE,
    W_DEVICE_PID,
    W_MIN_ORDER,
    W_N_CPUS,
    W_N_PAGES,
    W_NR_FREE,
    W_OWNER_PID,
    W_RANDOM_STATE,
    W_REFCNT,
    W_REPORTED,
    W_REPORTING_ENABLED,
    W_REQUESTED,
    W_ROTATED,
    W_SEED,
    W_TRIGGER,
)
from common.native import barrier, fault_point, kernel, view_u8
from guest.allocator.buddy import account_free, request_run, unqueue_work
from guest.allocator.lists import add_to_free_list_tail
from guest.allocator.locked import E_LOCK, lock_zone, unlock_zone
from guest.allocator.percpu import alloc_pages, cpu_slot, free_pages, lock_slot, pcp_list_head, unlock_slot
from guest.allocator.repair import empty_lists, recount_hint_bits
from guest.allocator.shuffle import next_random
from guest.allocator.view import blocks_of, ctl_of, links_of, open_zone

__all__ = [
    "claim_slot",
    "initialise_zone",
    "locked_copy",
    "locked_request",
    "read_list",
    "register_device",
    "release_slot",
    "unregister_device",
    "unreported_pages",
    "zone_alloc",
    "zone_free",
]

MOVABLE = int(Migratetype.MOVABLE)
REGISTER_BEGUN = NUMBERS["register.begun"]


@kernel
def initialise_zone(address, top_blocks):  # type: ignore[no-untyped-def]
    """Empty lists, MOVABLE pageblocks (memmap_init_zone), and every page free, in the given order of blocks.

    Args:
        top_blocks: int64[], first pfns of the blocks of the top order, in the order in which they are listed. What is
            left over at the end of memory is freed as one block of pageblock order.

    Nobody else may know of the segment yet: no lock is taken.
    """
    zone = open_zone(address)
    empty_lists(zone)
    for index in range(blocks_of(zone).size):
        blocks_of(zone)[index] = MOVABLE
    for cpu in range(ctl_of(zone)[W_N_CPUS]):
        for index in range(N_PCP_LISTS):
            head = pcp_list_head(zone, cpu, index)
            links_of(zone)[2 * head] = head
            links_of(zone)[2 * head + 1] = head
        ctl_of(zone)[cpu_slot(cpu) + C_RANDOM_STATE] = next_random((ctl_of(zone)[W_SEED] + cpu + 2) * 0x9E3779B1)
    ctl_of(zone)[W_RANDOM_STATE] = next_random((ctl_of(zone)[W_SEED] + 1) * 0x9E3779B1)
    for pfn in top_blocks:
        add_to_free_list_tail(zone, pfn, TOP_ORDER, MOVABLE)
        account_free(zone, 1 << TOP_ORDER, MOVABLE)
    rest = ctl_of(zone)[W_N_PAGES] & ((1 << TOP_ORDER) - 1)
    if rest:
        add_to_free_list_tail(zone, ctl_of(zone)[W_N_PAGES] - rest, TOP_ORDER - 1, MOVABLE)
        account_free(zone, rest, MOVABLE)


@kernel
def zone_alloc(address, cpu, order, migratetype, flags):  # type: ignore[no-untyped-def]
    """``alloc_pages`` on the zone at ``address``: a pfn, E_NO_MEMORY or E_LOCK."""
    return alloc_pages(open_zone(address), cpu, order, migratetype, flags)


@kernel
def zone_free(address, cpu, pfn, order):  # type: ignore[no-untyped-def]
    """``free_pages`` on the zone at ``address``: 0 or a code."""
    return free_pages(open_zone(address), cpu, pfn, order)


@kernel
def locked_copy(address, target):  # type: ignore[no-untyped-def]
    """Copy the segment (uint8[total_bytes]) with every lock held: a consistent snapshot. 0 or E_LOCK."""
    zone = open_zone(address)
    code = E_LOCK
    for cpu in range(ctl_of(zone)[W_N_CPUS]):
        lock_slot(zone, cpu)
    if lock_zone(zone):
        target[:] = view_u8(address, target.size)
        unlock_zone(zone)
        code = 0
    for cpu in range(ctl_of(zone)[W_N_CPUS]):
        unlock_slot(zone, cpu)
    return code


@kernel
def claim_slot(address, pid):  # type: ignore[no-untyped-def]
    """Take the first per-CPU slot that nobody owns. Its number, -1 when all are taken, or E_LOCK.

    One that the guest's own process takes is the guest's: should it die, its successor has it, and nobody else.
    """
    zone = open_zone(address)
    found = np.int64(-1)
    if not lock_zone(zone):
        return np.int64(E_LOCK)
    for cpu in range(ctl_of(zone)[W_N_CPUS]):
        if ctl_of(zone)[cpu_slot(cpu) + C_OWNER_PID] == 0:
            ctl_of(zone)[cpu_slot(cpu) + C_OF_GUEST] = pid == ctl_of(zone)[W_OWNER_PID]
            barrier()
            ctl_of(zone)[cpu_slot(cpu) + C_OWNER_PID] = pid
            found = np.int64(cpu)
            break
    unlock_zone(zone)
    return found


@kernel
def release_slot(address, cpu, pid):  # type: ignore[no-untyped-def]
    """Give a slot up if ``pid`` still owns it. True if it did."""
    zone = open_zone(address)
    if not lock_zone(zone):
        return False
    owned = ctl_of(zone)[cpu_slot(cpu) + C_OWNER_PID] == pid
    if owned:
        ctl_of(zone)[cpu_slot(cpu) + C_OWNER_PID] = 0
    unlock_zone(zone)
    return owned


@kernel
def register_device(address, pid, stale_pid):  # type: ignore[no-untyped-def]
    """Register the reporting device and request the first run without a high-water test (B3).

    With the trigger off nothing is requested: the host starts the runs.

    Returns 0, E_LOCK, or the pid of the device that is registered already (S14: one at a time; -EBUSY in v9).
    ``stale_pid`` may be replaced: the caller found it dead.
    """
    zone = open_zone(address)
    if not lock_zone(zone):
        return np.int64(E_LOCK)
    holder = ctl_of(zone)[W_DEVICE_PID]
    if holder == 0 or holder == stale_pid:
        # What a dead device had asked for or begun is over; its semaphore may have been taken already. A run that it
        # left half done left lists of any shape. Its blocks in flight are the caller's to put back.
        if ctl_of(zone)[W_ACTIVE]:
            for order in range(N_ORDERS):
                ctl_of(zone)[W_ROTATED + order] = (1 << N_MIGRATETYPES) - 1
        ctl_of(zone)[W_REQUESTED] = 0
        ctl_of(zone)[W_REFCNT] = 0
        unqueue_work(zone)  # a post that nobody took would wake the new device for nothing (P2)
        ctl_of(zone)[W_ACTIVE] = 0
        fault_point(REGISTER_BEGUN)
        ctl_of(zone)[W_DEVICE_PID] = pid
        ctl_of(zone)[W_REPORTING_ENABLED] = 1
        if ctl_of(zone)[W_TRIGGER] == TRIGGER_BITMAP:
            recount_hint_bits(zone)  # the policy before this one had the word for something else
        if ctl_of(zone)[W_TRIGGER] != TRIGGER_OFF:
            request_run(zone)
        holder = np.int64(0)
    unlock_zone(zone)
    return holder


@kernel
def unregister_device(address, pid):  # type: ignore[no-untyped-def]
    """End reporting: no free asks for a run any more (S13). 0 or E_LOCK. Blocks in flight are the caller's."""
    zone = open_zone(address)
    if not lock_zone(zone):
        return E_LOCK
    if ctl_of(zone)[W_DEVICE_PID] == pid:
        ctl_of(zone)[W_DEVICE_PID] = 0
        ctl_of(zone)[W_REPORTING_ENABLED] = 0
    unlock_zone(zone)
    return 0


@kernel
def locked_request(address):  # type: ignore[no-untyped-def]
    """Ask for a run, as registration does: used again when a host is back after a failed run. 0 or E_LOCK."""
    zone = open_zone(address)
    if not lock_zone(zone):
        return E_LOCK
    request_run(zone)
    unlock_zone(zone)
    return 0


@kernel
def read_list(address, order, migratetype, out):  # type: ignore[no-untyped-def]
    """Copy one free list, front to tail, into ``out`` (int64[]); returns its length (may exceed ``out``), or E_LOCK."""
    zone = open_zone(address)
    if not lock_zone(zone):
        return np.int64(E_LOCK)
    head = ctl_of(zone)[W_N_PAGES] + migratetype * N_ORDERS + order
    node = np.int64(links_of(zone)[2 * head])
    count = np.int64(0)
    while node != head and count < ctl_of(zone)[W_N_PAGES]:
        if count < out.size:
            out[count] = node
        count += 1
        node = np.int64(links_of(zone)[2 * node])
    unlock_zone(zone)
    return count


@kernel
def unreported_pages(address):  # type: ignore[no-untyped-def]
    """Free pages at or above the minimum order that are not Reported (read without the lock, for figures only)."""
    zone = open_zone(address)
    pages = np.int64(0)
    for order in range(ctl_of(zone)[W_MIN_ORDER], N_ORDERS):
        pages += (ctl_of(zone)[W_NR_FREE + order] - ctl_of(zone)[W_REPORTED + order]) << order
    return pages
