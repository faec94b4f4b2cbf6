"""Recordings as a replay needs them: all rows of one machine, from a text or an imported file, and their health."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import UsageError
from common.geometry import MAX_PAGES
from lab.trace.columns import NO_TEXT, Columns
from lab.trace.events import PAGE_EVENTS, Event
from lab.trace.formats import open_input
from lab.trace.health import Watch, refusals_of
from lab.trace.reader import Batch, read_all
from lab.trace.snapshot import Snapshot
from lab.trace.store import TraceFile

__all__ = ["Recording", "read_recording", "since_last_pass", "snapshot_time_ns"]

_PARQUET = b"PAR1"
_NEEDED = ("t_ns", "cpu", "event", "pfn", "order", "migratetype")
_SNAPSHOT_NAME = re.compile(r"snap(\d+)")
_SNAPSHOT_MARK = re.compile(r"snap idx=(\d+) t0=(\d+\.\d+) t1=(\d+\.\d+)")


@dataclass(frozen=True)
class Recording:
    """The part of a recording that is replayed.

    Attributes:
        health: as ``python -m lab import`` tells it, of the whole recording.
        begin_ns, end_ns: of the part, on the recording's clock.
        at_snapshot: it begins when the snapshot was taken, as far as a mark tells.
        first_notify_ns, first_drain_ns: in what was recorded before it, the first since the last pass, if any.
    """

    name: str
    rows: Columns
    health: dict[str, Any]
    refusals: list[str]
    begin_ns: int
    end_ns: int
    at_snapshot: bool
    first_notify_ns: int | None = None
    first_drain_ns: int | None = None

    def pending_ns(self, min_order: int) -> int | None:
        """When a pass was asked for that had not begun as the part begins, as far as what was before it tells.

        A free that notifies is recorded as such, or, at order 0, is any drain.
        """
        return self.first_drain_ns if self.first_notify_ns is None and min_order == 0 else self.first_notify_ns


def read_recording(names: list[str], start: Snapshot | None, from_ns: int | None, to_ns: int | None) -> Recording:
    """Read the recordings ``names``, each text or an imported file, and cut out the part that is asked for.

    It begins where the snapshot was taken, if the recording says when, else with its first event.

    Raises:
        UsageError: a recording cannot be read, holds no page event in that part, or is another machine's.
    """
    parts: list[Batch] = []
    health: dict[str, Any] | None = None
    refusals: list[str] = []
    alone = next((name for name in names if _is_imported(name)), None) if len(names) > 1 else None
    if alone is not None:
        raise UsageError(
            f"{alone}: is an imported trace, which stands alone; import the texts together: "
            "python -m lab import TRACE TRACE --out BOTH.parquet"
        )
    if len(names) == 1 and _is_imported(names[0]):
        imported = TraceFile(names[0])
        rows = _rows_of(imported)
        health = dict(imported.metadata.get("health") or {})
        refusals = refusals_of(health) if health else []
    else:
        parts = list(read_all(names))
        rows = Columns.joined([part.columns for part in parts])
    if not len(rows):
        raise UsageError(f"{names[0]}: holds no event; expected page events")
    times = rows["t_ns"]
    first_ns, last_ns = int(times[0]), int(times[-1])
    taken_ns = snapshot_time_ns(rows, start)
    begin_ns = from_ns if from_ns is not None else first_ns if taken_ns is None else taken_ns
    end_ns = last_ns if to_ns is None else to_ns
    low, high = np.searchsorted(times, begin_ns), np.searchsorted(times, end_ns, side="right")
    part = rows.take(slice(int(low), int(high)))
    if not np.isin(part["event"], [int(event) for event in PAGE_EVENTS]).any():
        raise UsageError(
            f"{names[0]}: has no page event from {begin_ns / 1e9:.6f} to {end_ns / 1e9:.6f} s; it spans "
            f"{first_ns / 1e9:.6f} to {last_ns / 1e9:.6f} s"
        )
    if health is None:
        watch = Watch(start)
        for batch in parts:
            inside = (batch.columns["t_ns"] >= begin_ns) & (batch.columns["t_ns"] <= end_ns)
            watch.see(Batch(batch.columns.take(np.flatnonzero(inside)), batch.source))
        seen = watch.health()
        health, refusals = seen.facts, seen.refusals
    _refuse_others(names[0], part, start)
    return Recording(
        names[0], part, health, refusals, begin_ns, end_ns, begin_ns == taken_ns, *since_last_pass(rows, int(low))
    )


def since_last_pass(rows: Columns, before: int) -> tuple[int | None, int | None]:
    """Times of the first notify and the first drain behind the last pass among the rows ahead of ``before``."""
    event = rows["event"][:before]
    passes = np.flatnonzero((event >= Event.process) & (event <= Event.report_ret))
    if not passes.size:
        return None, None
    found: list[int | None] = []
    for kind in (Event.notify, Event.mm_page_pcpu_drain):
        after = np.flatnonzero(event[passes[-1] :] == kind)
        found.append(int(rows["t_ns"][passes[-1] + after[0]]) if after.size else None)
    return found[0], found[1]


def _is_imported(name: str) -> bool:
    if name == "-" or not os.path.isfile(name):
        return False
    with open_input(name) as stream:
        return stream.read(len(_PARQUET)) == _PARQUET


def _rows_of(imported: TraceFile) -> Columns:
    """The columns that a replay looks at."""
    arrays: dict[str, npt.NDArray[Any]] = {
        name: np.ascontiguousarray(array) for name, array in imported.columns(*_NEEDED).items()
    }
    with_text, texts = imported.texts()
    arrays["text_id"] = np.full(len(imported), NO_TEXT, np.int32)
    arrays["text_id"][with_text] = np.arange(len(texts), dtype=np.int32)
    return Columns(arrays, texts)


def snapshot_time_ns(rows: Columns, start: Snapshot | None) -> int | None:
    """When the snapshot was taken, if its name has a number and the recording a mark of that number; else None."""
    named = None if start is None else _SNAPSHOT_NAME.search(os.path.basename(start.name))
    if named is None:
        return None
    for row in np.flatnonzero(rows["event"] == Event.mark).tolist():
        told = _SNAPSHOT_MARK.search(rows.text(row) or "")
        if told is not None and int(told[1]) == int(named[1]):
            return round(float(told[2]) * 1e9)
    return None


def _refuse_others(name: str, rows: Columns, start: Snapshot | None) -> None:
    """Refuse what is larger than any guest, or than the machine of the snapshot."""
    paged = rows["event"] <= Event.mm_page_alloc_extfrag
    ends = rows["pfn"][paged].astype(np.int64) + (np.int64(1) << rows["order"][paged].astype(np.int64))
    if ends.size and int(ends.max()) > MAX_PAGES:
        raise UsageError(
            f"{name}: names pfn {int(ends.max()) - 1:#x}; expected those of a guest of 1 TiB at most, up to "
            f"{MAX_PAGES - 1:#x}"
        )
    if start is None or not start.n_pages:
        return
    if ends.size and int(ends.max()) > start.n_pages:
        raise UsageError(
            f"{name}: names pfn {int(ends.max()) - 1:#x}, beyond the {start.n_pages} pages of {start.name}; expected a "
            "snapshot of the same machine"
        )
