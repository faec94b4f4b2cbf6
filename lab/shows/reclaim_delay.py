"""Is there one setting that reclaims as fast as a delay of 250 ms at the refaults of 2 s?

The case of a fleet (vm0, issue 34723): with a delay of 2 s six guests that free 2 GiB each took ten seconds to fall
below 1.5 GiB, with 250 ms one second; but a guest that goes through 512 MiB again and again then ran 23 cycles instead
of 38. Both halves in virtual time, and every existing policy's settings tried; a third guest churns 1 GiB, to see how
far an answer carries. A turn of the churn pauses for 0.4 s, as theirs did: longer than the fast delay, shorter than the
slow one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

from lab.experiment.metrics import RunResult
from lab.experiment.spec import RunSpec
from lab.shows.base import Context, Presentation, Table, summary, value_text

__all__ = ["ReclaimDelay"]

_MS = 1_000_000
_S = 1000 * _MS
_GIB = 1 << 30
_MEMORY = 3 * _GIB
_SLOW, _FAST = "rotate, 2 s", "rotate, 250 ms"
_CASES = ("free 2 GiB", "churn 512 MiB", "churn 1 GiB")
_TOLERANCE = 0.05
_NAMED = 4  # settings that a sentence names
_COLOURS = {
    "rotate": "#0072B2",
    "boundary": "#D55E00",
    "skip-walk": "#009E73",
    "hold": "#CC79A7",
    "bitmap": "#E69F00",
}


class ReclaimDelay:
    """See the module."""

    name = "reclaim-delay"
    title = "Fast reclaim without refaults"
    question = "Does one setting of an existing policy give the time to reclaim of 250 ms at the refaults of 2 s?"
    live = False
    rounds = 3

    def answer(self, context: Context) -> Presentation:
        """Virtual runs of every setting in all three cases, a seed a round."""
        specs = [
            spec.but(seed=number + 1)
            for number in range(context.rounds)
            for setting in _settings()
            for spec in _cases(setting)
        ]
        return _present(context.run(specs))


def _settings() -> list[RunSpec]:
    """Every setting that is tried; labels name them."""
    base = RunSpec(memory=_MEMORY, vcpus=1, cores=2)
    found = []
    for delay in (2000, 1000, 500, 250):
        for capacity in (32, 512):
            label = f"rotate, {_delay_text(delay)}" + ("" if capacity == 32 else f", batch {capacity}")
            found.append(base.but(policy="rotate", delay_ns=delay * _MS, capacity=capacity, label=label))
    for policy, marks in (("boundary", (32, 96, 160, 224, 448)), ("skip-walk", (32, 160))):
        found += [
            base.but(
                policy=policy,
                delay_ns=delay * _MS,
                high_water_mark=mark,
                label=f"{policy}, {_delay_text(delay)}, mark {mark}",
            )
            for delay in (1000, 250, 100)
            for mark in marks
        ]
    found += [
        base.but(policy="hold", delay_ns=delay * _MS, label=f"hold, {_delay_text(delay)}") for delay in (2000, 250)
    ]
    return [*found, base.but(policy="bitmap", label="bitmap")]


def _delay_text(milliseconds: int) -> str:
    return f"{milliseconds // 1000} s" if milliseconds % 1000 == 0 else f"{milliseconds} ms"


def _cases(setting: RunSpec) -> list[RunSpec]:
    def share(bytes_used: int) -> float:
        return bytes_used / _MEMORY

    churn = setting.but(hold_ns=50 * _MS, idle_ns=400 * _MS, duration_ns=35 * _S)
    return [
        setting.but(fill=share(2 * _GIB), hold_ns=_S, idle_ns=40 * _S, duration_ns=42 * _S),
        churn.but(fill=share(_GIB // 2)),
        churn.but(fill=share(_GIB)),
    ]


def _case(spec: RunSpec) -> str:
    if spec.idle_ns > 10 * _S:
        return _CASES[0]
    return _CASES[1] if spec.fill < 0.25 else _CASES[2]


def _present(results: Sequence[RunResult]) -> Presentation:
    found: dict[str, dict[str, list[RunResult]]] = {}
    for result in results:
        found.setdefault(result.spec.name, {}).setdefault(_case(result.spec), []).append(result)

    def values(label: str, case: str, metric: str) -> list[float | None]:
        return [result.metrics[metric] for result in found[label][case]]

    def middle(label: str, case: str, metric: str) -> float:
        return (summary(values(label, case, metric)) or (float("inf"), 0.0))[0]

    time_goal = middle(_FAST, _CASES[0], "t90_s") * (1 + _TOLERANCE)
    fault_goal = middle(_SLOW, _CASES[1], "refaults") * (1 + _TOLERANCE)
    both = [
        label
        for label in found
        if middle(label, _CASES[0], "t90_s") <= time_goal and middle(label, _CASES[1], "refaults") <= fault_goal
    ]
    hard_goal = middle(_SLOW, _CASES[2], "refaults") * (1 + _TOLERANCE)
    carrying = [label for label in both if middle(label, _CASES[2], "refaults") <= hard_goal]
    order = sorted(found, key=lambda label: (label not in both, middle(label, _CASES[0], "t90_s")))
    rows = tuple(
        (
            f"**{label}**" if label in both else label,
            value_text(values(label, _CASES[0], "t90_s"), 1, 2),
            value_text(values(label, _CASES[0], "t99_s"), 1, 2),
            value_text(values(label, _CASES[1], "refaults"), 1e-3, 0),
            value_text(values(label, _CASES[1], "page_ops_per_s"), 1e-6, 2),
            value_text(values(label, _CASES[2], "refaults"), 1e-3, 0),
        )
        for label in order
    )
    table = Table(
        "Time to reclaim 2 GiB, and what churning costs; bold: both goals are met",
        (
            "setting",
            "90 % back after, s",
            "99 % back after, s",
            "refaults, churn 512 MiB, thousands",
            "page operations a second, millions",
            "refaults, churn 1 GiB, thousands",
        ),
        rows,
        f"Goals, with {_TOLERANCE:.0%} of tolerance: the time of *{_FAST}* and the refaults of *{_SLOW}*. Mark: the "
        "high-water mark, in unreported free blocks of one order.",
    )
    goals = f"({time_goal:.2f} s and {fault_goal / 1e3:.0f} thousand refaults)"
    answer = f"{len(both)} of {len(found)} settings meet both goals {goals}{_some(order, both)}."
    reach = f"With 1 GiB of churn {len(carrying)} of them still keep the refaults of {_SLOW}{_some(order, carrying)}."
    slow_s, fast_s = (middle(label, _CASES[0], "t90_s") for label in (_SLOW, _FAST))
    fast_faults = middle(_FAST, _CASES[1], "refaults")
    reference = (
        f"{_SLOW} gives 90 % back after {slow_s:.1f} s, {_FAST} after {fast_s:.1f} s at {fast_faults / 1e3:.0f} "
        "thousand refaults; "
        "reported by the fleet: 10.1 to 10.3 s and 1.2 to 1.3 s to fall below 1.5 GiB."
    )
    points = {label: (middle(label, _CASES[0], "t90_s"), middle(label, _CASES[1], "refaults")) for label in found}
    policies = {label: found[label][_CASES[0]][0].spec.policy for label in found}
    figure = _figure(points, policies, (time_goal, fault_goal), both)
    return Presentation(
        (reference, answer, reach), (table,), figure, {"points": points, "both": both, "carrying": carrying}
    )


def _some(order: Sequence[str], labels: Sequence[str]) -> str:
    """The first few of ``labels`` in ``order``, in words."""
    chosen = [label for label in order if label in labels]
    if not chosen:
        return ""
    more = f" and {len(chosen) - _NAMED} more" if len(chosen) > _NAMED else ""
    return f": {'; '.join(chosen[:_NAMED])}{more}"


def _figure(
    points: dict[str, tuple[float, float]], policies: dict[str, str], goal: tuple[float, float], both: Sequence[str]
) -> Figure:
    figure = Figure(figsize=(10.0, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    for policy, colour in _COLOURS.items():
        labels = [label for label in points if policies[label] == policy]
        for label in labels:
            time_s, refaults = points[label]
            axes.scatter(
                time_s,
                refaults / 1e3,
                s=80 if label in both else 40,
                color=colour,
                edgecolors="black" if label in both else colour,
                zorder=3,
            )
        axes.scatter([], [], color=colour, label=policy)
    axes.axvline(goal[0], color="#444444", linestyle="--", linewidth=0.8)
    axes.axhline(goal[1] / 1e3, color="#444444", linestyle="--", linewidth=0.8)
    for label in (_SLOW, _FAST):
        time_s, refaults = points[label]
        axes.annotate(label, (time_s, refaults / 1e3), textcoords="offset points", xytext=(6, 6), fontsize=9)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2, 5, 10, 20, 40]))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("90 % of 2 GiB given back after, s (left is better)")
    axes.set_ylabel("refaults in 35 s of churning 512 MiB, thousands (down is better)")
    axes.legend(title="goals dashed\nblack edge: both met", fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes.grid(alpha=0.3)
    return figure
