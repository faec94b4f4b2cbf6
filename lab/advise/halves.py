"""The recording cut in halves: what would be chosen had only one of them been recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lab.advise.choose import Choice, Want, choose
from lab.advise.measure import Row

__all__ = ["Half", "halves", "middle_ns", "rest"]


@dataclass(frozen=True)
class Half:
    """One half of a recording.

    Attributes:
        name: "first" or "second".
        rows: of every setting, in the order of the whole's; empty where they are not known.
        choice: None where nothing can be chosen; ``why_not`` says why.
    """

    name: str
    rows: tuple[Row, ...] = ()
    choice: Choice | None = None
    why_not: str = ""


def middle_ns(begin_ns: int, end_ns: int) -> int:
    """Where a recording is cut."""
    return (begin_ns + end_ns) // 2


def rest(whole: Row, first: Row, cut_ns: int) -> Row:
    """What a setting returned and cost behind ``cut_ns``: the whole's figures without those of ``first`` up to there.

    It begins with all that the setting had done by then, as it would in a guest that runs on. The split huge pages are
    the whole's: a page may be split in both halves.
    """
    at = int(np.searchsorted([t_s for t_s, _ in whole.resident], cut_ns / 1e9, side="right"))
    before = whole.resident[at - 1 : at] or [[cut_ns / 1e9, 0.0]]
    return replace(
        whole,
        gib_min=max(0.0, whole.gib_min - first.gib_min),
        refaults=max(0, whole.refaults - first.refaults),
        refault_s=max(0.0, whole.refault_s - first.refault_s),
        host_cpu_s=max(0.0, whole.host_cpu_s - first.host_cpu_s),
        passes=max(0, whole.passes - first.passes),
        reports=max(0, whole.reports - first.reports),
        reported_bytes=max(0, whole.reported_bytes - first.reported_bytes),
        resident=[[cut_ns / 1e9, before[0][1]], *whole.resident[at:]],
    )


def halves(whole: Sequence[Row], first: Sequence[Row], want: Want, cut_ns: int, end_ns: int) -> tuple[Half, Half]:
    """What would be chosen of each half by what is wanted of the whole; ``first`` is empty if nothing moved in it."""
    if not first:
        why = "no page reaches or leaves the buddy lists in it"
        return Half("first", why_not=why), Half("second", why_not="the other half tells nothing to hold it against")
    second = [rest(row, early, cut_ns) for row, early in zip(whole, first, strict=True)]
    parts = (("first", first, 0, cut_ns), ("second", second, cut_ns, end_ns))
    early, late = (_half(name, rows, want, low, high) for name, rows, low, high in parts)
    return early, late


def _half(name: str, rows: Sequence[Row], want: Want, low_ns: int, high_ns: int) -> Half:
    target, drops = want.target, want.drops
    if target is not None:
        drops = tuple(drop for drop in drops if low_ns <= drop.t_ns and drop.t_ns + target.within_ns <= high_ns)
        if not drops:
            return Half(name, tuple(rows), why_not="it has no large free by which the target can be judged")
    if not any(row.passes for row in rows):
        return Half(name, tuple(rows), why_not="no setting reports anything in it")
    return Half(name, tuple(rows), choose(rows, replace(want, span_s=want.span_s / 2, drops=drops)))
