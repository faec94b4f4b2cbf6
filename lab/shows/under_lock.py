"""Why not under the lock: what a callback for every free block costs those who allocate, as memory grows.

The guest's memory is modelled, so that 64 GiB fit any machine: processes, locks, queues and allocations are real, and
the host acknowledges at once, without a discard. That favours the walk under the lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lab.experiment.metrics import RunResult
from lab.experiment.spec import RunSpec
from lab.shows.base import Context, Presentation, Table, summary, value_text

__all__ = ["UnderLock"]

_GIB = 1 << 30
_SIZES = (1, 16, 64)
_POLICIES = ("walk-locked", "boundary")
_USED_BYTES = 512 << 20
_WALK = "walk_ns"
_METRICS = ("hold_max_ns", "hold_p99_ns", "alloc_p999_ns", "alloc_p99_ns", "page_ops_per_s", "nodes_hold_max")


class UnderLock:
    """See the module."""

    name = "under-lock"
    title = "Why not under the lock"
    question = "How long does an allocation wait when every free block is reported with the zone lock held?"
    live = True
    rounds = 3

    def answer(self, context: Context) -> Presentation:
        """Live runs with a modelled RAM, sizes and policies interleaved."""
        specs = [
            _spec(policy, size).but(seed=number + 1)
            for number in range(context.rounds)
            for size in _SIZES
            for policy in _POLICIES
        ]
        return _present(context.run(specs))


def _spec(policy: str, gib: int) -> RunSpec:
    return RunSpec(
        mode="live",
        policy=policy,
        workload="churn",
        backend="model",
        memory=gib * _GIB,
        fill=max(0.01, _USED_BYTES / (gib * _GIB)),
        vcpus=1,
        duration_ns=6_000_000_000,
        delay_ns=100_000_000,
        capacity=16,
        high_water_mark=32,
        label=f"{policy}, {gib} GiB",
    )


def _present(results: Sequence[RunResult]) -> Presentation:
    found: dict[tuple[str, int], dict[str, list[float | None]]] = {}
    for result in results:
        row = found.setdefault((result.spec.policy, result.spec.memory // _GIB), {name: [] for name in _METRICS})
        for name in _METRICS:
            row[name].append(result.metrics[name])
        row.setdefault(_WALK, []).append(_walk_ns(result))
    rows = tuple(
        (
            policy,
            f"{gib} GiB",
            value_text(values["hold_max_ns"], 1e-6, 3),
            value_text(values[_WALK], 1e-6, 3),
            value_text(values["hold_p99_ns"], 1e-6, 3),
            value_text(values["nodes_hold_max"], 1, 0),
            value_text(values["alloc_p99_ns"], 1e-3, 1),
            value_text(values["alloc_p999_ns"], 1e-3, 1),
        )
        for (policy, gib), values in found.items()
    )
    table = Table(
        "Live, one vCPU that churns in 512 MiB, host acknowledges at once; median of the rounds ± half the quartiles'"
        " distance",
        (
            "policy",
            "zone",
            "longest hold, ms",
            "of it not waiting for the host, ms",
            "hold p99, ms",
            "list nodes under one hold",
            "allocation p99, µs",
            "allocation p99.9, µs",
        ),
        rows,
        "Allocations are those that began while a run was active. What is left of a hold when the wait for the host is "
        "taken out is what a callback costs that only writes addresses down, as the series for migration did.",
    )
    return Presentation(_finding(found), (table,), _figure(found), {"rows": [list(row) for row in rows]})


def _walk_ns(result: RunResult) -> float | None:
    """The longest hold without the longest wait for the host in one; a guest that waits outside holds no longer."""
    longest = result.metrics["hold_max_ns"]
    waiting = result.facts["lock_hold_ns"].get("waiting", {"max": 0})["max"]
    return None if longest is None else max(0.0, longest - waiting)


def _middle(values: Sequence[float | None]) -> float:
    return (summary(values) or (float("nan"), 0.0))[0]


def _finding(found: dict[tuple[str, int], dict[str, list[float | None]]]) -> tuple[str, ...]:
    sentences = []
    for gib in _SIZES:
        walk, boundary = (_middle(found[policy, gib]["hold_max_ns"]) for policy in _POLICIES)
        wait, other = (_middle(found[policy, gib]["alloc_p999_ns"]) for policy in _POLICIES)
        alone = _middle(found["walk-locked", gib][_WALK])
        sentences.append(
            f"At {gib} GiB the longest hold is {walk / 1e6:.1f} ms under walk-locked ({alone / 1e6:.2f} ms without the "
            f"wait for the host) and {boundary / 1e6:.3f} ms under boundary; allocation p99.9 is {wait / 1e3:.0f} µs "
            f"and {other / 1e3:.0f} µs."
        )
    return tuple(sentences)


def _figure(found: dict[tuple[str, int], dict[str, list[float | None]]]) -> Figure:
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, 2)
    styles = {"walk-locked": ("#D55E00", "s"), "boundary": ("#0072B2", "o")}
    for panel, metric, label in zip(
        axes,
        ("hold_max_ns", "alloc_p999_ns"),
        ("longest hold of the zone lock, ms", "allocation while reporting, p99.9, ms"),
        strict=True,
    ):
        for policy in _POLICIES:
            colour, marker = styles[policy]
            points = [summary(found[policy, gib][metric]) or (float("nan"), 0.0) for gib in _SIZES]
            panel.errorbar(
                _SIZES,
                [point[0] / 1e6 for point in points],
                yerr=[point[1] / 1e6 for point in points],
                color=colour,
                marker=marker,
                capsize=3,
                label=policy,
            )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(_SIZES, [f"{gib} GiB" for gib in _SIZES])
        panel.set_xlabel("size of the zone")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    axes[0].legend()
    return figure
