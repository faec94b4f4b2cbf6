"""A comparison as runs: interleaved, so that whatever the machine does meanwhile meets all policies alike.

Round r runs every workload and policy once, with the seed plus r; each round begins one policy later than the one
before, so that none is always first on a cold or always last on a warm machine. Live runs are strictly one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lab.experiment.progress import Progress
from lab.experiment.spec import Mode, RunSpec

if TYPE_CHECKING:
    from lab.experiment.metrics import RunResult
    from lab.experiment.store import Store

__all__ = ["LIVE_ENGINE", "OFF", "Engine", "Execute", "Plan", "Rival", "Run", "describe_runs", "make_plan", "run_plan"]

OFF = "off"
LIVE_ENGINE = "inline"  # one after the other, in this process
_SEEDS = 1 << 32  # as many as --seed takes

Execute = Callable[[dict[str, Any]], dict[str, Any]]


class Engine(Protocol):
    """What runs payloads: that of ``lab.experiment.engines``, or a stand-in."""

    def run(
        self, function: Execute, payloads: Sequence[dict[str, Any]], *, describe: Callable[[int], str]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Index and answer of each payload, as they finish; ``describe`` names one in an error."""


@dataclass(frozen=True)
class Rival:
    """One policy of a comparison, with its own settings if it has some.

    Attributes:
        name: as tables call it: the policy's name, and its settings after colons.
        changes: by field of ``RunSpec``, what differs from the common settings.
    """

    name: str
    policy: str
    changes: dict[str, Any]

    def spec(self, base: RunSpec) -> RunSpec:
        """``base`` with this policy and its settings; the label only when the policy's name does not tell."""
        return base.but(**self.changes, policy=self.policy, label=self.name if self.changes else "")


@dataclass(frozen=True)
class Run:
    """One run of a comparison; ``repeat`` counts rounds from 0."""

    spec: RunSpec
    repeat: int

    @property
    def key(self) -> tuple[str, int]:
        """What a run directory knows it by."""
        return self.spec.key(), self.repeat


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared.

    Attributes:
        specs: one a policy, in their order, with names that differ; workload, seed and mode are those of the plan.
        modes: in the order in which they run.
    """

    specs: tuple[RunSpec, ...]
    workloads: tuple[str, ...]
    repeat: int
    modes: tuple[Mode, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the policies, in their order; the others are tested against the first."""
        return tuple(spec.name for spec in self.specs)

    @property
    def base(self) -> str:
        """The name of the policy whose throughput is 100 %: the first without reporting."""
        return next(spec.name for spec in self.specs if spec.policy == OFF)

    def runs(self, mode: Mode) -> list[Run]:
        """All runs of one mode, in the order in which they are to be done."""
        ordered: list[Run] = []
        for repeat in range(self.repeat):
            turned = [*self.specs[repeat % len(self.specs) :], *self.specs[: repeat % len(self.specs)]]
            ordered += [
                Run(spec.but(mode=mode, workload=workload, seed=(spec.seed + repeat) % _SEEDS), repeat)
                for workload in self.workloads
                for spec in turned
            ]
        return ordered


def make_plan(
    rivals: Sequence[Rival], base: RunSpec, *, workloads: Sequence[str], repeat: int, modes: Sequence[Mode]
) -> Plan:
    """The plan of ``rivals`` on common settings; a plain ``off`` follows them unless one of them is ``off`` already."""
    compared = list(rivals)
    if not any(rival.policy == OFF for rival in rivals):
        compared.append(Rival(OFF, OFF, {}))
    specs = tuple(rival.spec(base) for rival in compared)
    return Plan(specs=specs, workloads=tuple(workloads), repeat=repeat, modes=tuple(modes))


def describe_runs(specs: Sequence[RunSpec]) -> Callable[[int], str]:
    """What an error calls the run of that index: ``memhog, boundary, seed 1, live``."""
    return lambda index: f"{specs[index].workload}, {specs[index].name}, seed {specs[index].seed}, {specs[index].mode}"


def run_plan(
    plan: Plan,
    *,
    execute: Execute,
    open_engine: Callable[[str], AbstractContextManager[Engine]],
    address: str,
    costs: dict[str, Any] | None,
    store: Store,
    progress: Progress,
) -> list[tuple[RunResult, int]]:
    """Do all runs of ``plan``; results with their repeat, in the order of the plan.

    Args:
        execute, open_engine: those of ``lab.experiment``.
        address: the engine of the runs in virtual time.
        costs: of virtual time, as their dictionary.
        store: gets each result as soon as it is there; runs whose results it has already are not done again.
    """
    from lab.experiment.metrics import RunResult

    results: list[tuple[RunResult, int]] = []
    for mode in plan.modes:
        runs = plan.runs(mode)
        found = {run: store.there[run.key] for run in runs if run.key in store.there}
        missing = [run for run in runs if run not in found]
        if missing:
            progress.start(mode, [run.spec for run in missing])
            payloads = [{"spec": run.spec.as_dict(), "costs": costs if mode == "virtual" else None} for run in missing]
            with open_engine(LIVE_ENGINE if mode == "live" else address) as engine:
                for index, answer in engine.run(execute, payloads, describe=describe_runs([r.spec for r in missing])):
                    run = missing[index]
                    found[run] = RunResult.from_dict(answer)
                    store.append(found[run], run.repeat)
                    progress.done(run.spec)
        results += [(found[run], run.repeat) for run in runs]
    return results
