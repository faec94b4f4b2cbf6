"""Stand-ins for runs: functions that a worker process can import, and results made of a specification."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InvariantViolation
from lab.experiment.metrics import METRICS, SERIES, RunResult
from lab.experiment.spec import RunSpec

GATE = "FPR_TEST_GATE"  # a folder: runs leave their process id there, and some wait there for ever


def make_result(spec: RunSpec, **metrics: float | None) -> RunResult:
    """A result that follows from ``spec`` alone, with ``metrics`` in place of what they name."""
    seed = int(spec.key(), 16) % 1000
    values: dict[str, float | None] = {name: float(seed + index) for index, name in enumerate(METRICS)}
    values.update({"violations": 0.0, "t99_s": None, **metrics})
    times = np.arange(5, dtype=np.float64)
    return RunResult(
        spec=spec,
        metrics=values,
        series={name: times * (index + 1) + 0.25 for index, name in enumerate(SERIES)},
        facts={"ended": "idle"},
    )


def stand_in_run(payload: dict[str, Any]) -> dict[str, Any]:
    """What ``execute`` does, without a run: the answer follows from the payload."""
    return make_result(RunSpec.from_dict(payload["spec"])).as_dict()


def gated_run(payload: dict[str, Any]) -> dict[str, Any]:
    """As ``stand_in_run``; runs with a seed above 3 wait for ever while the folder of the gate is there."""
    gate = Path(os.environ[GATE])
    if gate.is_dir():
        (gate / str(os.getpid())).touch()
        if payload["spec"]["seed"] > 3:
            signal.pause()
    return stand_in_run(payload)


def violating_run(payload: dict[str, Any]) -> dict[str, Any]:
    """A run in which an invariant did not hold."""
    return make_result(RunSpec.from_dict(payload["spec"]), violations=2.0).as_dict()


def square(payload: dict[str, Any]) -> dict[str, Any]:
    """The square of ``value``."""
    return {"value": payload["value"] ** 2}


def square_once_killed(payload: dict[str, Any]) -> dict[str, Any]:
    """As ``square``, but the first process that comes to ``marker`` is killed there, as if memory had run out."""
    marker = payload.get("marker")
    if marker and not os.path.exists(marker):
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return square(payload)


def killed(payload: dict[str, Any]) -> dict[str, Any]:
    """Ends its process if ``value`` is 3, each time."""
    if payload["value"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return square(payload)


def failing(payload: dict[str, Any]) -> dict[str, Any]:
    """A bug for value 3, a violation for value 5."""
    if payload["value"] == 3:
        raise ZeroDivisionError("by nothing")
    if payload["value"] == 5:
        raise InvariantViolation("S3: a block is in flight")
    return square(payload)


def waiting(payload: dict[str, Any]) -> dict[str, Any]:
    """Leaves its process id in ``folder`` and waits for ever, but for value 0."""
    if payload["value"]:
        Path(payload["folder"], str(os.getpid())).touch()
        signal.pause()
    return square(payload)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


@contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Set a variable that child processes read."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
