"""The exploration itself: frontier, parents, the time and the memory that it may use, and the way to what it found."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from common.errors import InvariantViolation
from common.native import JIT
from guest.allocator.validate import MAX_BREACHES, note
from lab.explore.contract import MESSAGES, SPINNING
from lab.explore.scenario import Scenario, World
from lab.explore.search import expand, hash_of, insert, refill, step_and_check
from lab.explore.state import pack, unpack
from lab.explore.steps import may_step, next_step
from lab.explore.words import (
    ALLOC_PAST,
    ANSWER,
    BEGIN,
    COMMAND,
    END,
    FREE_PAST,
    K_ALLOCS,
    K_ALLOCS_PAST,
    K_KINDS,
    PULL,
    PUT_BACK,
    WALK,
    X_HOST,
    X_MORE,
)

__all__ = ["ROOTS", "Exploration", "Violation", "apply", "breaches_of", "explore", "root_steps", "walk_steps"]

_CHUNK = 4096 if JIT else 16
_ROOM = 16 * _CHUNK + 256


@dataclass(frozen=True)
class Violation:
    """What was found, and the shortest way to it: steps from the fresh zone on."""

    breaches: tuple[str, ...]
    steps: tuple[int, ...]


@dataclass
class Exploration:
    """What an exploration came to.

    Attributes:
        states: distinct states seen. transitions: steps taken and checked. depth: every state within so many steps of a
            root has been seen. levels: states first seen at each depth.
        why: ``exhausted``, ``time``, ``memory``, ``depth`` or ``violation``.
    """

    scenario: Scenario
    states: int = 0
    transitions: int = 0
    depth: int = 0
    seconds: float = 0.0
    why: str = ""
    levels: list[int] = field(default_factory=list)
    violation: Violation | None = None


def breaches_of(found: np.ndarray) -> tuple[str, ...]:
    """What ``found`` says, in words."""
    triples = found[1:].reshape(-1, 3)[: min(int(found[0]), MAX_BREACHES)]
    return tuple(MESSAGES[int(code)].format(int(one), int(two), int(two)) for code, one, two in triples)


ROOTS = ("fresh", "full", "reported")


def root_steps(world: World, root: str) -> list[int]:
    """Take the steps from the fresh zone to a root. ``world.found`` says if something did not hold on the way.

    ``full``: everything that may be allocated is, in blocks of the minimum order. ``reported``: of those every second
    one was freed, and a whole run has reported them.
    """
    steps: list[int] = []
    if root == "fresh":
        return steps
    alloc = (ALLOC_PAST << 12) | (world.scenario.min_order << 6) | 1
    while len(steps) < world.zone.n_pages:
        before = int(world.zone.statistics().free_pages)
        apply(world, alloc)
        if world.found[0] or world.zone.statistics().free_pages == before:
            break
        steps.append(alloc)
    if root == "reported":
        block = 1 << world.scenario.min_order
        taken = [pfn for pfn in range(0, world.zone.n_pages, 2 * block) if world.ram[pfn]]
        run = [(FREE_PAST << 12) | (pfn << 6) for pfn in taken]
        while not world.found[0]:
            step = run.pop(0) if run else _next_of_run(world)
            if step < 0:
                break
            if len(steps) > 8 * world.zone.n_pages:
                note(world.found, SPINNING, len(steps), 0)
                break
            apply(world, step)
            steps.append(step)
    return steps


def _next_of_run(world: World) -> int:
    """What brings a run on, with a host that discards everything; -1: it is over."""
    count = int(world.hand[X_HOST])
    for kind, first in ((COMMAND, 0), (BEGIN, 0), (WALK, 0), (PULL, 0), (ANSWER, count), (PUT_BACK, 0), (END, 0)):
        if kind == COMMAND and world.ran:
            continue
        if may_step(world.view, world.words, world.hand, world.ram, kind, first, 0):
            world.ran = True
            return (kind << 12) | (first << 6)
    return -1


def apply(world: World, step: int) -> None:
    """Take one step and check it; ``world.found`` says what was found."""
    step_and_check(
        world.zone.address,
        world.view,
        world.words,
        world.hand,
        world.ram,
        world.mailbox,
        world.pfns,
        world.orders,
        world.holds,
        world.scratch,
        world.finding,
        world.hand_before,
        world.ctl_before,
        step,
        world.found,
    )


def walk_steps(world: World, steps: tuple[int, ...]) -> None:
    """Take ``steps`` one after the other, each of which must be possible, whatever the scenario leaves out.

    Raises:
        InvariantViolation: after one of them something did not hold. ValueError: one is not possible.
    """
    any_step = world.words.copy()
    any_step[[K_KINDS, K_ALLOCS, K_ALLOCS_PAST]] = -1
    for index, step in enumerate(steps):
        if next_step(world.view, any_step, world.hand, world.ram, np.int64(step - 1)) != step:
            raise ValueError(f"step {index} of the trace is not possible there")
        before = _retake(world)
        apply(world, step)
        if not world.found[0] and step >> 12 == PULL and world.hand[X_MORE] and (before == _retake(world)).all():
            note(world.found, SPINNING, 0, 0)
        if world.found[0]:
            raise InvariantViolation(f"step {index}: " + "; ".join(breaches_of(world.found)))


def _retake(world: World) -> np.ndarray:
    """Put the state down and take it up again, as the search does between any two steps; its bytes."""
    packing, state = world.packing, np.zeros(world.packing.state_bytes, dtype=np.uint8)
    pack(world.view, world.words, packing.words, packing.nodes, world.hand, world.ram, state)
    unpack(world.view, world.words, packing.words, packing.nodes, state, world.hand, world.ram)
    return state


class _Search:
    """State of one exploration."""

    def __init__(self, scenario: Scenario, memory_bytes: int) -> None:
        self.scenario = scenario
        self.world = World.create(scenario)
        size = self.world.packing.state_bytes
        self.table = np.zeros(1 << (20 if JIT else 16), dtype=np.uint64)
        self.new_states = np.zeros((_ROOM, size), dtype=np.uint8)
        self.new_parents = np.zeros(_ROOM, dtype=np.int64)
        self.new_steps = np.zeros(_ROOM, dtype=np.int64)
        self.counts = np.zeros(3, dtype=np.int64)
        self.base = np.zeros(self.world.zone.metadata_bytes, dtype=np.uint8)
        self.base_ram = np.zeros(self.world.zone.n_pages, dtype=np.uint8)
        self.parents: list[np.ndarray] = []
        self.steps: list[np.ndarray] = []
        self.roots: list[list[int]] = []
        self.memory_bytes = memory_bytes
        self.result = Exploration(scenario)

    def add_roots(self, roots: tuple[str, ...]) -> np.ndarray:
        """The roots, packed. One that a bug keeps from being reached is left out: it will be found on the way."""
        packed: list[np.ndarray] = []
        for root in roots:
            world = World.create(self.scenario)
            steps = root_steps(world, root)
            state = np.zeros(world.packing.state_bytes, dtype=np.uint8)
            packing = world.packing
            pack(world.view, world.words, packing.words, packing.nodes, world.hand, world.ram, state)
            if not world.found[0] and insert(self.table, np.uint64(hash_of(state))):
                packed.append(state)
                self.roots.append(steps)
        count = len(packed)
        self.parents.append(-1 - np.arange(count, dtype=np.int64))
        self.steps.append(np.zeros(count, dtype=np.int64))
        self.result.states = count
        self.result.levels = [count]
        return np.array(packed)

    def expand(self, states: np.ndarray, first_id: int) -> int:
        """Expand a chunk; how many of its states were."""
        world, self.counts[0] = self.world, 0
        found = expand(
            world.zone.address,
            world.words,
            world.packing.words,
            world.packing.nodes,
            world.mailbox,
            self.base,
            self.base_ram,
            world.hand,
            world.ram,
            world.pfns,
            world.orders,
            world.holds,
            world.scratch,
            world.finding,
            world.ctl_before,
            states,
            first_id,
            self.table,
            self.new_states,
            self.new_parents,
            self.new_steps,
            self.counts,
            world.found,
        )
        return int(found)

    def level(self, frontier: list[np.ndarray], first_id: int, until: float) -> tuple[list[np.ndarray], str]:
        """Expand a whole level; the next one, and why it ended before its time if it did."""
        following: list[np.ndarray] = []
        size, done = 0, 0
        for block in frontier:
            at = 0
            while at < len(block):
                self._make_room()
                expanded = self.expand(block[at : at + _CHUNK], first_id + done)
                at, done, new = at + expanded, done + expanded, int(self.counts[0])
                following.append(self.new_states[:new].copy())
                self.parents.append(self.new_parents[:new].astype(np.int32))
                self.steps.append(self.new_steps[:new].astype(np.int32))
                self.result.states += new
                size += following[-1].nbytes
                if self.world.found[0]:
                    self.result.violation = Violation(
                        breaches_of(self.world.found), (*self.trace(first_id + done), int(self.counts[2]))
                    )
                    return following, "violation"
                if time.monotonic() > until:
                    return following, "time"
                if size + self.table.nbytes > self.memory_bytes:
                    return following, "memory"
        return following, ""

    def _make_room(self) -> None:
        if self.result.states + _ROOM > self.table.size // 2:
            table = np.zeros(2 * self.table.size, dtype=np.uint64)
            refill(self.table, table)
            self.table = table

    def trace(self, state: int) -> tuple[int, ...]:
        """The steps from the fresh zone to a state."""
        parents, steps = np.concatenate(self.parents), np.concatenate(self.steps)
        back: list[int] = []
        while parents[state] >= 0:
            back.append(int(steps[state]))
            state = int(parents[state])
        return (*self.roots[-1 - int(parents[state])], *reversed(back))


def explore(
    scenario: Scenario,
    *,
    seconds: float = 300.0,
    depth: int = 1 << 30,
    memory_bytes: int = 4 << 30,
    roots: tuple[str, ...] = ROOTS,
    progress: Callable[[Exploration], None] | None = None,
) -> Exploration:
    """Explore ``scenario`` breadth first, until everything is seen or a bound is met.

    Args:
        depth: most steps from a root. memory_bytes: for the next frontier and the table of states. progress: called
            with the exploration after each level.

    Raises:
        UsageError: as ``Scenario.check``.
    """
    search = _Search(scenario, memory_bytes)
    result = search.result
    frontier, first_id = [search.add_roots(roots)], 0
    search.expand(frontier[0][:0], 0)  # of nothing: the first call compiles, and that is not exploring
    started = time.monotonic()
    while not result.why:
        following, result.why = search.level(frontier, first_id, started + seconds)
        result.transitions, result.seconds = int(search.counts[1]), time.monotonic() - started
        first_id += sum(map(len, frontier))
        result.levels.append(sum(map(len, following)))
        if not result.why:
            result.depth += 1
            if not result.levels[-1]:
                result.why = "exhausted"
            elif result.depth >= depth:
                result.why = "depth"
        frontier = following
        if progress is not None:
            progress(result)
    return result
