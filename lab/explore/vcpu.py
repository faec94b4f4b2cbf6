"""What the vCPUs and compaction do: one call of a production kernel a step, and what it must answer.

A vCPU that gets a block writes to all of it in the same step: between the two nobody else could tell the difference,
since whoever changes a page that is about to be written to changes it after as well, and is found then.
"""

from __future__ import annotations

import numpy as np

from common.geometry import Migratetype
from common.layout import BLOCK_MT_MASK, BLOCK_SAVED_SHIFT, CPU_WORDS, HEADER_WORDS, W_FREE_PAGES, W_MIN_WATERMARK
from common.native import kernel
from guest.allocator.asks import ASK, AWAITED, ask_word, end_ask
from guest.allocator.buddy import pageblock_type
from guest.allocator.install import is_ask_of
from guest.allocator.lists import free_list_head, next_node
from guest.allocator.locked import (
    E_NO_MEMORY,
    lock_zone,
    locked_isolate,
    locked_rotate,
    locked_set_type,
    locked_unisolate,
    unlock_zone,
)
from guest.allocator.percpu import alloc_there, drain_slot, free_pages
from guest.allocator.validate import note
from guest.allocator.view import blocks_of, ctl_of
from guest.memory import use_pages
from lab.explore.words import CONTENT_SHIFT, K_SLOTS, OWNER_MASK, X_ASKS, X_DRAIN

__all__ = ["alloc", "drain", "end_wait", "free", "isolate", "isolated_blocks", "rotate", "set_type", "unisolate"]

ISOLATE = int(Migratetype.ISOLATE)


@kernel
def slot_of(scenario, vcpu):  # type: ignore[no-untyped-def]
    """Slot that vCPU 1 or 2 goes through; -1: past the per-CPU lists."""
    return np.int64(vcpu - 1) if vcpu <= scenario[K_SLOTS] else np.int64(-1)


@kernel
def alloc(address, zone, scenario, hand, ram, finding, vcpu, order, migratetype, found):  # type: ignore[no-untyped-def]
    """Allocate, check what was handed out, write to it."""
    before = ctl_of(zone)[W_FREE_PAGES]
    pfn = alloc_there(zone, slot_of(scenario, vcpu), np.int64(order), np.int64(migratetype), np.int64(0))
    if pfn <= ASK:
        if pfn > AWAITED + 1:
            hand[X_ASKS + vcpu - 1] = ASK - pfn + 1
        return
    if pfn < 0:
        if pfn != E_NO_MEMORY:
            note(found, 40, pfn, order)
        return
    for page in range(pfn, pfn + (1 << order)):
        if np.int64(ram[page]) & OWNER_MASK:
            note(found, 41, page, np.int64(ram[page]) & OWNER_MASK)
        if pageblock_type(zone, page) == ISOLATE and not hand[X_DRAIN]:
            note(found, 42, page, order)
    after = ctl_of(zone)[W_FREE_PAGES]
    if after < before and after < ctl_of(zone)[W_MIN_WATERMARK]:
        note(found, 43, after, ctl_of(zone)[W_MIN_WATERMARK])
    slot = HEADER_WORDS + max(slot_of(scenario, vcpu), np.int64(0)) * CPU_WORDS
    use_pages(zone, address, np.int64(0), slot, finding, pfn, np.int64(order), np.int64(1))
    ram[pfn : pfn + (1 << order)] = vcpu | (vcpu << CONTENT_SHIFT)


@kernel
def free(zone, scenario, ram, vcpu, pfn, order, found):  # type: ignore[no-untyped-def]
    """Free a block; what is in it stays."""
    for page in range(pfn, pfn + (1 << order)):
        ram[page] = np.int64(ram[page]) & ~OWNER_MASK
    code = free_pages(zone, slot_of(scenario, vcpu), np.int64(pfn), np.int64(order))
    if code != 0:
        note(found, 44, pfn, code)


@kernel
def drain(address, hand, slot, found):  # type: ignore[no-untyped-def]
    """Give back what a slot's lists hold (drain_pages); the last slot ends what an isolation has to do."""
    pages = drain_slot(address, slot)
    if pages < 0:
        note(found, 45, slot, pages)
    hand[X_DRAIN] &= ~(1 << slot)


@kernel
def end_wait(zone, hand, vcpu, found):  # type: ignore[no-untyped-def]
    """A vCPU ends its ask, answered or not, as the end of ``wait_for_install`` does; it tries again some time."""
    index = hand[X_ASKS + vcpu - 1] - 1
    hand[X_ASKS + vcpu - 1] = 0
    if not lock_zone(zone):
        note(found, 45, vcpu, index)
        return
    if is_ask_of(zone, ask_word(index), zone.thread):
        end_ask(zone, index)
    else:
        note(found, 46, vcpu, index)
    unlock_zone(zone)


@kernel
def isolated_blocks(zone):  # type: ignore[no-untyped-def]
    """How many pageblocks are isolated."""
    count = 0
    blocks = blocks_of(zone)
    for index in range(blocks.size):
        count += np.int64(blocks[index]) & BLOCK_MT_MASK == ISOLATE
    return count


@kernel
def isolate(address, scenario, hand, pageblock, found):  # type: ignore[no-untyped-def]
    """Isolate a pageblock; the per-CPU lists are to be drained next (``Zone.isolate``)."""
    code = locked_isolate(address, pageblock)
    if code != 0:
        note(found, 47, pageblock, code)
    hand[X_DRAIN] = (1 << scenario[K_SLOTS]) - 1


@kernel
def unisolate(address, zone, pageblock, found):  # type: ignore[no-untyped-def]
    """End the isolation of a pageblock."""
    code = locked_unisolate(address, pageblock)
    if code != 0:
        note(found, 47, pageblock, code)
    blocks = blocks_of(zone)  # what it was before is nobody's to know any more
    if np.int64(blocks[pageblock]) >> BLOCK_SAVED_SHIFT:
        note(found, 48, pageblock, np.int64(blocks[pageblock]))


@kernel
def set_type(address, pageblock, migratetype, found):  # type: ignore[no-untyped-def]
    """Change the type of a pageblock."""
    code = locked_set_type(address, pageblock, migratetype)
    if code != 0:
        note(found, 47, pageblock, code)


@kernel
def rotate(address, zone, order, migratetype, found):  # type: ignore[no-untyped-def]
    """Turn a list by one entry; any turn is some of these."""
    second = next_node(zone, next_node(zone, free_list_head(zone, order, migratetype)))
    code = locked_rotate(address, order, migratetype, second)
    if code != 0:
        note(found, 47, second, code)
