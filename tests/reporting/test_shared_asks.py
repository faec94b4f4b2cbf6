"""shared: asks whose asker is killed, too many of them at once, and none that waits without an end."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from common.geometry import Migratetype
from common.layout import (
    A_STATE,
    ASK_FREE,
    ASK_WORDS,
    INSTALLED,
    N_ASKS,
    NEVER_TOUCHED,
    W_ASKING,
    W_ASKS,
)
from guest.allocator import asks, entry
from guest.allocator.asks import ASK, begin_ask, end_ask
from guest.allocator.buddy import NOT_THERE, take_smallest
from guest.allocator.locked import lock_zone, unlock_zone
from guest.allocator.repair import rebuild_zone
from guest.allocator.view import ZoneView, open_zone
from guest.allocator.zone import Zone
from guest.reporting import shared
from guest.reporting.claims import take_over
from tests.allocator.arrange import JIT_OFF, MIB, make_zone
from tests.reporting.test_shared import Populator, a_dead_pid, residence

MOVABLE = Migratetype.MOVABLE


@contextlib.contextmanager
def holding(zone: Zone, thread: int) -> Iterator[ZoneView]:
    """The zone lock, as if ``thread`` had it."""
    view = open_zone(zone.address)._replace(thread=thread)
    assert lock_zone(view)
    yield view
    unlock_zone(view)


def ask_as(zone: Zone, thread: int, count: int) -> None:
    """Leave ``count`` asks behind that ``thread`` began."""
    shared.set_asking(zone.address, os.getpid())
    with holding(zone, thread) as view:
        for _ in range(count):
            pfn = int(take_smallest(view, 9, MOVABLE))
            assert pfn <= NOT_THERE, "a block that is not there"
            assert ASK >= begin_ask(view, NOT_THERE - pfn) > ASK - N_ASKS


def alloc_in_time(zone: Zone, order: int) -> int | None:
    """Allocate in a thread; fails if it goes on for ever."""
    got: list[int | None] = []
    asking = threading.Thread(target=lambda: got.append(zone.alloc(order)), daemon=True)
    asking.start()
    asking.join(20)
    assert len(got) == 1, "an allocation that waits without an end"
    return got[0]


@pytest.fixture
def large() -> Iterator[Zone]:
    """More blocks than there are asks, and none of them there."""
    opened = make_zone(128 * MIB, registered=False)
    shared.set_open(opened.address, 1)
    assert take_over(opened, os.getpid(), None) == 0
    yield opened
    opened.validate()
    opened.close()


def test_asks_of_threads_that_were_killed_do_not_keep_others_waiting(large: Zone) -> None:
    """S3: all sixteen are theirs; who comes next ends them, and their blocks are free again."""
    ask_as(large, a_dead_pid(), N_ASKS)
    assert large.statistics().in_flight_blocks == N_ASKS
    with Populator(large):
        pfn = alloc_in_time(large, 9)
    assert pfn is not None
    assert residence(large, pfn) == {INSTALLED}, "that they died is no reason to stop asking"
    assert large.statistics().in_flight_blocks == 0


def test_a_take_over_ends_asks_of_threads_that_were_killed(large: Zone) -> None:
    """And not one of a thread that lives."""
    ask_as(large, a_dead_pid(), 3)
    ask_as(large, os.getpid(), 1)
    assert entry.unregister_device(large.address, os.getpid()) == 0
    assert take_over(large, os.getpid(), None) == 0
    assert large.statistics().in_flight_blocks == 1
    assert large._control[W_ASKING], "that they died says nothing of the host"


def test_where_all_asks_are_taken_asking_ends_after_a_bounded_wait(large: Zone) -> None:
    """By threads that live, and nobody answers: the touch populates."""
    ask_as(large, os.getpid(), N_ASKS)
    pfn = alloc_in_time(large, 9)
    assert pfn is not None
    assert residence(large, pfn) == {NEVER_TOUCHED}
    assert not large._control[W_ASKING]
    assert large.statistics().in_flight_blocks == N_ASKS


class KilledError(Exception):
    """Where a thread is killed."""


@pytest.mark.skipif(not JIT_OFF, reason="kernels are replaced by name")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", ["take_for_report", "leave_flight", "free_across_pageblocks"])
def test_s3_a_kill_leaves_no_block_in_flight_that_no_ask_names(
    large: Zone, monkeypatch: pytest.MonkeyPatch, where: str, when: str
) -> None:
    """S3: and no ask without a block, which a later report could have in flight. Found at the repair of the lock."""
    real = getattr(asks, where)

    def killed(*arguments: object) -> None:
        if when == "after":
            real(*arguments)
        raise KilledError

    free_pages = large.statistics().free_pages
    dead = a_dead_pid()
    if where != "take_for_report":
        ask_as(large, dead, 1)
    shared.set_asking(large.address, os.getpid())
    with holding(large, dead) as view:
        monkeypatch.setattr(asks, where, killed)
        step, number = (end_ask, 0)
        if where == "take_for_report":
            step, number = (begin_ask, NOT_THERE - take_smallest(view, 9, MOVABLE))
        with pytest.raises(KilledError):
            step(view, number)
        monkeypatch.undo()
        rebuild_zone(view)
    named = int((large._control[W_ASKS + A_STATE :][: N_ASKS * ASK_WORDS : ASK_WORDS] != ASK_FREE).sum())
    found = np.zeros(8, dtype=np.int64)
    assert shared.find_in_flight(large.address, found, found.copy()) == 0
    assert large.statistics().in_flight_blocks == named
    assert shared.end_lost_asks(large.address) == 0
    assert large.statistics().in_flight_blocks == 0
    assert large.statistics().free_pages == free_pages


@pytest.mark.parametrize("order", [0, 9])
@pytest.mark.parametrize("pcp_batch", [0, 8])
def test_what_is_asked_for_is_no_reason_to_be_out_of_memory(order: int, pcp_batch: int) -> None:
    """All free memory is in asks, whose threads are gone: who waits ends them, and has it."""
    zone = make_zone(16 * MIB, registered=False, pcp_batch=pcp_batch)
    shared.set_open(zone.address, 1)
    assert take_over(zone, os.getpid(), None) == 0
    ask_as(zone, a_dead_pid(), 4)
    assert zone.statistics().free_pages == 0
    cpu = zone.claim_cpu()
    with Populator(zone):
        assert zone.alloc(order, cpu=cpu) is not None
    assert zone.statistics().failed_allocations == 0
    assert zone.statistics().in_flight_blocks == 0
    zone.close()


def test_out_of_memory_is_said_after_a_bounded_wait_for_what_is_asked_for() -> None:
    zone = make_zone(64 * MIB, registered=False)
    shared.set_open(zone.address, 1)
    assert take_over(zone, os.getpid(), None) == 0
    ask_as(zone, os.getpid(), N_ASKS)
    assert alloc_in_time(zone, 0) is None
    assert zone.statistics().failed_allocations == 1
    assert zone.statistics().in_flight_blocks == N_ASKS
    zone.close()
