"""What the tests of the explorer run in a process of its own, with small pageblocks and kernels as plain Python.

``python -m tests.lab.explore_child WHAT``; prints one JSON value.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InvariantViolation
from common.geometry import PAGEBLOCK_ORDER, Migratetype
from common.layout import HEADER_WORDS, KIND_MASK, ON_PCP
from common.mutex import wait_semaphore
from guest.allocator import entry, locked, percpu
from guest.memory import use_pages
from guest.reporting.cycle import Answer, Batch, Cycle, Outcome
from lab.explore.bugs import plant
from lab.explore.explorer import ROOTS, apply, breaches_of
from lab.explore.plain import keep_views
from lab.explore.run import explore_policies
from lab.explore.scenario import LIVE_POLICIES, World, scenario_of
from lab.explore.state import pack
from lab.explore.steps import next_step
from lab.explore.trace import replay_here
from lab.explore.words import (
    ACK_DONE,
    ACK_FAILED,
    ACK_KEPT,
    BATCH,
    CONTENT_MASK,
    RUN,
    STEP_NAMES,
    X_ACK,
    X_DISCARDED,
    X_MORE,
    X_PHASE,
)

TRACES = Path(__file__).with_name("explore_traces.json")
_OUTCOMES = {ACK_DONE: Outcome.DONE, ACK_KEPT: Outcome.KEPT, ACK_FAILED: Outcome.FAILED}
_UNMIRRORED = ("stop", "register", "set_asking")
MOVABLE = int(Migratetype.MOVABLE)


def bounded(depth: int) -> Any:
    """Every policy to a small depth, from two of the roots."""
    return explore_policies(LIVE_POLICIES, {}, seconds=600, depth=depth, roots=ROOTS[:2])["explorations"]


def sound() -> Any:
    """Each kept trace on the kernels as they are; what it breaks."""
    return {one["bug"]: _replay(one) for one in json.loads(TRACES.read_text())}


def planted() -> Any:
    """Each kept trace with its bug; what it breaks."""
    found = {}
    for one in json.loads(TRACES.read_text()):
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            plant(one["bug"])
            os.write(write, _replay(one).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as stream:
            found[one["bug"]] = stream.read()
        os.waitpid(child, 0)
    return found


def between() -> Any:
    """A pageblock is isolated at the moment between a free's first look at it and its slot lock: is the page kept?

    True if the page is on a per-CPU list afterwards, from where it would be handed out.
    """
    world = World.create(scenario_of("boundary"))
    pfn, lock = world.zone.alloc(1, cpu=0), percpu.lock_slot
    assert pfn is not None

    def isolate_first(view: Any, cpu: int) -> None:
        percpu.lock_slot = lock
        world.zone.isolate(pfn >> PAGEBLOCK_ORDER)
        lock(view, cpu)

    percpu.lock_slot = isolate_first
    world.zone.free(pfn, 1, cpu=0)
    world.zone.validate()
    return bool(int(world.zone.page_states()[pfn]) & KIND_MASK == ON_PCP)


def _replay(one: dict[str, Any]) -> str:
    try:
        replay_here(trace=one["trace"], **one["scenario"])
    except InvariantViolation as error:
        return str(error)
    return ""


class Mirror:
    """The same steps once more, through ``Zone`` and ``Cycle``: the reporter of the explorer is to be the real one."""

    def __init__(self, policy: str) -> None:
        self.explored = World.create(scenario_of(policy))
        self.world = World.create(scenario_of(policy))
        self.zone = self.world.zone
        self.cycle = Cycle(self.zone, policy, capacity=self.world.scenario.capacity, residence=self._residence)
        self.batch: Batch | None = None
        self.failed = False

    def _residence(self, pfn: int, order: int) -> np.ndarray:
        present: np.ndarray = (self.explored.ram[pfn : pfn + (1 << order)] & CONTENT_MASK) != 0
        return present

    def take(self, step: int) -> None:
        """One step on both sides."""
        name, first, second = STEP_NAMES[step >> 12], (step >> 6) & 63, step & 63
        ack, discarded = int(self.explored.hand[X_ACK]), int(self.explored.hand[X_DISCARDED])
        apply(self.explored, step)
        assert not self.explored.found[0], breaches_of(self.explored.found)
        if name in {"answer", "keep"}:
            return
        if name in {"put_back", "withdraw"}:
            self._put_back(ack if name == "put_back" else 0, discarded)
        elif name == "walk":
            self._walk(first)
        else:
            getattr(self, f"_{name}")(first, second)

    def same(self) -> bool:
        """Both zones are the same, byte for byte of what means something."""
        states = []
        for world in (self.explored, self.world):
            packing, state = world.packing, np.zeros(world.packing.state_bytes, dtype=np.uint8)
            pack(world.view, world.words, packing.words, packing.nodes, self.explored.hand, self.explored.ram, state)
            states.append(state)
        phase, more = self.explored.hand[X_PHASE], bool(self.explored.hand[X_MORE])
        return bool((states[0] == states[1]).all()) and (phase not in {RUN, BATCH} or self.cycle._more == more)

    def _alloc(self, order: int, kind: int) -> None:
        self._take_pages(order, kind, 0)

    def _alloc_past(self, order: int, kind: int) -> None:
        self._take_pages(order, kind, -1)

    def _take_pages(self, order: int, kind: int, cpu: int) -> None:
        pfn = self.zone.alloc(order, Migratetype(kind), cpu=cpu)
        if pfn is not None:
            use_pages(self.world.view, self.zone.address, 0, HEADER_WORDS, self.world.finding, pfn, order, 1)

    def _free(self, pfn: int, _second: int, cpu: int = 0) -> None:
        self.zone.free(pfn, int(self.zone.page_states()[pfn]) & 0xF, cpu=cpu)

    def _free_past(self, pfn: int, second: int) -> None:
        self._free(pfn, second, -1)

    def _drain(self, slot: int, _second: int) -> None:
        self.zone.drain(slot)

    def _begin(self, _first: int, _second: int) -> None:
        wait_semaphore(self.zone.work_address)
        self.failed = False
        self.cycle.begin()

    def _pull(self, _first: int, _second: int) -> None:
        self.batch = self.cycle.pull()

    def _put_back(self, ack: int, discarded: int) -> None:
        assert self.batch is not None
        outcome = _OUTCOMES.get(ack, Outcome.WITHDRAWN)
        self.failed = outcome in {Outcome.FAILED, Outcome.WITHDRAWN}
        self.cycle.put_back(self.batch, Answer(outcome, np.arange(self.batch.pfns.size) < discarded))

    def _walk(self, command: int) -> None:
        self._begin(0, 0)
        while (batch := self.cycle.pull()) is not None:
            self.cycle.put_back(batch, Outcome.FAILED if command else Outcome.DONE)
        self.failed = command != 0

    def _end(self, _first: int, _second: int) -> None:
        self.cycle.end(abandon=self.failed)

    def _rearm(self, _first: int, _second: int) -> None:
        entry.locked_request(self.zone.address)

    _command = _rearm

    def _isolate(self, pageblock: int, _second: int) -> None:
        locked.locked_isolate(self.zone.address, pageblock)

    def _unisolate(self, pageblock: int, _second: int) -> None:
        self.zone.unisolate(pageblock)

    def _set_type(self, pageblock: int, kind: int) -> None:
        self.zone.set_pageblock_migratetype(pageblock, Migratetype(kind))

    def _rotate(self, order: int, kind: int) -> None:
        self.zone.rotate(order, Migratetype(kind), self.zone.free_list(order, Migratetype(kind))[1][0])

    def _release(self, _first: int, _second: int) -> None:
        self.cycle.release(16)


def mirrored(steps: int) -> Any:
    """Random steps under each policy; how many of each kind were the same on both sides, or where they were not."""
    found: dict[str, Any] = {}
    for policy in LIVE_POLICIES:
        dice, mirror, taken = random.Random(7), Mirror(policy), dict.fromkeys(STEP_NAMES, 0)
        for _ in range(steps):
            possible: dict[str, list[int]] = {}
            world, step = mirror.explored, -1
            while (step := int(next_step(world.view, world.words, world.hand, world.ram, np.int64(step)))) >= 0:
                if STEP_NAMES[step >> 12] not in _UNMIRRORED and step != (STEP_NAMES.index("walk") << 12 | 2 << 6):
                    possible.setdefault(STEP_NAMES[step >> 12], []).append(step)
            name = dice.choice(sorted(possible))
            mirror.take(dice.choice(possible[name]))
            taken[name] += 1
            if not mirror.same():
                return {"policy": policy, "taken": taken, "last": name}
        found[policy] = taken
    return found


if __name__ == "__main__":
    keep_views()
    what: Any = {"bounded": bounded, "sound": sound, "planted": planted, "mirrored": mirrored, "between": between}[
        sys.argv[1]
    ]
    json.dump(what(*map(int, sys.argv[2:])), sys.stdout)
