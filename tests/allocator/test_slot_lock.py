"""A per-CPU slot's lock: taken over when its owner is gone, waited for while it lives."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from common.geometry import Migratetype
from common.layout import C_COUNT, C_IN_HAND, C_LOCK, CLAIMED, HANDED_OUT, TAKEN_IN, ZEROED
from guest.allocator.percpu import cpu_slot
from guest.allocator.zone import Zone, ZoneSettings
from tests.support import wait_until

MIB = 1 << 20


def _lock_word(zone: Zone, cpu: int) -> int:
    return int(cpu_slot(cpu)) + C_LOCK


@pytest.mark.parametrize("waited_for", [True, False])
def test_a_dead_owner_is_replaced_and_the_slot_rebuilt(waited_for: bool) -> None:
    """S4: the lists and the count follow from the forward chain; an owner that nobody waited for is dead too."""
    zone = Zone.private(ZoneSettings(16 * MIB))
    kept = zone.alloc(0, cpu=0)
    assert kept is not None
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        if waited_for:
            process.wait()
        zone._control[_lock_word(zone, 0)] = process.pid
        zone._control[int(cpu_slot(0)) + C_COUNT] += 5  # as if it died between a list and its count
        zone.free(kept, cpu=0)  # waits for the process to end, then takes over
    assert zone._control[_lock_word(zone, 0)] == 0
    zone.validate()
    zone.drain(0)
    assert zone.statistics().free_pages == zone.n_pages
    zone.close()


def test_a_living_owner_is_waited_for() -> None:
    """S3: nobody enters the slot while its owner is in it."""
    zone = Zone.private(ZoneSettings(16 * MIB))
    zone._control[_lock_word(zone, 0)] = threading.get_native_id()  # of this thread, which is not the one that waits
    got: list[int | None] = []
    other = threading.Thread(target=lambda: got.append(zone.alloc(0, cpu=0)))
    other.start()
    other.join(0.2)
    assert other.is_alive()
    assert got == []
    zone._control[_lock_word(zone, 0)] = 0
    wait_until(lambda: bool(got), timeout_s=30)
    other.join()
    zone.validate()
    zone.close()


def _dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


@pytest.mark.parametrize("record", [HANDED_OUT, TAKEN_IN])
def test_s3_z3_a_block_between_two_owners_goes_to_the_list_of_its_pageblock(record: int) -> None:
    """What it was allocated for may have no such list; and what was given back is not zeroed any more."""
    zone = Zone.private(ZoneSettings(16 * MIB, pcp_batch=8, host_zeroed=True))
    zone.set_pageblock_migratetype(0, Migratetype.CMA)
    pfn = zone.alloc(3, Migratetype.CMA)
    assert pfn is not None
    zone.set_pageblock_migratetype(0, Migratetype.MOVABLE)
    slot = int(cpu_slot(0))
    zone._page[pfn] |= ZEROED | (CLAIMED if record == TAKEN_IN else 0)
    zone._control[slot + C_IN_HAND] = (pfn << 1 | record) + 1
    zone._control[_lock_word(zone, 0)] = _dead_pid()
    large = zone.alloc(9, cpu=0)  # waits for the dead one, and takes over
    assert large is not None
    assert large != pfn
    zone.validate()
    assert zone.alloc(3, cpu=0) == pfn
    assert bool(zone._page[pfn] & ZEROED) == (record == HANDED_OUT)
    zone.close()


def test_a_lock_in_ones_own_name_is_that_of_a_dead_one() -> None:
    """A thread never waits for itself: whoever died in it had the same number, as in a container that was restarted."""
    zone = Zone.private(ZoneSettings(16 * MIB))
    zone._control[_lock_word(zone, 0)] = threading.get_native_id()
    assert zone.alloc(0, cpu=0) is not None
    zone.validate()
    zone.close()
