"""One replay from files to the answer that is printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import UsageError
from common.geometry import PAGE_BYTES
from lab.replay import kernels
from lab.replay.against import RealPass, compare, real_residence
from lab.replay.engine import Prices, Replay, ReplaySettings
from lab.replay.plan import Plan, build_plan
from lab.replay.source import Recording
from lab.replay.start import Place, Watermarks, machine_pages, places, recommended_kbytes, watermarks
from lab.trace.events import Event
from lab.trace.snapshot import Snapshot

__all__ = ["Machine", "answer", "beside", "machine_of", "recorded_begins", "replay", "zone_plan"]


@dataclass(frozen=True)
class Machine:
    """What is known of the recorded machine beside its pages."""

    pages: int
    zones: list[tuple[Place, Watermarks]]
    min_free_kbytes: int


def machine_of(plan: Plan, start: Snapshot | None, *, memory_bytes: int, min_free_kbytes: int) -> Machine:
    """The machine: as given, else as the recording and the snapshot tell.

    Raises:
        UsageError: what is given contradicts them.
    """
    ends = plan.pfn + (np.int64(1) << plan.order.astype(np.int64))
    pages = machine_pages(start, int(ends.max()) - 1 if len(plan) else 0, memory_bytes)
    found = places(pages)
    kbytes = min_free_kbytes or recommended_kbytes(found)
    return Machine(pages, list(zip(found, watermarks(found, kbytes), strict=True)), kbytes)


def zone_plan(recording: Recording) -> Plan:
    """The plan of a zone replay.

    Raises:
        UsageError: the recording has no zone events.
    """
    plan = build_plan(recording.rows)
    if not np.isin(plan.op, [kernels.OP_TAKE, kernels.OP_GIVE]).any():
        raise UsageError(
            f"{recording.name}: has neither mm_page_alloc_zone_locked nor mm_page_pcpu_drain; a zone replay needs both: "
            "see python -m lab record"
        )
    return plan


def replay(
    recording: Recording, plan: Plan, machine: Machine, start: Snapshot | None, settings: ReplaySettings, prices: Prices
) -> Replay:
    """A replay that has not been run."""
    return Replay(plan, machine.zones, start, settings, prices, begin_ns=recording.begin_ns, end_ns=recording.end_ns)


def answer(done: Replay, recording: Recording, machine: Machine, plan: Plan, *, blocks: bool) -> dict[str, Any]:
    """What a replay found, as the JSON has it. ``blocks``: with the pfn and order of every block, pass by pass."""
    settings, counts = done.settings, done.counts
    reported = [one for one in done.passes if one.blocks]
    refaults = int(counts[kernels.C_REFAULTS])
    found: dict[str, Any] = {
        "health": recording.health,
        "settings": {
            "policy": settings.policy,
            "min_order": settings.min_order,
            "delay_ns": done.delay_ns,
            "capacity": done.capacity,
            "hz": settings.hz,
            "min_free_kbytes": machine.min_free_kbytes,
            "memory_bytes": machine.pages * PAGE_BYTES,
            "zones": [
                {"name": place.name, "pages": place.pages, "min_pages": marks.lowest, "low_pages": marks.low}
                for place, marks in machine.zones
            ],
        },
        "begin_s": recording.begin_ns / 1e9,
        "end_s": recording.end_ns / 1e9,
        "events": len(plan),
        "passes": [
            {
                "t_s": one.t_ns / 1e9,
                "reports": len(one.report_ends),
                "blocks": len(one.blocks),
                "bytes": one.pages * PAGE_BYTES,
            }
            for one in reported
        ],
        "empty_passes": len(done.passes) - len(reported),
        "reported_bytes": sum(one.pages for one in reported) * PAGE_BYTES,
        "resident": [[t_ns / 1e9, pages * PAGE_BYTES] for t_ns, pages in done.samples],
        "gib_min": done.gib_minutes(),
        "refaults": refaults,
        "refault_s": refaults * done.prices.refault_ns / 1e9,
        "first_touches": int(counts[kernels.C_FIRST_TOUCHES]),
        "host_cpu_s": done.host_cpu_ns / 1e9,
        "unknown": {
            "taken_not_free_pages": int(counts[kernels.C_NOT_FREE]),
            "freed_not_used_pages": int(counts[kernels.C_NOT_USED]),
            "taken_while_reported_blocks": int(counts[kernels.C_CONFLICTS]),
            "frees_without_event": plan.unseen_frees,
        },
    }
    if blocks:
        found["reported"] = [[list(block) for block in one.blocks] for one in reported]
    return found


def beside(
    done: Replay, recording: Recording, machine: Machine, start: Snapshot | None, plan: Plan, real: list[RealPass]
) -> dict[str, Any]:
    """The real guest's reports beside those of a replay that was run."""
    found = compare(done.passes, real)
    if not any(one.answers for one in real):
        return found
    touched = plan.op == kernels.OP_TOUCH
    fresh = Replay(
        plan, machine.zones, start, ReplaySettings(policy="off"), done.prices,
        begin_ns=recording.begin_ns, end_ns=recording.end_ns,
    )  # fmt: skip
    times = [t_ns for t_ns, _ in done.samples]
    pages = real_residence(
        fresh.resident_map(), (plan.t_ns[touched], plan.pfn[touched], plan.order[touched]), real, times
    )
    ours = np.array([pages_held for _, pages_held in done.samples], np.float64)
    found["real_resident"] = [[t_ns / 1e9, count * PAGE_BYTES] for t_ns, count in zip(times, pages, strict=True)]
    found["resident_off_mean"] = float(np.abs(ours - np.array(pages)).mean()) / machine.pages
    return found


def recorded_begins(recording: Recording) -> tuple[int, ...]:
    """When the recorded guest's own passes began."""
    rows = recording.rows
    return tuple(int(t_ns) for t_ns in rows["t_ns"][rows["event"] == Event.process])
