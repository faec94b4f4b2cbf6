"""What a dead process leaves in a zone: its per-CPU slots with their blocks, its reports, what it was marking.

Linux frees the memory of a process that is killed (exit_mmap), and so does ``reap``. Or somebody goes on with it: a
guest that restarts takes the slots of the process before it over, and finds its blocks by the owner that is written
beside each (``allocator/owners``). A block whose owner had not finished using it for the first time is nobody's: it is
freed either way.

Everything here is done by one process at a time for one dead one, since a slot, and a zone's ownership, are taken over
by one atomic step; and all of it can be done twice, since whoever does it may die as well.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from common.errors import AllocatorError
from common.geometry import N_ORDERS
from common.layout import (
    C_OF_GUEST,
    C_OWNER_PID,
    C_TOUCHING,
    ORDER_MASK,
    RESIDENT,
    RETURNED,
    W_N_PAGES,
    W_POISON,
    W_RETURNED_PAGES,
    W_SETTLED_PAGES,
    W_SETTLING,
)
from common.native import kernel, thread_is_gone, view_i64
from guest.allocator.owners import find_owned, take_slot
from guest.allocator.slots import cpu_slot
from guest.allocator.view import ctl_of, open_zone, pages_of
from guest.memory import PAGE_WORDS, end_touch, is_there, poison_pages, resident_map

if TYPE_CHECKING:
    from guest.allocator.zone import Zone

__all__ = ["Inheritance", "dead_slots", "finish_settling", "free_inheritance", "reap", "take_over_slot"]

Residence: TypeAlias = Callable[[int, int], np.ndarray]

_ROWS = 4096  # blocks looked up at once


@dataclass(frozen=True)
class Inheritance:
    """A slot that was taken over, and its blocks: int64[n, 3], pfn, order, and the owner's word of each (not 0)."""

    cpu: int
    blocks: np.ndarray


@kernel
def finish_touch(address, ram_address, cpu):  # type: ignore[no-untyped-def]
    """Make true what the owner of slot ``cpu`` had noted of the block it was using for the first time.

    The pages that it had not come to are touched now, so that map, counts and memory agree again. The block itself is
    freed by the caller: it has no stamps, or not all of them.
    """
    zone = open_zone(address)
    slot = cpu_slot(cpu)
    record = ctl_of(zone)[slot + C_TOUCHING] - 1
    if record < 0:
        return
    pfn, order = record >> 4, record & ORDER_MASK
    if order < N_ORDERS and pfn + (1 << order) <= zone.n_pages:
        residence = resident_map(address, ctl_of(zone)[W_N_PAGES])
        for page in range(pfn, pfn + (1 << order)):
            if ram_address != 0:
                # SAFETY: the mapping holds n_pages pages, and the block is that of the slot, which the caller owns.
                view_i64(ram_address + page * 8 * PAGE_WORDS, PAGE_WORDS)[0] = 0
            residence[page] = RESIDENT
        end_touch(zone, slot)
    else:
        ctl_of(zone)[slot + C_TOUCHING] = 0


@kernel
def poison_block(address, ram_address, pfn, order):  # type: ignore[no-untyped-def]
    """``poison_pages`` where the zone asks for it, of the pages that are there: the others were not used (Z4)."""
    zone = open_zone(address)
    if ctl_of(zone)[W_POISON] == 0:
        return
    residence = resident_map(address, ctl_of(zone)[W_N_PAGES])
    for page in range(pfn, pfn + (1 << order)):
        if residence[page] == RESIDENT:
            poison_pages(zone, ram_address, page, 0)


@kernel
def settle_rest(address, gone):  # type: ignore[no-untyped-def]
    """Mark the rest of the block that a dead reporter was marking as returned, and count it.

    ``gone``: bool[pages of the block], which of them are not there. For whoever has taken the zone over.
    """
    header = view_i64(address, W_SETTLED_PAGES + 1)
    first = header[W_SETTLING] - 1
    if first < 0:
        return
    residence = resident_map(address, header[W_N_PAGES])
    for index in range(gone.size):
        if gone[index] and is_there(residence, first + index):
            residence[first + index] = RETURNED
    header[W_RETURNED_PAGES] = header[W_SETTLED_PAGES]
    header[W_SETTLING] = 0


@kernel
def settling_block(address):  # type: ignore[no-untyped-def]
    """(pfn, order) of the block that a dead reporter was marking, or (-1, 0)."""
    header = view_i64(address, W_SETTLED_PAGES + 1)
    first = header[W_SETTLING] - 1
    if first < 0 or first >= header[W_N_PAGES]:
        return np.int64(-1), np.int64(0)
    return first, np.int64(pages_of(open_zone(address))[first]) & ORDER_MASK


def dead_slots(zone: Zone, *, guest_is_dead: bool = False) -> list[tuple[int, int]]:
    """(slot, pid) of each slot whose process has ended. Reads without a lock.

    ``guest_is_dead``: the caller has the owner's lock on the RAM object, so the guest's own slots are of a dead process
    whatever their pid says: this one may have been given the same, as the first of a container mostly is.
    """
    found = []
    for cpu in range(zone.n_cpus):
        pid = zone.slot_word(cpu, C_OWNER_PID)
        of_dead_guest = guest_is_dead and zone.slot_word(cpu, C_OF_GUEST)
        if pid and (of_dead_guest or (pid != os.getpid() and thread_is_gone(pid))):
            found.append((cpu, pid))
    return found


def take_over_slot(zone: Zone, cpu: int, stale_pid: int, ram_address: int) -> Inheritance | None:
    """Make a dead process's slot this one's; its blocks, or None if another process was faster.

    What its per-CPU lists hold goes back to the zone, and so does a block that was not in use yet. Takes both locks.

    Args:
        stale_pid: the slot's owner, which the caller found dead.
        ram_address: where the guest's RAM is mapped here, 0 for the model backend.
    """
    if not take_slot(zone.address, cpu, stale_pid, os.getpid()):
        return None
    zone.drain(cpu)  # takes the slot's lock, and so repairs it
    finish_touch(zone.address, ram_address, cpu)
    blocks = _blocks_of(zone, cpu)
    unused = blocks[:, 2] == 0
    _free(zone, cpu, ram_address, blocks[unused])
    return Inheritance(cpu, blocks[~unused])


def reap(zone: Zone, ram_address: int) -> int:
    """Free what dead processes have in this zone, and give their slots up (exit_mmap); how many slots. Both locks.

    Not what they had in flight: that is the reporter's who comes after them (``claims.take_over``). And not what the
    guest itself had: that is its successor's, if there is one.
    """
    reaped = 0
    for cpu, pid in dead_slots(zone):
        if zone.slot_word(cpu, C_OF_GUEST):
            continue
        inherited = take_over_slot(zone, cpu, pid, ram_address)
        if inherited is not None:
            free_inheritance(zone, inherited, ram_address)
            reaped += 1
    return reaped


def free_inheritance(zone: Zone, inherited: Inheritance, ram_address: int) -> None:
    """Free every block of a slot that was taken over, and give the slot up. Both locks."""
    _free(zone, inherited.cpu, ram_address, inherited.blocks)
    zone.release_cpu(inherited.cpu)


def finish_settling(zone: Zone, residence: Residence | None) -> None:
    """Finish what a dead reporter was marking as returned. For whoever has the zone, before its blocks in flight go
    back. ``residence``: as for ``Cycle``; None without RAM, where all that was reported counts as gone.
    """
    pfn, order = settling_block(zone.address)
    if pfn < 0:
        return
    gone = np.ones(1 << order, dtype=np.bool_) if residence is None else ~residence(int(pfn), int(order))
    settle_rest(zone.address, gone)


def _blocks_of(zone: Zone, cpu: int) -> np.ndarray:
    """Every block of a slot: int64[n, 3]."""
    parts = []
    rows = np.zeros((_ROWS, 3), dtype=np.int64)
    first = 0
    while first < zone.n_pages:
        count, first = find_owned(zone.address, cpu, first, rows)
        parts.append(rows[:count].copy())
    return np.concatenate(parts) if parts else rows[:0]


def _free(zone: Zone, cpu: int, ram_address: int, blocks: np.ndarray) -> None:
    for pfn, order, _word in blocks.tolist():
        poison_block(zone.address, ram_address, pfn, order)
        with contextlib.suppress(AllocatorError):  # somebody freed what was not his
            zone.free(pfn, order, cpu=cpu)
    zone.drain(cpu)
