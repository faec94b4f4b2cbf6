"""Processes that die while they allocate: forked from one that has its kernels ready, killed after some microseconds.

``python -m tests.stress.nursery LAB GUEST KILLS SEED WAY``. The children never touch a page, so the RAM object and the
resident map go on agreeing; what they hold when they die stays allocated. Forking is safe here alone: one thread.
``WAY``: through per-CPU lists (``pcp``) or past them (``buddy``). Prints how many of the dead held the zone's lock.
"""

from __future__ import annotations

import os
import random
import select
import signal
import sys

import numpy as np

from common.geometry import Migratetype
from common.native import kernel
from guest.allocator.percpu import alloc_pages, free_pages
from guest.allocator.shuffle import next_random
from guest.allocator.view import open_zone
from guest.allocator.zone import Zone

__all__ = ["HELD_BLOCKS", "MAX_ORDER"]

HELD_BLOCKS = 8  # of one child; each may stay allocated for good
MAX_ORDER = 3
MOVABLE = int(Migratetype.MOVABLE)


@kernel
def hammer(address, cpu, held, seed, rounds):  # type: ignore[no-untyped-def]
    """Free and allocate, ``rounds`` times, into random places of ``held`` (int64[n, 2]: pfn or -1, order)."""
    zone = open_zone(address)
    state = seed
    for _round in range(rounds):
        state = next_random(state)
        place = (state >> 20) % held.shape[0]
        if held[place, 0] >= 0:
            if free_pages(zone, cpu, held[place, 0], held[place, 1]) != 0:
                return False
            held[place, 0] = -1
        else:
            order = (state >> 40) % (MAX_ORDER + 1)
            held[place, 0] = alloc_pages(zone, cpu, order, MOVABLE, 0)
            held[place, 1] = order
    return True


def _child(zone: Zone, write_end: int, seed: int, *, through_pcp: bool) -> None:
    held = np.full((HELD_BLOCKS, 2), -1, dtype=np.int64)
    cpu = zone.claim_cpu() if through_pcp else -1
    os.write(write_end, b"!")
    while hammer(zone.address, cpu, held, seed, 1 << 20):
        seed += 1
    os._exit(1)  # a free of its own block was refused


def _main(lab: str, guest: str, kills: int, seed: int, way: str) -> None:
    zone = Zone.attach(lab, guest)
    held = np.full((HELD_BLOCKS, 2), -1, dtype=np.int64)
    for warm_cpu in (-1, zone.claim_cpu()):
        hammer(zone.address, warm_cpu, held, seed, 64)
        for pfn, order in held.tolist():
            if pfn >= 0:
                zone.free(pfn, order, cpu=warm_cpu)
        held[:] = -1
    zone.release_cpu(warm_cpu)
    moments = random.Random(seed)
    before = zone.statistics().repairs
    for number in range(kills):
        read_end, write_end = os.pipe()
        child = os.fork()
        if not child:
            try:
                _child(zone, write_end, seed + number, through_pcp=way == "pcp")
            finally:
                os._exit(2)
        os.close(write_end)
        os.read(read_end, 1)
        os.close(read_end)
        select.select([], [], [], moments.uniform(0.0, 0.002))
        os.kill(child, signal.SIGKILL)
        _pid, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"child {number} ended by itself: {status}"
        zone.validate()  # takes every lock: repairs what the dead one held, and must find nothing wrong then
    sys.stdout.write(f"{zone.statistics().repairs - before}\n")


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
