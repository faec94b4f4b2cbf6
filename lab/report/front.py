"""Footprint against throughput: which settings no other beats in both, and where the bend is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lab.experiment.comparison import throughput
from lab.experiment.metrics import RunResult
from lab.experiment.pareto import front, knee
from lab.experiment.spec import Mode, RunSpec
from lab.experiment.statistics import Summary, summarize
from lab.report.load import name_results

__all__ = ["Front", "Point", "fronts"]


@dataclass(frozen=True)
class Point:
    """One configuration: the medians over its seeds and repeats.

    Attributes:
        footprint: GiB·min, less is better.
        work: page operations a second, more is better; of a job its length in s, less is better.
    """

    name: str
    spec: RunSpec
    footprint: Summary
    work: Summary

    @property
    def x(self) -> float:
        """Median footprint, GiB·min."""
        assert self.footprint.median is not None
        return self.footprint.median

    @property
    def y(self) -> float:
        """Median of ``work``."""
        assert self.work.median is not None
        return self.work.median


@dataclass(frozen=True)
class Front:
    """All configurations of one mode and workload.

    Attributes:
        is_job: whether ``Point.work`` is the time to do the work.
        best: those that none beats, from the smallest footprint up.
        knee: the one of ``best`` farthest beyond the straight line between its ends, both axes scaled to the front;
            None when there are fewer than three or none is beyond it.
    """

    mode: Mode
    workload: str
    is_job: bool
    points: tuple[Point, ...]
    best: tuple[Point, ...]
    knee: Point | None


def fronts(results: Sequence[RunResult]) -> list[Front]:
    """One front a mode and workload, in the order of ``results``. Runs without both figures are left out."""
    names = name_results(results)
    blocks: dict[tuple[Mode, str], dict[str, list[RunResult]]] = {}
    for name, result in zip(names, results, strict=True):
        blocks.setdefault((result.spec.mode, result.spec.workload), {}).setdefault(name, []).append(result)
    found = []
    for (mode, workload), by_name in blocks.items():
        group = [result for side in by_name.values() for result in side]
        is_job = all(result.spec.work_pages and result.metrics.get("job_s") for result in group)
        points = [point for name, side in by_name.items() if (point := _point(name, side, is_job=is_job))]
        table = np.array([(point.x, point.y) for point in points]).reshape(-1, 2)
        better = (-1, -1 if is_job else 1)
        on_front = front(table, better)
        best = [point for point, is_on in zip(points, on_front, strict=True) if is_on]
        best.sort(key=lambda point: (point.x, point.name))
        bend = knee(table, better)
        found.append(Front(mode, workload, is_job, tuple(points), tuple(best), None if bend is None else points[bend]))
    return found


def _point(name: str, results: Sequence[RunResult], *, is_job: bool) -> Point | None:
    footprint = summarize([result.metrics.get("gib_min") for result in results])
    work = summarize([result.metrics.get("job_s") if is_job else throughput(result) for result in results])
    if footprint.median is None or work.median is None:
        return None
    return Point(name, results[0].spec, footprint, work)
