"""The sweep over an engine, and the advice that comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import UsageError
from common.geometry import PAGE_BYTES
from lab.advise.choose import Choice, Want, choose, front, knee, sensitivity, without_rebuild
from lab.advise.grid import DEFAULT, OFF, Setting, grid
from lab.advise.halves import Half, halves, middle_ns
from lab.advise.measure import Drop, Row, large_frees, measure, moved_pages
from lab.advise.wants import Target
from lab.experiment.engines import open_engine
from lab.replay import answer as told
from lab.replay.engine import Prices
from lab.replay.source import Recording, read_recording
from lab.trace.events import Event
from lab.trace.snapshot import read_snapshot

__all__ = ["Advice", "Question", "advise", "doubts"]

_FEW_PASSES = 3
_SHORT_SPAN = 10  # times the delay of the chosen setting
_MUCH_UNKNOWN = 0.01  # of the moves


@dataclass(frozen=True, kw_only=True)
class Question:
    """A recording, the settings to try, and what to choose by.

    Attributes:
        start: name of the snapshot, "" if there is none.
        memory_bytes, min_free_kbytes: 0: as the recording and the snapshot tell.
        budget: share of one processor.
    """

    traces: tuple[str, ...]
    start: str = ""
    policies: tuple[str, ...] = ("rotate", "boundary")
    orders: tuple[int, ...] = (0, 4, 9)
    delays_ns: tuple[int, ...] = (10**8, 25 * 10**7, 10**9, 2 * 10**9)
    capacities: tuple[int, ...] = (32, 512)
    memory_bytes: int = 0
    min_free_kbytes: int = 0
    budget: float | None = None
    target: Target | None = None
    engine: str = "processes"


@dataclass(frozen=True)
class Advice:
    """All that was found.

    Attributes:
        moves: of pages, that were replayed.
        used_end_bytes: memory in use as the recording ends.
        halves: what would be chosen had only one half been recorded.
    """

    question: Question
    health: dict[str, Any]
    refusals: list[str]
    span_s: float
    moves: int
    used_end_bytes: int
    want: Want
    rows: list[Row]
    choice: Choice
    prices: Prices
    halves: tuple[Half, Half]

    def row(self, setting: Setting) -> Row:
        """The row of a setting that was tried."""
        return next(row for row in self.rows if row.setting == setting)

    def as_dict(self) -> dict[str, Any]:
        """As the JSON has it."""
        bend, plain = knee(self.rows), without_rebuild(self.rows, self.want)
        target = self.question.target
        chosen = self.choice.row
        return {
            "traces": list(self.question.traces),
            "start": self.question.start,
            "span_s": self.span_s,
            "moves": self.moves,
            "used_end_bytes": self.used_end_bytes,
            "budget": self.question.budget,
            "target": None if target is None else {"bytes": target.size_bytes, "within_ns": target.within_ns},
            "chosen": {**chosen.as_dict(), "met": self.choice.met, "why": self.choice.why},
            "without_rebuild": {**plain.row.as_dict(), "met": plain.met, "why": plain.why},
            "default": self.row(DEFAULT).as_dict(),
            "off": self.row(OFF).as_dict(),
            "knee": None if bend is None else bend.as_dict(),
            "front": [row.as_dict() for row in front(self.rows)],
            "rows": [row.as_dict() for row in self.rows],
            "large_frees": [
                {"t_s": drop.t_ns / 1e9, "bytes": drop.bytes, "used_bytes": drop.used_bytes} for drop in self.want.drops
            ],
            "sensitivity": [
                {"prices": name, "same": other.row is chosen, "met": other.met, **other.row.setting.as_dict()}
                for name, other in sensitivity(self.rows, self.want)
            ],
            "halves": [self._half(half) for half in self.halves],
            "doubts": doubts(self),
            "prices_ns": vars(self.prices),
            "resident": {
                "chosen": chosen.resident,
                "default": self.row(DEFAULT).resident,
                "off": self.row(OFF).resident,
            },
            "health": self.health,
        }

    def _half(self, half: Half) -> dict[str, Any]:
        if half.choice is None:
            return {"half": half.name, "same": None, "why_not": half.why_not}
        found = half.choice.row
        same = found.setting == self.choice.row.setting
        return {"half": half.name, "same": same, "met": half.choice.met, **found.as_dict()}


def advise(question: Question, tell: Callable[[int, int], None] | None = None) -> Advice:
    """Replay every setting, and choose.

    Args:
        tell: called with how many replays are done and how many there are: each setting twice, whole and first half.

    Raises:
        UsageError: the recording cannot be replayed, a setting cannot be used, or the target cannot be judged.
    """
    start = read_snapshot(question.start) if question.start else None
    recording = read_recording(list(question.traces), start, None, None)
    scene = told.scene_of(
        recording, start, memory_bytes=question.memory_bytes, min_free_kbytes=question.min_free_kbytes
    )
    free_pages = int((np.int64(1) << scene.start.order.astype(np.int64)).sum())
    used_bytes = (scene.pages - free_pages) * PAGE_BYTES
    drops = large_frees(scene.plan, recording.begin_ns, recording.end_ns, used_bytes)
    span_s = (recording.end_ns - recording.begin_ns) / 1e9
    if span_s <= 0:
        raise UsageError(f"{recording.name}: all of its events are at one time; expected a recording with a span")
    want = Want(span_s, question.budget, question.target, _judged(question.target, drops, recording.end_ns))
    settings = grid(question.policies, question.orders, question.delays_ns, question.capacities)
    cut_ns = middle_ns(recording.begin_ns, recording.end_ns)
    ends = (None, cut_ns) if _moves_before(recording, cut_ns) else (None,)
    payloads = [
        {
            "traces": list(question.traces),
            "start": question.start,
            "to_ns": end_ns,
            "memory_bytes": scene.pages * PAGE_BYTES,
            "min_free_kbytes": scene.min_free_kbytes,
            "settings": {**setting.as_dict(), "requested_ns": recording.pending_ns(setting.min_order), "check": False},
        }
        for end_ns in ends
        for setting in settings
    ]
    found = _run(question.engine, settings, payloads, tell)
    rows, first = found[: len(settings)], found[len(settings) :]
    return Advice(
        question,
        recording.health,
        recording.refusals,
        span_s,
        len(scene.plan),
        used_bytes + int(moved_pages(scene.plan).sum()) * PAGE_BYTES,
        want,
        rows,
        choose(rows, want),
        Prices(),
        halves(rows, first, want, cut_ns, recording.end_ns),
    )


def _moves_before(recording: Recording, cut_ns: int) -> bool:
    """Whether pages reach or leave the buddy lists in the recording up to ``cut_ns``, without which it is no replay."""
    early = recording.rows["event"][recording.rows["t_ns"] <= cut_ns]
    return bool(np.isin(early, [int(Event.mm_page_alloc_zone_locked), int(Event.mm_page_pcpu_drain)]).any())


def _judged(target: Target | None, drops: Sequence[Drop], end_ns: int) -> tuple[Drop, ...]:
    """The large frees behind which enough is recorded to judge a target by; all of them without one.

    Raises:
        UsageError: there is none.
    """
    if target is None:
        return tuple(drops)
    found = tuple(drop for drop in drops if drop.t_ns + target.within_ns <= end_ns)
    if not found:
        raise UsageError(
            f"--target: no large free in the recording has {target.within_ns / 1e9:g} s behind it; "
            f"{len(drops)} in all; record longer, or allow less time"
        )
    return found


def _run(
    address: str,
    settings: list[Setting],
    payloads: list[dict[str, Any]],
    tell: Callable[[int, int], None] | None,
) -> list[Row]:
    """A row a payload, which are the settings in their order, once or twice."""
    found: dict[int, Row] = {}
    count = len(settings)
    with open_engine(address) as engine:
        for index, answer in engine.run(measure, payloads, describe=lambda index: str(settings[index % count])):
            found[index] = Row(settings[index % count], **answer)
            if tell is not None:
                tell(len(found), len(payloads))
    return [found[index] for index in range(len(payloads))]


def doubts(advice: Advice) -> list[str]:
    """Why the advice may not hold, a sentence each; none when nothing speaks against it."""
    chosen, found = advice.choice.row, []
    health = advice.health
    if health.get("verdict", "complete") != "complete":
        gaps = [note["text"] for note in health.get("notes", []) if note.get("level") == "gap"]
        found.append("the trace has gaps: " + "; ".join(gaps or advice.refusals))
    if not advice.question.start:
        found.append("there is no snapshot: what was free as the recording began is learnt from the events only")
    missed = sum(chosen.unknown.get(key, 0) for key in ("taken_not_free_pages", "freed_not_used_pages"))
    if missed > advice.moves * _MUCH_UNKNOWN:
        found.append(f"{missed} pages were not where the replay had them, of {advice.moves} moves")
    delay_s = chosen.setting.delay_ns / 1e9
    if advice.span_s < _SHORT_SPAN * delay_s:
        found.append(f"the trace spans {advice.span_s:.1f} s, less than {_SHORT_SPAN} delays of {delay_s:g} s")
    if chosen.passes < _FEW_PASSES:
        found.append(f"passes that reported, under the chosen setting: {chosen.passes}, too few to tell a habit")
    for name, other in sensitivity(advice.rows, advice.want):
        if other.met < advice.choice.met:
            found.append(f"if {name}, none does what was asked for")
        elif other.row is not chosen:
            found.append(f"if {name}, it would be: {other.row.setting}")
    found += [
        f"had only the {half.name} half been recorded, it would be: {half.choice.row.setting}"
        for half in advice.halves
        if half.choice is not None and half.choice.row.setting != chosen.setting
    ]
    edges = _edges(advice.question, chosen.setting)
    if edges:
        found.append(f"the chosen {' and '.join(edges)} is the lowest that was tried; lower ones may be better still")
    return found


def _edges(question: Question, chosen: Setting) -> list[str]:
    """Which of the chosen values are the lowest of several that were tried, and could be lower."""
    found = []
    if len(question.delays_ns) > 1 and 0 < chosen.delay_ns == min(question.delays_ns):
        found.append("delay")
    if len(question.orders) > 1 and 0 < chosen.min_order == min(question.orders):
        found.append("order")
    return found
