"""A state as bytes: what of the segment means something, what the actors have in hand, what each page holds.

Left out are cumulative statistics, locks, sequence numbers, and what no step may read: links of pages that are on no
list (those of an allocated block say whose it is, for repair alone), boundaries while no run keeps any, a policy's
words between runs. Those are *zero* when a state is taken up again, so a kernel that reads them all the same goes
wrong, and breaks a list.

Every number fits a byte in zones as small as these; ``pack`` says so if one does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from common import layout
from common.errors import UsageError
from common.geometry import N_ORDERS, PAGEBLOCK_ORDER
from common.layout import (
    A_ORDER,
    A_OWNER,
    A_PFN,
    A_STATE,
    ACTIVE_BOUNDARY,
    ACTIVE_RELEASE,
    ASK_FREE,
    C_COUNT,
    FREE,
    FREE_HEAD_NODES,
    HELD,
    INACTIVE,
    KIND_MASK,
    N_FREE_LISTS,
    N_POLICY_WORDS,
    ON_PCP,
    PCP_HEAD_NODES,
    W_ACTIVE,
    W_BOUNDARY,
    W_DEVICE_PID,
    W_N_CPUS,
    W_POLICY_WORDS,
    W_PRESSURE,
    W_REPORTING_ENABLED,
    W_ROTATED,
    W_WORK,
)
from common.native import kernel, semaphore_post, semaphore_try, word_address
from guest.allocator.asks import ask_word
from guest.allocator.percpu import cpu_slot
from guest.allocator.view import bitmap_of, blocks_of, ctl_of, links_of, pages_of, residence_of
from guest.reporting.table import BITMAP, BOUNDARY, HINT, HOLD, ROTATE, SHARED
from lab.explore.words import K_PID, K_POLICY, X_WORDS, X_WORK

__all__ = ["MOST_PAGES", "Packing", "pack", "packing_of", "set_work", "unpack", "work_value"]

MOST_PAGES = 64
ASKERS = 2  # a vCPU waits for one block at a time, so no more asks than these are taken


def _names(text: str) -> list[str]:
    return text.split()


# Each field of the header and of a slot is one of these. Whoever adds one knows what it is, and says so here.
_KEPT = _names(
    """
    free_pages isolated_pages in_flight_pages in_flight_blocks nr_free reported reporting_enabled requested
    active refcnt held_pages held_blocks asking open_to_host
    """
)
_TREATED = _names(
    """
    boundary rotated policy_words pressure device_pid asks work
    """
)
_CONSTANT = _names(
    """
    magic layout_version total_bytes n_pages n_cpus link_offset page_offset resident_offset block_offset
    ram_bytes owner_pid epoch created_ns seed ready bitmap_offset min_watermark low_watermark high_watermark
    pcp_batch trigger min_order high_water_mark shuffle_order merge_likely pcp_high random_state random_word
    random_bits zero_tracking poison padding
    """
)
_FREE_RUNNING = _names(
    """
    zone_lock allocations frees requests runs nodes_visited pulled_blocks in_flight_max_blocks returned_pages
    steals claimed_pageblocks repairs failed_allocations nodes_hold_max installs installed_pages install_wait_ns
    asks_withdrawn ask_sequence asks_work reinstalled_pages in_hand in_hand_before in_hand_head settling
    settled_pages
    """
)
_SLOT_KEPT = ["count"]
_SLOT_OTHERS = _names(
    """
    lock owner_pid random_state random_word random_bits allocations frees refills drains refaults first_touches
    allocated_bytes freed_bytes violations zeroing_skipped_pages in_hand touching touched_first touched_again
    spare
    of_guest
    """
)


@dataclass(frozen=True)
class Packing:
    """How the states of one zone are packed. ``words``: int64[], the words of header and slots that are kept as is."""

    words: Any
    nodes: int
    state_bytes: int


def packing_of(n_pages: int, n_cpus: int) -> Packing:
    """The packing of a zone of ``n_pages`` pages.

    Raises:
        UsageError: the zone is too large, or the layout has a field that nobody has classified.
    """
    nodes = n_pages + FREE_HEAD_NODES + n_cpus * PCP_HEAD_NODES
    if n_pages > MOST_PAGES or nodes > 255:
        raise UsageError(f"pages: {n_pages}; allowed are {MOST_PAGES} at most")
    _check_fields("header", layout.HEADER_DTYPE, [*_KEPT, *_TREATED, *_CONSTANT, *_FREE_RUNNING])
    _check_fields("slot", layout.CPU_DTYPE, _SLOT_KEPT + _SLOT_OTHERS)
    words: list[int] = []
    for name in _KEPT:
        dtype, offset = layout.HEADER_DTYPE.fields[name][:2]  # type: ignore[index]
        words.extend(range(offset // 8, offset // 8 + dtype.itemsize // 8))
    words.extend(int(cpu_slot(cpu)) + C_COUNT for cpu in range(n_cpus))
    treated = N_FREE_LISTS + N_ORDERS + N_POLICY_WORDS + 3 * ASKERS
    pages = 5 * n_pages + (n_pages >> PAGEBLOCK_ORDER) + n_pages // 8  # state (2), residence, content, spare
    state_bytes = len(words) + treated + 2 * nodes + pages + X_WORDS
    return Packing(np.array(words, dtype=np.int64), nodes, -(-state_bytes // 8) * 8)


def _check_fields(what: str, dtype: np.dtype[Any], known: list[str]) -> None:
    unknown = sorted(set(dtype.names or ()) - set(known))
    if unknown:
        raise UsageError(
            f"lab/explore/state.py: {what} field {', '.join(unknown)}: say there whether it is part of a state, "
            "constant, or free running"
        )


@kernel
def work_value(zone):  # type: ignore[no-untyped-def]
    """Value of the semaphore that the reporter sleeps on. Nobody else is there."""
    value = np.int64(0)
    # SAFETY: the semaphore lies in the mapped header.
    while semaphore_try(word_address(zone.ctl, W_WORK)) == 0:
        value += 1
    for _ in range(value):
        semaphore_post(word_address(zone.ctl, W_WORK))
    return value


@kernel
def set_work(zone, value):  # type: ignore[no-untyped-def]
    """Give that semaphore a value."""
    # SAFETY: as above.
    while semaphore_try(word_address(zone.ctl, W_WORK)) == 0:
        pass
    for _ in range(value):
        semaphore_post(word_address(zone.ctl, W_WORK))


@kernel
def is_listed(state):  # type: ignore[no-untyped-def]
    """True when a page in this state is on a list, so that its links mean something."""
    kind = state & KIND_MASK
    return kind == FREE or kind == ON_PCP or kind == HELD


@kernel
def pack_policy(zone, scenario, out, at):  # type: ignore[no-untyped-def]
    """Write boundaries, turned lists and policy words, as far as somebody may read them, from ``out[at]`` on."""
    ctl = ctl_of(zone)
    policy = scenario[K_POLICY]
    active = ctl[W_ACTIVE]
    if active == ACTIVE_BOUNDARY or active == ACTIVE_RELEASE:
        for index in range(N_FREE_LISTS):
            out[at + index] = ctl[W_BOUNDARY + index] + 1
    at += N_FREE_LISTS
    if policy == BOUNDARY or policy == SHARED:
        for order in range(N_ORDERS):
            out[at + order] = ctl[W_ROTATED + order] + 1
    at += N_ORDERS
    if policy == BITMAP:
        out[at] = ctl[W_POLICY_WORDS] + 1
    if active != INACTIVE:
        if policy == HINT or policy == HOLD:
            out[at] = ctl[W_PRESSURE] != ctl[W_POLICY_WORDS]
        elif policy == BITMAP:
            out[at + 1] = ctl[W_POLICY_WORDS + 1] + 1
        elif policy == ROTATE:
            for index in range(4):
                out[at + index] = ctl[W_POLICY_WORDS + index] + 1
    return at + N_POLICY_WORDS


@kernel
def unpack_policy(zone, scenario, state, at):  # type: ignore[no-untyped-def]
    """What ``pack_policy`` wrote; what it left out becomes 0, or what follows from the rest."""
    ctl = ctl_of(zone)
    policy = scenario[K_POLICY]
    for index in range(N_FREE_LISTS):
        ctl[W_BOUNDARY + index] = max(np.int64(state[at + index]) - 1, 0)
    at += N_FREE_LISTS
    for order in range(N_ORDERS):
        ctl[W_ROTATED + order] = max(np.int64(state[at + order]) - 1, 0)
    at += N_ORDERS
    ctl[W_PRESSURE] = 0
    for index in range(N_POLICY_WORDS):
        ctl[W_POLICY_WORDS + index] = np.int64(state[at + index]) - (state[at + index] > 0)
    if policy == HINT or policy == HOLD:
        ctl[W_PRESSURE] = np.int64(state[at])
        ctl[W_POLICY_WORDS] = 0
    elif policy == ROTATE:
        for index in range(4):
            ctl[W_POLICY_WORDS + index] = np.int64(state[at + index]) - 1
    return at + N_POLICY_WORDS


@kernel
def pack(zone, scenario, words, nodes, hand, ram, out):  # type: ignore[no-untyped-def]
    """Write the state into ``out`` (uint8[state_bytes]). False: some number does not fit a byte.

    ``hand``: int64[X_WORDS]. ``ram``: uint8[n_pages]. Nobody else is there; no lock is held.
    """
    ctl = ctl_of(zone)
    n_pages = zone.n_pages
    out[:] = 0
    fits = True
    for index in range(words.size):
        value = ctl[words[index]]
        fits = fits and -1 <= value < 255
        out[index] = (value + 1) & 0xFF
    at = pack_policy(zone, scenario, out, np.int64(words.size))
    for index in range(ASKERS):
        ask = ask_word(index)
        if ctl[ask + A_STATE] != ASK_FREE:
            out[at] = ctl[ask + A_STATE]
            out[at + 1] = ctl[ask + A_PFN]
            out[at + 2] = ctl[ask + A_ORDER]
        at += 3
    out[at : at + 2 * nodes] = links_of(zone)[: 2 * nodes]
    pages = pages_of(zone)
    for pfn in range(n_pages):
        state = np.int64(pages[pfn])
        if not is_listed(state):
            out[at + 2 * pfn] = 0
            out[at + 2 * pfn + 1] = 0
        out[at + 2 * nodes + 2 * pfn] = state & 0xFF
        out[at + 2 * nodes + 2 * pfn + 1] = state >> 8
    at += 2 * nodes + 2 * n_pages
    out[at : at + n_pages] = residence_of(zone)[:n_pages]
    at += n_pages
    out[at : at + n_pages] = ram
    at += n_pages
    blocks = blocks_of(zone)
    out[at : at + blocks.size] = blocks
    at += blocks.size
    if scenario[K_POLICY] == BITMAP:
        out[at : at + n_pages // 8] = bitmap_of(zone)
    at += n_pages // 8
    for index in range(X_WORDS):
        out[at + index] = hand[index]
    return fits


@kernel
def unpack(zone, scenario, words, nodes, state, hand, ram):  # type: ignore[no-untyped-def]
    """Make the segment, ``hand`` and ``ram`` what ``pack`` found. Statistics go on as they are."""
    ctl = ctl_of(zone)
    n_pages = zone.n_pages
    for index in range(words.size):
        ctl[words[index]] = np.int64(state[index]) - 1
    ctl[W_DEVICE_PID] = scenario[K_PID] if ctl[W_REPORTING_ENABLED] else 0
    at = unpack_policy(zone, scenario, state, np.int64(words.size))
    for index in range(ASKERS):
        ask = ask_word(index)
        ctl[ask + A_STATE] = np.int64(state[at])
        ctl[ask + A_PFN] = np.int64(state[at + 1])
        ctl[ask + A_ORDER] = np.int64(state[at + 2])
        ctl[ask + A_OWNER] = zone.thread  # both vCPUs are this thread
        at += 3
    links_of(zone)[: 2 * nodes] = state[at : at + 2 * nodes]
    pages = pages_of(zone)
    at += 2 * nodes
    for pfn in range(n_pages):
        pages[pfn] = np.int64(state[at + 2 * pfn]) | (np.int64(state[at + 2 * pfn + 1]) << 8)
    at += 2 * n_pages
    residence_of(zone)[:n_pages] = state[at : at + n_pages]
    at += n_pages
    ram[:] = state[at : at + n_pages]
    at += n_pages
    blocks = blocks_of(zone)
    blocks[:] = state[at : at + blocks.size]
    at += blocks.size
    bitmap_of(zone)[:] = state[at : at + n_pages // 8]
    at += n_pages // 8
    for index in range(X_WORDS):
        hand[index] = np.int64(state[at + index])
    for cpu in range(ctl[W_N_CPUS]):
        ctl[cpu_slot(cpu)] = 0  # no lock is held
    set_work(zone, hand[X_WORK])
