"""A process that does everything that a guest's processes do to a zone, until it is killed on the way.

``main`` is called in a child of a nursery, with a place to die at armed.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import numpy as np

from common.geometry import PAGE_BYTES, PAGEBLOCK_ORDER, TOP_ORDER, Migratetype
from common.layout import N_ASKS
from common.ramobject import RamObject
from common.statistics import HISTOGRAM_WORDS
from guest.allocator.asks import ASK, begin_ask
from guest.allocator.buddy import is_missing
from guest.allocator.entry import register_device, unregister_device
from guest.allocator.install import wait_for_install
from guest.allocator.locked import lock_zone, unlock_zone
from guest.allocator.view import open_zone
from guest.allocator.zone import Zone
from guest.memory import FINDING_WORDS, present_pages
from guest.reporting import shared
from guest.reporting.cycle import Batch, Cycle, Outcome
from guest.workloads import engine
from host.proof import punch_hole

__all__ = ["NEVER_REACHED", "main"]

NEVER_REACHED = 3
ROUNDS = 40
POLICIES = ("boundary", "rotate", "bitmap", "hint", "hold", "walk-locked", "skip-walk")
TYPES = (Migratetype.MOVABLE, Migratetype.MOVABLE, Migratetype.UNMOVABLE, Migratetype.RECLAIMABLE)
MOST_HELD = 24


class Victim:
    """One process's hands on a zone."""

    def __init__(self, lab: str, guest: str, seed: int) -> None:
        self.random = random.Random(seed)
        self.zone = Zone.attach(lab, guest)
        self.ram = RamObject.open(lab, guest, ram_bytes=self.zone.ram_bytes)
        self.memory = np.frombuffer(self.ram.map(), dtype=np.uint8)
        self.address = int(self.memory.ctypes.data)
        self.cpu = self.zone.claim_cpu(self.address)
        self.view = open_zone(self.zone.address)
        self.state = np.zeros(engine.STATE_WORDS, dtype=np.int64)
        self.state[engine.S_CPU] = self.cpu
        self.held = np.zeros((MOST_HELD, engine.HELD_COLUMNS), dtype=np.int64)
        self.times = np.zeros((engine.TIMES_ROWS, HISTOGRAM_WORDS), dtype=np.int64)
        self.finding = np.zeros(FINDING_WORDS, dtype=np.int64)
        self.scratch = np.zeros(2, dtype=np.int64)
        self.plain: list[tuple[int, int]] = []  # allocated and never used

    def work(self) -> None:
        """A round of everything."""
        for _ in range(12):
            self.random.choice((self.acquire, self.acquire, self.release))()
        self.move_pageblocks()
        self.allocate_unused()
        self.zone.drain(self.cpu)
        for policy in self.random.sample(POLICIES, 3):
            self.report_under(policy)
        self.install()
        while self.state[engine.S_HELD] > MOST_HELD // 2:
            self.release()

    def acquire(self) -> None:
        order = self.random.choice((0, 0, 1, 3, 4))
        engine.acquire(
            self.view,
            self.zone.address,
            self.address,
            self.state,
            self.held,
            self.times,
            self.finding,
            self.scratch,
            order,
            int(self.random.choice(TYPES)),
        )

    def release(self) -> None:
        count = int(self.state[engine.S_HELD])
        if count:
            index = self.random.randrange(count)
            engine.release(self.view, self.address, self.state, self.held, self.finding, index, self.zone.min_order)

    def allocate_unused(self) -> None:
        """Large blocks, of types that have to be stolen, through the lists of pageblock order and past them."""
        for order in (PAGEBLOCK_ORDER, 6, 10):
            pfn = self.zone.alloc(order, self.random.choice(TYPES), cpu=self.cpu)
            if pfn is not None:
                self.plain.append((pfn, order))
        while len(self.plain) > 2:
            pfn, order = self.plain.pop(self.random.randrange(len(self.plain)))
            self.zone.free(pfn, order, cpu=self.cpu)

    def move_pageblocks(self) -> None:
        chosen = self.random.sample(range(self.zone.n_pages >> PAGEBLOCK_ORDER), 4)
        whole = self.zone.free_list(TOP_ORDER, Migratetype.MOVABLE)  # halves of a free block of the top order
        for pageblock in [*chosen, *(pfn >> PAGEBLOCK_ORDER for pfn, _reported in whole[:1])]:
            self.zone.isolate(pageblock)
            self.zone.unisolate(pageblock)
            self.zone.set_pageblock_migratetype(pageblock, self.random.choice(TYPES))

    def report_under(self, policy: str) -> None:
        assert register_device(self.zone.address, os.getpid(), self.zone.device_pid()) == 0
        cycle = Cycle(self.zone, policy, capacity=4, residence=self.residence)
        outcomes = (Outcome.DONE, Outcome.DONE, Outcome.FAILED)
        poisons = self.zone.settings().poison != 0  # then nothing is discarded (S12)
        cycle.run(self._carry_out(Outcome.KEPT if poisons else self.random.choice(outcomes)))
        cycle.release()
        unregister_device(self.zone.address, os.getpid())

    def install(self) -> None:
        """Ask for a block that is not there, populate it as a host would, and end the ask."""
        assert register_device(self.zone.address, os.getpid(), self.zone.device_pid()) == 0
        shared.set_open(self.zone.address, 1)
        shared.set_asking(self.zone.address, os.getpid())
        for order in range(4, TOP_ORDER + 1):
            for pfn, _reported in self.zone.free_list(order, Migratetype.MOVABLE):
                if is_missing(self.view, pfn, order):
                    self._install_block(pfn)
                    break
        shared.refuse_asks(self.zone.address)
        shared.set_open(self.zone.address, 0)
        unregister_device(self.zone.address, os.getpid())

    def _install_block(self, pfn: int) -> None:
        assert lock_zone(self.view)
        index = ASK - int(begin_ask(self.view, pfn))
        unlock_zone(self.view)
        asked = np.zeros((N_ASKS, shared.ASK_COLUMNS), dtype=np.int64)
        assert shared.collect_asks(self.zone.address, asked) == 1
        first, order, sequence = asked[0, 1:].tolist()
        os.posix_fallocate(self.ram.fileno(), first * PAGE_BYTES, PAGE_BYTES << order)
        assert shared.answer_ask(self.zone.address, index, sequence, True) == 1
        assert wait_for_install(self.view, index)

    def residence(self, pfn: int, order: int) -> np.ndarray:
        return present_pages(self.ram.fileno(), pfn, order)

    def _carry_out(self, outcome: Outcome) -> Callable[[Batch], Outcome]:
        def carry_out(batch: Batch) -> Outcome:
            for pfn, order in zip(batch.pfns.tolist(), batch.orders.tolist(), strict=True):
                if outcome is Outcome.KEPT:
                    break
                punch_hole(self.ram.fileno(), pfn * PAGE_BYTES, PAGE_BYTES << order)
            return outcome

        return carry_out


def main(arguments: list[str]) -> int:
    """``[lab, guest, seed]``. NEVER_REACHED if it was not killed after ROUNDS rounds."""
    lab, guest, seed = arguments
    victim = Victim(lab, guest, int(seed))
    for _ in range(ROUNDS):
        victim.work()
        assert victim.finding[0] == 0
        assert victim.state[engine.S_REFUSED] == 0
    return NEVER_REACHED
