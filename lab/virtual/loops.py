"""Compiled loops over the live primitives, which calibration times from outside: one call a measurement."""

from __future__ import annotations

import numpy as np

from common.geometry import PAGE_BYTES
from common.layout import W_ZONE_LOCK
from common.native import kernel, mutex_lock, mutex_unlock, view_i64, word_address
from guest.allocator.percpu import alloc_pages, cpu_slot, free_pages
from guest.allocator.view import open_zone
from guest.memory import PAGE_WORDS, check_stamps, use_pages

__all__ = ["check_many", "clear_many", "get_many", "hit_many", "lock_many", "put_many", "use_many"]

MOVABLE = 1
TAG = 1


@kernel
def lock_many(address, count):  # type: ignore[no-untyped-def]
    """``count`` uncontended lock+unlock pairs of the zone lock."""
    zone = open_zone(address)
    lock = word_address(zone.ctl, W_ZONE_LOCK)
    for _ in range(count):
        mutex_lock(lock)
        mutex_unlock(lock)


@kernel
def get_many(address, cpu, order, out):  # type: ignore[no-untyped-def]
    """Allocate ``out.size`` blocks one at a time into ``out`` (int64[]). Returns how many failed."""
    zone = open_zone(address)
    failed = 0
    for index in range(out.size):
        out[index] = alloc_pages(zone, cpu, order, MOVABLE, 0)
        if out[index] < 0:
            failed += 1
    return failed


@kernel
def put_many(address, cpu, order, pfns):  # type: ignore[no-untyped-def]
    """Free every block of ``pfns`` (int64[]) in that order. Returns how many were refused."""
    zone = open_zone(address)
    refused = 0
    for index in range(pfns.size):
        if free_pages(zone, cpu, pfns[index], order) != 0:
            refused += 1
    return refused


@kernel
def hit_many(address, cpu, order, pfns, count):  # type: ignore[no-untyped-def]
    """Allocate ``pfns.size`` blocks (int64[]) and free them, newest first, ``count`` times. Returns how many failed.

    With fewer blocks than a batch, and that many on the list before, the zone is never asked.
    """
    zone = open_zone(address)
    failed = 0
    for _ in range(count):
        for index in range(pfns.size):
            pfns[index] = alloc_pages(zone, cpu, order, MOVABLE, 0)
        for index in range(pfns.size - 1, -1, -1):
            if pfns[index] < 0 or free_pages(zone, cpu, pfns[index], order) != 0:
                failed += 1
    return failed


@kernel
def use_many(address, ram_address, cpu, finding, first, order, count):  # type: ignore[no-untyped-def]
    """Use ``count`` neighbouring blocks from ``first`` on, as a workload does after an allocation."""
    zone = open_zone(address)
    for index in range(count):
        use_pages(zone, address, ram_address, cpu_slot(cpu), finding, first + (index << order), order, TAG)


@kernel
def check_many(address, ram_address, finding, first, order, count):  # type: ignore[no-untyped-def]
    """Check the stamps of as many blocks, as a workload does before a free. Returns how many are sound."""
    zone = open_zone(address)
    sound = 0
    for index in range(count):
        if check_stamps(zone, ram_address, cpu_slot(0), finding, first + (index << order), order, TAG):
            sound += 1
    return sound


@kernel
def clear_many(ram_address, first, count):  # type: ignore[no-untyped-def]
    """Clear ``count`` pages from ``first`` on, and nothing else: the zeroing in ``use_pages``."""
    for page in range(first, first + count):
        # SAFETY: the caller's mapping holds these pages.
        words = view_i64(ram_address + page * PAGE_BYTES, PAGE_WORDS)
        for index in range(PAGE_WORDS):
            words[index] = np.int64(0)
