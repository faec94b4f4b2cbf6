"""The real guest's reports beside ours: pass by pass, block by block, and the host's memory over time."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import UsageError
from common.geometry import PAGE_BYTES
from lab.replay import kernels
from lab.replay.engine import Pass
from lab.trace.columns import Columns
from lab.trace.events import Event
from lab.trace.formats import open_input, pieces
from lab.trace.reader import read_all

__all__ = ["RealPass", "compare", "passes_of", "read_real", "real_residence"]

_ENTRY = re.compile(r"(0x[0-9a-f]+|\d+):(\d+)")
_HEAD = "t_guest,cpu,nents,bytes,order_min,order_max,report_to_ack_us"
_NEAR_NS = 1_000_000_000  # two passes are the same if they begin within half a delay of mainline
_APART_NS = 1_000_000_000  # reports of a table that lie so far apart are of two passes
_WITHIN = 0.05


@dataclass
class RealPass:
    """What the recorded guest did in one pass. ``blocks`` is empty where the source names none.

    Attributes:
        answers: (time of the answer in ns, first of ``blocks``, end) of each report.
    """

    t_ns: int
    pages: int
    reports: int
    blocks: list[tuple[int, int]]
    answers: list[tuple[int, int, int]]


def read_real(name: str, begin_ns: int, end_ns: int) -> list[RealPass]:
    """The passes in the file ``name``: ``reports.csv``, or a trace with the events ``report``.

    Raises:
        UsageError: it is neither, or holds none; names the file, the line and what was expected.
    """
    stream = open_input(name)
    try:
        _, parts = pieces(stream, name, binary=True)
        first = next(parts)
        if first.lstrip(b"\xef\xbb\xbf").startswith(b"t_guest,"):
            found = _of_table(name, (first + b"".join(parts)).decode("utf-8-sig", "replace"))
        else:
            found = []
    finally:
        stream.close()
    if not found:
        rows = Columns.joined([batch.columns for batch in read_all([name])])
        found = passes_of(rows)
        if not np.any(rows["event"] == Event.report):
            raise UsageError(f"{name}: holds no report; expected a table {_HEAD}, or a trace with the events report")
    return [one for one in found if begin_ns <= one.t_ns <= end_ns]


def _of_table(name: str, text: str) -> list[RealPass]:
    lines = text.splitlines()
    if not lines[0].startswith("t_guest,cpu,nents,bytes"):
        raise UsageError(f"{name}: line 1: {lines[0][:80]!r}; expected {_HEAD}")
    found: list[RealPass] = []
    last_ns = 0
    for number, words in enumerate(csv.reader(lines[1:]), 2):
        try:
            at_ns, pages = round(float(words[0]) * 1e9), int(words[3]) // PAGE_BYTES
        except (ValueError, IndexError):
            raise UsageError(f"{name}: line {number}: {','.join(words)[:80]!r}; expected {_HEAD}") from None
        if not found or at_ns - last_ns > _APART_NS:
            found.append(RealPass(at_ns, 0, 0, [], []))
        found[-1].pages += pages
        found[-1].reports += 1
        last_ns = at_ns
    return found


def passes_of(rows: Columns) -> list[RealPass]:
    """The passes that a trace itself tells of: process, report, report_ret, process_ret."""
    found: list[RealPass] = []
    told = np.flatnonzero((rows["event"] >= Event.process) & (rows["event"] <= Event.report_ret))
    first = 0
    open_pass = False
    for row in told.tolist():
        event, at_ns = int(rows["event"][row]), int(rows["t_ns"][row])
        if event == Event.process or not (open_pass or event != Event.report):
            found.append(RealPass(at_ns, 0, 0, [], []))
            open_pass = True
        if event == Event.process_ret:
            open_pass = False
        elif event == Event.report and found:
            entries = [(int(pfn, 0), int(order)) for pfn, order in _ENTRY.findall(rows.text(row) or "")]
            first = len(found[-1].blocks)
            found[-1].blocks += entries
            found[-1].pages += sum(1 << order for _, order in entries)
            found[-1].reports += 1
        elif event == Event.report_ret and found:
            found[-1].answers.append((at_ns, first, len(found[-1].blocks)))
    return found


def _pairs(ours: Sequence[Pass], real: Sequence[RealPass]) -> list[tuple[Pass | None, RealPass | None]]:
    """Passes of both that are the same one, by time; with None what the other has not."""
    found: list[tuple[Pass | None, RealPass | None]] = []
    left, right = 0, 0
    while left < len(ours) or right < len(real):
        if right == len(real) or (left < len(ours) and ours[left].t_ns < real[right].t_ns - _NEAR_NS):
            found.append((ours[left], None))
            left += 1
        elif left == len(ours) or ours[left].t_ns > real[right].t_ns + _NEAR_NS:
            found.append((None, real[right]))
            right += 1
        else:
            found.append((ours[left], real[right]))
            left += 1
            right += 1
    return found


def compare(ours: Sequence[Pass], real: Sequence[RealPass]) -> dict[str, Any]:
    """How far ours and the real passes agree. A pass that reports nothing and has no counterpart is left out."""
    rows = []
    shared = named = 0
    for mine, theirs in _pairs(ours, real):
        bytes_ours = mine.pages * PAGE_BYTES if mine else 0
        bytes_real = theirs.pages * PAGE_BYTES if theirs else 0
        if not bytes_ours and not bytes_real:
            continue
        row: dict[str, Any] = {
            "t_s": mine.t_ns / 1e9 if mine else None,
            "real_t_s": theirs.t_ns / 1e9 if theirs else None,
            "reports": len(mine.report_ends) if mine else 0,
            "real_reports": theirs.reports if theirs else 0,
            "bytes": bytes_ours,
            "real_bytes": bytes_real,
            "within": abs(bytes_ours - bytes_real) <= _WITHIN * bytes_real,
        }
        if theirs and theirs.blocks:
            both = len(set(mine.blocks) & set(theirs.blocks)) if mine else 0
            row |= {"real_blocks": len(theirs.blocks), "blocks_shared": both}
            shared += both
            named += len(theirs.blocks)
        rows.append(row)
    total, total_real = sum(row["bytes"] for row in rows), sum(row["real_bytes"] for row in rows)
    return {
        "passes": rows,
        "passes_within_5_percent": sum(row["within"] for row in rows) / len(rows) if rows else 1.0,
        "bytes": total,
        "real_bytes": total_real,
        "bytes_ratio": total / total_real if total_real else None,
        "blocks_found": shared / named if named else None,
    }


def real_residence(
    resident: npt.NDArray[np.uint8],
    plan_rows: tuple[npt.NDArray[Any], ...],
    real: Sequence[RealPass],
    times_ns: Sequence[int],
) -> list[int]:
    """Pages that the host holds at ``times_ns`` if the real guest's reports are carried out in place of ours.

    Args:
        resident: uint8[pages], at the start; written to.
        plan_rows: t_ns, pfn and order of each allocation that was handed out.
    """
    counts: npt.NDArray[np.int64] = np.zeros(kernels.COUNTS, np.int64)
    counts[kernels.C_RESIDENT] = int(np.count_nonzero(resident == 1))
    answers = [(at_ns, one.blocks[first:end]) for one in real for at_ns, first, end in one.answers]
    t_ns, pfns, orders = plan_rows
    found, row, answer = [], 0, 0
    for until in times_ns:
        while answer < len(answers) and answers[answer][0] <= until:
            end = int(np.searchsorted(t_ns, answers[answer][0], side="right"))
            kernels.touch_all(resident, pfns, orders, row, end, counts)
            row = end
            blocks = np.array(answers[answer][1], np.int64).reshape(-1, 2)
            kernels.discard(resident, blocks[:, 0].copy(), blocks[:, 1].copy(), counts)
            answer += 1
        end = int(np.searchsorted(t_ns, until, side="right"))
        kernels.touch_all(resident, pfns, orders, row, end, counts)
        row = end
        found.append(int(counts[kernels.C_RESIDENT]))
    return found
