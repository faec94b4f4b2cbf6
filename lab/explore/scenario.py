"""A scenario: one policy on one small zone, and which steps the actors may take. Its world: zone, actors, scratch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.errors import UsageError
from common.geometry import N_ORDERS, PAGE_BYTES, PAGEBLOCK_ORDER, PAGEBLOCK_ORDER_VARIABLE, TOP_ORDER, Migratetype
from common.layout import HEADER_WORDS
from common.mutex import initialise_semaphore
from common.statistics import new_histogram
from guest.allocator.entry import register_device
from guest.allocator.view import open_zone
from guest.allocator.zone import Zone, ZoneSettings
from guest.memory import FINDING_WORDS
from guest.reporting.table import find_policy
from guest.reporting.walk_locked import M_DRAINED, M_FILLED, MAILBOX_WORDS
from lab.explore.search import FOUND_WORDS
from lab.explore.state import Packing, packing_of, work_value
from lab.explore.words import K_WORDS, MOST_BLOCKS, N_KINDS, STEP_NAMES, X_WORDS, X_WORK

__all__ = ["LIVE_POLICIES", "Scenario", "World", "scenario_of"]

LIVE_POLICIES = ("boundary", "scan", "skip-walk", "rotate", "walk-locked", "hint", "bitmap", "hold", "shared")
LARGEST_PAGEBLOCK_ORDER = 3
_ALLOCS = {
    f"{order}{kind.name[0]}": 1 << (8 * order + kind)
    for order in range(min(N_ORDERS, 7))
    for kind in (Migratetype.MOVABLE, Migratetype.UNMOVABLE)
}


def _bits(allocs: tuple[str, ...]) -> int:
    return sum(_ALLOCS[text] for text in {*allocs})


@dataclass(frozen=True)
class Scenario:
    """What is explored.

    Attributes:
        pages: of the zone, whole pageblocks.
        allocs, allocs_past: what the first vCPU allocates, through its per-CPU lists, and the second, past them: an
            order and the first letter of MOVABLE or UNMOVABLE.
        capacity: blocks a batch, at most MOST_BLOCKS. slots: vCPUs that go through per-CPU lists, 1 or 2.
        steps: kinds of step that may be taken, names of ``words.STEP_NAMES``.
        min_watermark, low_watermark, high_watermark, pcp_batch, pcp_high: pages, as in ``ZoneSettings``.
        isolated: pageblocks that are isolated at a time, at most.
    """

    policy: str
    pages: int = 16
    capacity: int = 2
    min_order: int = 1
    high_water_mark: int = 1
    allocs: tuple[str, ...] = ("0M", "1M", "2U")
    allocs_past: tuple[str, ...] = ("1M", "1U", "3M")
    slots: int = 1
    isolated: int = 1
    min_watermark: int = 1
    low_watermark: int = 2
    high_watermark: int = 4
    pcp_batch: int = 1
    pcp_high: int = 4
    host_zeroed: bool = True
    steps: tuple[str, ...] = STEP_NAMES

    def check(self) -> None:
        """Look at what the constructor was given.

        Raises:
            UsageError: names the attribute and what is allowed.
        """
        find_policy(self.policy)
        if self.policy not in LIVE_POLICIES:
            raise UsageError(f"policy: {self.policy!r}; explored are {', '.join(LIVE_POLICIES)}")
        if PAGEBLOCK_ORDER > LARGEST_PAGEBLOCK_ORDER:
            raise UsageError(f"{PAGEBLOCK_ORDER_VARIABLE}: pageblocks of order {PAGEBLOCK_ORDER}; set it to 2 or 3")
        for name, value, low, high in (
            ("capacity", self.capacity, 1, MOST_BLOCKS),
            ("min_order", self.min_order, 0, TOP_ORDER),
            ("slots", self.slots, 1, 2),
            ("pages", self.pages, 1 << TOP_ORDER, 64),
        ):
            if not low <= value <= high:
                raise UsageError(f"{name}: {value}; allowed is {low} to {high}")
        wrong = [text for text in self.allocs + self.allocs_past if text not in _ALLOCS]
        if wrong:
            raise UsageError(f"allocations: {', '.join(wrong)}; allowed are {', '.join(_ALLOCS)}")
        unknown = sorted({*self.steps} - {*STEP_NAMES})
        if unknown:
            raise UsageError(f"steps: {', '.join(unknown)}; allowed are {', '.join(STEP_NAMES)}")

    def words(self) -> np.ndarray:
        """The scenario as kernels see it, int64[K_WORDS]."""
        kinds = sum(1 << index for index in range(N_KINDS) if STEP_NAMES[index] in self.steps)
        values = [
            find_policy(self.policy).number,
            self.capacity,
            kinds,
            _bits(self.allocs),
            _bits(self.allocs_past),
            os.getpid(),
            self.slots,
            self.isolated,
        ]
        assert len(values) == K_WORDS
        return np.array(values, dtype=np.int64)


# What is different where a policy asks for it: a hint takes blocks of the top order alone, so it needs some of them.
_OWN: dict[str, dict[str, Any]] = {
    "rotate": {"capacity": 1},
    "hint": {"pages": 24},
    "bitmap": {"high_water_mark": 2},
}


def scenario_of(policy: str, **overrides: Any) -> Scenario:
    """The scenario that ``policy`` is explored with unless told otherwise.

    Raises:
        UsageError: as ``Scenario.check``.
    """
    scenario = Scenario(policy, **(_OWN.get(policy, {}) | overrides))
    scenario.check()
    return scenario


@dataclass
class World:
    """A private zone, its actors, and the arrays that the kernels write to. Nobody else may use the zone."""

    scenario: Scenario
    zone: Zone
    view: Any
    words: np.ndarray
    packing: Packing
    ran: bool = False  # a root has had its run
    hand: np.ndarray = field(default_factory=lambda: np.zeros(X_WORDS, dtype=np.int64))
    hand_before: np.ndarray = field(default_factory=lambda: np.zeros(X_WORDS, dtype=np.int64))
    found: np.ndarray = field(default_factory=lambda: np.zeros(FOUND_WORDS, dtype=np.int64))
    finding: np.ndarray = field(default_factory=lambda: np.zeros(FINDING_WORDS, dtype=np.int64))
    scratch: np.ndarray = field(default_factory=lambda: np.zeros(2, dtype=np.int64))
    holds: np.ndarray = field(default_factory=new_histogram)
    ctl_before: np.ndarray = field(default_factory=lambda: np.zeros(HEADER_WORDS, dtype=np.int64))

    def __post_init__(self) -> None:
        self.ram = np.zeros(self.zone.n_pages, dtype=np.uint8)
        self.pfns = np.zeros(self.scenario.capacity, dtype=np.int64)
        self.orders = np.zeros(self.scenario.capacity, dtype=np.int64)
        # Eight words more than needed: semaphores are aligned to a cache line, as those of a segment are.
        self._mailbox = np.zeros(MAILBOX_WORDS + 8, dtype=np.int64)
        self.mailbox = int(self._mailbox.ctypes.data) + 8 * (-(int(self._mailbox.ctypes.data) // 8) % 8)
        initialise_semaphore(self.mailbox + 8 * M_FILLED)
        initialise_semaphore(self.mailbox + 8 * M_DRAINED)

    @classmethod
    def create(cls, scenario: Scenario) -> World:
        """A fresh zone, all of it free, with a reporter that has registered.

        Raises:
            UsageError: as ``Scenario.check``, and of ``packing_of``.
        """
        scenario.check()
        settings = ZoneSettings(
            memory_bytes=scenario.pages * PAGE_BYTES,
            cpus=scenario.slots,
            pcp_batch=scenario.pcp_batch,
            pcp_high=scenario.pcp_high,
            min_order=scenario.min_order,
            high_water_mark=scenario.high_water_mark,
            trigger=find_policy(scenario.policy).trigger,
            min_watermark=scenario.min_watermark,
            low_watermark=scenario.low_watermark,
            high_watermark=scenario.high_watermark,
            host_zeroed=scenario.host_zeroed,
        )
        packing = packing_of(scenario.pages, scenario.slots)
        zone = Zone.private(settings)
        if scenario.policy == "shared":
            from guest.reporting.shared import set_open

            set_open(zone.address, 1)
        register_device(zone.address, os.getpid(), 0)
        world = cls(scenario, zone, open_zone(zone.address), scenario.words(), packing)
        world.hand[X_WORK] = work_value(world.view)
        return world
