"""What a comparison found: figures of each policy and workload, tests against the first, and virtual time against live.

Terminal, JSON and report all read the ``Comparison`` that ``compare_results`` makes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lab.experiment.metrics import METRICS, Metric, RunResult
from lab.experiment.spec import Mode, RunSpec
from lab.experiment.statistics import SIGNIFICANT, Summary, rank_test, smallest_p, summarize

__all__ = [
    "CLOSE_PERCENT",
    "COMPARED",
    "TESTED",
    "THROUGHPUT",
    "VIRTUAL_AGAINST_LIVE",
    "Comparison",
    "Distance",
    "Figure",
    "Row",
    "Sample",
    "compare_results",
    "throughput",
]

THROUGHPUT = Metric("throughput_vs_off", "throughput against off", "%", 1)  # paired by round and seed
COMPARED = {THROUGHPUT.name: THROUGHPUT, **METRICS}

# What a table of a comparison has, in its order. All of ``COMPARED`` is in the JSON, these alone are tested.
TESTED = (
    THROUGHPUT.name,
    "gib_min",
    "t50_s",
    "t90_s",
    "t99_s",
    "refaults",
    "stayed_bytes",
    "zeroing_skipped_pages",
    "reports",
    "duplicates",
    "hold_p50_ns",
    "hold_p99_ns",
    "hold_max_ns",
    "nodes_hold_max",
    "alloc_p50_ns",
    "alloc_p99_ns",
    "alloc_p999_ns",
    "guest_cpu_s",
    "host_cpu_s",
)
VIRTUAL_AGAINST_LIVE = (THROUGHPUT.name, "gib_min", "t90_s")
CLOSE_PERCENT = 10.0  # so near virtual time is to be to live

_CENSORED = {"t50_s", "t90_s", "t99_s"}  # None: not reached, so later than all that were
# Settings that make the same work on the same machine: only such runs have a ratio of throughputs.
_SAME_WORK = (
    "mode workload memory vcpus cores work_order fill hold_ns idle_ns duration_ns work_pages backend seed".split()  # noqa: SIM905  names
)


@dataclass(frozen=True)
class Sample:
    """One result under the name that tables give its policy and settings."""

    name: str
    result: RunResult
    repeat: int


@dataclass(frozen=True)
class Figure:
    """One figure of a policy on a workload. ``p``: of the rank test against the first policy; None if not tested."""

    summary: Summary
    p: float | None


@dataclass(frozen=True)
class Row:
    """One policy on one workload. ``figures``: by name, those of ``COMPARED``; ``spec``: that of its first run."""

    mode: Mode
    workload: str
    name: str
    spec: RunSpec
    figures: dict[str, Figure]

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return {
            "mode": self.mode,
            "policy": self.name,
            "workload": self.workload,
            "spec": self.spec.as_dict(),
            "metrics": {
                name: {
                    "median": figure.summary.median,
                    "spread": figure.summary.spread,
                    "values": list(figure.summary.values),
                    "p": figure.p,
                }
                for name, figure in self.figures.items()
            },
        }


@dataclass(frozen=True)
class Distance:
    """How far virtual time is from live in one figure; medians, in the figure's unit.

    Attributes:
        percent: of the live figure, positive when virtual time says more; None when one of the two has no figure, or
            the live one is 0 and the other not.
    """

    policy: str
    workload: str
    metric: str
    live: float | None
    virtual: float | None
    percent: float | None

    @property
    def is_far(self) -> bool:
        """Beyond ``CLOSE_PERCENT``, or told by one of the two alone."""
        if self.percent is None:
            return not (self.live is None and self.virtual is None)
        return abs(self.percent) > CLOSE_PERCENT

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return {
            "policy": self.policy,
            "workload": self.workload,
            "metric": self.metric,
            "live": self.live,
            "virtual": self.virtual,
            "percent": self.percent,
            "beyond_10_percent": self.is_far,
        }


@dataclass(frozen=True)
class Comparison:
    """All rows, by mode, workload and policy in the order of the runs.

    Attributes:
        first: the policy that the others were tested against.
        tests: how many tests were made. Nothing is corrected for their number.
    """

    first: str
    rows: tuple[Row, ...]
    distances: tuple[Distance, ...]
    tests: int

    def blocks(self) -> Iterable[tuple[Mode, str, list[Row]]]:
        """Rows that stand side by side: those of one mode and workload."""
        blocks: dict[tuple[Mode, str], list[Row]] = {}
        for row in self.rows:
            blocks.setdefault((row.mode, row.workload), []).append(row)
        for (mode, workload), rows in blocks.items():
            yield mode, workload, rows

    def notes(self) -> list[str]:
        """What a reader of the tables has to know, in sentences."""
        sizes = sorted({len(row.figures[THROUGHPUT.name].summary.values) for row in self.rows})
        repeats = " to ".join(str(size) for size in dict.fromkeys((sizes[0], sizes[-1]))) if sizes else "0"
        notes = [
            f"Each figure is the median of {repeats} run{'s' * (repeats != '1')} ± half the interquartile range.",
        ]
        if not self.tests:
            notes.append("No rank test was made.")
        else:
            notes.append(
                f"p: two-sided rank test (Mann-Whitney) against {self.first}; + better, - worse, ~ other, where p is "
                f"below {SIGNIFICANT:g}. Throughput is tested as measured, not as a ratio."
            )
            notes.append(
                f"{self.tests} tests were made and p is not corrected for their number: chance alone puts about "
                f"{self.tests * SIGNIFICANT:.0f} of them below {SIGNIFICANT:g}."
            )
            least = smallest_p(sizes[-1], sizes[-1])
            if least >= SIGNIFICANT:
                notes.append(
                    f"Too few runs to tell: with {sizes[-1]} against {sizes[-1]} the smallest p that can come out is "
                    f"{least:.2g}; --repeat 4 is the least that can go below {SIGNIFICANT:g}."
                )
        if any(row.mode == "virtual" for row in self.rows):
            notes.append("Repeats in virtual time differ by their seed and by nothing else.")
        return notes + [f"{row.mode}, {row.workload}, {row.name}: {words}" for row in self.rows for words in _bad(row)]


def throughput(result: RunResult) -> float | None:
    """Page operations a second; for a job what its length comes to."""
    job_s = result.metrics.get("job_s")
    if result.spec.work_pages and job_s:
        return result.spec.work_pages / job_s
    return result.metrics.get("page_ops_per_s")


def compare_results(samples: Sequence[Sample], *, first: str, base: str | None, tested: bool = True) -> Comparison:
    """The comparison that ``samples`` make.

    Args:
        first: the name of the policy that the others are tested against.
        base: the name of the policy whose throughput is 100 %; None: any run without reporting on the same work.
        tested: whether to make tests at all.
    """
    ratios = _ratios(samples, base)
    groups: dict[tuple[Mode, str], dict[str, list[Sample]]] = {}
    for sample in samples:
        spec = sample.result.spec
        groups.setdefault((spec.mode, spec.workload), {}).setdefault(sample.name, []).append(sample)
    rows = []
    tests = 0
    for (mode, workload), by_name in groups.items():
        values = {
            name: {metric: _values(metric, group, ratios) for metric in COMPARED} for name, group in by_name.items()
        }
        for name, group in by_name.items():
            figures = {}
            for metric in COMPARED:
                p = None
                if tested and metric in TESTED and name != first and first in by_name:
                    ours, theirs = (
                        [throughput(sample.result) for sample in side] if metric == THROUGHPUT.name else side_values
                        for side, side_values in (
                            (by_name[first], values[first][metric]),
                            (group, values[name][metric]),
                        )
                    )
                    p = rank_test(ours, theirs, censored=metric in _CENSORED)
                tests += p is not None
                figures[metric] = Figure(summarize(values[name][metric], censored=metric in _CENSORED), p)
            rows.append(Row(mode, workload, name, group[0].result.spec, figures))
    return Comparison(first, tuple(rows), tuple(_distances(rows)), tests)


def _ratios(samples: Sequence[Sample], base: str | None) -> dict[int, float | None]:
    """Throughput in percent of the base's in the same round, by the identity of the result."""

    def same_work(sample: Sample) -> tuple[Any, ...]:
        return (sample.repeat, *(getattr(sample.result.spec, name) for name in _SAME_WORK))

    bases: dict[tuple[Any, ...], float | None] = {}
    for sample in samples:
        if sample.name == base if base is not None else sample.result.spec.policy == "off":
            bases.setdefault(same_work(sample), throughput(sample.result))
    ratios: dict[int, float | None] = {}
    for sample in samples:
        ours, theirs = throughput(sample.result), bases.get(same_work(sample))
        ratios[id(sample.result)] = None if ours is None or not theirs else 100 * (ours / theirs)
    return ratios


def _values(metric: str, group: Sequence[Sample], ratios: dict[int, float | None]) -> list[float | None]:
    if metric == THROUGHPUT.name:
        return [ratios[id(sample.result)] for sample in group]
    return [sample.result.metrics.get(metric) for sample in group]


def _distances(rows: Sequence[Row]) -> Iterable[Distance]:
    live = {(row.workload, row.name): row for row in rows if row.mode == "live"}
    for row in rows:
        twin = live.get((row.workload, row.name))
        if row.mode != "virtual" or twin is None:
            continue
        for metric in VIRTUAL_AGAINST_LIVE:
            real, virtual = twin.figures[metric].summary.median, row.figures[metric].summary.median
            yield Distance(row.name, row.workload, metric, real, virtual, _percent(real, virtual))


def _percent(live: float | None, virtual: float | None) -> float | None:
    if live is None or virtual is None:
        return None
    if not live:
        return None if virtual else 0.0
    return 100 * (virtual - live) / live


def _bad(row: Row) -> Iterable[str]:
    for metric in ("violations", "failed_allocations"):
        total = sum(value or 0 for value in row.figures[metric].summary.values)
        if total:
            yield f"{total:g} {METRICS[metric].title} in {row.figures[metric].summary.n} runs"
