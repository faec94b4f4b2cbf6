"""What one setting returns and costs, and when the recorded guest freed much."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from common.geometry import PAGE_BYTES, PAGEBLOCK_ORDER
from lab.advise.grid import Setting
from lab.advise.wants import Target
from lab.replay.execute import execute
from lab.replay.kernels import OP_GIVE, OP_TAKE
from lab.replay.plan import Plan

__all__ = ["Drop", "Row", "large_frees", "measure", "moved_pages", "worst_after"]

_STEP_NS = 100_000_000
_WINDOW_STEPS = 10
_LARGE = 0.5  # of the largest


@dataclass(frozen=True)
class Drop:
    """A large free: memory in use fell by ``bytes`` within a second that ends at ``t_ns``; ``used_bytes`` is left."""

    t_ns: int
    bytes: int
    used_bytes: int


@dataclass(frozen=True)
class Row:
    """What a replay of one setting found.

    Attributes:
        gib_min: memory that the host holds, over time.
        host_cpu_s: answering the reports. refault_s: touching again what was given back.
        end_bytes: the host holds at the end.
        split_huge_pages: 2 MiB pages of which a part was given back in a report of less.
        resident: (t_s, bytes) pairs.
        unknown: what the replay had to guess, by kind.
    """

    setting: Setting
    gib_min: float
    refaults: int
    refault_s: float
    host_cpu_s: float
    passes: int
    reports: int
    reported_bytes: int
    end_bytes: int
    split_huge_pages: int = 0
    resident: list[list[float]] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)

    def cost_s(self, refault: float = 1.0, host: float = 1.0) -> float:
        """Processor time of guest and host, with each price times a factor."""
        return self.refault_s * refault + self.host_cpu_s * host

    def as_dict(self) -> dict[str, Any]:
        """All but the course of memory over time, as the JSON has it."""
        facts = {name: value for name, value in vars(self).items() if name not in {"setting", "resident"}}
        return {**self.setting.as_dict(), **facts, "cost_s": self.cost_s()}


def measure(payload: dict[str, Any]) -> dict[str, Any]:
    """One replay, as ``lab.replay.execute`` does it, boiled down to the fields of a ``Row`` but ``setting``.

    Raises:
        UsageError: as ``execute``.
    """
    found = execute({**payload, "blocks": True})
    blocks = [block for one in found["reported"] for block in one]
    parts = {pfn >> PAGEBLOCK_ORDER for pfn, order in blocks if order < PAGEBLOCK_ORDER}
    return {
        "gib_min": found["gib_min"],
        "refaults": found["refaults"],
        "refault_s": found["refault_s"],
        "host_cpu_s": found["host_cpu_s"],
        "passes": len(found["passes"]),
        "reports": sum(one["reports"] for one in found["passes"]),
        "reported_bytes": found["reported_bytes"],
        "end_bytes": found["resident"][-1][1],
        "split_huge_pages": len(parts),
        "resident": found["resident"],
        "unknown": found["unknown"],
    }


def moved_pages(plan: Plan) -> npt.NDArray[np.int64]:
    """What each row of a plan adds to memory in use, pages: int64[rows]."""
    signs: npt.NDArray[np.int64] = (plan.op == OP_TAKE).astype(np.int64) - (plan.op == OP_GIVE)
    return signs << plan.order.astype(np.int64)


def large_frees(plan: Plan, begin_ns: int, end_ns: int, used_at_begin_bytes: int) -> list[Drop]:
    """The largest falls of memory in use within a second, down to half of the largest, in the order of time.

    Memory in use is what is not on the buddy lists, looked at every 100 ms. Two large frees are a second apart or
    more; of the same fall the place counts where all of it has come back first.

    Args:
        used_at_begin_bytes: memory in use as the recording begins.
    """
    total = np.concatenate(([0], np.cumsum(moved_pages(plan))))
    times = np.append(np.arange(begin_ns, end_ns, _STEP_NS, dtype=np.int64), end_ns)
    used = total[np.searchsorted(plan.t_ns, times, side="right")]
    used = used * PAGE_BYTES + used_at_begin_bytes
    fall = np.array([used[max(0, at - _WINDOW_STEPS) : at + 1].max() - used[at] for at in range(len(used))])
    least = max(PAGE_BYTES, int(fall.max() * _LARGE))
    found = []
    while fall.max() >= least:
        at = int(np.argmax(fall))
        found.append(Drop(int(times[at]), int(fall[at]), int(used[at])))
        fall[max(0, at - _WINDOW_STEPS) : at + _WINDOW_STEPS + 1] = 0
    return sorted(found, key=lambda drop: drop.t_ns)


def worst_after(row: Row, drops: list[Drop], target: Target) -> int:
    """Of the least that the host holds within the target's time after each large free, the most, bytes."""
    resident: npt.NDArray[np.float64] = np.array(row.resident, np.float64).reshape(-1, 2)
    times = np.rint(resident[:, 0] * 1e9).astype(np.int64)
    worst = 0
    for drop in drops:
        low = int(np.searchsorted(times, drop.t_ns, side="right")) - 1
        high = int(np.searchsorted(times, drop.t_ns + target.within_ns, side="right"))
        worst = max(worst, int(resident[max(0, low) : max(high, low + 1, 1), 1].min()))
    return worst
