"""One run from plain values to plain values, in whichever process an engine chooses."""

from __future__ import annotations

import sys
from typing import Any

from common.errors import UsageError
from lab.experiment.spec import RunSpec

__all__ = ["execute", "load_costs"]


def execute(payload: dict[str, Any]) -> dict[str, Any]:
    """Do one run. Top-level, and plain values both ways, so that any executor can send it anywhere.

    Args:
        payload: ``spec``: ``RunSpec.as_dict()``; ``costs``: ``Costs.as_dict()``, or None for a live run.

    Returns:
        ``RunResult.as_dict()``.

    Raises:
        UsageError: a run in virtual time without costs, or what the run itself refuses.
    """
    spec = RunSpec.from_dict(payload["spec"])
    if spec.mode == "live":
        from lab.live.run import run_live

        return run_live(spec).as_dict()
    from lab.virtual.costs import Costs
    from lab.virtual.run import run_virtual

    costs = payload.get("costs")
    if costs is None:
        raise UsageError("costs: none; virtual time needs those of a machine: python -m lab calibrate")
    return run_virtual(spec, Costs.from_dict(costs)).as_dict()


def load_costs(path: str) -> dict[str, Any]:
    """The costs of virtual time in ``path``, or this machine's if it is empty: measured now if they never were.

    What is measured is kept where ``Costs.load`` looks; one line on standard error says so.

    Raises:
        UsageError: a file that holds no such costs. LabError, MachineError: the measurement failed.
    """
    from lab.virtual.costs import Costs, default_path

    if not path and not default_path().exists():
        from lab.commands.calibrate import ROUNDS, calibrate_to

        if sys.stderr is not None:
            sys.stderr.write("measuring what things cost on this machine (once, some 15 s)\n")
        return calibrate_to(str(default_path()), ROUNDS, force=False).costs.as_dict()
    return Costs.load(path or None).as_dict()
