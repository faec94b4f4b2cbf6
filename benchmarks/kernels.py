"""Compiled loops that the benchmarks time from outside: one call a measurement, so Python adds nothing."""

from __future__ import annotations

import numpy as np

from common.layout import W_ZONE_LOCK
from common.native import kernel, mutex_lock, mutex_unlock, word_address
from guest.allocator.percpu import alloc_pages, cpu_slot, free_pages
from guest.allocator.view import open_zone
from guest.memory import use_pages

__all__ = ["get_many", "lock_pairs", "put_many", "repeat_pairs", "use_many"]

MOVABLE = 1


@kernel
def lock_pairs(address, count):  # type: ignore[no-untyped-def]
    """``count`` uncontended lock+unlock pairs of the zone lock: the yardstick."""
    zone = open_zone(address)
    lock = word_address(zone.ctl, W_ZONE_LOCK)
    for _ in range(count):
        mutex_lock(lock)
        mutex_unlock(lock)


@kernel
def get_many(address, cpu, order, out):  # type: ignore[no-untyped-def]
    """Allocate ``out.size`` blocks one at a time into ``out`` (uint32[]). Returns how many failed."""
    zone = open_zone(address)
    failed = 0
    for index in range(out.size):
        pfn = alloc_pages(zone, cpu, order, MOVABLE, 0)
        out[index] = pfn
        if pfn < 0:
            failed += 1
    return failed


@kernel
def put_many(address, cpu, order, pfns):  # type: ignore[no-untyped-def]
    """Free every block of ``pfns`` (uint32[]) in that order. Returns how many were refused."""
    zone = open_zone(address)
    refused = 0
    for pfn in pfns:
        if free_pages(zone, cpu, np.int64(pfn), order) != 0:
            refused += 1
    return refused


@kernel
def repeat_pairs(address, cpu, order, count):  # type: ignore[no-untyped-def]
    """Allocate one block and free it, ``count`` times. Returns how many failed."""
    zone = open_zone(address)
    failed = 0
    for _ in range(count):
        pfn = alloc_pages(zone, cpu, order, MOVABLE, 0)
        if pfn < 0 or free_pages(zone, cpu, pfn, order) != 0:
            failed += 1
    return failed


@kernel
def use_many(address, ram_address, finding, first, order, count):  # type: ignore[no-untyped-def]
    """Use ``count`` neighbouring blocks from ``first`` on, as a workload does after an allocation."""
    zone = open_zone(address)
    for index in range(count):
        use_pages(zone, address, ram_address, cpu_slot(0), finding, first + (index << order), order, 1)
