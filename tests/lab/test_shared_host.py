"""The host of trusting guests, in one process with a guest that is made by hand."""

from __future__ import annotations

import os

import numpy as np
import pytest

from common.geometry import PAGE_BYTES
from common.layout import N_ASKS
from common.names import ram_object, zone_object
from common.ramobject import RamObject
from guest.allocator.asks import begin_ask, end_ask
from guest.allocator.locked import lock_zone, unlock_zone
from guest.allocator.view import open_zone
from guest.allocator.zone import Zone, ZoneSettings
from guest.reporting import shared
from host.objects import Identities, shared_memory_identity
from lab.shared_host.attached import AttachedGuest, OpenGuest

MIB = 1 << 20


@pytest.mark.parametrize("given_up", [False, True])
def test_s4_a_block_is_populated_only_while_it_is_asked_for(lab_name: str, given_up: bool) -> None:
    """S4: afterwards it may have been claimed, and the discard that populating it would undo has been counted."""
    ram = RamObject.create(lab_name, "g0", ram_bytes=16 * MIB)
    zone = Zone.create(lab_name, "g0", settings=ZoneSettings(16 * MIB, ram_bytes=16 * MIB))
    shared.set_open(zone.address, 1)
    errors: list[BaseException] = []
    identities = Identities(
        lab_name,
        "g0",
        shared_memory_identity(zone_object(lab_name, "g0")),
        shared_memory_identity(ram_object(lab_name, "g0")),
        None,
        None,
    )
    opened = OpenGuest(
        "g0",
        Zone.attach(lab_name, "g0"),
        RamObject.open(lab_name, "g0", ram_bytes=16 * MIB),
        os.pidfd_open(os.getpid()),
        identities,
    )
    guest = AttachedGuest(opened, every_ns=10**9, on_error=errors.append)
    view = open_zone(zone.address)
    asks = np.zeros((N_ASKS, shared.ASK_COLUMNS), dtype=np.int64)
    with guest._memory:  # the thread that populates stops here, with the ask in its hands
        assert lock_zone(view)
        begin_ask(view, 0)
        unlock_zone(view)
        assert shared.collect_asks(zone.address, asks) == 1
        index, pfn, order, _sequence = asks[0].tolist()
        if given_up:
            assert lock_zone(view)
            end_ask(view, index)
            unlock_zone(view)
    guest._install(*asks[0].tolist())
    guest.detach(died=False)
    populated = ram.resident_bytes()
    assert errors == []
    assert (pfn, populated) == (0, 0 if given_up else PAGE_BYTES << order)
    assert guest.late_installs >= given_up
    assert guest.installs == (0 if given_up else 1)
    zone.unlink()
    zone.close()
    ram.unlink()
    ram.close()
