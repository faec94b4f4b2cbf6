"""Outcomes for tests: two guests whose accounts agree, to be broken in one place at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from common import layout
from lab.outcome import ProcessEnd, RunOutcome
from lab.pagemap import classify, grid
from lab.sampler import Observation, PageSnapshot
from lab.samples import Reading, SeriesRecorder

__all__ = ["MIB", "agreeing_outcome", "guest_account", "host_account", "observation"]

MIB = 1 << 20
_MEMORY, _PEAK, _FINAL = 64 * MIB, 60 * MIB, 4 * MIB
_HOLD = {"p50": 500, "p99": 3000, "max": 9000}


def guest_account(name: str) -> dict[str, Any]:
    """What a guest writes that freed 60 MiB and got rid of 56 of them."""
    return {
        "ok": True,
        "name": name,
        "memory_bytes": _MEMORY,
        "peak_resident_bytes": _PEAK,
        "final_resident_bytes": _FINAL,
        "freed_bytes": 60 * MIB,
        "returned_bytes": _PEAK - _FINAL,
        "refaults": 0,
        "allocations": 30,
        "frees": 30,
        "violations": 0,
        "in_flight_max_blocks": 16,
        "lock_hold_ns": {"pull": dict(_HOLD), "put_back": dict(_HOLD)},
        "alloc_ns": dict(_HOLD),
        "reports": 2,
        "blocks": 28,
        "reported_bytes": _PEAK - _FINAL,
        "withdrawn": 0,
        "failed": 0,
        "stale_acks": 0,
        "complaints": [],
        "backend": "shared",
        "workload": "memhog",
        "policy": "boundary",
        "min_order": 9,
        "capacity": 16,
        "delay_ns": 100_000_000,
        "reports_timeline": [[1_006_000_000_000, 16, 32 * MIB], [1_006_100_000_000, 12, 24 * MIB]],
    }


def host_account(names: list[str]) -> dict[str, Any]:
    """What a host writes that freed 56 MiB of each of ``names``."""
    freed = (_PEAK - _FINAL) * len(names)
    counters = {"reports": 2 * len(names), "blocks": 28 * len(names), "asked_bytes": freed, "freed_bytes": freed}
    quiet = {"failures": 0, "rejected": 0, "malformed": 0, "invalid_blocks": 0}
    return {
        "ok": True,
        "duration_s": 10.0,
        "host": {**counters, **quiet},
        "guests": [
            {
                "name": name,
                "state": "left",
                "freed_bytes": _PEAK - _FINAL,
                "memory_bytes": _MEMORY,
                "final_resident_bytes": _FINAL,
            }
            for name in names
        ],
    }


def observation() -> Observation:
    """A guest seen from outside: 60 MiB resident for five seconds, then 4 MiB."""
    recorder = SeriesRecorder()
    for index in range(100):
        resident = _PEAK if 1 <= index < 60 else _FINAL
        recorder.append(
            Reading(index / 10, resident, resident, resident, _MEMORY - resident, 0, 0, _PEAK - resident, 0, 0)
        )
    n_pages = _MEMORY >> 12
    snapshots = []
    for time_s, resident_bytes in ((3.0, _PEAK), (9.9, _FINAL)):
        states = np.zeros(n_pages, np.uint16)
        resident_pages = resident_bytes >> 12
        states[::1024] = layout.FREE | layout.REPORTED | 10
        states[:resident_pages:1024] = layout.ALLOCATED | 10
        resident_map = np.zeros(n_pages, np.uint8)
        resident_map[: _PEAK >> 12] = layout.RETURNED
        resident_map[:resident_pages] = layout.RESIDENT
        snapshots.append(PageSnapshot(time_s, grid(classify(states, resident_map)), resident_bytes))
    return Observation(recorder.series(), recorder.peak, recorder.latest, *snapshots)


def agreeing_outcome(**changes: Any) -> RunOutcome:
    """Two guests and a host that ended well."""
    names = ["guest-1", "guest-2"]
    fields: dict[str, Any] = {
        "lab": "demo-test",
        "duration_s": 10.0,
        "started_s": 1000.0,
        "host": ProcessEnd("host", 0, "", host_account(names)),
        "guests": tuple(ProcessEnd(name, 0, "", guest_account(name)) for name in names),
        "observations": {name: observation() for name in names},
        "interrupted": False,
        "problem": None,
    }
    return RunOutcome(**{**fields, **changes})
