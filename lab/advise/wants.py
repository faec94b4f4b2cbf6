"""What a person asks for besides the knee: a budget of processor time, or memory given back in time. Light."""

from __future__ import annotations

import re
from dataclasses import dataclass

from common.errors import UsageError
from common.units import format_size, parse_duration_ns, parse_size

__all__ = ["BUDGET_WORDS", "TARGET_WORDS", "Target", "parse_budget", "parse_target"]

BUDGET_WORDS = "more than 0 and up to 100 % of a processor, such as '2% cpu'"
TARGET_WORDS = "a size, the word in, and a time above 0, such as '1.5GiB in 2s'"

_BUDGET = re.compile(r"\s*([0-9]{1,3}(?:\.[0-9]{1,9})?)\s*%\s*(?:of\s+a?\s*)?(?:cpu)?\s*", re.IGNORECASE)
_TARGET = re.compile(r"\s*(\S.*?)\s+in\s+(\S+)\s*")


@dataclass(frozen=True)
class Target:
    """Memory that the host may hold, and how long after a large free it may hold more."""

    size_bytes: int
    within_ns: int

    def __str__(self) -> str:
        return f"{format_size(self.size_bytes)} in {self.within_ns / 1e9:g} s"


def parse_budget(text: str) -> float:
    """The share of one processor in ``text``, above 0 and up to 1.

    Raises:
        UsageError: it is none.
    """
    match = _BUDGET.fullmatch(text)
    share = float(match[1]) / 100 if match else 0.0
    if not 0 < share <= 1:
        raise UsageError(f"{text!r}; allowed is {BUDGET_WORDS}")
    return share


def parse_target(text: str) -> Target:
    """The target in ``text``.

    Raises:
        UsageError: it is none.
    """
    match = _TARGET.fullmatch(text)
    try:
        target = Target(parse_size(match[1]), parse_duration_ns(match[2])) if match else None
    except UsageError:
        target = None
    if target is None or not target.size_bytes or not target.within_ns:
        raise UsageError(f"{text!r}; allowed is {TARGET_WORDS}")
    return target
