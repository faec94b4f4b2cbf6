"""What a handle on a zone refuses: locks on a read-only mapping, lists that do not exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from common.errors import OutOfRangeError, UsageError
from common.geometry import Migratetype
from guest.allocator.zone import Zone, ZoneSettings

MIB = 1 << 20


@pytest.mark.parametrize(
    "call",
    [
        lambda zone: zone.alloc(0),
        lambda zone: zone.free(0),
        lambda zone: zone.drain(0),
        lambda zone: zone.claim_cpu(),
        lambda zone: zone.isolate(0),
        lambda zone: zone.free_list(10, Migratetype.MOVABLE),
        lambda zone: zone.snapshot(),
        lambda zone: zone.validate(),
    ],
)
def test_a_read_only_handle_takes_no_lock(lab_name: str, call: Callable[[Zone], Any]) -> None:
    """It would be a fault of this process, not an error; looking without a lock goes on working."""
    zone = Zone.create(lab_name, "g", settings=ZoneSettings(16 * MIB))
    try:
        looker = Zone.attach(lab_name, "g", read_only=True)
        assert looker.statistics().free_pages == looker.n_pages
        assert looker.page_states().size == looker.n_pages
        with pytest.raises(UsageError, match="read-only"):
            call(looker)
        looker.close()
    finally:
        zone.unlink()
        zone.close()


@pytest.mark.parametrize(("order", "kind"), [(11, 1), (-1, 1), (0, 6), (10, 99_999_999), (0, -1)])
def test_there_is_no_such_list(order: int, kind: int) -> None:
    zone = Zone.private(ZoneSettings(16 * MIB))
    with pytest.raises(OutOfRangeError):
        zone.free_list(order, kind)  # type: ignore[arg-type]
    zone.close()
