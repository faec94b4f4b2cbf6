"""hint, bitmap and hold beside a workload, step by step at random: the invariants hold after every step."""

from __future__ import annotations

import random

import pytest

from common.geometry import Migratetype
from guest.allocator.zone import Zone
from guest.reporting.cycle import Batch, Cycle, Outcome
from guest.reporting.table import POLICIES
from tests.allocator.arrange import MIB, make_zone
from tests.reporting.arrange import reported_heads

STEPS = 400
OUTCOMES = [Outcome.DONE, Outcome.DONE, Outcome.KEPT, Outcome.SENT, Outcome.FAILED, Outcome.WITHDRAWN]


class Stage:
    """One zone, one policy in some step of its run, and the blocks that the workload has."""

    def __init__(self, policy: str, seed: int) -> None:
        self.random = random.Random(seed)
        row = POLICIES[policy]
        self.zone: Zone = make_zone(
            32 * MIB,
            trigger=row.trigger,
            high_water_mark=2,
            min_order=7,
            min_watermark=64,
            low_watermark=600,
            high_watermark=1300,
        )
        self.cycle = Cycle(self.zone, policy, capacity=3)
        self.running = False
        self.batch: Batch | None = None
        self.owned: list[tuple[int, int]] = []

    def step(self) -> None:
        """Something that may happen now."""
        choice = self.random.randrange(10)
        if choice < 4:
            order = self.random.choice([0, 3, 7, 9, 10])
            pfn = self.zone.alloc(order, self.random.choice([Migratetype.MOVABLE, Migratetype.UNMOVABLE]))
            if pfn is not None:
                self.owned.append((pfn, order))
        elif choice < 7 and self.owned:
            self.zone.free(*self.owned.pop(self.random.randrange(len(self.owned))))
        elif choice == 7 and self.random.randrange(4) == 0:
            self.cycle.release(self.random.randrange(4))
        else:
            self.turn()

    def turn(self) -> None:
        """The next step of the cycle."""
        if not self.running:
            self.cycle.begin()
            self.running = True
        elif self.batch is not None:
            self.cycle.put_back(self.batch, self.random.choice(OUTCOMES))
            self.batch = None
        else:
            self.batch = self.cycle.pull()
            if self.batch is None:
                self.cycle.end()
                self.running = False

    def check(self) -> None:
        """What must hold between any two steps."""
        self.zone.validate()
        now = self.zone.statistics()
        assert now.allocated_pages == sum(1 << order for _pfn, order in self.owned)  # S4
        assert now.in_flight_blocks == (0 if self.batch is None else self.batch.pfns.size) <= self.cycle.capacity  # S10
        assert reported_heads(self.zone) == []  # S1: none of these flags anything
        if not self.cycle.policy.keeps:
            assert now.held_blocks == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("policy", ["hint", "bitmap", "hold"])
def test_s1_s3_s4_s10_hold_at_every_step(policy: str, seed: int) -> None:
    """S1, S3, S4, S10; and at the end everything comes back."""
    stage = Stage(policy, seed)
    pulled = 0
    for _step in range(STEPS):
        stage.step()
        stage.check()
        pulled += stage.batch is not None
    assert pulled > 0
    if stage.batch is not None:
        stage.cycle.put_back(stage.batch, Outcome.WITHDRAWN)
    stage.cycle.end(abandon=True)
    stage.cycle.release()
    for block in stage.owned:
        stage.zone.free(*block)
    assert stage.zone.statistics().free_pages == stage.zone.n_pages
    stage.zone.validate()
    stage.zone.close()
