"""The guest's RAM: first use of a page, stamps, and the resident map that tells what was given back.

A page's owner alone writes its byte in the resident map: whoever allocated the block, or the reporter while the block
is in flight. So nothing here takes a lock.
"""

from __future__ import annotations

import os

import numpy as np

from common.geometry import PAGE_BYTES
from common.layout import (
    C_FIRST_TOUCHES,
    C_REFAULTS,
    C_VIOLATIONS,
    INSTALLED,
    NEVER_TOUCHED,
    RESIDENT,
    RETURNED,
    W_N_PAGES,
    W_RESIDENT_OFFSET,
    W_RETURNED_PAGES,
)
from common.native import kernel, view_i64, view_u8
from common.pagecount import PageCount
from guest.allocator.view import ctl_of

__all__ = [
    "FINDING_WORDS",
    "PAGE_WORDS",
    "STAMP_LOST",
    "ZERO_LOST",
    "check_stamps",
    "mark_returned",
    "present_pages",
    "resident_map",
    "set_residence",
    "stamp_of",
    "use_pages",
]

PAGE_WORDS = PAGE_BYTES // 8
# What a violation leaves behind, int64[FINDING_WORDS]: kind, pfn, expected, found. The first one is kept.
FINDING_WORDS = 4
ZERO_LOST = 1  # a page that was discarded, or never used, did not read as zeros (S6)
STAMP_LOST = 2  # a stamp written into an allocated page was not there when it was freed (S3, S5, S6)
_PFN_BITS = 28


@kernel
def resident_map(address, n_pages):  # type: ignore[no-untyped-def]
    """The resident map of the zone at ``address``, uint8[n_pages]."""
    return view_u8(address + view_i64(address, W_RESIDENT_OFFSET + 1)[W_RESIDENT_OFFSET], n_pages)


@kernel
def stamp_of(pfn, tag):  # type: ignore[no-untyped-def]
    """Stamp of page ``pfn`` under allocation ``tag`` (1 to 2**34): never 0, never the same for two pages or owners."""
    return (tag << _PFN_BITS) | pfn


@kernel
def note_finding(zone, slot, finding, kind, pfn, expected, found):  # type: ignore[no-untyped-def]
    """Count a violation in the caller's slot and keep the first in ``finding``."""
    ctl_of(zone)[slot + C_VIOLATIONS] += 1
    if finding[0] == 0:
        finding[0] = kind
        finding[1] = pfn
        finding[2] = expected
        finding[3] = found


@kernel
def first_nonzero(words):  # type: ignore[no-untyped-def]
    """0 if every word of the page is 0, else one that is not."""
    union = np.int64(0)
    for index in range(PAGE_WORDS):
        union |= words[index]
    return union


@kernel
def use_pages(zone, address, ram_address, slot, finding, pfn, order, tag):  # type: ignore[no-untyped-def]
    """First use of an allocated block by its owner: fault it in, check, clear (clear_page), stamp.

    Every page that is not resident must read as zeros (S6); it is counted as a first touch or a refault. So must one
    that a host populated beforehand, which is counted there. With
    ``ram_address`` 0 (the model backend) only the map is kept. Returns the pages that were not resident.
    """
    residence = resident_map(address, ctl_of(zone)[W_N_PAGES])
    refaults = np.int64(0)
    first_touches = np.int64(0)
    for page in range(pfn, pfn + (1 << order)):
        was = residence[page]
        if was == NEVER_TOUCHED:
            first_touches += 1
        elif was == RETURNED:
            refaults += 1
        if ram_address != 0:
            # SAFETY: the mapping holds n_pages pages and outlives the vCPU threads; pfn was handed out by the zone.
            words = view_i64(ram_address + page * PAGE_BYTES, PAGE_WORDS)
            if was != RESIDENT:
                found = first_nonzero(words)
                if found != 0:
                    note_finding(zone, slot, finding, ZERO_LOST, page, 0, found)
            for index in range(PAGE_WORDS):
                words[index] = 0
            words[0] = stamp_of(page, tag)
            words[PAGE_WORDS - 1] = stamp_of(page, tag)
        residence[page] = RESIDENT
    ctl_of(zone)[slot + C_REFAULTS] += refaults
    ctl_of(zone)[slot + C_FIRST_TOUCHES] += first_touches
    return refaults + first_touches


@kernel
def check_stamps(zone, ram_address, slot, finding, pfn, order, tag):  # type: ignore[no-untyped-def]
    """Before a free: every page of the block still carries its stamp at both ends. Returns True if so."""
    if ram_address == 0:
        return True
    sound = True
    for page in range(pfn, pfn + (1 << order)):
        # SAFETY: as in use_pages.
        words = view_i64(ram_address + page * PAGE_BYTES, PAGE_WORDS)
        expected = stamp_of(page, tag)
        found = words[0] if words[0] != expected else words[PAGE_WORDS - 1]
        if found != expected:
            note_finding(zone, slot, finding, STAMP_LOST, page, expected, found)
            sound = False
    return sound


@kernel
def mark_returned(address, pfns, orders):  # type: ignore[no-untyped-def]
    """Blocks in flight were discarded: their resident pages become returned. Reporter thread, no lock.

    Returns how many pages that were.
    """
    header = view_i64(address, W_RETURNED_PAGES + 1)
    residence = resident_map(address, header[W_N_PAGES])
    returned = np.int64(0)
    for index in range(pfns.size):
        for page in range(pfns[index], pfns[index] + (1 << orders[index])):
            if residence[page] == RESIDENT or residence[page] == INSTALLED:
                residence[page] = RETURNED
                returned += 1
    header[W_RETURNED_PAGES] += returned
    return returned


def present_pages(descriptor: int, pfn: int, order: int) -> np.ndarray:
    """Which pages of a block the RAM object open at ``descriptor`` holds: bool[2**order]. Raises nothing.

    Exact where this kernel counts pages; elsewhere a page that was populated and never written passes for absent.
    """
    try:
        return _counted_pages(PageCount(), descriptor, pfn, 1 << order)
    except OSError:  # ENOSYS: an older kernel; EPERM: a sandbox that does not know it
        return _pages_with_data(descriptor, pfn, 1 << order)


def _counted_pages(count: PageCount, descriptor: int, pfn: int, pages: int) -> np.ndarray:
    """As ``present_pages``, by halves: a block is mostly whole or gone. Raises ``OSError``."""
    there = count.pages(descriptor, pfn * PAGE_BYTES, pages * PAGE_BYTES)
    if there in (0, pages):
        return np.full(pages, there == pages)
    half = pages // 2
    halves = [_counted_pages(count, descriptor, first, half) for first in (pfn, pfn + half)]
    return np.concatenate(halves)


def _pages_with_data(descriptor: int, pfn: int, pages: int) -> np.ndarray:
    """As ``present_pages``, by looking for holes."""
    present = np.zeros(pages, dtype=bool)
    start, end = pfn * PAGE_BYTES, (pfn + pages) * PAGE_BYTES
    position = start
    while position < end:
        try:
            data = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError:
            break  # ENXIO: no data from here to the end of the object
        if data >= end:
            break
        hole = min(os.lseek(descriptor, data, os.SEEK_HOLE), end)
        present[(data - start) // PAGE_BYTES : -(-(hole - start) // PAGE_BYTES)] = True
        position = hole
    return present


@kernel
def set_residence(address, first, now):  # type: ignore[no-untyped-def]
    """A discard of pages in flight from ``first`` on is uncertain: ``now`` (uint8[]: RESIDENT or RETURNED) is what is.

    A page that was never touched stays so. Reporter thread, no lock.
    """
    header = view_i64(address, W_RETURNED_PAGES + 1)
    residence = resident_map(address, header[W_N_PAGES])
    for index in range(now.size):
        was = residence[first + index]
        if (was == RESIDENT or was == INSTALLED) and now[index] == RETURNED:
            residence[first + index] = RETURNED
            header[W_RETURNED_PAGES] += 1
