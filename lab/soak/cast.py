"""Who takes part in a soak: guests that stay, guests that come and go, and what is attached to those that stay.

Each that stays is of another policy and differs in order, delay, capacity, workload, vCPUs, backend, shuffling, poison
and what it does with zeroed pages; together they are everything that a guest can be. Who comes is drawn from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["MOST_RESIDENTS", "Role", "residents", "visitor"]

_MIB = 1 << 20
_MS = 1_000_000
_DEADLINE_NS = 200 * _MS  # below how long a host is stopped at times, so that reports are withdrawn


@dataclass(frozen=True)
class Role:
    """One guest: what ``GuestSettings`` is told, and who is attached. ``attached``: workloads, or ``compact``."""

    name: str
    settings: Mapping[str, Any]
    attached: tuple[str, ...] = field(default=())

    @property
    def trusting(self) -> bool:
        """Whether its host is of the kind that claims."""
        return bool(self.settings["policy"] == "shared")


def _role(name: str, attached: tuple[str, ...] = (), **settings: Any) -> Role:
    common = {"memory": 64 * _MIB, "vcpus": 1, "fill": 0.4, "deadline_ns": _DEADLINE_NS, "high_water_mark": 0}
    return Role(name, {**common, **settings}, attached)


_RESIDENTS = (
    _role(
        "boundary", ("churn", "burst", "compact"), policy="boundary", min_order=9, delay_ns=10 * _MS,
        workload="churn", vcpus=2, shuffle=True, work_order=9,
    ),
    _role(
        "rotate", ("page-fault", "compact"), policy="rotate", min_order=0, delay_ns=5 * _MS, capacity=64,
        workload="page-fault", work_order=0, host_zeroed=True, pcp_batch=31,
    ),
    _role("shared", ("churn",), policy="shared", min_order=9, workload="burst", idle_ns=50 * _MS, vcpus=2),
    _role(
        "bitmap", (), policy="bitmap", backend="model", memory=1024 * _MIB, min_order=4, delay_ns=20 * _MS,
        workload="churn", vcpus=2, merge_likely=False,
    ),
    _role("scan", ("compact",), policy="scan", min_order=3, delay_ns=20 * _MS, workload="burst", idle_ns=30 * _MS),
    _role(
        "walk-locked", (), policy="walk-locked", min_order=9, delay_ns=50 * _MS, workload="memhog", work_order=3,
        hold_ns=30 * _MS, idle_ns=60 * _MS, vcpus=2,
    ),
    _role("hint", ("churn",), policy="hint", min_order=4, workload="build", hold_ns=5 * _MS, idle_ns=30 * _MS, vcpus=2),
    _role("hold", (), policy="hold", min_order=9, delay_ns=20 * _MS, workload="burst", idle_ns=40 * _MS, pcp_batch=0),
    _role(
        "skip-walk", ("compact",), policy="skip-walk", min_order=9, delay_ns=10 * _MS, capacity=1, workload="churn",
        poison=170,
    ),
)  # fmt: skip
MOST_RESIDENTS = len(_RESIDENTS)

_POLICIES = ("boundary", "rotate", "scan", "skip-walk", "bitmap", "hold", "off")
_WORKLOADS = ("churn", "burst", "memhog", "page-fault", "build")


def residents(count: int, seed: int) -> tuple[Role, ...]:
    """The first ``count`` of those that stay, with seeds of their own. At most MOST_RESIDENTS."""
    return tuple(
        Role(role.name, {**role.settings, "seed": (seed + index) % (1 << 32)}, role.attached)
        for index, role in enumerate(_RESIDENTS[:count])
    )


def visitor(name: str, moments: random.Random, longest_s: float) -> Role:
    """A guest that ends by itself, ``longest_s`` after it began to work at the latest."""
    order = moments.choice((0, 3, 9))
    return _role(
        name,
        policy=moments.choice(_POLICIES),
        workload=moments.choice(_WORKLOADS),
        backend=moments.choice(("shared", "shared", "shared", "model")),
        memory=moments.choice((16, 32, 64)) * _MIB,
        min_order=order,
        work_order=moments.choice((0, 3, 9)),
        delay_ns=moments.choice((0, 5, 50)) * _MS,
        hold_ns=10 * _MS,
        idle_ns=20 * _MS,
        vcpus=moments.choice((1, 1, 2)),
        shuffle=moments.random() < 0.5,
        host_zeroed=moments.random() < 0.3,
        duration_s=round(moments.uniform(longest_s / 4, longest_s), 3),
        seed=moments.randrange(1 << 32),
    )
