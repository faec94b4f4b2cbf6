"""``python -m lab.advise.lessons FOLDER``: what recordings teach about the order, the budget and the delay.

FOLDER holds traces/, snapshots/ and runs/ of guests that were recorded at order 9 and at order 0. The real guests'
figures stand beside those of replays of one guest's trace at either order, as the tables of docs/fidelity.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import EXIT_OK, CommandParser, run_command
from common.errors import UsageError
from common.geometry import PAGE_BYTES
from common.layout import RESIDENT
from common.output import check_output, write_json
from lab.advise.recorded import Left, Run, Work, left_in, left_of, read_run, total
from lab.replay import answer as told
from lab.replay.engine import Replay, ReplaySettings
from lab.replay.source import read_recording
from lab.trace.events import Event
from lab.trace.snapshot import Snapshot, read_snapshot

__all__ = ["Lesson", "budgets", "delays", "main", "orders"]

_MIB = float(1 << 20)
_S = 10**9
_GUEST = "o9_1g_traced"
_TRACES = {  # phases in one trace: its number, the snapshot before it, the snapshot after it
    "thp": ("01_thp", "snap00_boot", "snap03_thp512"),
    "nothp": ("02_nothp", "snap03_thp512", "snap06_nothp512"),
    "partial": ("03_partial", "snap06_nothp512", "snap07_partial"),
    "many": ("04_many", "snap07_partial", "snap09_many"),
}
_IN_RUNS = {
    "thp": ("thp128", "thp256", "thp512"),
    "nothp": ("nothp128", "nothp256", "nothp512"),
    "partial": ("partial",),
    "many": ("many",),
}
_SMALL_FREES = ("128", "256", "512")


@dataclass(frozen=True)
class Lesson:
    """A table in Markdown with its figures. ``rows``: as the JSON has them."""

    title: str
    headers: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    rows: list[dict[str, Any]]

    def __str__(self) -> str:
        cells = [self.headers, tuple("---" for _ in self.headers), *self.lines]
        return f"### {self.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in cells)


def main(arguments: list[str] | None = None) -> int:
    """Exit code."""
    return run_command(lambda: _run(arguments))


def _run(arguments: list[str] | None) -> int:
    parser = CommandParser(prog="python -m lab.advise.lessons", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--json", default="", metavar="PATH|-")
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")
    namespace = parser.parse_args(arguments)
    if namespace.json:
        check_output(namespace.json, force=namespace.force)
    folder = Path(namespace.folder)
    if not (folder / "traces").is_dir():
        raise UsageError(f"{folder}: has no traces/; expected a folder of recordings")
    runs = {order: read_run(folder / f"runs/o{order}_1g") for order in (9, 0)}
    found: list[Lesson] = []
    makers: tuple[Callable[[], list[Lesson]], ...] = (
        lambda: orders(folder, runs),
        lambda: budgets(folder, runs[0]),
        lambda: delays(folder, runs),
    )
    for make in makers:
        found += make()
        sys.stderr.write(f"{found[-1].title}: done\n")
    if namespace.json:
        write_json({lesson.title: lesson.rows for lesson in found}, namespace.json, force=namespace.force)
    sys.stdout.write("\n".join(str(lesson) for lesson in found))
    return EXIT_OK


def orders(folder: Path, runs: dict[int, Run]) -> list[Lesson]:
    """What stays behind at order 9 and not at order 0, and how many more reports that takes, real and replayed."""
    work: list[tuple[str, str, Work, Work]] = []
    left: list[tuple[str, int, Left]] = [
        (f"real, run without a trace, order {o}", o, runs[o].left["many"]) for o in (9, 0)
    ]
    for name in _TRACES:
        ours = {order: _replay(folder, name, order) for order in (9, 0)}
        real = {order: _total(runs[order], _IN_RUNS[name]) for order in (9, 0)}
        work += [("real", name, real[9], real[0]), ("ours", name, _work(ours[9]), _work(ours[0]))]
        if name == "many":
            after = _snapshot(folder, name, end=True)
            left.insert(1, ("real, the traced guest, order 9", 9, left_in(after)))
            left += [(f"ours, its trace at order {order}", order, _left(ours[order])) for order in (9, 0)]
    work.append(("real", "the whole run", runs[9].whole, runs[0].whole))
    return [_left_table(left), _work_table(work)]


def _left_table(left: Sequence[tuple[str, int, Left]]) -> Lesson:
    headers = ("after `many`", "free and held by the host, MiB", "free in blocks below order 9, MiB")
    return Lesson(
        "Order 9 leaves memory behind, order 0 none",
        headers,
        tuple((name, f"{one.held:.2f}", f"{one.small:.2f}") for name, _, one in left),
        [{"guest": name, "order": order, **vars(one)} for name, order, one in left],
    )


def _work_table(work: Sequence[tuple[str, str, Work, Work]]) -> Lesson:
    headers = ("phases", "guest", "passes, 9 / 0", "reports, 9 / 0", "", "blocks, 9 / 0", "", "MiB, 9 / 0", "")
    lines = []
    for guest, phases, nine, nought in work:
        cells = [phases, guest, f"{nine.passes} / {nought.passes}"]
        for key, digits in (("reports", 0), ("blocks", 0), ("mib", 0)):
            ours, theirs = getattr(nine, key), getattr(nought, key)
            cells += [f"{ours:.{digits}f} / {theirs:.{digits}f}", f"{theirs / ours:.2f} times" if ours else "-"]
        lines.append(tuple(cells))
    return Lesson(
        "What order 0 takes",
        headers,
        tuple(lines),
        [
            {"guest": guest, "phases": phases, "order_9": vars(nine), "order_0": vars(nought)}
            for guest, phases, nine, nought in work
        ],
    )


def budgets(folder: Path, real: Run) -> list[Lesson]:
    """Blocks and MiB of each pass between the two frees of ``partial``, at order 0."""
    rows: list[dict[str, Any]] = [{"guest": "real, 32", "passes": [list(one) for one in real.partial]}]
    for name, capacity in (("ours, 32", 32), ("ours, 512", 512)):
        done = _replay(folder, "partial", 0, capacity=capacity)
        freed_ns, again_ns = (
            _mark_ns(folder, "partial", text) for text in ("hog.freed_partial", "hog.freeing mib=256")
        )
        passes = [
            ((one.t_ns - freed_ns) / _S, len(one.blocks), one.pages * PAGE_BYTES / _MIB)
            for one in done.passes
            if one.blocks and freed_ns <= one.t_ns < again_ns
        ]
        rows.append({"guest": name, "passes": [list(one) for one in passes]})
    lines = tuple(
        (
            row["guest"],
            ", ".join(f"{t_s:.1f} ({blocks}, {mib:.1f})" for t_s, blocks, mib in row["passes"]),
            f"{sum(mib for _, _, mib in row['passes']):.1f}",
        )
        for row in rows
    )
    headers = ("blocks a report", "passes: s after the free (blocks, MiB)", "MiB in all")
    return [Lesson("The budget of a pass throttles partial frees", headers, lines, rows)]


def delays(folder: Path, runs: dict[int, Run]) -> list[Lesson]:
    """From a free to the first pass, under several delays, and in the real guests."""
    freed_ns = _mark_ns(folder, "thp", "hog.freed mib=128")
    rows: list[dict[str, Any]] = []
    for delay_ns in (_S // 10, _S // 4, _S, 2 * _S):
        done = _replay(folder, "thp", 9, delay_ns=delay_ns)
        first_ns = min(one.t_ns for one in done.passes if one.blocks and one.t_ns >= freed_ns)
        rows.append({"guest": "ours", "delay_s": delay_ns / _S, "first_s": [(first_ns - freed_ns) / _S]})
    rows += [
        {
            "guest": f"real, order {order}",
            "delay_s": 2.0,
            "first_s": [run.first_report_s[f"thp{size}"] for size in _SMALL_FREES],
        }
        for order, run in runs.items()
    ]
    lines = tuple((row["guest"], f"{row['delay_s']:g} s", _span(row["first_s"])) for row in rows)
    headers = ("guest", "delay", "first report after a free on huge pages, s")
    return [Lesson("The delay is the floor of every return", headers, lines, rows)]


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3f}" if low == high else f"{low:.3f} to {high:.3f}"


def _total(run: Run, phases: Sequence[str]) -> Work:
    return total(run.phases[name] for name in phases)


def _work(done: Replay) -> Work:
    passes = [one for one in done.passes if one.blocks]
    return Work(
        len(passes),
        sum(len(one.report_ends) for one in passes),
        sum(len(one.blocks) for one in passes),
        sum(one.pages for one in passes) * PAGE_BYTES / _MIB,
    )


def _left(done: Replay) -> Left:
    """What is free at the end of a replay, and how much of it the host holds."""
    blocks, resident = done.free_blocks(), done.resident_map() == RESIDENT
    held = sum(int(np.count_nonzero(resident[pfn : pfn + (1 << order)])) for pfn, order in blocks.items())
    return left_of(np.array(list(blocks.values()), np.int64), held)


def _replay(folder: Path, name: str, order: int, *, delay_ns: int = 2 * _S, capacity: int = 32) -> Replay:
    """One trace, from the snapshot before it."""
    scene = _scene(folder, name)
    pending_ns = scene.recording.pending_ns(order)
    settings = ReplaySettings(
        min_order=order, delay_ns=delay_ns, capacity=capacity, requested_ns=pending_ns, check=False
    )
    done = told.replay(scene, settings)
    done.run()
    return done


@lru_cache(maxsize=1)
def _scene(folder: Path, name: str) -> told.Scene:
    start = _snapshot(folder, name)
    trace, _, _ = _TRACES[name]
    recording = read_recording([str(folder / f"traces/{_GUEST}.{trace}.txt.gz")], start, None, None)
    return told.scene_of(recording, start)


def _mark_ns(folder: Path, name: str, text: str) -> int:
    """When the recording says so first.

    Raises:
        UsageError: it never does.
    """
    rows = _scene(folder, name).recording.rows
    for row in np.flatnonzero(rows["event"] == Event.mark).tolist():
        if rows.text(row) == text:
            return int(rows["t_ns"][row])
    raise UsageError(f"{folder}: {_TRACES[name][0]} has no mark {text!r}; expected the recordings of that guest")


def _snapshot(folder: Path, name: str, *, end: bool = False) -> Snapshot:
    return read_snapshot(str(folder / f"snapshots/{_GUEST}.{_TRACES[name][1 + end]}.blocks.csv.gz"))


if __name__ == "__main__":
    sys.exit(main())
