"""The one published sweep of free page reporting's settings, again: order, delay and batch size under a build.

Theirs: a clang build, 12 vCPUs, 16 GiB guest, six runs a setting (HyperAlloc's paper, EuroSys'25). Ours: a job of the
same character in virtual time, scaled down: processes of mixed small orders that come and go, a fixed amount of work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lab.experiment.metrics import RunResult
from lab.experiment.spec import RunSpec
from lab.shows.base import Context, Presentation, Table, summary, value_text

__all__ = ["PublishedSweep"]

_MS = 1_000_000
_SETTINGS = tuple((order, delay, capacity) for order in (9, 0) for delay in (2000, 100) for capacity in (32, 512))
# Build minutes, GiB·min during the build, GiB·min of the whole run, host system CPU seconds; order 9's default batch
# and delay first (reference: peers, "Reclaim").
_PUBLISHED: dict[tuple[int, int, int] | None, tuple[float, float, float, float]] = {
    None: (41.2, 478.0, 637.0, 365.0),
    (9, 2000, 32): (41.2, 434.5, 545.7, 407.0),
    (9, 2000, 512): (41.2, 431.0, 541.0, 361.0),
    (9, 100, 32): (41.2, 438.0, 550.0, 389.0),
    (9, 100, 512): (41.1, 435.0, 545.0, 376.0),
    (0, 2000, 32): (48.6, 390.0, 420.0, 3463.0),
    (0, 2000, 512): (48.8, 379.0, 408.0, 3413.0),
    (0, 100, 32): (61.1, 449.0, 480.0, 7702.0),
    (0, 100, 512): (61.1, 442.0, 471.0, 7113.0),
}
_Key = tuple[int, int, int] | None


class PublishedSweep:
    """See the module."""

    name = "published-sweep"
    title = "The published sweep, again"
    question = "Do order, delay and batch size rank as in the one published sweep of them?"
    live = False
    rounds = 3

    def answer(self, context: Context) -> Presentation:
        """Virtual runs of ``rotate``, a seed a round."""
        specs = [
            spec.but(seed=number + 1)
            for number in range(context.rounds)
            for spec in [_spec(None), *(_spec(setting) for setting in _SETTINGS)]
        ]
        return _present(context.run(specs))


def _spec(setting: _Key) -> RunSpec:
    base = RunSpec(
        policy="off",
        workload="build",
        memory=4 << 30,
        vcpus=6,
        cores=8,
        fill=0.9,
        work_order=0,
        hold_ns=_MS,
        work_pages=200_000_000,
        duration_ns=3600 * 1000 * _MS,
        label="off",
    )
    if setting is None:
        return base
    order, delay, capacity = setting
    return base.but(
        policy="rotate",
        min_order=order,
        delay_ns=delay * _MS,
        capacity=capacity,
        label=f"order {order}, {delay} ms, batch {capacity}",
    )


def _key(spec: RunSpec) -> _Key:
    if spec.policy == "off":
        return None
    return spec.min_order, (spec.delay_ns or 0) // _MS, spec.capacity or 0


def _present(results: Sequence[RunResult]) -> Presentation:
    names = ("job_s", "gib_min", "host_cpu_s", "refaults", "reports")
    found: dict[_Key, dict[str, list[float | None]]] = {}
    for result in results:
        row = found.setdefault(_key(result.spec), {name: [] for name in names})
        for name in names:
            row[name].append(result.metrics[name])
    middle = {
        key: {name: (summary(values) or (0.0, 0.0))[0] for name, values in row.items()} for key, row in found.items()
    }
    off, theirs = middle[None], _PUBLISHED[None]
    rows = []
    for key, row in found.items():
        published = _PUBLISHED[key]
        name = "no reporting" if key is None else f"order {key[0]}, {key[1]} ms, batch {key[2]}"
        rows.append(
            (
                name,
                value_text([value / off["job_s"] for value in row["job_s"] if value]),
                f"{published[0] / theirs[0]:.2f}",
                value_text([value / off["gib_min"] for value in row["gib_min"] if value]),
                f"{published[1] / theirs[1]:.2f}",
                value_text(row["host_cpu_s"]),
                f"{published[3]:.0f}",
                value_text(row["refaults"], 1e-6),
            )
        )
    table = Table(
        "Ours (rotate, virtual time) beside the published figures; job time and footprint as ratios to no reporting",
        (
            "setting",
            "job time",
            "published: build",
            "footprint, GiB·min",
            "published: GiB·min during the build",
            "host processor time, s",
            "published: host system CPU, s",
            "refaults, millions",
        ),
        tuple(rows),
        "What is to be compared is the ordering, not the figures: theirs is another machine and a real build.",
    )
    checks = _ordering(middle)
    ordering = Table(
        "The ordering, claim by claim",
        ("claim", "ours", "holds"),
        tuple((claim, text, "yes" if holds else "no") for claim, text, holds in checks),
    )
    finding = tuple(f"{claim}: {text} ({'holds' if holds else 'does not hold'})." for claim, text, holds in checks)
    return Presentation(finding, (table, ordering), _figure(middle), {"settings": [list(row) for row in rows]})


def _ordering(middle: dict[_Key, dict[str, float]]) -> list[tuple[str, str, bool]]:
    """What the published sweep teaches, each as (claim, our figures, whether it holds)."""
    off = middle[None]

    def share(key: _Key, name: str) -> float:
        return middle[key][name] / off[name]

    nines = [setting for setting in _SETTINGS if setting[0] == 9]
    times = [share(key, "job_s") for key in nines]
    feet = [share(key, "gib_min") for key in nines]
    slow = [(0, 2000, capacity) for capacity in (32, 512)]
    fast = [(0, 100, capacity) for capacity in (32, 512)]
    slow_time, fast_time = (sum(share(key, "job_s") for key in keys) / 2 for keys in (slow, fast))
    slow_foot, fast_foot = (sum(share(key, "gib_min") for key in keys) / 2 for keys in (slow, fast))
    nine_time, nine_foot = sum(times) / len(times), sum(feet) / len(feet)
    return [
        (
            "At order 9 neither delay nor batch size matters",
            f"job time {min(times):.3f} to {max(times):.3f}, footprint {min(feet):.3f} to {max(feet):.3f} of off",
            max(times) - min(times) < 0.03 and max(feet) - min(feet) < 0.05,
        ),
        (
            "Order 0 at 2 s returns more than order 9, and costs more",
            f"footprint {slow_foot:.3f} against {nine_foot:.3f}, job time {slow_time:.3f} against {nine_time:.3f}",
            slow_foot < nine_foot and slow_time > nine_time,
        ),
        (
            "Order 0 at 100 ms is worse than at 2 s on both axes",
            f"footprint {fast_foot:.3f} against {slow_foot:.3f}, job time {fast_time:.3f} against {slow_time:.3f}",
            fast_foot > slow_foot and fast_time > slow_time,
        ),
    ]


def _figure(middle: dict[_Key, dict[str, float]]) -> Figure:
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, 2)
    off, theirs = middle[None], _PUBLISHED[None]
    ours = {key: (row["job_s"] / off["job_s"], row["gib_min"] / off["gib_min"]) for key, row in middle.items()}
    published = {key: (row[0] / theirs[0], row[1] / theirs[1]) for key, row in _PUBLISHED.items()}
    for panel, points, title in zip(axes, (ours, published), ("ours, virtual time", "published"), strict=True):
        for key, (job, foot) in points.items():
            colour = "#444444" if key is None else {9: "#0072B2", 0: "#D55E00"}[key[0]]
            marker = "*" if key is None else {2000: "o", 100: "s"}[key[1]]
            filled = key is None or key[2] == 32
            panel.scatter(
                job, foot, s=70, marker=marker, edgecolors=colour, facecolors=colour if filled else "none", zorder=3
            )
        panel.set_xlabel("job time against no reporting (left is better)")
        panel.set_title(title)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("footprint against no reporting\n(down is better)")
    for label, colour, marker in (
        ("no reporting", "#444444", "*"),
        ("order 9, 2 s", "#0072B2", "o"),
        ("order 9, 100 ms", "#0072B2", "s"),
        ("order 0, 2 s", "#D55E00", "o"),
        ("order 0, 100 ms", "#D55E00", "s"),
    ):
        axes[1].scatter([], [], color=colour, marker=marker, label=label)
    axes[1].scatter([], [], edgecolors="#444444", facecolors="none", marker="o", label="hollow: batch 512")
    axes[1].legend(fontsize=8, loc="center")
    return figure
