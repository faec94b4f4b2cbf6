"""What must hold between any two steps, beside what ``validate`` sees: the contract of the reporting reference.

``check_state`` looks at a state alone, ``check_step`` at what a step made of the state before. Both add to what
``find_breaches`` found, with codes of their own.
"""

from __future__ import annotations

import numpy as np

from common.geometry import N_ORDERS, TOP_ORDER, Migratetype
from common.layout import (
    A_STATE,
    ACTIVE_BOUNDARY,
    ACTIVE_RELEASE,
    ALLOCATED,
    ASK_FREE,
    C_IN_HAND,
    C_TOUCHING,
    CLAIMED,
    FREE,
    HEAD_MASK,
    HELD,
    IN_FLIGHT,
    INACTIVE,
    INSTALLED,
    KIND_MASK,
    MT_MASK,
    MT_SHIFT,
    N_FREE_LISTS,
    NEVER_TOUCHED,
    ON_PCP,
    ORDER_MASK,
    REPORTED,
    RETURNED,
    TRIGGER_ANY_FREE,
    TRIGGER_BITMAP,
    TRIGGER_HIGH_WATER_MARK,
    W_ACTIVE,
    W_BOUNDARY,
    W_FREE_PAGES,
    W_HIGH_WATER_MARK,
    W_HIGH_WATERMARK,
    W_IN_FLIGHT_BLOCKS,
    W_IN_FLIGHT_PAGES,
    W_IN_HAND,
    W_LOW_WATERMARK,
    W_MIN_ORDER,
    W_MIN_WATERMARK,
    W_N_CPUS,
    W_NR_FREE,
    W_POLICY_WORDS,
    W_REPORTED,
    W_REPORTING_ENABLED,
    W_REQUESTED,
    W_REQUESTS,
    W_SETTLING,
    W_TRIGGER,
    ZEROED,
)
from common.native import kernel
from guest.allocator.asks import ask_word
from guest.allocator.buddy import pageblock_type
from guest.allocator.lists import free_list_head, next_node
from guest.allocator.percpu import cpu_slot
from guest.allocator.validate import BREACHES, note
from guest.allocator.view import ctl_of, pages_of, residence_of
from guest.reporting.blocks import SHORT
from guest.reporting.table import BOUNDARY, HOLD, ROTATE, SCAN, SHARED, SKIP_WALK
from lab.explore.state import ASKERS
from lab.explore.words import (
    ACK_DONE,
    ACK_KEPT,
    BEGIN,
    CONTENT_MASK,
    CONTENT_SHIFT,
    DRAIN,
    FREE_LISTS,
    FREE_PAST,
    IDLE,
    K_CAPACITY,
    K_POLICY,
    KEPT,
    MOST_BLOCKS,
    OWNER_MASK,
    PULL,
    PUT_BACK,
    STOPPED,
    WITHDRAW,
    X_ACK,
    X_ASKS,
    X_BLOCKS,
    X_COUNT,
    X_DRAIN,
    X_PHASE,
    X_WORK,
)

__all__ = ["MESSAGES", "SPINNING", "UNFIT", "check_state", "check_step"]

ISOLATE = int(Migratetype.ISOLATE)
SPINNING = 75
UNFIT = 76

MESSAGES = BREACHES | {
    40: "S4: allocation answered {0} (order {1})",
    41: "S3: page {0} was handed out while vCPU {1} has it",
    42: "S9: page {0} of an isolated pageblock was handed out (order {1})",
    43: "S4: an allocation left {0} pages free, below the min watermark of {1}",
    44: "S4: the free of block {0} by its owner was refused ({1})",
    45: "lock: a step on {0} lost the lock ({1})",
    46: "S3: the ask that vCPU or host {0} has to do with is not there ({1})",
    47: "S9: a change of pageblock or list {0} was refused ({1})",
    48: "S9: the type of pageblock {0} after isolation is {1}",
    49: "B2: the reporter woke without a post",
    50: "S10: a pull answered {0} blocks, at most {1} are allowed",
    51: "S5: the host discarded page {0}, which vCPU {1} has",
    52: "S5: the host discarded block {0} of order {1}, which is not in flight",
    53: "S3: {0} of {1} blocks of a batch were still in flight when it went back",
    54: "S4: of {0} held blocks {1} were released",
    55: "S6: page {0} holds what {1} wrote, and is not its any more",
    56: "S4: page {0} of an allocated block has owner {1}",
    57: "S4: page {0} has an owner ({1}), and is not allocated",
    58: "S6: block {0} is Reported or held, and its page {1} was neither discarded nor kept",
    59: "Z1: block {0}, order {1}, is marked zeroed and is not zero",
    60: "S6: page {0} is said not to be there (state {1}), and holds something",
    61: "S4: page {0} is claimed between two steps ({1:#x})",
    62: "S3: block {0} of the batch, order {1}, is not in flight",
    63: "S4: {0} blocks are in flight, the actors have {1}",
    64: "B5: ACTIVE is {0} while the reporter is in phase {1}",
    65: "B2: REQUESTED is set, no work is queued ({0}) and nobody runs ({1})",
    66: "P2: work is queued ({0}) and nobody asked for a run ({1})",
    67: "S2: block {0}, order {1}, became Reported without a report that was acknowledged",
    68: "S8: block {0}, order {1}, is Reported, and its report failed, was withdrawn, or was not answered",
    69: "S15: a put-back asked for a run ({0} before, {1} after)",
    70: "S9: a pull took block {0} of order {1} from an isolated pageblock, or below the minimum order",
    71: "S4: a pull or put-back of {0} pages changed the free count by {1}",
    72: "P1: the pull came up short, and block {0} of order {1} is unreported",
    73: "B5: the boundary of list {0} is {1} at the start of a run, not its head",
    74: "P3: a free of order {1} at {0} should have asked for a run",
    SPINNING: "P1: a pull changed nothing and asks for another ({0}, {1})",
    UNFIT: "a number of this state does not fit a byte ({0}, {1})",
    77: "B3: a free of order {1} at {0} asked for a run below the high-water mark",
    78: "M4: a pull left {0} pages free, at or below the mark of {1}",
    79: "M2: the budget of a list is {0} ({1})",
    80: "S2: block {0}, order {1}, was Reported already when it was pulled",
    81: "S1: block {0}, order {1}, is Reported under a policy that flags none",
    82: "M3: a pull changed the cyclic order of the list of order {0}, at block {1}",
    85: "S4: a journal names a block between two steps (header {0}, a slot {1})",
    84: "S9: block {0}, order {1}, of an isolated pageblock is on a per-CPU list that was drained since",
    83: "D3: the boundary left block {0} of order {1}, which is still on its list",
}


@kernel
def check_pages(zone, scenario, hand, ram, found):  # type: ignore[no-untyped-def]
    """Owners, contents, flags and the resident map agree (S1, S4, S6, Z1). The records are a tiling."""
    pages = pages_of(zone)
    residence = residence_of(zone)
    policy = scenario[K_POLICY]
    flags = policy == BOUNDARY or policy == SCAN or policy == SKIP_WALK or policy == ROTATE or policy == SHARED
    pfn = np.int64(0)
    while pfn < zone.n_pages:
        state = np.int64(pages[pfn])
        order = state & ORDER_MASK
        kind = state & KIND_MASK
        if state & CLAIMED:
            note(found, 61, pfn, state)
        if kind == ON_PCP and hand[X_DRAIN] == 0 and pageblock_type(zone, pfn) == ISOLATE:
            note(found, 84, pfn, order)
        if state & REPORTED and not flags:
            note(found, 81, pfn, order)
        empty = kind == HELD or (state & REPORTED) != 0
        for page in range(pfn, pfn + (1 << order)):
            value = np.int64(ram[page])
            owner = value & OWNER_MASK
            content = (value & CONTENT_MASK) >> CONTENT_SHIFT
            if kind == ALLOCATED:
                if owner == 0 or owner != np.int64(ram[pfn]) & OWNER_MASK:
                    note(found, 56, page, owner)
                elif content != owner:
                    note(found, 55, page, content)
            elif owner != 0:
                note(found, 57, page, owner)
            if content != 0:
                if empty and not value & KEPT:
                    note(found, 58, pfn, page)
                if state & ZEROED:
                    note(found, 59, pfn, order)
                there = residence[page]
                if there == NEVER_TOUCHED or there == RETURNED or there == INSTALLED:
                    note(found, 60, page, np.int64(there))
        pfn += 1 << order


@kernel
def check_flight(zone, scenario, hand, found):  # type: ignore[no-untyped-def]
    """What is in flight is what the reporter has and what vCPUs wait for (S3, S10)."""
    pages = pages_of(zone)
    blocks = hand[X_COUNT]
    if blocks > scenario[K_CAPACITY]:
        note(found, 50, blocks, scenario[K_CAPACITY])
    for index in range(blocks):
        pfn = hand[X_BLOCKS + index]
        order = hand[X_BLOCKS + MOST_BLOCKS + index]
        if np.int64(pages[pfn]) & HEAD_MASK != IN_FLIGHT | order:
            note(found, 62, pfn, order)
    asks = np.int64(0)
    for index in range(ASKERS):
        asks += ctl_of(zone)[ask_word(index) + A_STATE] != ASK_FREE
        blocks += hand[X_ASKS + index] != 0
    if ctl_of(zone)[W_IN_FLIGHT_BLOCKS] != blocks or asks != blocks - hand[X_COUNT]:
        note(found, 63, ctl_of(zone)[W_IN_FLIGHT_BLOCKS], blocks)


@kernel
def check_run(zone, scenario, hand, found):  # type: ignore[no-untyped-def]
    """Request, semaphore and ACTIVE agree with where the reporter is (B2, B5, P2, M2)."""
    ctl = ctl_of(zone)
    phase = hand[X_PHASE]
    sleeping = phase == IDLE
    if ctl[W_ACTIVE] != INACTIVE and (sleeping or phase == STOPPED):
        note(found, 64, ctl[W_ACTIVE], phase)
    if sleeping and ctl[W_REQUESTED] != 0 and hand[X_WORK] == 0:
        note(found, 65, hand[X_WORK], phase)
    if sleeping and ctl[W_REQUESTED] == 0 and hand[X_WORK] != 0:
        note(found, 66, hand[X_WORK], phase)
    if scenario[K_POLICY] == ROTATE and ctl[W_ACTIVE] != INACTIVE and ctl[W_POLICY_WORDS + 3] < -1:
        note(found, 79, ctl[W_POLICY_WORDS + 3], phase)


@kernel
def check_journals(zone, found):  # type: ignore[no-untyped-def]
    """Between two steps nobody has a block that only a journal names."""
    ctl = ctl_of(zone)
    for cpu in range(ctl[W_N_CPUS]):
        slot = cpu_slot(cpu)
        if ctl[W_IN_HAND] != 0 or ctl[W_SETTLING] != 0 or ctl[slot + C_IN_HAND] != 0 or ctl[slot + C_TOUCHING] != 0:
            note(found, 85, ctl[W_IN_HAND], ctl[slot + C_IN_HAND])


@kernel
def check_state(zone, scenario, hand, ram, found):  # type: ignore[no-untyped-def]
    """All of it. ``found`` holds no breach of the records, or they cannot be walked."""
    check_pages(zone, scenario, hand, ram, found)
    check_flight(zone, scenario, hand, found)
    check_run(zone, scenario, hand, found)
    check_journals(zone, found)


@kernel
def check_flags(zone, hand_before, kind, pages_before, found):  # type: ignore[no-untyped-def]
    """A block becomes Reported by the put-back of an acknowledged report that it was in, whole, and by nothing else
    (S2, S7, S8).
    """
    pages = pages_of(zone)
    for pfn in range(zone.n_pages):
        state = np.int64(pages[pfn])
        if not state & REPORTED:
            continue
        before = np.int64(pages_before[pfn])
        order = state & ORDER_MASK
        if before & REPORTED and before & HEAD_MASK == state & HEAD_MASK:
            continue
        in_batch = False
        for index in range(hand_before[X_COUNT]):
            if hand_before[X_BLOCKS + index] == pfn and hand_before[X_BLOCKS + MOST_BLOCKS + index] == order:
                in_batch = True
        if not in_batch or (kind != PUT_BACK and kind != WITHDRAW):
            note(found, 67, pfn, order)
        elif kind == WITHDRAW or (hand_before[X_ACK] != ACK_DONE and hand_before[X_ACK] != ACK_KEPT):
            note(found, 68, pfn, order)


@kernel
def check_pull(zone, scenario, hand, ctl_before, pages_before, answer, found):  # type: ignore[no-untyped-def]
    """What a pull took, and left (S2, S4, S9, P1, M4)."""
    ctl = ctl_of(zone)
    policy = scenario[K_POLICY]
    taken = np.int64(0)
    for index in range(hand[X_COUNT]):
        pfn = hand[X_BLOCKS + index]
        order = hand[X_BLOCKS + MOST_BLOCKS + index]
        taken += 1 << order
        if order < ctl[W_MIN_ORDER]:
            note(found, 70, pfn, order)
        for page in range(pfn, pfn + (1 << order)):
            if pageblock_type(zone, page) == ISOLATE:
                note(found, 70, pfn, order)
                break
        if np.int64(pages_before[pfn]) & (HEAD_MASK | REPORTED) == FREE | order | REPORTED:
            note(found, 80, pfn, order)
    if ctl_before[W_FREE_PAGES] - ctl[W_FREE_PAGES] != taken:
        note(found, 71, taken, ctl_before[W_FREE_PAGES] - ctl[W_FREE_PAGES])
    if ctl[W_IN_FLIGHT_PAGES] - ctl_before[W_IN_FLIGHT_PAGES] != taken:
        note(found, 71, taken, ctl[W_IN_FLIGHT_PAGES] - ctl_before[W_IN_FLIGHT_PAGES])
    mark = np.int64(-1)
    if policy == SKIP_WALK or policy == ROTATE:
        mark = ctl[W_MIN_WATERMARK]
    elif policy == HOLD:
        mark = ctl[W_HIGH_WATERMARK] - 1
    if taken > 0 and ctl[W_FREE_PAGES] <= mark:
        note(found, 78, ctl[W_FREE_PAGES], mark)
    if policy == ROTATE and taken > 0 and ctl_before[W_POLICY_WORDS] == 0:
        gate = ctl[W_LOW_WATERMARK] + (scenario[K_CAPACITY] << ctl[W_MIN_ORDER])
        if ctl_before[W_FREE_PAGES] <= gate:
            note(found, 78, ctl_before[W_FREE_PAGES], gate)
    whole = policy == BOUNDARY or policy == SCAN or policy == SHARED
    if policy == SKIP_WALK:
        whole = ctl[W_FREE_PAGES] > ctl[W_MIN_WATERMARK] + (1 << TOP_ORDER)
    if whole and answer == SHORT:
        check_all_reported(zone, found)


@kernel
def check_cycle(zone, links_before, found):  # type: ignore[no-untyped-def]
    """Every list is what it was, turned, less what was pulled (M3)."""
    pages = pages_of(zone)
    for order in range(ctl_of(zone)[W_MIN_ORDER], N_ORDERS):
        for migratetype in range(ISOLATE):
            head = free_list_head(zone, order, migratetype)
            state = FREE | order
            first = np.int64(-1)
            now = np.int64(-1)
            node = np.int64(links_before[2 * head])
            while node != head:
                if np.int64(pages[node]) & HEAD_MASK == state:
                    if first < 0:
                        first = node
                        now = node
                    if now != node:
                        note(found, 82, order, node)
                        return
                    now = next_node(zone, now)
                    if now == head:
                        now = next_node(zone, now)
                node = np.int64(links_before[2 * node])
            if now != first:
                note(found, 82, order, first)
                return


@kernel
def check_boundaries(zone, ctl_before, found):  # type: ignore[no-untyped-def]
    """What a vCPU does moves a boundary only with its page (D3)."""
    ctl = ctl_of(zone)
    for index in range(N_FREE_LISTS):
        before = ctl_before[W_BOUNDARY + index]
        if before != ctl[W_BOUNDARY + index] and before < zone.n_pages:
            order = index % N_ORDERS
            state = np.int64(pages_of(zone)[before])
            there = state & (HEAD_MASK | REPORTED) == FREE | order | REPORTED
            if there and (state & MT_MASK) >> MT_SHIFT == index // N_ORDERS:
                note(found, 83, before, order)


@kernel
def check_all_reported(zone, found):  # type: ignore[no-untyped-def]
    """No unreported block is on a list that is reported (P1, D5, D6)."""
    pages = pages_of(zone)
    pfn = np.int64(0)
    while pfn < zone.n_pages:
        state = np.int64(pages[pfn])
        order = state & ORDER_MASK
        listed = state & KIND_MASK == FREE and (state & MT_MASK) >> MT_SHIFT != ISOLATE
        if listed and order >= ctl_of(zone)[W_MIN_ORDER] and not state & REPORTED:
            note(found, 72, pfn, order)
        pfn += 1 << order


@kernel
def check_put_back(zone, hand_before, ctl_before, found):  # type: ignore[no-untyped-def]
    """A put-back restores exactly what its pull took, and asks for nothing (S4, S15)."""
    ctl = ctl_of(zone)
    pages = np.int64(0)
    for index in range(hand_before[X_COUNT]):
        pages += 1 << hand_before[X_BLOCKS + MOST_BLOCKS + index]
    if ctl_before[W_IN_FLIGHT_PAGES] - ctl[W_IN_FLIGHT_PAGES] != pages:
        note(found, 71, pages, ctl_before[W_IN_FLIGHT_PAGES] - ctl[W_IN_FLIGHT_PAGES])
    if ctl[W_REQUESTS] != ctl_before[W_REQUESTS] or ctl[W_REQUESTED] != ctl_before[W_REQUESTED]:
        note(found, 69, ctl_before[W_REQUESTED], ctl[W_REQUESTED])


@kernel
def check_begin(zone, found):  # type: ignore[no-untyped-def]
    """Every boundary is at its list's head, ISOLATE included (B5)."""
    active = ctl_of(zone)[W_ACTIVE]
    if active == ACTIVE_BOUNDARY or active == ACTIVE_RELEASE:
        for index in range(N_FREE_LISTS):
            if ctl_of(zone)[W_BOUNDARY + index] != zone.n_pages + index:
                note(found, 73, index, ctl_of(zone)[W_BOUNDARY + index])


@kernel
def check_free(zone, ctl_before, pfn, past, found):  # type: ignore[no-untyped-def]
    """After an ordinary free a run is asked for when it is due, and not before (B3, P3)."""
    ctl = ctl_of(zone)
    pages = pages_of(zone)
    final = np.int64(-1)
    for order in range(N_ORDERS):
        head = pfn & ~((1 << order) - 1)
        if np.int64(pages[head]) & HEAD_MASK == FREE | order:
            final = np.int64(order)
    if final < ctl[W_MIN_ORDER] or not ctl[W_REPORTING_ENABLED]:
        return
    trigger = ctl[W_TRIGGER]
    due = trigger == TRIGGER_ANY_FREE
    if trigger == TRIGGER_HIGH_WATER_MARK:
        due = ctl[W_NR_FREE + final] >= ctl[W_REPORTED + final] + ctl[W_HIGH_WATER_MARK]
    elif trigger == TRIGGER_BITMAP:
        due = ctl[W_POLICY_WORDS] >= ctl[W_HIGH_WATER_MARK]
    if due and not ctl[W_REQUESTED]:
        note(found, 74, pfn, final)
    if past and not due and ctl[W_REQUESTED] and not ctl_before[W_REQUESTED]:
        note(found, 77, pfn, final)


@kernel
def check_step(  # type: ignore[no-untyped-def]
    zone, scenario, kind, first, past, hand, hand_before, ctl_before, pages_before, links_before, answer, found
):
    """What a step made of the state before it.

    ``first``: its first argument. ``past``: it went past the per-CPU lists. ``answer``: what a pull answered.
    """
    check_flags(zone, hand_before, kind, pages_before, found)
    if kind == PULL:
        check_pull(zone, scenario, hand, ctl_before, pages_before, answer, found)
        if scenario[K_POLICY] == ROTATE:
            check_cycle(zone, links_before, found)
    elif kind == PUT_BACK or kind == WITHDRAW:
        check_put_back(zone, hand_before, ctl_before, found)
    elif kind == BEGIN:
        check_begin(zone, found)
    elif kind == FREE_LISTS or kind == FREE_PAST:
        check_free(zone, ctl_before, first, past, found)
    active = ctl_before[W_ACTIVE]
    if kind <= DRAIN and (active == ACTIVE_BOUNDARY or active == ACTIVE_RELEASE):
        check_boundaries(zone, ctl_before, found)
