"""S1, S3 to S6, B1: a process is killed at each place in the kernels. Whoever locks next repairs; nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common import faults
from common.errors import AllocatorError
from common.geometry import PAGE_BYTES, PAGEBLOCK_ORDER
from common.layout import INSTALLED, RESIDENT
from common.ramobject import RamObject
from guest.allocator.entry import unregister_device
from guest.allocator.locked import ALLOC_NO_WATERMARKS
from guest.allocator.zone import Zone, ZoneSettings
from guest.inherit import finish_settling, reap
from guest.memory import present_pages
from guest.reporting.claims import take_over
from guest.reporting.cycle import Cycle
from guest.workloads.vcpu import VCpu, WorkloadSettings
from lab.nursery import Nursery
from tests.kill.victim import NEVER_REACHED
from tests.support import leftovers

MIB = 1 << 20
GUEST = "g0"
PATIENCE_S = 60.0
IN_KERNELS = [name for name in faults.POINTS if faults.NUMBERS[name] < faults.NUMBERS["segment.created"]]


class Survivor:
    """The process of this test: it owns the guest, works in the zone, and sees to what the dead leave."""

    def __init__(self, lab: str, *, poison: int = 0) -> None:
        self.lab = lab
        self.ram = RamObject.create(lab, GUEST, ram_bytes=16 * MIB)
        settings = ZoneSettings(
            16 * MIB,
            cpus=3,
            pcp_batch=8,
            pcp_high=8192,
            min_order=4,
            high_water_mark=1,
            ram_bytes=16 * MIB,
            poison=poison,
        )
        self.zone = Zone.create(lab, GUEST, settings=settings)
        self.memory = np.frombuffer(self.ram.map(), dtype=np.uint8)
        work = WorkloadSettings("churn", 400, 0, 0, 0, 7)
        self.address = int(self.memory.ctypes.data)
        self.vcpu = VCpu(self.zone, self.address, work, on_error=self._fail)

    @staticmethod
    def _fail(error: BaseException) -> None:
        raise error

    def work(self) -> None:
        for _ in range(4):
            self.vcpu.step(200)

    def sweep(self) -> None:
        """Bring all that is free to this process's per-CPU lists: what the dead one's lists lead to is there then."""
        pfns = []
        while (pfn := self.zone.alloc(0, cpu=self.vcpu.cpu, flags=ALLOC_NO_WATERMARKS)) is not None:
            pfns.append(pfn)
        for pfn in pfns:
            self.zone.free(pfn, 0, cpu=self.vcpu.cpu)

    def residence(self, pfn: int, order: int) -> np.ndarray:
        return present_pages(self.ram.fileno(), pfn, order)

    def bury(self) -> None:
        """What a guest does about a process that died: its pages, its reports, what it held."""
        finish_settling(self.zone, self.residence)
        assert take_over(self.zone, os.getpid(), self.residence, stale_pid=self.zone.device_pid()) == 0
        unregister_device(self.zone.address, os.getpid())
        Cycle(self.zone, "hold").release()
        reap(self.zone, self.address)
        for pageblock in range(self.zone.n_pages >> PAGEBLOCK_ORDER):  # who isolates is nobody in particular: it stays
            with contextlib.suppress(AllocatorError):
                self.zone.unisolate(pageblock)

    def check(self) -> None:
        """S4: every page is free, on a per-CPU list, or this process's own. And what is there is what the map says."""
        self.zone.validate()
        now = self.zone.statistics()
        mine = sum(1 << int(order) for order in self.vcpu.held[: int(self.vcpu.state[2]), 1])
        assert now.in_flight_pages == now.in_flight_blocks == now.held_pages == now.isolated_pages == 0
        assert now.allocated_pages == mine
        believed = np.isin(self.zone.resident_map(), (RESIDENT, INSTALLED))
        there = present_pages(self.ram.fileno(), 0, 12)
        assert np.flatnonzero(believed != there).tolist() == []
        assert now.resident_pages * PAGE_BYTES == self.ram.resident_bytes()

    def end(self) -> None:
        self.vcpu.release_all()
        assert self.vcpu.complaint() == ""
        self.zone.release_cpu(self.vcpu.cpu)
        assert self.zone.statistics().free_pages == self.zone.n_pages
        self.zone.unlink()
        self.zone.close()
        self.ram.unlink()
        del self.memory
        self.ram.close()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Uncompiled: the same stores in the same order, a second to start, and a place to die between any two of them."""
    with Nursery(tmp_path_factory.mktemp("kill"), fault="kernels", compiled=False) as started:
        yield started


def kill_at(nursery: Nursery, survivor: Survivor, point: str, seed: int, *, surely: bool = True) -> None:
    """Let a process die there, and see to it that the survivor finds everything in order.

    ``surely``: it has to come to that place so often.
    """
    survivor.work()
    survivor.zone.drain(survivor.vcpu.cpu)
    child = nursery.start("victim", "tests.kill.victim:main", [survivor.lab, GUEST, str(seed)], fault=point)
    try:
        assert child.ended_within(PATIENCE_S), "it hangs"
        code = child.reap()
    finally:
        child.close()
    if code == NEVER_REACHED:
        assert not surely, f"{point} was never reached"
        survivor.bury()  # it ended without giving anything back
        return
    assert code == -signal.SIGKILL, child.err.read_text()
    pfn = survivor.zone.alloc(4)  # the next locker repairs the zone; the slot of the dead is still as it was
    assert pfn is not None
    survivor.zone.free(pfn, 4)
    if point.startswith("walk.handed"):  # S5: the host may be discarding them
        assert survivor.zone.statistics().in_flight_blocks > 0
    survivor.work()  # whoever lives goes on beside it, and gets what the dead one had
    survivor.sweep()
    survivor.zone.validate()
    survivor.zone.drain(survivor.vcpu.cpu)
    survivor.bury()
    survivor.check()


@pytest.mark.parametrize("point", IN_KERNELS)
def test_s3_s4_death_in_a_kernel_is_repaired(lab_name: str, nursery: Nursery, point: str) -> None:
    """At the first and at the third time: each finds the zone in another state."""
    survivor = Survivor(lab_name)
    for seed, count in enumerate((1, 3)):
        kill_at(nursery, survivor, f"{point}:{count}", seed, surely=count == 1)
    survivor.end()


@pytest.fixture(scope="module")
def compiled_nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Compiled as in earnest, but for the places; the first start compiles them into a cache of their own."""
    with Nursery(tmp_path_factory.mktemp("kill-compiled"), fault="kernels") as started:
        yield started


@pytest.mark.stress
@pytest.mark.timeout(900)
@pytest.mark.parametrize("point", IN_KERNELS)
def test_s3_s4_death_in_a_compiled_kernel_is_repaired(lab_name: str, compiled_nursery: Nursery, point: str) -> None:
    """As above, with the stores in the order that the compiler gave them."""
    survivor = Survivor(lab_name)
    for seed, count in enumerate((1, 2, 3, 4, 6)):
        kill_at(compiled_nursery, survivor, f"{point}:{count}", 100 + seed, surely=count == 1)
    survivor.end()


def test_s6_z4_a_zone_that_poisons(lab_name: str, nursery: Nursery) -> None:
    """What the dead had is poisoned before anybody else gets it."""
    survivor = Survivor(lab_name, poison=0xAA)
    for seed, point in enumerate(("touch.noted:9", "touch.page:30", "touch.marked:9", "take-in.claimed:5")):
        kill_at(nursery, survivor, point, seed)
    survivor.end()


def test_every_place_says_what_it_is_between() -> None:
    assert all(len(text) > 20 for text in faults.POINTS.values())
    assert not faults.ARMED
    assert leftovers("no-such-lab") == []


def test_the_dead_leave_their_output(tmp_path: Path) -> None:
    with Nursery(tmp_path, fault="later", compiled=False) as nursery:
        child = nursery.start("wrong", "tests.kill.victim:main", ["no-such-lab", GUEST, "0"])
        assert child.ended_within(PATIENCE_S)
        assert child.reap() == 1
        child.close()
        assert "no-such-lab" in child.err.read_text()
