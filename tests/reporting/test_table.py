"""The table of policies: every row can be driven, and its defaults are what a guest uses when nobody says otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from common.errors import UsageError
from common.settings import GuestSettings
from guest.allocator.zone import Zone, ZoneSettings
from guest.machine import Machine
from guest.reporting.cycle import MAX_CAPACITY, Batch, Cycle, Outcome
from guest.reporting.table import POLICIES, find_policy
from tests.allocator.arrange import MIB

# Numbers are what the kernels branch on; the versions' constants are those of the patches.
CONSTANTS = {
    "off": (0, "off", 0, 16, 32),
    "boundary": (1, "hwm", 100_000_000, 16, 32),
    "scan": (2, "hwm", 100_000_000, 16, 32),
    "skip-walk": (3, "hwm", 100_000_000, 16, 32),
    "rotate": (4, "any", 2_000_000_000, 32, 32),
}


@pytest.mark.parametrize("name", sorted(CONSTANTS))
def test_number_trigger_delay_capacity_and_mark(name: str) -> None:
    policy = find_policy(name)
    assert (
        policy.number,
        policy.trigger,
        policy.delay_ns,
        policy.capacity,
        policy.high_water_mark,
    ) == CONSTANTS[name]


def test_rows_can_be_told_apart() -> None:
    assert len({policy.number for policy in POLICIES.values()}) == len(POLICIES)
    assert all(name == policy.name and policy.summary for name, policy in POLICIES.items())
    assert all(1 <= policy.capacity <= MAX_CAPACITY for policy in POLICIES.values())


def test_every_trigger_of_the_table_is_one_of_a_zone() -> None:
    for policy in POLICIES.values():
        Zone.private(ZoneSettings(16 * MIB, trigger=policy.trigger)).close()


def test_an_unknown_policy_is_refused_with_what_there_is() -> None:
    with pytest.raises(UsageError, match=r"policy: 'best'; allowed are .*boundary.*rotate.*scan"):
        find_policy("best")


@pytest.mark.parametrize("name", sorted(name for name, row in CONSTANTS.items() if row[1] != "off"))
def test_a_cycle_of_each_has_that_capacity_and_reports_a_whole_zone(name: str) -> None:
    """Through ``table``: begin, pull, put back, end of that number, and of no other."""
    zone = Zone.private(ZoneSettings(256 * MIB, trigger=find_policy(name).trigger))
    cycle = Cycle(zone, name)
    assert cycle.capacity == find_policy(name).capacity
    sizes: list[int] = []

    def report(batch: Batch) -> Outcome:
        sizes.append(len(batch.pfns))
        return Outcome.KEPT

    cycle.run(report)
    assert sum(sizes) == 64  # blocks of 4 MiB: no watermark nor budget of any comes before the last one
    assert max(sizes) == cycle.capacity
    assert zone.unreported_pages() == 0
    zone.validate()
    zone.close()


def test_off_reports_nothing() -> None:
    zone = Zone.private(ZoneSettings(16 * MIB))
    assert Cycle(zone, "off").run(lambda _batch: Outcome.DONE).batches == 0
    assert zone.statistics().runs == 0
    zone.close()


@pytest.mark.parametrize("name", ["boundary", "rotate"])
@pytest.mark.parametrize("given", [False, True])
def test_a_guest_takes_what_nobody_set_from_its_policy(lab_name: str, name: str, given: bool) -> None:
    """``--delay``, ``--capacity`` and ``--high-water-mark``."""
    changes: dict[str, Any] = {"delay_ns": 5_000_000, "capacity": 7, "high_water_mark": 3} if given else {}
    settings = GuestSettings(
        host=lab_name, name="g0", memory=16 * MIB, backend="model", workload="none", policy=name, **changes
    )
    policy = find_policy(name)
    with Machine(settings) as machine:
        used = machine.result().settings
    expected = {
        "delay_ns": policy.delay_ns,
        "capacity": policy.capacity,
        "high_water_mark": policy.high_water_mark,
    } | changes
    assert {key: used[key] for key in expected} == expected
