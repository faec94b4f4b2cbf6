"""A run directory as the report sees it: each result under a name that tells its settings from the others'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from common.errors import UsageError
from common.units import format_size
from lab.experiment.comparison import Comparison, Sample, compare_results
from lab.experiment.metrics import RunResult
from lab.experiment.spec import RunSpec

__all__ = ["Experiment", "format_ns", "load_experiment", "name_results", "setting_text"]

_NOT_IN_A_NAME = {"mode", "workload", "seed", "label", "policy"}
_SHORT = {"min_order": "order", "work_order": "work order"}
_KNOWN_KINDS = ("compare", "sweep")


@dataclass(frozen=True)
class Experiment:
    """What one run directory holds.

    Attributes:
        path: as it was given.
        record: run.json: kind, settings, command, version, commit, created, environment.
        samples: by mode, workload, policy and seed, so that the order of finishing does not matter.
    """

    path: str
    record: dict[str, Any]
    costs: dict[str, Any] | None
    samples: tuple[Sample, ...]
    comparison: Comparison

    @property
    def kind(self) -> str:
        """What made it: "compare" or "sweep"."""
        return str(self.record["kind"])


def load_experiment(path: str) -> Experiment:
    """Read the run directory ``path``.

    Raises:
        UsageError: it is none, is damaged, or has no result yet.
    """
    from lab.experiment.directory import RunDirectory

    directory = RunDirectory.read(path)
    if directory.kind not in _KNOWN_KINDS:
        raise UsageError(f"{path}: holds a {directory.kind}; a report is made of {' or '.join(_KNOWN_KINDS)}")
    kept = directory.results(series=True)
    if not kept:
        raise UsageError(f"{path}: holds no result yet; start its {directory.kind} again to go on with it")
    settings = directory.settings
    order = [str(name) for name in settings.get("policies", [])] if directory.kind == "compare" else []
    names = name_results([one.result for one in kept])
    samples = [Sample(name, one.result, one.repeat) for name, one in zip(names, kept, strict=True)]
    workloads = [str(name) for name in settings.get("workloads", [])] if order else []
    samples.sort(key=lambda sample: _position(sample, order, workloads))
    tested = directory.kind == "compare"
    base = settings.get("base") if tested else None
    first = order[0] if order else samples[0].name
    return Experiment(
        path,
        directory.record,
        directory.costs,
        tuple(samples),
        compare_results(samples, first=first, base=base, tested=tested),
    )


def name_results(results: Sequence[RunResult]) -> list[str]:
    """A name for each result: its label or policy, and those settings that vary among results of that name.

    Results that differ in mode, workload or seed alone have the same name.
    """
    by_name: dict[str, list[RunSpec]] = {}
    for result in results:
        by_name.setdefault(result.spec.name, []).append(result.spec)
    varying = {
        name: [
            setting.name
            for setting in fields(RunSpec)
            if setting.name not in _NOT_IN_A_NAME and len({getattr(spec, setting.name) for spec in specs}) > 1
        ]
        for name, specs in by_name.items()
    }
    return [
        ", ".join(
            [
                result.spec.name,
                *(setting_text(key, getattr(result.spec, key)) for key in varying[result.spec.name]),
            ]
        )
        for result in results
    ]


def setting_text(key: str, value: Any) -> str:
    """One setting as a name has it: ``order 9``, ``delay 250ms``, ``no shuffle``."""
    title = _SHORT.get(key, key.removesuffix("_ns").replace("_", " "))
    if isinstance(value, bool):
        return title if value else f"no {title}"
    if value is None:
        return f"{title} of the policy"
    if key.endswith("_ns"):
        return f"{title} {format_ns(value)}"
    return f"{title} {format_size(value) if key == 'memory' else value}"


def format_ns(duration_ns: int) -> str:
    """``duration_ns`` in the largest unit that gives a whole number: ``250ms``."""
    for unit, factor in (("s", 1_000_000_000), ("ms", 1_000_000), ("us", 1_000)):
        if duration_ns and duration_ns % factor == 0:
            return f"{duration_ns // factor}{unit}"
    return f"{duration_ns}ns" if duration_ns else "0"


def _position(sample: Sample, order: Sequence[str], workloads: Sequence[str]) -> tuple[Any, ...]:
    """Where ``sample`` stands: as the settings have it, else by name and number."""
    spec = sample.result.spec
    place = order.index(sample.name) if sample.name in order else len(order)
    work = workloads.index(spec.workload) if spec.workload in workloads else len(workloads)
    settings = tuple(
        (value is not None, value or 0)
        for value in (spec.min_order, spec.delay_ns, spec.capacity, spec.memory, spec.vcpus)
    )
    return (spec.mode, work, spec.workload, place, spec.policy, settings, sample.name, spec.seed, sample.repeat)
