"""``python -m lab.replay.fidelity FOLDER``: every phase of a folder of recordings, ours beside the real guest.

FOLDER holds traces/NAME.NN_*.txt.gz and snapshots/NAME.snapNN_*.blocks.csv.gz. A phase begins where one snapshot was
taken and ends where the next one was; the marks in the traces say when. NAME begins with o and the minimum order.
"""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import EXIT_OK, CommandParser, run_command
from common.errors import UsageError
from common.geometry import PAGE_BYTES
from common.output import check_output, write_json
from lab.replay import answer as told
from lab.replay.against import passes_of
from lab.replay.engine import MODES, Replay, ReplaySettings
from lab.replay.picture import draw
from lab.replay.source import Recording, read_recording, since_last_pass
from lab.trace.events import Event
from lab.trace.snapshot import Snapshot, read_snapshot

__all__ = ["main", "phases_of"]

_MARK = re.compile(r"snap idx=(\d+) t0=(\d+\.\d+) .*label=(\S+)")
_NAME = re.compile(r"o(\d+)_")


def main(arguments: list[str] | None = None) -> int:
    """Exit code."""
    return run_command(lambda: _run(arguments))


def _run(arguments: list[str] | None) -> int:
    parser = CommandParser(prog="python -m lab.replay.fidelity", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--mode", choices=MODES, default="zone", help="as of `python -m lab replay` (default: zone)")
    parser.add_argument("--json", default="", metavar="PATH|-")
    parser.add_argument("--plot", default="", metavar="FILE.png")
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")
    namespace = parser.parse_args(arguments)
    for path in (namespace.json, namespace.plot):
        if path:
            check_output(path, force=namespace.force)
    folder = Path(namespace.folder)
    names = sorted({path.name.split(".")[0] for path in folder.glob("traces/*.txt.gz") if _NAME.match(path.name)})
    if not names:
        raise UsageError(f"{folder}: has no traces/oORDER_*.txt.gz; expected a folder of recordings")
    rows, panels = [], []
    for name in names:
        for label, found, row in phases_of(folder, name, namespace.mode):
            rows.append(row)
            panels.append((label, found))
            sys.stderr.write(_line(row))
    if namespace.json:
        write_json(rows, namespace.json, force=namespace.force)
    if namespace.plot:
        draw(panels, namespace.plot, force=namespace.force)
    sys.stdout.write(_table(rows))
    return EXIT_OK


def phases_of(folder: Path, name: str, mode: str = "zone") -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Label, answer and row of each phase of one guest."""
    told_order = _NAME.match(name)
    assert told_order is not None
    order = int(told_order[1])
    traces = sorted(str(path) for path in folder.glob(f"traces/{name}.*.txt.gz"))
    whole = read_recording(traces, None, None, None)
    marks = []
    for row in np.flatnonzero(whole.rows["event"] == Event.mark).tolist():
        told_mark = _MARK.search(whole.rows.text(row) or "")
        if told_mark is not None:
            marks.append((int(told_mark[1]), round(float(told_mark[2]) * 1e9), told_mark[3]))
    found = []
    for (number, begin_ns, label), (end_number, end_ns, end_label) in itertools.pairwise(marks):
        start = read_snapshot(str(folder / f"snapshots/{name}.snap{number:02d}_{label}.blocks.csv.gz"))
        end = read_snapshot(str(folder / f"snapshots/{name}.snap{end_number:02d}_{end_label}.blocks.csv.gz"))
        answer, figures = _phase(_part(whole, begin_ns, end_ns), start, end, order, mode)
        figures = {"recording": name, "phase": end_label, "order": order, **figures}
        found.append((f"order {order}, {end_label}", answer, figures))
    return found


def _part(whole: Recording, begin_ns: int, end_ns: int) -> Recording:
    low, high = np.searchsorted(whole.rows["t_ns"], [begin_ns, end_ns])
    notify_ns, drain_ns = since_last_pass(whole.rows, int(low))
    return replace(
        whole,
        rows=whole.rows.take(slice(int(low), int(high))),
        begin_ns=begin_ns,
        end_ns=end_ns,
        at_snapshot=True,
        first_notify_ns=notify_ns,
        first_drain_ns=drain_ns,
    )


def _phase(
    part: Recording, start: Snapshot, end: Snapshot, order: int, mode: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    scene = told.scene_of(part, start, mode=mode)
    done = told.replay(scene, ReplaySettings(min_order=order, requested_ns=part.pending_ns(order)))
    done.run()
    answer = told.answer(done, scene, blocks=False)
    real = passes_of(part.rows)
    against = answer["against"] = told.beside(done, scene, real)
    pairs = [row for row in against["passes"] if row["t_s"] is not None and row["real_t_s"] is not None]
    ours, theirs = done.free_blocks(), dict(zip(end.pfn.tolist(), end.order.tolist(), strict=True))
    return answer, {
        "moves": answer["moves"],
        "passes": len([one for one in real if one.pages]),
        "within_5_percent": against["passes_within_5_percent"],
        "real_mib": against["real_bytes"] / 2**20,
        "bytes_ratio": against["bytes_ratio"],
        "blocks_found": against["blocks_found"],
        "resident_off_mean": against.get("resident_off_mean"),
        "largest_time_off_s": max((abs(row["t_s"] - row["real_t_s"]) for row in pairs), default=None),
        "end_blocks_apart": len(ours.items() ^ theirs.items()),
        "end_held_mib": _held(done, end) * PAGE_BYTES / 2**20,
        "end_real_held_mib": int(end.host_allocated_pages.sum()) * PAGE_BYTES / 2**20,
        "unknown": answer["unknown"],
    }


def _held(done: Replay, end: Snapshot) -> int:
    """Pages that are free at the end in the real guest, and that the host holds in ours."""
    resident = done.resident_map() == 1
    blocks = zip(end.pfn.tolist(), (1 << end.order.astype(np.int64)).tolist(), strict=True)
    return sum(int(np.count_nonzero(resident[pfn : pfn + size])) for pfn, size in blocks)


def _line(row: dict[str, Any]) -> str:
    return f"{row['recording']} {row['phase']}: {row['passes']} passes, {row['moves']} moves\n"


def _table(rows: list[dict[str, Any]]) -> str:
    """The table of docs/fidelity.md."""
    head = [
        "order",
        "phase",
        "moves",
        "passes",
        "within 5 %",
        "MiB reported",
        "bytes, ours/real",
        "blocks found",
        "memory off, mean",
        "pass off, at most",
        "free blocks apart at the end",
        "free and held at the end, ours/real MiB",
    ]
    lines = [head, ["---"] * len(head)]
    lines += [
        [
            str(row["order"]),
            row["phase"],
            str(row["moves"]),
            str(row["passes"]),
            _share(row["within_5_percent"]),
            f"{row['real_mib']:.1f}",
            _number(row["bytes_ratio"]),
            _share(row["blocks_found"]),
            _share(row["resident_off_mean"], 3),
            f"{_number(row['largest_time_off_s'], 3)} s",
            str(row["end_blocks_apart"]),
            f"{row['end_held_mib']:.2f} / {row['end_real_held_mib']:.2f}",
        ]
        for row in rows
    ]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _share(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}%}".replace("%", " %")


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
