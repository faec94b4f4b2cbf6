"""Zones for tests: small, private to this process, per-CPU lists off unless asked for."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, Phase, settings

from common.geometry import Migratetype
from guest.allocator.entry import register_device
from guest.allocator.locked import ALLOC_NO_WATERMARKS
from guest.allocator.zone import Zone, ZoneSettings

__all__ = ["ALLOC_NO_WATERMARKS", "JIT_OFF", "MIB", "bounded", "exhaust", "make_zone"]

MIB = 1 << 20
JIT_OFF = os.environ.get("NUMBA_DISABLE_JIT") == "1"


def make_zone(memory_bytes: int = 16 * MIB, *, registered: bool = True, **overrides: Any) -> Zone:
    """A private zone whose order of events is exact: no per-CPU lists, no shuffling, min watermark of one page.

    ``registered``: this process is its reporting device, so a first run is asked for.
    """
    chosen: dict[str, Any] = {
        "memory_bytes": memory_bytes,
        "cpus": 2,
        "pcp_batch": 0,
        "shuffle": False,
        "min_watermark": 1,
        "low_watermark": 2,
        "high_watermark": 3,
    }
    zone = Zone.private(ZoneSettings(**(chosen | overrides)))
    if registered:
        assert register_device(zone.address, os.getpid(), 0) == 0
    return zone


def exhaust(zone: Zone, order: int = 9, migratetype: Migratetype = Migratetype.MOVABLE) -> list[int]:
    """Allocate blocks of ``order`` until there are none; their pfns in ascending order."""
    pfns: list[int] = []
    while (pfn := zone.alloc(order, migratetype, flags=ALLOC_NO_WATERMARKS)) is not None:
        pfns.append(pfn)
    return sorted(pfns)


def bounded(examples: int, steps: int) -> settings:
    """Hypothesis settings that keep the suite short; a quarter when the kernels run uncompiled."""
    # Explaining a failure takes minutes, as does shrinking one uncompiled: do that compiled.
    phases = [Phase.explicit, Phase.reuse, Phase.generate] + ([] if JIT_OFF else [Phase.shrink])
    divisor = 4 if JIT_OFF else 1
    return settings(
        max_examples=max(2, examples // divisor),
        stateful_step_count=max(10, steps // (2 if JIT_OFF else 1)),
        deadline=None,
        report_multiple_bugs=False,
        phases=phases,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
