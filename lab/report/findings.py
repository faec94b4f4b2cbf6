"""What an experiment found, in sentences. Each is read off the figures; nothing here judges but by the tests made."""

from __future__ import annotations

from collections.abc import Sequence

from lab.experiment.comparison import CLOSE_PERCENT, COMPARED, TESTED, THROUGHPUT, Comparison, Row
from lab.experiment.metrics import RunResult
from lab.experiment.spec import Mode
from lab.experiment.table import mark, number
from lab.report.front import Front, fronts
from lab.report.load import Experiment

__all__ = ["findings", "headline", "what_was_run"]


def headline(experiment: Experiment) -> str:
    """A title: what was compared."""
    names = list(dict.fromkeys(sample.result.spec.policy for sample in experiment.samples))
    if experiment.kind == "sweep":
        count = len({sample.name for sample in experiment.samples})
        return f"{count} settings of {_listed(names)}, side by side"
    names = list(dict.fromkeys(sample.name for sample in experiment.samples))
    return f"{_listed(names)}, side by side"


def what_was_run(experiment: Experiment) -> str:
    """How many runs of what, in one sentence."""
    results = [sample.result for sample in experiment.samples]
    workloads = list(dict.fromkeys(result.spec.workload for result in results))
    counts = [
        f"{sum(result.spec.mode == mode for result in results)} {words}"
        for mode, words in (("live", "with real processes"), ("virtual", "in virtual time"))
        if any(result.spec.mode == mode for result in results)
    ]
    return f"{len(results)} runs of {_listed(workloads)}: {_listed(counts)}, on {_machine(experiment)}."


def findings(experiment: Experiment) -> list[str]:
    """One sentence or two a mode and workload, then how far virtual time is from live."""
    comparison = experiment.comparison
    if experiment.kind == "sweep":
        told = [_of_front(front) for front in fronts([sample.result for sample in experiment.samples])]
    else:
        told = [_of_block(mode, workload, rows, comparison) for mode, workload, rows in comparison.blocks()]
    return [*told, *_of_distances(comparison), *_of_failures([sample.result for sample in experiment.samples])]


def _machine(experiment: Experiment) -> str:
    environment = experiment.record.get("environment", {})
    return f"{environment.get('cores_usable', '?')} processors ({environment.get('cpu_model') or 'of unknown model'})"


def _of_front(front: Front) -> str:
    where = f"{front.workload}, {_mode(front.mode)}"
    if not front.best:
        return f"{where}: no run has both a footprint and a throughput."
    smallest = front.best[0]
    fastest = front.best[-1]
    unit = "s for the work" if front.is_job else "page operations a second"
    text = (
        f"{where}: of {len(front.points)} settings no other beats {len(front.best)} in both footprint and throughput. "
        f"The smallest footprint has {smallest.name} ({number(smallest.x)} GiB·min, {number(smallest.y)} {unit}), "
        f"the highest throughput {fastest.name} ({number(fastest.x)} GiB·min, {number(fastest.y)} {unit})."
    )
    if front.knee is None:
        return f"{text} The line between has no knee."
    return f"{text} The knee is {front.knee.name} ({number(front.knee.x)} GiB·min, {number(front.knee.y)} {unit})."


def _of_block(mode: Mode, workload: str, rows: Sequence[Row], comparison: Comparison) -> str:
    """Footprint and throughput of each policy against none, then what the tests tell apart."""
    where = f"{workload}, {_mode(mode)}"
    base = next((row for row in rows if row.spec.policy == "off" and _is_whole(row)), None)
    parts = [_against(row, base) for row in rows if base is not None and row is not base]
    told = f"against {base.name}, " + "; ".join(parts) if base is not None and any(parts) else "see the table"
    reference = next((row for row in rows if row.name == comparison.first), None)
    rivals = [row for row in rows if row is not reference and row.spec.policy != "off"]
    differences = [words for row in rivals if reference is not None and (words := _differs(row, reference))]
    text = f"{where}: {told}."
    if differences:
        return f"{text} By the rank test, compared with {comparison.first}: {'; '.join(differences)}."
    return text


def _is_whole(row: Row) -> bool:
    return row.figures[THROUGHPUT.name].summary.median == 100


def _against(row: Row, base: Row) -> str:
    """``boundary has 43 % less footprint at 97 % of the throughput and gives 90 % back in 0.6 s``."""
    ours, theirs = (one.figures["gib_min"].summary.median for one in (row, base))
    ratio = row.figures[THROUGHPUT.name].summary.median
    parts = []
    if ours is not None and theirs:
        change = 100 * (ours - theirs) / theirs
        parts.append(f"{number(round(abs(change), 1))} % {'less' if change < 0 else 'more'} footprint")
    if ratio is not None:
        parts.append(f"{number(round(ratio, 1))} % of the throughput")
    t90_s = row.figures["t90_s"].summary.median
    if t90_s is not None:
        parts.append(f"90 % given back after {number(t90_s)} s")
    return f"{row.name} has {_listed(parts)}" if parts else f"{row.name} has no figures"


def _differs(row: Row, reference: Row) -> str:
    """``hint is better in a, b and worse in c``; empty where no test tells them apart."""
    better, worse = (
        [
            COMPARED[name].title
            for name in TESTED
            if mark(row.figures[name], reference.figures[name], COMPARED[name]) == sign
        ]
        for sign in "+-"
    )
    parts = [f"{word} in {_listed(names)}" for word, names in (("better", better), ("worse", worse)) if names]
    return f"{row.name} is {', and '.join(parts)}" if parts else ""


def _of_distances(comparison: Comparison) -> list[str]:
    distances = comparison.distances
    if not distances:
        return []
    far = [one for one in distances if one.is_far]
    if not far:
        return [f"Virtual time is within {CLOSE_PERCENT:g} % of live in all {len(distances)} figures compared."]
    told = [
        f"{COMPARED[one.metric].title} of {one.policy} on {one.workload} "
        f"({'one of the two has none' if one.percent is None else f'{one.percent:+.0f} %'})"
        for one in far
    ]
    share = f"{len(far)} of {len(distances)} figures"
    return [f"Virtual time is beyond {CLOSE_PERCENT:g} % of live in {share}: {_listed(told)}."]


def _of_failures(results: Sequence[RunResult]) -> list[str]:
    """Violations and failed allocations, which are no finding about policies but a reason to doubt."""
    told = []
    for name in ("violations", "failed_allocations"):
        found = sum(result.metrics.get(name) or 0 for result in results)
        if found:
            runs = sum(bool(result.metrics.get(name)) for result in results)
            told.append(f"{number(found)} {COMPARED[name].title} in {runs} of {len(results)} runs.")
    return told


def _mode(mode: Mode) -> str:
    return "live" if mode == "live" else "virtual time"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else "nothing"
