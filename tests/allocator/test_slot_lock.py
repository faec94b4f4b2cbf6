"""A per-CPU slot's lock: taken over when its owner is gone, waited for while it lives."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from common.layout import C_COUNT, C_LOCK
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
    zone._control[_lock_word(zone, 0)] = threading.get_native_id()
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
