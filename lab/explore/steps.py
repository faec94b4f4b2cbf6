"""Which steps a state allows, and taking one."""

from __future__ import annotations

import numpy as np

from common.geometry import N_ORDERS, Migratetype
from common.layout import (
    A_STATE,
    ALLOCATED,
    ASKED,
    C_COUNT,
    KIND_MASK,
    ORDER_MASK,
    W_ASKING,
    W_HELD_BLOCKS,
    W_REPORTING_ENABLED,
    W_REQUESTED,
)
from common.native import kernel
from guest.allocator.asks import ask_word
from guest.allocator.entry import locked_request
from guest.allocator.lists import free_list_head, next_node
from guest.allocator.percpu import cpu_slot
from guest.allocator.validate import note
from guest.allocator.view import blocks_of, ctl_of, pages_of
from guest.reporting.blocks import SHORT
from guest.reporting.table import HINT, SHARED, WALK_LOCKED
from lab.explore import reporter, vcpu
from lab.explore.state import ASKERS, work_value
from lab.explore.words import (
    ACK_NONE,
    ALLOC_LISTS,
    ALLOC_PAST,
    ANSWER,
    ANSWER_ASK,
    BATCH,
    BEGIN,
    COMMAND,
    DRAIN,
    END,
    END_ASK,
    ENDING,
    FREE_LISTS,
    FREE_PAST,
    IDLE,
    ISOLATE_BLOCK,
    K_ALLOCS,
    K_ALLOCS_PAST,
    K_ISOLATED,
    K_KINDS,
    K_POLICY,
    K_SLOTS,
    KEEP,
    N_KINDS,
    OWNER_MASK,
    PULL,
    PUT_BACK,
    REARM,
    REARMING,
    REGISTER,
    RELEASE,
    ROTATE_LIST,
    RUN,
    SET_ASKING,
    SET_TYPE,
    STOP,
    STOPPED,
    UNISOLATE_BLOCK,
    WALK,
    WITHDRAW,
    X_ACK,
    X_ASKS,
    X_DRAIN,
    X_HOST,
    X_MORE,
    X_PHASE,
    X_WORK,
)

__all__ = ["may_step", "next_step", "take_step"]

ISOLATE = int(Migratetype.ISOLATE)
MOVABLE = int(Migratetype.MOVABLE)
WALK_ANSWERS = 3


@kernel
def span_of(zone, kind):  # type: ignore[no-untyped-def]
    """How many first and second arguments steps of ``kind`` have."""
    if kind == ALLOC_LISTS or kind == ALLOC_PAST or kind == ROTATE_LIST:
        return N_ORDERS, ISOLATE + 1
    if kind == FREE_LISTS or kind == FREE_PAST:
        return zone.n_pages, 1
    if kind == ISOLATE_BLOCK or kind == UNISOLATE_BLOCK:
        return blocks_of(zone).size, 1
    if kind == SET_TYPE:
        return blocks_of(zone).size, ISOLATE
    if kind == DRAIN or kind == END_ASK:
        return 2, 1
    if kind == ANSWER_ASK:
        return ASKERS, 2
    if kind == ANSWER:
        return 5, 1
    if kind == WALK:
        return WALK_ANSWERS, 1
    return 1, 1


@kernel
def may_vcpu(zone, scenario, hand, ram, kind, first, second):  # type: ignore[no-untyped-def]
    """Steps of the vCPUs."""
    if kind == END_ASK:
        return hand[X_ASKS + first] != 0
    if kind == DRAIN:
        return first < scenario[K_SLOTS] and (
            ctl_of(zone)[cpu_slot(first) + C_COUNT] > 0 or hand[X_DRAIN] >> first & 1 != 0
        )
    who = 1 if kind == ALLOC_LISTS or kind == FREE_LISTS else 2
    if hand[X_ASKS + who - 1] != 0:
        return False  # it sleeps
    if kind == ALLOC_LISTS or kind == ALLOC_PAST:
        allowed = scenario[K_ALLOCS] if kind == ALLOC_LISTS else scenario[K_ALLOCS_PAST]
        return allowed >> (8 * first + second) & 1 != 0
    return np.int64(pages_of(zone)[first]) & KIND_MASK == ALLOCATED and np.int64(ram[first]) & OWNER_MASK == who


@kernel
def may_report(zone, scenario, hand, kind, first):  # type: ignore[no-untyped-def]
    """Steps of the reporter and the host."""
    policy = scenario[K_POLICY]
    phase = hand[X_PHASE]
    held = ctl_of(zone)[W_HELD_BLOCKS]
    if kind == BEGIN:
        return phase == IDLE and hand[X_WORK] > 0 and policy != WALK_LOCKED
    if kind == WALK:
        return phase == IDLE and hand[X_WORK] > 0 and policy == WALK_LOCKED
    if kind == PULL:
        return phase == RUN and hand[X_MORE] != 0
    if kind == PUT_BACK:
        return phase == BATCH and hand[X_ACK] != ACK_NONE
    if kind == WITHDRAW:  # a host that may be inside the gate is waited for
        return phase == BATCH and policy != SHARED and (hand[X_ACK] != ACK_NONE or policy != WALK_LOCKED)
    if kind == END:
        return (phase == ENDING or (phase == RUN and hand[X_MORE] == 0)) and not (policy == HINT and held)
    if kind == REARM:
        return phase == REARMING
    if kind == STOP:
        return phase == IDLE or (phase == RUN and hand[X_MORE] != 0 and not (policy == HINT and held))
    if kind == REGISTER:
        return phase == STOPPED
    if kind == RELEASE:
        return held > 0 and ((policy == HINT and phase == ENDING) or phase == STOPPED)
    if kind == ANSWER:
        return hand[X_HOST] > 0 and first <= hand[X_HOST]
    if kind == KEEP:
        return hand[X_HOST] > 0 and policy != SHARED
    if kind == COMMAND:
        return policy == HINT and ctl_of(zone)[W_REPORTING_ENABLED] != 0 and ctl_of(zone)[W_REQUESTED] == 0
    if kind == SET_ASKING:
        return policy == SHARED and phase != STOPPED and ctl_of(zone)[W_ASKING] == 0
    return kind == ANSWER_ASK and ctl_of(zone)[ask_word(first) + A_STATE] == ASKED


@kernel
def may_compact(zone, scenario, hand, kind, first, second):  # type: ignore[no-untyped-def]
    """Steps of compaction."""
    if hand[X_DRAIN]:
        return False
    if kind == ROTATE_LIST:
        head = free_list_head(zone, first, second)
        entry = next_node(zone, head)
        return entry != head and next_node(zone, entry) != head
    kind_now = np.int64(blocks_of(zone)[first]) & 0x7
    if kind == ISOLATE_BLOCK:
        return kind_now != ISOLATE and vcpu.isolated_blocks(zone) < scenario[K_ISOLATED]
    if kind == UNISOLATE_BLOCK:
        return kind_now == ISOLATE
    return kind_now != ISOLATE and kind_now != second and second <= MOVABLE


@kernel
def may_step(zone, scenario, hand, ram, kind, first, second):  # type: ignore[no-untyped-def]
    """Whether a step is possible now. Its arguments are within ``span_of``."""
    if scenario[K_KINDS] >> kind & 1 == 0:
        return False
    if kind <= END_ASK:
        return may_vcpu(zone, scenario, hand, ram, kind, first, second)
    if ISOLATE_BLOCK <= kind <= ROTATE_LIST:
        return may_compact(zone, scenario, hand, kind, first, second)
    return may_report(zone, scenario, hand, kind, first)


@kernel
def next_step(zone, scenario, hand, ram, step):  # type: ignore[no-untyped-def]
    """The first possible step that comes behind ``step`` (-1: the very first), or -1.

    A step is one number: (kind * 64 + first) * 64 + second.
    """
    kind, first, second = np.int64(0), np.int64(0), np.int64(-1)
    if step >= 0:
        kind, first, second = step >> 12, (step >> 6) & 63, step & 63
    while kind < N_KINDS:
        firsts, seconds = span_of(zone, kind)
        second += 1
        if second >= seconds or scenario[K_KINDS] >> kind & 1 == 0:
            second = np.int64(0)
            first += 1
        if first >= firsts or scenario[K_KINDS] >> kind & 1 == 0:
            first = np.int64(0)
            second = np.int64(-1)
            kind += 1
            continue
        if may_step(zone, scenario, hand, ram, kind, first, second):
            return (kind << 12) | (first << 6) | second
    return np.int64(-1)


@kernel
def step_vcpu(address, zone, scenario, hand, ram, finding, kind, first, second, found):  # type: ignore[no-untyped-def]
    """A step of a vCPU or of compaction."""
    if kind == ALLOC_LISTS or kind == ALLOC_PAST:
        who = 1 if kind == ALLOC_LISTS else 2
        vcpu.alloc(address, zone, scenario, hand, ram, finding, who, first, second, found)
    elif kind == FREE_LISTS or kind == FREE_PAST:
        order = np.int64(pages_of(zone)[first]) & ORDER_MASK
        vcpu.free(zone, scenario, ram, 1 if kind == FREE_LISTS else 2, first, order, found)
    elif kind == DRAIN:
        vcpu.drain(address, hand, first, found)
    elif kind == END_ASK:
        vcpu.end_wait(zone, hand, first + 1, found)
    elif kind == ISOLATE_BLOCK:
        vcpu.isolate(address, scenario, hand, first, found)
    elif kind == UNISOLATE_BLOCK:
        vcpu.unisolate(address, zone, first, found)
    elif kind == SET_TYPE:
        vcpu.set_type(address, first, second, found)
    elif kind == ROTATE_LIST:
        vcpu.rotate(address, zone, first, second, found)


@kernel
def step_report(address, zone, scenario, hand, ram, mailbox, pfns, orders, holds, scratch, kind, first, second, found):  # type: ignore[no-untyped-def]
    """A step of the reporter or the host; what a pull answered, else SHORT."""
    if kind == BEGIN:
        reporter.begin(address, zone, scenario, hand, found)
    elif kind == PULL:
        return np.int64(reporter.pull(address, scenario, hand, pfns, orders, holds, scratch, found))
    elif kind == PUT_BACK or kind == WITHDRAW:
        ack = hand[X_ACK] if kind == PUT_BACK else np.int64(ACK_NONE)
        if kind == WITHDRAW:
            reporter.withdraw(hand)
        reporter.put_back(address, zone, scenario, hand, ram, ack, pfns, orders, holds, scratch, found)
    elif kind == END:
        reporter.end(address, scenario, hand, found)
    elif kind == REARM:
        reporter.rearm(address, hand, found)
    elif kind == STOP:
        reporter.stop(address, scenario, hand, found)
    elif kind == REGISTER:
        reporter.register(address, scenario, hand, found)
    elif kind == ANSWER or kind == KEEP:
        reporter.answer(zone, hand, ram, first, kind == KEEP, found)
    elif kind == COMMAND:
        if locked_request(address) != 0:
            note(found, 45, 0, 0)
    elif kind == RELEASE:
        reporter.release(address, zone, holds, scratch, found)
    elif kind == WALK:
        reporter.walk_all(address, zone, hand, ram, mailbox, pfns, orders, holds, scratch, first, found)
    elif kind == ANSWER_ASK:
        reporter.answer_one(address, zone, first, second, found)
    elif kind == SET_ASKING:
        reporter.show(address, scenario, found)
    return np.int64(SHORT)


@kernel
def take_step(address, zone, scenario, hand, ram, mailbox, pfns, orders, holds, scratch, finding, step, found):  # type: ignore[no-untyped-def]
    """Take a possible step; what a pull answered, else SHORT. Adds to ``found`` what a kernel answered wrongly."""
    kind, first, second = step >> 12, (step >> 6) & 63, step & 63
    answer = np.int64(SHORT)
    if kind <= END_ASK or ISOLATE_BLOCK <= kind <= ROTATE_LIST:
        step_vcpu(address, zone, scenario, hand, ram, finding, kind, first, second, found)
    else:
        answer = step_report(
            address, zone, scenario, hand, ram, mailbox, pfns, orders, holds, scratch, kind, first, second, found
        )
    hand[X_WORK] = work_value(zone)
    return answer
