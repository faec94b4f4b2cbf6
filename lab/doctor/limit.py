"""One limit: what it is, what is needed, whether it suffices, and what mends it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

__all__ = ["Limit", "Plan", "Verdict", "at_least", "left_of"]


class Verdict(StrEnum):
    """Whether a limit suffices. ``UNKNOWN``: this machine does not say."""

    OK = "ok"
    SHORT = "short"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Plan:
    """What is to run here: guests of this size beside whatever runs already."""

    guests: int
    memory_bytes: int
    capacity: int
    backend: str
    vcpus: int = 2

    @property
    def ram_bytes(self) -> int:
        """Memory of one guest that is really there."""
        return self.memory_bytes if self.backend == "shared" else 0


@dataclass(frozen=True)
class Limit:
    """A row of the table.

    Attributes:
        value, needed: in words; ``needed`` is empty where there is nothing to need.
        fix: the command that mends it; where the verdict is ok, one that would better it, or empty.
        note: what else is worth knowing.
    """

    name: str
    value: str
    needed: str
    verdict: Verdict
    fix: str = ""
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def left_of(limit: int | None, used: int) -> int | None:
    """What ``used`` leaves of a limit (None: unknown; below 0: without limit), 0 at least."""
    return limit if limit is None or limit < 0 else max(0, limit - used)


def at_least(value: int | None, needed: int) -> Verdict:
    """The verdict on a limit of ``value`` (None: unknown; below 0: without limit) of which ``needed`` must be free."""
    if value is None:
        return Verdict.UNKNOWN
    return Verdict.OK if value < 0 or value >= needed else Verdict.SHORT
