"""Sweeps: all runs of a grid that a directory does not have yet, then which settings no other beats."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from common.cli import EXIT_OK
from common.errors import InvariantViolation
from common.output import STDOUT, write_bytes, write_json
from lab.experiment.directory import RunDirectory
from lab.experiment.engines import check_address, open_engine
from lab.experiment.environment import git_commit, project_version
from lab.experiment.grid import Grid, load_grid
from lab.experiment.metrics import RunResult
from lab.experiment.spec import RunSpec

if TYPE_CHECKING:
    from lab.commands.sweep import SweepSettings
    from lab.experiment.statistics import Summary
    from lab.report.front import Front

__all__ = ["PICTURE", "print_fronts", "run_sweep"]

PICTURE = "pareto.png"
_REPEAT = 1  # a grid varies the seed instead
_MOST_ROWS = 40

Execute = Callable[[dict[str, Any]], dict[str, Any]]


def run_sweep(
    settings: SweepSettings, *, costs: dict[str, Any] | None, function: Execute, command: list[str] | None = None
) -> int:
    """Do the runs that are missing in ``settings.out`` and say what came of all; the exit code.

    Args:
        costs: of virtual time, as their dictionary; None for live runs.
        function: does one run; see ``lab.experiment.execute``.
        command: what the directory records as the command line.

    Raises:
        UsageError: the grid, the engine's address or the directory is not usable; before anything runs.
        LabError: a run or its engine failed; what had finished is kept.
        InvariantViolation: runs found violations; raised once everything is written.
    """
    check_address(settings.address)
    grid = load_grid(settings.grid, "live" if settings.live else "virtual")
    with RunDirectory.open(
        settings.out, kind="sweep", settings=grid.as_dict(), costs=costs, force=settings.force, command=command
    ) as directory:
        specs = grid.specs()
        _do_missing(settings, grid, directory, costs, function)
        by_key = {kept.result.spec.key(): kept.result for kept in directory.results()}
    results = [by_key[spec.key()] for spec in specs]
    _tell(settings, grid, results)
    bad = [_describe(result.spec) for result in results if result.metrics["violations"]]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise InvariantViolation(f"violations in {'; '.join(bad[:3])}{more}; see {settings.out}")
    return EXIT_OK


def _do_missing(
    settings: SweepSettings, grid: Grid, directory: RunDirectory, costs: dict[str, Any] | None, function: Execute
) -> None:
    """The runs whose results ``directory`` has not; each is kept as soon as it is there."""
    from lab.experiment.progress import make_progress

    specs, done = grid.specs(), directory.done()
    missing = [spec for spec in specs if (spec.key(), _REPEAT) not in done]
    talk = None if settings.quiet else sys.stderr
    if len(missing) < len(specs):
        _say(talk, f"{settings.out}: {len(specs) - len(missing)} of {len(specs)} runs are there")
        there, here = _made_with(directory.record), _made_with({"version": project_version(), "commit": git_commit()})
        if missing and there != here:
            _say(talk, f"{settings.out}: was begun with {there}, goes on with {here}; --force begins anew")
    if not missing:
        return
    payloads = ({"spec": spec.as_dict(), "costs": costs} for spec in missing)
    progress = make_progress(quiet=settings.quiet)
    try:
        with open_engine(settings.address) as engine:
            progress.start(grid.mode, missing)
            for index, answer in engine.run(
                function,
                payloads,
                in_flight=1 if settings.live else None,
                describe=lambda index: _describe(missing[index]),
            ):
                directory.append(RunResult.from_dict(answer), _REPEAT)
                progress.done(missing[index])
    except BaseException:
        progress.close()
        kept = len(directory.done())
        _say(talk, f"{settings.out}: {kept} of {len(specs)} runs are kept; the same command goes on with the others")
        raise
    finally:
        progress.close()


def _tell(settings: SweepSettings, grid: Grid, results: Sequence[RunResult]) -> None:
    """Picture, table and JSON of all results."""
    from lab.report.front import fronts
    from lab.report.plots import pareto_figure
    from lab.report.style import figure_bytes

    found = fronts(results)
    picture = os.path.join(settings.out, PICTURE)
    # It follows from what the directory holds, so it may replace what an earlier part of the same sweep drew.
    write_bytes(figure_bytes(pareto_figure(results, title=_title(grid)), "png"), picture, force=True)
    # Standard output is for the object when it goes there.
    print_fronts(found, sys.stderr if settings.json == STDOUT else sys.stdout)
    _say(
        None if settings.quiet else sys.stderr,
        f"{len(results)} run{'s' * (len(results) != 1)} in {settings.out}, picture in {picture}",
    )
    if settings.json:
        document = {
            "directory": settings.out,
            "settings": grid.as_dict(),
            "fronts": [_front_as_dict(front) for front in found],
            "results": [
                {name: value for name, value in result.as_dict().items() if name != "series"} for result in results
            ],
        }
        write_json(document, settings.json, force=settings.force)


def print_fronts(found: Sequence[Front], stream: TextIO | None) -> None:
    """A table for each mode and workload: the settings that no other beats, from the smallest footprint up."""
    if stream is None:
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(file=stream, width=None if stream.isatty() else 120, highlight=False)
    for front in found:
        work = "time for the work, s" if front.is_job else "page operations/s"
        table = Table(box=None, pad_edge=False, title_justify="left")
        table.title = (
            f"{front.workload}, {front.mode}: {len(front.best)} of {len(front.points)} settings are not beaten"
        )
        table.add_column("")
        table.add_column("settings", overflow="fold")
        for heading in ("GiB·min", work):
            table.add_column(heading, justify="right", no_wrap=True)
        for point in front.best[:_MOST_ROWS]:
            figures = [_figure(summary) for summary in (point.footprint, point.work)]
            table.add_row("knee" if point is front.knee else "", point.name, *figures)
        console.print(table, markup=False)
        if len(front.best) > _MOST_ROWS:
            console.print(f"and {len(front.best) - _MOST_ROWS} more", markup=False)
        console.print()


def _figure(summary: Summary) -> str:
    """The median, with the spread where there is more than one run."""
    from lab.experiment.table import number, plus_minus

    if summary.median is None:
        return ""
    return number(summary.median) if summary.n < 2 else plus_minus(summary.median, summary.spread)


def _front_as_dict(front: Front) -> dict[str, Any]:
    """Plain dictionary for JSON."""
    return {
        "mode": front.mode,
        "workload": front.workload,
        "configurations": len(front.points),
        "best": [
            {
                "name": point.name,
                "gib_min": point.footprint.median,
                "job_s" if front.is_job else "page_ops_per_s": point.work.median,
                "knee": point is front.knee,
            }
            for point in front.best
        ],
    }


def _title(grid: Grid) -> str:
    return f"Footprint against {'time' if grid.fixed.get('work_pages') else 'throughput'}, {len(grid)} runs"


def _describe(spec: RunSpec) -> str:
    """A run in a message: what differs from the defaults, and the key of its files."""
    changed = [
        f"{name}={value}"
        for name, value in spec.as_dict().items()
        if value != getattr(RunSpec(), name) or name == "seed"
    ]
    return f"run {spec.key()} ({spec.workload}, {spec.policy}, {', '.join(changed)})"


def _made_with(record: dict[str, Any]) -> str:
    commit = record.get("commit")
    return f"version {record['version']}" + (f" at {commit[:12]}{'+' * commit.endswith('+')}" if commit else "")


def _say(stream: TextIO | None, text: str) -> None:
    if stream is not None:
        print(text, file=stream, flush=True)
