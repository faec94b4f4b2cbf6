"""The settings that are tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

__all__ = ["DEFAULT", "MAINLINE", "OFF", "Setting", "grid"]

MAINLINE = "rotate"


@dataclass(frozen=True, order=True)
class Setting:
    """One policy with its order, delay and most blocks a report."""

    policy: str
    min_order: int
    delay_ns: int
    capacity: int

    def __str__(self) -> str:
        if self.policy == "off":
            return "off"
        return f"{self.policy}, order {self.min_order}, {self.delay_ns / 1e9:g} s, {self.capacity}"

    def as_dict(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)

    @property
    def changes(self) -> tuple[int, int, int, int]:
        """How far it is from the kernel's default, the change that is hardest to make first: policy, code, order."""
        code = (self.delay_ns != DEFAULT.delay_ns) + (self.capacity != DEFAULT.capacity)
        return int(self.policy != MAINLINE), code, int(self.min_order != DEFAULT.min_order), -self.delay_ns


# mm/page_reporting.c with pages of 4 KiB: pageblock_order, PAGE_REPORTING_DELAY, PAGE_REPORTING_CAPACITY.
DEFAULT = Setting(MAINLINE, 9, 2 * 10**9, 32)
OFF = Setting("off", 9, 2 * 10**9, 32)


def grid(
    policies: Sequence[str], orders: Sequence[int], delays_ns: Sequence[int], capacities: Sequence[int]
) -> list[Setting]:
    """Every combination, each once, and ahead of them what all are held against: no reporting, and the default."""
    cells = [Setting(*cell) for cell in product(policies, orders, delays_ns, capacities)]
    return list(dict.fromkeys([OFF, DEFAULT, *cells]))
