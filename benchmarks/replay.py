"""How fast a recording is replayed in each mode, and what the invariant check costs."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from benchmarks.rows import Row, median, spread
from lab.replay import answer
from lab.replay.engine import MODES, ReplaySettings
from lab.replay.source import Recording
from lab.trace.columns import Columns
from lab.trace.events import Event
from lab.trace.snapshot import UNKNOWN_PAGES, Snapshot

__all__ = ["run"]

_PAGES = 1 << 18  # 1 GiB
_ROUNDS = 24  # processes, one after the other, each with half of the memory
_USED = 1 << 17
_BATCH = 63
_TARGET_EVENTS_S, _TARGET_SHARE = 1e7, 0.5
_STEP_NS = 1500
_PLAIN_EVENTS = 2_000_000


def _recording() -> tuple[Recording, Snapshot]:
    """Processes that take pages by fault and give them back in another order, by per-CPU batches of 63."""
    chance = np.random.default_rng(1)
    events, pfns = [], []
    for number in range(_ROUNDS):
        first = _PAGES // 4 + (number % 4) * 4096
        taken = np.arange(first, first + _USED, dtype=np.uint32)
        given = chance.permutation(taken.reshape(-1, 16)).ravel() if number % 2 else taken
        for order, kinds in (
            (taken, (Event.mm_page_alloc_zone_locked, Event.mm_page_alloc)),
            (given, (Event.mm_page_free, Event.mm_page_free_batched, Event.mm_page_pcpu_drain)),
        ):
            for batch in np.array_split(order, len(order) // _BATCH):
                for kind in kinds:
                    events.append(np.full(len(batch), int(kind), np.uint8))
                    pfns.append(batch)
    rows = Columns.empty(sum(len(batch) for batch in pfns))
    rows["event"][:] = np.concatenate(events)
    rows["pfn"][:] = np.concatenate(pfns)
    rows["migratetype"][:] = 1
    rows["t_ns"][:] = np.arange(len(rows)) * _STEP_NS
    recording = Recording("processes", rows, {}, [], 0, int(rows["t_ns"][-1]), at_snapshot=True)
    heads = np.arange(_PAGES // 4, _PAGES, 1024, dtype=np.int64)
    start = Snapshot(
        "all but a quarter",
        "blocks",
        heads,
        np.full(heads.size, 10, np.uint8),
        np.zeros(heads.size, np.bool_),
        np.full(heads.size, UNKNOWN_PAGES, np.int64),
        _PAGES,
    )
    return recording, start


def _plain_python(recording: Recording) -> float:
    """Events a second of a loop in Python that keeps a set of free pages and does nothing else."""
    rows = recording.rows
    part = slice(0, _PLAIN_EVENTS)
    events, pfns = rows["event"][part].tolist(), rows["pfn"][part].tolist()
    free: set[int] = set()
    taken, given = int(Event.mm_page_alloc_zone_locked), int(Event.mm_page_pcpu_drain)
    begun = time.perf_counter()
    for event, pfn in zip(events, pfns, strict=True):
        if event == taken:
            free.discard(pfn)
        elif event == given:
            free.add(pfn)
    return len(events) / (time.perf_counter() - begun)


def run(rounds: int) -> Iterator[Row]:
    """Rows of speed with and without the check and by mode, mainline's policy at its settings, from columns in memory.

    The three modes and a loop in plain Python take turns.
    """
    recording, start = _recording()
    scenes = {mode: answer.scene_of(recording, start, mode=mode) for mode in MODES}
    runs = [("zone", False), ("zone", True), ("page", False), ("demand", False)]
    seconds: dict[tuple[str, bool], list[float]] = {kind: [] for kind in runs}
    plans: list[float] = []
    plain: list[float] = []
    for number in range(rounds + 1):
        begun = time.perf_counter()
        answer.scene_of(recording, start)
        plans.append(time.perf_counter() - begun)
        plain.append(_plain_python(recording))
        for (mode, check), samples in seconds.items():
            done = answer.replay(scenes[mode], ReplaySettings(check=check))
            begun = time.perf_counter()
            done.run()
            if number:  # the first compiles
                samples.append(time.perf_counter() - begun)
    events = len(recording.rows)
    without = median(seconds["zone", False])
    for (mode, check), samples in seconds.items():
        speeds = [events / taken for taken in samples]
        share = without / median(samples)
        loop = f"{events} events in columns; a loop in Python over a set of free pages {median(plain):.3g}/s"
        yield Row(
            name=f"{mode} replay of a recording, {'with' if check else 'without'} the check",
            unit="events/s",
            value=median(speeds),
            spread=spread(speeds),
            against="without the check" if check else loop,
            ratio=share if check else median(speeds) / median(plain),
            target=f"ratio >= {_TARGET_SHARE}" if check else f"value >= {_TARGET_EVENTS_S:.0f}",
            ok=share >= _TARGET_SHARE if check else median(speeds) >= _TARGET_EVENTS_S,
        )
    speeds = [events / taken for taken in plans[1:]]
    yield Row(
        name="plan of a replay, once for all settings",
        unit="events/s",
        value=median(speeds),
        spread=spread(speeds),
        against=f"{events} events in columns",
        ratio=None,
        target=None,
        ok=None,
    )
