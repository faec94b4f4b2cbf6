"""shared: a host claims free blocks itself, populates what is asked for, and may die at any moment."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Self

import numpy as np
import pytest

from common.geometry import PAGEBLOCK_PAGES, Migratetype
from common.layout import INSTALLED, N_ASKS, NEVER_TOUCHED, RESIDENT, RETURNED, W_ASKS_WORK
from common.mutex import post_semaphore, wait_semaphore
from guest.allocator import entry
from guest.allocator.zone import Zone
from guest.reporting import shared
from guest.reporting.claims import Claims, take_over
from guest.reporting.cycle import Batch, Cycle, Outcome
from guest.reporting.table import POLICIES
from tests.allocator.arrange import ALLOC_NO_WATERMARKS, MIB, make_zone
from tests.reporting.arrange import accept, free_alternating, reported_heads, unreported_heads
from tests.support import wait_until

MOVABLE = Migratetype.MOVABLE


@pytest.fixture
def zone() -> Iterator[Zone]:
    opened = make_zone(64 * MIB, high_water_mark=2, registered=False)
    shared.set_open(opened.address, 1)
    assert take_over(opened, os.getpid(), None) == 0
    yield opened
    opened.validate()
    opened.close()


def claims_of(zone: Zone, *, capacity: int = 16) -> Cycle:
    return Cycle(zone, "shared", capacity=capacity)


def residence(zone: Zone, pfn: int, pages: int = PAGEBLOCK_PAGES) -> set[int]:
    return set(zone.resident_map()[pfn : pfn + pages].tolist())


def a_dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


class Populator:
    """What a host does with asks, on a thread; ``answer`` decides (True: populated, False: refused, None: nothing)."""

    def __init__(self, zone: Zone, answer: Callable[[int], bool | None] = lambda _pfn: True) -> None:
        self.zone = zone
        self.asked: list[tuple[int, int]] = []
        self.answered: list[int] = []
        self._answer = answer
        self._stopping = False
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        out = np.zeros((N_ASKS, shared.ASK_COLUMNS), dtype=np.int64)
        address = self.zone.address + 8 * W_ASKS_WORK
        while True:
            wait_semaphore(address)
            if self._stopping:
                return
            count = int(shared.collect_asks(self.zone.address, out))
            for index, pfn, order, sequence in out[:count].tolist():
                self.asked.append((pfn, order))
                decided = self._answer(pfn)
                if decided is not None:
                    self.answered.append(int(shared.answer_ask(self.zone.address, index, sequence, decided)))

    def __enter__(self) -> Self:
        shared.set_asking(self.zone.address, os.getpid())
        self._thread.start()
        return self

    def __exit__(self, *_details: object) -> None:
        self._stopping = True
        post_semaphore(self.zone.address + 8 * W_ASKS_WORK)
        self._thread.join()


def test_the_row_says_what_it_is() -> None:
    row = POLICIES["shared"]
    assert (row.number, row.trigger, row.host_driven, row.capacity) == (9, "hwm", True, 16)


# ---------------------------------------------------------------- claims


def test_claimed_blocks_are_flagged_at_the_tail_and_taken_once(zone: Zone) -> None:
    """P1, B1: and the next free goes ahead of them."""
    freed, buddies = free_alternating(zone, 6)
    assert claims_of(zone, capacity=4).run(accept).blocks == 6
    assert reported_heads(zone) == freed
    assert unreported_heads(zone) == []
    assert claims_of(zone).run(accept).blocks == 0
    zone.free(buddies[-1], 9)  # merges: unreported again, S7
    assert reported_heads(zone) == freed[:-1]


def test_s10_the_lock_is_held_for_the_claim_alone(zone: Zone) -> None:
    free_alternating(zone, 4)

    def discard(_batch: Batch) -> Outcome:
        pfn = zone.alloc(9, flags=ALLOC_NO_WATERMARKS)
        assert pfn is not None
        zone.free(pfn, 9)
        return Outcome.DONE

    claims_of(zone, capacity=3).run(discard)


@pytest.mark.parametrize("when", ["before the run", "during the run"])
def test_a_closed_zone_is_not_claimed_from(zone: Zone, when: str) -> None:
    """S13: opting out holds from the moment it returns."""
    free_alternating(zone, 4)
    cycle = claims_of(zone, capacity=1)
    if when == "before the run":
        shared.set_open(zone.address, 0)
        cycle.begin()
    else:
        cycle.begin()
        batch = cycle.pull()
        assert batch is not None
        shared.set_open(zone.address, 0)
        cycle.put_back(batch, Outcome.DONE)
    assert cycle.pull() is None
    cycle.end()
    assert not zone.open_to_host()
    assert zone.statistics().in_flight_blocks == 0
    assert len(unreported_heads(zone)) == (4 if when == "before the run" else 3)


# ---------------------------------------------------------------- asking for a block back


@pytest.mark.parametrize("order", [0, 3, 9])
@pytest.mark.parametrize("pcp_batch", [0, 8])
def test_what_is_not_there_is_populated_before_anybody_has_it(order: int, pcp_batch: int) -> None:
    """The whole free block at once, so what is split off it needs no ask of its own."""
    zone = make_zone(16 * MIB, registered=False, pcp_batch=pcp_batch)
    shared.set_open(zone.address, 1)
    take_over(zone, os.getpid(), None)
    claims_of(zone).run(accept)
    cpu = zone.claim_cpu()
    with Populator(zone) as host:
        pfn = zone.alloc(order, cpu=cpu)
        assert pfn is not None
        assert residence(zone, pfn, 1 << order) == {INSTALLED}
        assert len(host.asked) == 1
        other = zone.alloc(order, cpu=cpu)
        assert other is not None
        assert len(host.asked) == 1, "it comes out of the same block"
    asked, asked_order = host.asked[0]
    assert asked <= pfn < asked + (1 << asked_order)
    assert residence(zone, asked, 1 << asked_order) == {INSTALLED}
    now = zone.statistics()
    assert (now.installs, now.installed_pages, now.asks_withdrawn) == (1, 1 << asked_order, 0)
    assert now.install_wait_ns > 0
    assert now.resident_pages == now.installed_pages
    assert now.in_flight_blocks == 0
    zone.validate()
    zone.free(pfn, order, cpu=cpu)
    zone.free(other, order, cpu=cpu)
    zone.release_cpu(cpu)
    zone.validate()
    zone.close()


def test_nothing_is_asked_for_while_no_host_answers(zone: Zone) -> None:
    """And what is there is never asked for."""
    claims_of(zone).run(accept)
    pfn = zone.alloc(9)
    assert pfn is not None
    assert zone.statistics().installs == zone.statistics().asks_withdrawn == 0
    zone._resident[:] = RESIDENT
    with Populator(zone) as host:
        other = zone.alloc(9)
        assert other is not None
    assert host.asked == []


def test_a_hole_is_asked_for_although_its_flag_was_lost_in_a_merge(zone: Zone) -> None:
    """S7 takes the flag, and not the hole."""
    freed, buddies = free_alternating(zone, 1)
    zone._resident[:] = RESIDENT
    claims_of(zone).run(accept)
    assert residence(zone, freed[0]) == {RETURNED}
    zone.free(buddies[0], 9)
    assert reported_heads(zone) == []
    with Populator(zone) as host:
        pfn = zone.alloc(9, flags=ALLOC_NO_WATERMARKS)
    assert host.asked == [(freed[0], 10)]
    assert pfn in (freed[0], buddies[0])
    assert zone.statistics().installed_pages == PAGEBLOCK_PAGES, "half of it was there"


def test_s4_installed_pages_are_returned_like_any_other(zone: Zone) -> None:
    """S4: what a host populated and nobody used is resident, and counts as returned when it is claimed again."""
    claims_of(zone).run(accept)
    with Populator(zone):
        pfn = zone.alloc(9)
    assert pfn is not None
    installed = zone.statistics().installed_pages
    zone.free(pfn, 9)
    assert claims_of(zone).run(accept).blocks >= 1
    assert zone.statistics().returned_pages == installed
    assert zone.statistics().resident_pages == 0


def test_s3_a_block_asked_for_is_in_flight_until_the_answer(zone: Zone) -> None:
    claims_of(zone).run(accept)
    seen: list[int] = []

    def look(_pfn: int) -> bool:
        seen.append(zone.statistics().in_flight_blocks)
        zone.validate()
        return True

    with Populator(zone, look):
        assert zone.alloc(9) is not None
    assert seen == [1]


@pytest.mark.parametrize("threads", [2, 20])
def test_many_ask_at_once(threads: int) -> None:
    """More of them than there are asks, too: each gets a block, and each block was populated first."""
    zone = make_zone(128 * MIB, registered=False)
    shared.set_open(zone.address, 1)
    take_over(zone, os.getpid(), None)
    claims_of(zone).run(accept)
    got: list[int | None] = []
    with Populator(zone):
        asking = [threading.Thread(target=lambda: got.append(zone.alloc(10))) for _ in range(threads)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
    assert len({pfn for pfn in got if pfn is not None}) == threads
    assert all(residence(zone, pfn, 1024) == {INSTALLED} for pfn in got if pfn is not None)
    assert zone.statistics().in_flight_blocks == 0
    zone.validate()
    zone.close()


def test_a_refusal_ends_asking_and_the_allocation_goes_on(zone: Zone) -> None:
    """No space at the host: the touch finds that out; nothing hangs and nothing loops."""
    claims_of(zone).run(accept)
    with Populator(zone, lambda _pfn: False) as host:
        assert zone.alloc(9) is not None
        assert zone.alloc(9) is not None
    assert len(host.asked) == 1
    assert zone.statistics().asks_withdrawn == 1
    assert zone.statistics().installed_pages == 0


def test_a_host_that_does_not_answer_is_not_waited_for_any_longer(zone: Zone) -> None:
    """It is alive and stopped: after a bounded wait the block is handed out, and a late answer is worth nothing."""
    claims_of(zone).run(accept)
    late: list[tuple[int, int]] = []
    out = np.zeros((N_ASKS, shared.ASK_COLUMNS), dtype=np.int64)
    with Populator(zone, lambda _pfn: None):
        asking = threading.Thread(target=lambda: zone.alloc(9))
        asking.start()
        wait_until(lambda: shared.collect_asks(zone.address, out) == 1, what="an ask")
        late.append((int(out[0, 0]), int(out[0, 3])))
        asking.join()
    assert zone.statistics().asks_withdrawn == 1
    assert shared.answer_ask(zone.address, *late[0], True) == 0
    assert zone.statistics().installs == 0


def test_a_dead_host_is_not_waited_for() -> None:
    zone = make_zone(16 * MIB, registered=False)
    shared.set_open(zone.address, 1)
    dead = a_dead_pid()
    assert entry.register_device(zone.address, dead, 0) == 0
    shared.set_asking(zone.address, dead)
    pfn = zone.alloc(9)
    assert pfn is not None
    assert zone.statistics().asks_withdrawn == 1
    assert residence(zone, pfn) == {NEVER_TOUCHED}
    zone.validate()
    zone.close()


# ---------------------------------------------------------------- death and succession


def die_in_flight(zone: Zone, *, capacity: int = 3) -> Batch:
    """A host that claims a batch and is gone."""
    dead = a_dead_pid()
    assert entry.unregister_device(zone.address, os.getpid()) == 0
    assert entry.register_device(zone.address, dead, 0) == 0
    cycle = claims_of(zone, capacity=capacity)
    cycle.begin()
    first = cycle.pull()
    assert first is not None
    cycle.put_back(first, Outcome.DONE)
    batch = cycle.pull()
    assert batch is not None
    return batch


def test_what_a_dead_host_had_in_flight_comes_back_with_its_residence(zone: Zone) -> None:
    """S3, S4, S14: it had discarded every other page when it died."""
    freed, _ = free_alternating(zone, 8)
    zone._resident[:] = RESIDENT
    batch = die_in_flight(zone)
    dead = zone.device_pid()
    assert take_over(zone, os.getpid(), None) == dead, "who says that it is dead?"

    def every_other(_pfn: int, order: int) -> np.ndarray:
        return np.tile([True, False], 1 << order >> 1)

    before = zone.statistics().returned_pages
    assert take_over(zone, os.getpid(), every_other, stale_pid=dead) == 0
    assert zone.device_pid() == os.getpid()
    assert zone.statistics().in_flight_blocks == 0
    assert zone.statistics().returned_pages - before == batch.pages // 2
    assert set(unreported_heads(zone)) >= {int(pfn) for pfn in batch.pfns}
    zone.validate()
    claims_of(zone).run(accept)
    assert sorted(reported_heads(zone)) == freed, "none is missed on the lists that a half-done run left behind (D6)"


def test_a_take_over_leaves_blocks_alone_that_were_asked_for(zone: Zone) -> None:
    """S3: they are the asker's, who puts them back itself."""
    claims_of(zone).run(accept)
    with Populator(zone, lambda _pfn: None) as host:
        asking = threading.Thread(target=lambda: zone.alloc(9))
        asking.start()
        wait_until(lambda: host.asked, what="an ask")
        found = shared.find_in_flight(zone.address, np.zeros(8, dtype=np.int64), np.zeros(8, dtype=np.int64))
        assert found == 0
        assert zone.statistics().in_flight_blocks == 1
        shared.refuse_asks(zone.address)
        asking.join()
    assert zone.statistics().in_flight_blocks == 0


def test_a_guest_takes_back_what_its_dead_host_had(zone: Zone) -> None:
    free_alternating(zone, 8)
    batch = die_in_flight(zone)
    guest = Claims(zone, lambda _pfn, order: np.ones(1 << order, dtype=bool))
    assert not guest.connected
    assert zone.statistics().in_flight_blocks == batch.pfns.size
    guest.check()
    assert zone.statistics().in_flight_blocks == 0
    assert zone.device_pid() == 0
    guest.check()
    assert take_over(zone, os.getpid(), None) == 0, "the next host finds it free"


def test_s13_a_guest_that_ends_waits_for_the_claims_that_are_under_way(zone: Zone) -> None:
    free_alternating(zone, 4)
    cycle = claims_of(zone, capacity=2)
    cycle.begin()
    batch = cycle.pull()
    assert batch is not None
    ending = threading.Thread(target=Claims(zone, None).stop)
    ending.start()
    wait_until(lambda: not zone.open_to_host(), what="the guest to close its zone")
    assert ending.is_alive()
    cycle.put_back(batch, Outcome.DONE)
    assert cycle.pull() is None
    cycle.end()
    ending.join()
    assert zone.statistics().in_flight_blocks == 0
