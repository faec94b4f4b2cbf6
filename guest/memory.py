"""The guest's RAM: first use of a page, stamps, and the resident map that tells what was given back.

A page's owner alone writes its byte in the resident map: whoever allocated the block, or the reporter while the block
is in flight. So nothing here takes a lock.
"""

from __future__ import annotations

import os

import numpy as np

from common.faults import NUMBERS
from common.geometry import PAGE_BYTES
from common.layout import (
    C_FIRST_TOUCHES,
    C_REFAULTS,
    C_TOUCHED_AGAIN,
    C_TOUCHED_FIRST,
    C_TOUCHING,
    C_VIOLATIONS,
    C_ZEROING_SKIPPED,
    INSTALLED,
    NEVER_TOUCHED,
    RESIDENT,
    RETURNED,
    W_N_PAGES,
    W_POISON,
    W_RESIDENT_OFFSET,
    W_RETURNED_PAGES,
    W_SETTLED_PAGES,
    W_SETTLING,
    ZEROED,
)
from common.native import barrier, exchange_u16, fault_point, kernel, view_i64, view_u8
from common.pagecount import PageCount
from guest.allocator.view import ctl_of, pages_of

__all__ = [
    "FINDING_WORDS",
    "PAGE_WORDS",
    "POISON_LOST",
    "STAMP_LOST",
    "ZERO_LOST",
    "check_stamps",
    "is_there",
    "mark_returned",
    "poison_pages",
    "poison_pattern",
    "present_pages",
    "resident_map",
    "set_residence",
    "stamp_of",
    "take_zeroed",
    "use_pages",
]

PAGE_WORDS = PAGE_BYTES // 8
# What a violation leaves behind, int64[FINDING_WORDS]: kind, pfn, expected, found. The first one is kept.
FINDING_WORDS = 4
ZERO_LOST = 1  # a page that was discarded, confirmed as zero, or never used, did not read as zeros (S6, Z1)
STAMP_LOST = 2  # a stamp written into an allocated page was not there when it was freed (S3, S5, S6)
POISON_LOST = 3  # a page that was poisoned when it was freed did not hold the poison when it was used again (Z4)
_PFN_BITS = 28
TOUCH_NOTED, TOUCH_PAGE, TOUCH_MARKED = NUMBERS["touch.noted"], NUMBERS["touch.page"], NUMBERS["touch.marked"]
SETTLE_PAGE, SETTLE_MARKED = NUMBERS["settle.page"], NUMBERS["settle.marked"]


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
def word_unlike(words, expected):  # type: ignore[no-untyped-def]
    """``expected`` if every word of the page is that, else one that is not (or a mixture of several such)."""
    union = np.int64(0)
    for index in range(PAGE_WORDS):
        union |= words[index] ^ expected
    return union ^ expected


@kernel
def poison_pattern(zone):  # type: ignore[no-untyped-def]
    """The word that a poisoned page is full of: the zone's poison byte eight times. 0: this zone does not poison."""
    pattern = np.int64(ctl_of(zone)[W_POISON])
    pattern |= pattern << 8
    pattern |= pattern << 16
    return pattern | pattern << 32


@kernel
def poison_pages(zone, ram_address, pfn, order):  # type: ignore[no-untyped-def]
    """Fill a block that is about to be freed with the zone's poison (kernel_poison_pages). Its owner calls."""
    if ram_address == 0:
        return
    pattern = poison_pattern(zone)
    for page in range(pfn, pfn + (1 << order)):
        # SAFETY: as in use_pages.
        words = view_i64(ram_address + page * PAGE_BYTES, PAGE_WORDS)
        for index in range(PAGE_WORDS):
            words[index] = pattern


@kernel
def take_zeroed(zone, pfn):  # type: ignore[no-untyped-def]
    """Whether the host proved the allocated block at ``pfn`` zero; the answer is given once (Z3).

    An exchange, not a store: a wrong free of this block by somebody else may be claiming it at this moment.
    """
    state = np.int64(pages_of(zone)[pfn])
    if state & ZEROED == 0:
        return False
    # SAFETY: pfn was handed out by the zone, so its state is in bounds.
    return exchange_u16(zone.page + 2 * pfn, state, state & ~ZEROED)


@kernel
def use_pages(zone, address, ram_address, slot, finding, pfn, order, tag):  # type: ignore[no-untyped-def]
    """First use of an allocated block by its owner: fault it in, check, clear (clear_page), stamp.

    Every page that is not resident must read as zeros (S6); it is counted as a first touch or a refault. So must one
    that a host populated beforehand, which is counted there. A zeroed block is not cleared again: what was given back
    comes zero-filled with its fault, and clearing it is a second time (Z1). It is checked all the same; a page of it
    that is not zero is a violation, and is cleared. In a zone that poisons, a page that was ever used must hold the
    poison instead, resident or not: the host may discard nothing (Z4). A page that a host populated was not there.

    With ``ram_address`` 0 (the model backend) only map and counts are kept. Returns the pages that were not resident.
    """
    residence = resident_map(address, ctl_of(zone)[W_N_PAGES])
    zeroed = take_zeroed(zone, pfn)
    poison = poison_pattern(zone)
    skipped = np.int64(0)
    missing = begin_touch(zone, residence, slot, pfn, order)
    for page in range(pfn, pfn + (1 << order)):
        was = residence[page]
        if ram_address != 0:
            # SAFETY: the mapping holds n_pages pages and outlives the vCPU threads; pfn was handed out by the zone.
            words = view_i64(ram_address + page * PAGE_BYTES, PAGE_WORDS)
            clear = not zeroed
            if zeroed or was == NEVER_TOUCHED or was == INSTALLED or (was == RETURNED and poison == 0):
                found = word_unlike(words, np.int64(0))
                if found != 0:
                    note_finding(zone, slot, finding, ZERO_LOST, page, 0, found)
                    clear = True
            elif poison != 0:
                found = word_unlike(words, poison)
                if found != poison:
                    note_finding(zone, slot, finding, POISON_LOST, page, poison, found)
            if clear:
                for index in range(PAGE_WORDS):
                    words[index] = 0
            else:
                skipped += 1
            words[0] = stamp_of(page, tag)
            words[PAGE_WORDS - 1] = stamp_of(page, tag)
        elif zeroed:
            skipped += 1
        residence[page] = RESIDENT
        fault_point(TOUCH_PAGE)
    ctl_of(zone)[slot + C_ZEROING_SKIPPED] += skipped
    fault_point(TOUCH_MARKED)
    end_touch(zone, slot)
    return missing


@kernel
def begin_touch(zone, residence, slot, pfn, order):  # type: ignore[no-untyped-def]
    """Note the block that is about to be used, and what the slot's counts are when it is; the pages that are missing.

    Should the process die on the way, whoever takes the slot over makes the rest of it true (``guest.inherit``).
    """
    refaults = np.int64(0)
    first_touches = np.int64(0)
    for page in range(pfn, pfn + (1 << order)):
        first_touches += residence[page] == NEVER_TOUCHED
        refaults += residence[page] == RETURNED
    ctl_of(zone)[slot + C_TOUCHED_FIRST] = ctl_of(zone)[slot + C_FIRST_TOUCHES] + first_touches
    ctl_of(zone)[slot + C_TOUCHED_AGAIN] = ctl_of(zone)[slot + C_REFAULTS] + refaults
    barrier()
    ctl_of(zone)[slot + C_TOUCHING] = (pfn << 4 | order) + 1
    barrier()
    fault_point(TOUCH_NOTED)
    return refaults + first_touches


@kernel
def end_touch(zone, slot):  # type: ignore[no-untyped-def]
    """Every page of the block that was noted is resident: count them, and close the journal."""
    barrier()
    ctl_of(zone)[slot + C_FIRST_TOUCHES] = ctl_of(zone)[slot + C_TOUCHED_FIRST]
    ctl_of(zone)[slot + C_REFAULTS] = ctl_of(zone)[slot + C_TOUCHED_AGAIN]
    barrier()
    ctl_of(zone)[slot + C_TOUCHING] = 0


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
    header = view_i64(address, W_SETTLED_PAGES + 1)
    residence = resident_map(address, header[W_N_PAGES])
    before = header[W_RETURNED_PAGES]
    for index in range(pfns.size):
        first, pages = pfns[index], 1 << orders[index]
        count = np.int64(0)
        for page in range(first, first + pages):
            count += is_there(residence, page)
        begin_settling(header, first, count)
        for page in range(first, first + pages):
            if is_there(residence, page):
                residence[page] = RETURNED
                fault_point(SETTLE_PAGE)
        end_settling(header)
    return header[W_RETURNED_PAGES] - before


@kernel
def is_there(residence, page):  # type: ignore[no-untyped-def]
    """True for a page that the guest uses, or that a host populated."""
    return residence[page] == RESIDENT or residence[page] == INSTALLED


@kernel
def begin_settling(header, first, count):  # type: ignore[no-untyped-def]
    """Note the block from ``first`` on, of which ``count`` pages are about to be marked as returned.

    The reporter alone does this, a block at a time, so one record is enough (``guest.inherit`` reads it).
    """
    header[W_SETTLED_PAGES] = header[W_RETURNED_PAGES] + count
    barrier()
    header[W_SETTLING] = first + 1
    barrier()


@kernel
def end_settling(header):  # type: ignore[no-untyped-def]
    """Close that journal."""
    fault_point(SETTLE_MARKED)
    barrier()
    header[W_RETURNED_PAGES] = header[W_SETTLED_PAGES]
    barrier()
    header[W_SETTLING] = 0


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
    header = view_i64(address, W_SETTLED_PAGES + 1)
    residence = resident_map(address, header[W_N_PAGES])
    count = np.int64(0)
    for index in range(now.size):
        count += is_there(residence, first + index) and now[index] == RETURNED
    begin_settling(header, first, count)
    for index in range(now.size):
        if is_there(residence, first + index) and now[index] == RETURNED:
            residence[first + index] = RETURNED
            fault_point(SETTLE_PAGE)
    end_settling(header)
