"""One replay from files to the answer that is printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import UsageError
from common.geometry import PAGE_BYTES
from lab.replay import kernels
from lab.replay.against import RealPass, compare, real_residence
from lab.replay.engine import Prices, Replay, ReplaySettings, list_sizes
from lab.replay.learn import Correction, corrected, eased, first_events, has_zone_events, learnt
from lab.replay.plan import Plan, build_page_plan, build_plan
from lab.replay.source import Recording
from lab.replay.start import Part, Place, Watermarks, machine_pages, part_of, places, recommended_kbytes, watermarks
from lab.trace.events import Event
from lab.trace.snapshot import Snapshot

__all__ = ["Scene", "answer", "beside", "recorded_begins", "replay", "scene_of"]


@dataclass(frozen=True)
class Scene:
    """Everything that replays of one recording share, whatever the policy and its settings.

    Attributes:
        mode: zone, page or demand.
        start: the free lists as the recording begins.
        pages: of the machine.
        parts: its zones, in the order in which the kernel walks them.
        correction: what of the snapshot was not so any more.
    """

    recording: Recording
    mode: str
    plan: Plan
    start: Snapshot
    pages: int
    parts: list[Part]
    min_free_kbytes: int
    correction: Correction


def scene_of(
    recording: Recording,
    start: Snapshot | None,
    *,
    mode: str = "zone",
    memory_bytes: int = 0,
    min_free_kbytes: int = 0,
) -> Scene:
    """The scene of a replay: as given, else as the recording and the snapshot tell (0 for what is not given).

    In a demand replay the machine is one zone: our allocator has but one to choose pages from.

    Raises:
        UsageError: what is given contradicts them, or the recording has not the events that the mode needs.
    """
    plan = _plan(recording, start, mode)
    highest = int((plan.pfn + (np.int64(1) << plan.order.astype(np.int64))).max()) - 1
    pages = machine_pages(start, highest, memory_bytes)
    found = places(pages)
    kbytes = min_free_kbytes or recommended_kbytes(found)
    if mode == "demand":
        found = [Place("all", 0, found[-1].end)]
    zones = list(zip(found, watermarks(found, kbytes), strict=True))
    end = found[-1].end
    correction = Correction()
    if start is None:
        first = first_events(recording, end, allocations_tell=not has_zone_events(recording))
        begin, zones = learnt(recording, first), eased(zones, first)
    else:
        begin = start
        if has_zone_events(recording):
            begin, correction = corrected(start, recording, end)
    parts = [part_of(place, marks, begin, plan, follow=mode != "demand") for place, marks in zones]
    return Scene(recording, mode, plan, begin, pages, parts, kbytes, correction)


def _plan(recording: Recording, start: Snapshot | None, mode: str) -> Plan:
    if mode == "zone":
        plan = build_plan(recording.rows, start if recording.at_snapshot else None)
        if not np.isin(plan.op, [kernels.OP_TAKE, kernels.OP_GIVE]).any():
            raise UsageError(
                f"{recording.name}: has neither mm_page_alloc_zone_locked nor mm_page_pcpu_drain; a zone replay needs "
                "both, see: python -m lab record; or replay allocations and frees: --mode page"
            )
        return plan
    plan = build_page_plan(recording.rows, batched=bool(recording.health.get("batched_without_free")))
    if not len(plan):
        raise UsageError(
            f"{recording.name}: has neither mm_page_alloc nor mm_page_free; a {mode} replay needs both, see: "
            "python -m lab record"
        )
    return plan


def replay(scene: Scene, settings: ReplaySettings, prices: Prices | None = None) -> Replay:
    """A replay that has not been run."""
    return Replay(
        scene.parts,
        settings,
        prices or Prices(),
        mode=scene.mode,
        begin_ns=scene.recording.begin_ns,
        end_ns=scene.recording.end_ns,
    )


def answer(done: Replay, scene: Scene, *, blocks: bool) -> dict[str, Any]:
    """What a replay found, as the JSON has it. ``blocks``: with the pfn and order of every block, pass by pass."""
    counts, recording = done.counts, scene.recording
    reported = [one for one in done.passes if one.blocks]
    refaults = int(counts[kernels.C_REFAULTS])
    found: dict[str, Any] = {
        "health": recording.health,
        "settings": _settings(done, scene),
        "begin_s": recording.begin_ns / 1e9,
        "end_s": recording.end_ns / 1e9,
        "moves": len(scene.plan),
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
            "failed_pages": int(counts[kernels.C_FAILED]),
            "frees_without_event": scene.plan.unseen_frees,
            "takes_without_event": scene.plan.silent_takes,
            "start_corrected_pages": scene.correction.changed,
            "start_contradicted_share": scene.correction.share,
        },
    }
    if blocks:
        found["reported"] = [[list(block) for block in one.blocks] for one in reported]
    return found


def _settings(done: Replay, scene: Scene) -> dict[str, Any]:
    """What was replayed with, defaults and guesses included."""
    settings, prices = done.settings, done.prices
    chosen = {} if scene.mode != "demand" else {
        "shuffle": settings.shuffle, "merge_likely": settings.merge_likely, "seed": settings.seed
    }  # fmt: skip
    return {
        "mode": scene.mode,
        "policy": settings.policy,
        "min_order": settings.min_order,
        "delay_ns": done.delay_ns,
        "capacity": done.capacity,
        "hz": settings.hz,
        **chosen,
        "memory_bytes": scene.pages * PAGE_BYTES,
        "min_free_kbytes": scene.min_free_kbytes,
        "zones": [
            {
                "name": place.name,
                "pages": place.pages,
                "min_pages": marks.lowest,
                "low_pages": marks.low,
                **_lists(done, scene, place, marks),
            }
            for place, marks in ((part.place, part.marks) for part in scene.parts)
        ],
        "prices_ns": {
            "report": prices.report_ns,
            "range": prices.range_ns,
            "page": prices.page_ns,
            "refault": prices.refault_ns,
        },
    }


def _lists(done: Replay, scene: Scene, place: Place, marks: Watermarks) -> dict[str, int]:
    if scene.mode == "zone":
        return {}
    batch, high = list_sizes(place, marks, scene.plan.cpus, done.settings)
    return {"pcp_batch": batch, "pcp_high": high}


def beside(done: Replay, scene: Scene, real: list[RealPass]) -> dict[str, Any]:
    """The real guest's reports beside those of a replay that was run."""
    found = compare(done.passes, real)
    if not any(one.answers for one in real):
        return found
    plan = scene.plan
    touched = (plan.op == kernels.OP_TOUCH) | (plan.op == kernels.OP_ALLOC)
    unused = replay(scene, ReplaySettings(policy="off"))
    times = [t_ns for t_ns, _ in done.samples]
    pages = real_residence(
        unused.resident_map(), (plan.t_ns[touched], plan.pfn[touched], plan.order[touched]), real, times
    )
    ours = np.array([held for _, held in done.samples], np.float64)
    found["real_resident"] = [[t_ns / 1e9, count * PAGE_BYTES] for t_ns, count in zip(times, pages, strict=True)]
    found["resident_off_mean"] = float(np.abs(ours - np.array(pages)).mean()) / scene.pages
    return found


def recorded_begins(recording: Recording) -> tuple[int, ...]:
    """When the recorded guest's own passes began."""
    rows = recording.rows
    return tuple(int(t_ns) for t_ns in rows["t_ns"][rows["event"] == Event.process])
