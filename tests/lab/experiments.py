"""Made results for tests: a toy that turns a specification into figures, and engines that run it in this process."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lab.experiment.metrics import METRICS, RunResult
from lab.experiment.spec import RunSpec

__all__ = ["GIB", "MadeEngine", "made_result", "toy"]

GIB = 1 << 30
# Throughput and footprint of each policy as shares of those without reporting.
_CHARACTER = {"off": (1.0, 1.0), "boundary": (0.97, 0.55), "rotate": (0.98, 0.6), "hint": (0.9, 0.7)}


def made_result(spec: RunSpec, **metrics: float | None) -> RunResult:
    """A result with the given figures and 0 elsewhere; its footprint falls from the memory to a tenth of it."""
    unknown = set(metrics) - set(METRICS)
    assert not unknown, unknown
    times = np.linspace(0.0, spec.duration_ns / 1e9, 40)
    resident = spec.memory * np.where(times < times[-1] / 2, 1.0, 0.1)
    series = {
        "t_s": times,
        "resident_bytes": resident,
        "allocated_bytes": resident / 2,
        "reported_bytes": spec.memory - resident,
    }
    none: dict[str, float | None] = dict.fromkeys(METRICS, 0.0)
    none |= {"job_s": None} | metrics
    return RunResult(spec=spec, metrics=none, series=series, facts={"complaints": []})


def toy(payload: dict[str, Any]) -> dict[str, Any]:
    """Figures that depend on policy, workload, order, delay, mode and seed, as ``execute`` would answer them."""
    spec = RunSpec.from_dict(payload["spec"])
    noise = random.Random(f"{spec.seed} {spec.mode} {spec.workload} {spec.name}")
    speed, footprint = _CHARACTER.get(spec.policy, (0.95, 0.65))
    speed *= 1 - (9 - spec.min_order) * 0.02
    delay_s = (100_000_000 if spec.delay_ns is None else spec.delay_ns) / 1e9
    off = spec.policy == "off"
    virtual = 1.05 if spec.mode == "virtual" else 1.0

    def about(value: float) -> float:
        return value * virtual * (1 + 0.02 * noise.random())

    result = made_result(
        spec,
        page_ops_per_s=about(2e6 * speed),
        gib_min=about(0.08 * footprint + (0 if off else delay_s * 0.01)),
        peak_bytes=about(spec.memory * 0.7),
        t50_s=None if off else about(delay_s + 0.2),
        t90_s=None if off else about(delay_s + 0.5),
        t99_s=None if off else about(delay_s + 0.9),
        returned_bytes=0.0 if off else about(spec.memory * 0.9),
        stayed_bytes=0.0 if off else about(spec.memory * 0.6),
        refaults=0.0 if off else about(120_000),
        reports=0.0 if off else round(about(400)),
        duplicates=0.0,
        hold_p50_ns=None if off else about(900),
        hold_p99_ns=None if off else about(6000),
        hold_max_ns=None if off else about(40_000),
        nodes_hold_max=None if off else 32.0,
        alloc_p50_ns=None if off else about(120),
        alloc_p99_ns=None if off else about(900),
        alloc_p999_ns=None if off else about(20_000),
        guest_cpu_s=about(9.0),
        host_cpu_s=0.0 if off else about(0.3),
    )
    shape = result.series["resident_bytes"]
    shape *= about(1.0) if off else footprint * about(1.0)
    if off:
        shape[:] = shape[0]
    return result.as_dict()


class MadeEngine:
    """An engine that notes what it was given and answers in an order of its own."""

    def __init__(self, *, backwards: bool = False) -> None:
        self.backwards = backwards
        self.payloads: list[dict[str, Any]] = []
        self.addresses: list[str] = []
        self.names: list[str] = []  # of the last run's payloads

    @contextlib.contextmanager
    def open(self, address: str) -> Iterator[MadeEngine]:
        """This engine, whatever the address."""
        self.addresses.append(address)
        yield self

    def run(
        self,
        function: Callable[[dict[str, Any]], dict[str, Any]],
        payloads: Sequence[dict[str, Any]],
        *,
        describe: Callable[[int], str],
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Answers, backwards when there is no order to keep."""
        self.names = [describe(index) for index in range(len(payloads))]
        indices = list(range(len(payloads)))
        if self.backwards:
            indices.reverse()
        for index in indices:
            self.payloads.append(payloads[index])
            yield index, function(payloads[index])
