"""One run from plain values to plain values, in whichever process an engine chooses."""

from __future__ import annotations

from typing import Any

from common.errors import UsageError
from lab.experiment.spec import RunSpec

__all__ = ["execute"]


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
