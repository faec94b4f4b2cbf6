"""Breadth first: every state is expanded once, every step is checked, and parents give the shortest trace."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.layout import FREE_HEAD_NODES, W_FREE_PAGES
from common.native import JIT, kernel, view_u8
from guest.allocator.validate import MAX_BREACHES, find_breaches, note
from guest.allocator.view import ctl_of, links_of, open_zone, pages_of
from guest.reporting.blocks import SHORT
from lab.explore.contract import SPINNING, UNFIT, check_state, check_step
from lab.explore.state import pack, unpack
from lab.explore.steps import next_step, take_step
from lab.explore.words import FREE_PAST, K_SLOTS, PULL, X_COUNT, X_MORE, X_WORDS

__all__ = ["FOUND_WORDS", "expand", "hash_of", "insert", "refill", "step_and_check"]

FOUND_WORDS = 1 + 3 * MAX_BREACHES
_MIX = 0x9E3779B97F4A7C15


@kernel
def _compiled_hash(packed):  # type: ignore[no-untyped-def]
    """64 bits of a packed state; never 0."""
    words = packed.view(np.uint64)
    value = np.uint64(0x243F6A8885A308D3)
    for index in range(words.size):
        value ^= words[index]
        value *= np.uint64(_MIX)
        value ^= value >> np.uint64(29)
        value *= np.uint64(0xBF58476D1CE4E5B9)
        value ^= value >> np.uint64(32)
    return value | np.uint64(1)


def _plain_hash(packed: Any) -> Any:
    """The same bits for equal states, by other means: plain Python has no wrapping multiplication."""
    return np.uint64(hash(packed.tobytes()) & 0xFFFF_FFFF_FFFF_FFFF | 1)


hash_of: Any = _compiled_hash if JIT else _plain_hash


@kernel
def insert(table, value):  # type: ignore[no-untyped-def]
    """Put ``value`` into ``table`` (uint64[power of two], 0: empty); True if it is new. There must be room."""
    mask = np.int64(table.size - 1)
    slot = np.int64(value >> np.uint64(1)) & mask
    while table[slot] != 0:
        if table[slot] == value:
            return False
        slot = (slot + 1) & mask
    table[slot] = value
    return True


@kernel
def refill(old, new):  # type: ignore[no-untyped-def]
    """Put all of one table into a larger one."""
    for value in old:
        if value != 0:
            insert(new, value)


@kernel
def step_and_check(  # type: ignore[no-untyped-def]
    address,
    zone,
    scenario,
    hand,
    ram,
    mailbox,
    pfns,
    orders,
    holds,
    scratch,
    finding,
    hand_before,
    ctl_before,
    step,
    found,
):
    """Take one step and check all that must hold after it; returns what a pull answered, else SHORT.

    ``hand_before``, ``ctl_before``: scratch, as large as what they are to hold.
    """
    hand_before[:] = hand
    ctl_before[:] = ctl_of(zone)[: ctl_before.size]
    pages_before = pages_of(zone).copy()
    links_before = links_of(zone)[: 2 * (zone.n_pages + FREE_HEAD_NODES)].copy()
    found[0] = 0
    answer = take_step(address, zone, scenario, hand, ram, mailbox, pfns, orders, holds, scratch, finding, step, found)
    in_step = found[0]
    if in_step == 0:
        find_breaches(zone, found)
    if found[0] == 0:
        check_state(zone, scenario, hand, ram, found)
        kind = step >> 12
        past = kind == FREE_PAST and scenario[K_SLOTS] < 2
        check_step(
            zone,
            scenario,
            kind,
            (step >> 6) & 63,
            past,
            hand,
            hand_before,
            ctl_before,
            pages_before,
            links_before,
            answer,
            found,
        )
    return answer


@kernel
def expand(  # type: ignore[no-untyped-def]
    address,
    scenario,
    words,
    nodes,
    mailbox,
    base,
    base_ram,
    hand,
    ram,
    pfns,
    orders,
    holds,
    scratch,
    finding,
    ctl_before,
    states,
    first_id,
    table,
    new_states,
    new_parents,
    new_steps,
    counts,
    found,
):
    """Expand ``states`` (uint8[n, bytes]); returns how many were, fewer if something was found or there is no room.

    Args:
        base, base_ram: scratch, bytes of the segment and of the model of its pages.
        first_id: number of the first of ``states``; parents are told by it.
        table: of the states seen. new_states, new_parents, new_steps: filled, ``counts[0]`` says how many.
        counts: int64[3]: new states, steps taken, and once something was found the step that did it.
        found: int64[FOUND_WORDS], empty unless something was found; ``counts[2]`` is the step then.
    """
    zone = open_zone(address)
    segment = view_u8(address, base.size)
    packed = np.zeros(states.shape[1], dtype=np.uint8)
    hand_base = np.zeros(X_WORDS, dtype=np.int64)
    hand_before = np.zeros(X_WORDS, dtype=np.int64)
    for index in range(states.shape[0]):
        if counts[0] + 256 > new_states.shape[0]:
            return index
        unpack(zone, scenario, words, nodes, states[index], hand_base, base_ram)
        base[:] = segment
        hand[:] = hand_base
        ram[:] = base_ram
        step = next_step(zone, scenario, hand_base, base_ram, np.int64(-1))
        while step >= 0:
            answer = step_and_check(
                address,
                zone,
                scenario,
                hand,
                ram,
                mailbox,
                pfns,
                orders,
                holds,
                scratch,
                finding,
                hand_before,
                ctl_before,
                step,
                found,
            )
            counts[1] += 1
            if found[0] == 0 and not pack(zone, scenario, words, nodes, hand, ram, packed):
                note(found, UNFIT, ctl_of(zone)[W_FREE_PAGES], 0)
            if found[0] == 0 and step >> 12 == PULL and answer != SHORT and hand[X_COUNT] == 0 and hand[X_MORE] != 0:
                same = True
                for at in range(packed.size):
                    same = same and packed[at] == states[index, at]
                if same:
                    note(found, SPINNING, 0, 0)
            if found[0] > 0:
                counts[2] = step
                return index
            if insert(table, hash_of(packed)):
                new = counts[0]
                new_states[new] = packed
                new_parents[new] = first_id + index
                new_steps[new] = step
                counts[0] = new + 1
            segment[:] = base
            hand[:] = hand_base
            ram[:] = base_ram
            step = next_step(zone, scenario, hand, ram, step)
    return np.int64(states.shape[0])
