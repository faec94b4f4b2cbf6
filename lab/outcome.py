"""What a run leaves behind: how every process ended, what it said of itself, what was seen from outside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lab.sampler import Observation

__all__ = ["Account", "ProcessEnd", "RunOutcome"]

Account = Mapping[str, Any]
"""The JSON object that a host or guest writes when it ends."""


@dataclass(frozen=True)
class ProcessEnd:
    """How one process ended. ``exit_code`` is negative if a signal ended it, None if it never started."""

    name: str
    exit_code: int | None
    stderr_tail: str
    account: Account | None


@dataclass(frozen=True)
class RunOutcome:
    """A whole run. ``problem`` says in words what cut it short, if anything but an interruption did.

    ``watched``: somebody looked at the guests from outside, so there are observations of them.
    """

    lab: str
    duration_s: float
    started_s: float  # CLOCK_MONOTONIC; time 0 of the observations
    host: ProcessEnd
    guests: tuple[ProcessEnd, ...]
    observations: Mapping[str, Observation]
    interrupted: bool
    problem: str | None
    watched: bool = True

    @property
    def processes(self) -> tuple[ProcessEnd, ...]:
        """Host first, then guests."""
        return (self.host, *self.guests)
