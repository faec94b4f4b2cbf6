"""A report as files: the page last, so that it is there only when all that it speaks of is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from matplotlib.figure import Figure

from common.errors import MachineError, UsageError
from common.output import check_output, write_bytes
from lab.experiment.comparison import Row, Sample
from lab.experiment.spec import Mode
from lab.report.findings import findings, headline
from lab.report.front import fronts
from lab.report.load import Experiment
from lab.report.page import Picture, render_page
from lab.report.plots import MOST_LINES, footprint_figure, latency_figure, pareto_figure, returned_figure
from lab.report.style import figure_bytes
from lab.report.tables import comparison_tables, markdown, runs_csv, summary_csv

__all__ = ["PAGE", "write_report"]

PAGE = "index.html"
_SUMMARY, _RUNS, _TABLES = "summary.csv", "runs.csv", "tables.md"


def write_report(experiment: Experiment, folder: str, *, force: bool) -> list[str]:
    """Write all files of the report into ``folder``, which is made if need be; their paths, the page last.

    The same directory gives the same files, to the byte, with the same versions of the drawing libraries.

    Raises:
        UsageError: the folder holds files of those names and ``force`` is not given, or it cannot be one.
        MachineError: a file could not be written; those before it are whole.
    """
    _make_folder(folder)
    for name in (_SUMMARY, _RUNS, _TABLES, PAGE):  # before the pictures, which take a while
        check_output(os.path.join(folder, name), force=force)
    tables = comparison_tables(experiment.comparison)
    pictures = list(_pictures(experiment))
    files = {
        _SUMMARY: summary_csv(experiment.comparison).encode(),
        _RUNS: runs_csv(experiment.samples).encode(),
        _TABLES: markdown(headline(experiment), findings(experiment), tables, experiment.comparison.notes()).encode(),
    }
    for picture in pictures:
        files |= {f"{picture.name}.png": picture.png, f"{picture.name}.svg": picture.svg}
    files[PAGE] = render_page(experiment, tables, pictures).encode()
    paths = {os.path.join(folder, name): data for name, data in files.items()}
    for path in paths:
        check_output(path, force=force)  # all of them before the first is written
    for path, data in paths.items():
        write_bytes(data, path, force=force)
    return list(paths)


def _make_folder(folder: str) -> None:
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise UsageError(f"{folder}: exists and is no folder; name another path")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{folder}: {error.strerror}; name another path with --out") from error


def _pictures(experiment: Experiment) -> Iterator[Picture]:
    """Four a mode, as far as there is something to draw."""
    modes: tuple[tuple[Mode, str], ...] = (("live", "live"), ("virtual", "virtual time"))
    for mode, words in modes:
        samples = [sample for sample in experiment.samples if sample.result.spec.mode == mode]
        if not samples:
            continue
        names = _drawn(samples)
        shown = [sample for sample in samples if sample.name in names]
        rows = [row for row in experiment.comparison.rows if row.mode == mode and row.name in names]
        count = len({sample.name for sample in samples})
        which = f" {len(names)} of {count} settings are drawn." if len(names) < count else ""
        yield from _of_mode(mode, words, which, samples, shown, rows)


def _of_mode(
    mode: Mode, words: str, which: str, samples: Sequence[Sample], shown: Sequence[Sample], rows: Sequence[Row]
) -> Iterator[Picture]:
    if any(len(sample.result.series["t_s"]) for sample in shown):
        title = f"Footprint over time, {words}"
        text = (
            "Resident memory: the line is the median of the runs, the band goes from the least to the most, "
            f"as far as all runs of a policy go.{which}"
        )
        yield _picture(f"footprint-{mode}", title, text, lambda title: footprint_figure(shown, title=title))
    yield _picture(
        f"pareto-{mode}",
        f"Footprint against throughput, {words}",
        "A point is the median of the runs of one policy and its settings, with half the interquartile range. "
        "The line joins what no other beats in both; a ring marks its knee, if it has one.",
        lambda title: pareto_figure([sample.result for sample in samples], title=title),
    )
    yield _picture(
        f"returned-{mode}",
        f"Time to give back, {words}",
        f"From the moment when the guest is idle until so much of what was free is given back.{which}",
        lambda title: returned_figure(rows, title=title),
    )
    yield _picture(
        f"latency-{mode}",
        f"Lock and allocation, {words}",
        f"How long the zone lock was held for a pull or a put-back, and how long allocations took meanwhile.{which}",
        lambda title: latency_figure(rows, title=title),
    )


def _picture(name: str, title: str, text: str, draw: Callable[[str], Figure]) -> Picture:
    # Drawn twice: saving moves what the layout has placed, so a second save of one figure is not the first.
    png, svg = (figure_bytes(draw(title), suffix) for suffix in ("png", "svg"))
    return Picture(name, title, text, png, svg)


def _drawn(samples: Sequence[Sample]) -> list[str]:
    """Names that get a line: all of a few; of many no reporting, knees and ends of the fronts, then their middles."""
    names = list(dict.fromkeys(sample.name for sample in samples))
    if len(names) <= MOST_LINES:
        return names
    found = fronts([sample.result for sample in samples])
    wanted = [sample.name for sample in samples if sample.result.spec.policy == "off"]
    wanted += [front.knee.name for front in found if front.knee is not None]
    wanted += [front.best[end].name for front in found if front.best for end in (0, -1)]
    wanted += [point.name for front in found for point in front.best]
    chosen = list(dict.fromkeys(name for name in wanted if name in names))[:MOST_LINES]
    return [name for name in names if name in chosen]
