"""A virtual clock, and the processors whose time it hands out.

An actor either waits (``at``: a moment) or works (``work``: so many ns of a processor). Those who work share the
processors evenly: when more want to run than there are, everyone runs slower in proportion. Events of one moment happen
in the order in which they were asked for, so equal inputs give equal histories.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

__all__ = ["Clock", "Task"]

_EARLIEST = 1e-6  # ns; work below that is rounding


class Task:
    """Work that is being done. ``remaining`` is right after each event; ``cpu_ns`` goes to its owner's account.

    ``remaining`` may be raised while the task runs: it waited for something in between.
    """

    __slots__ = ("action", "owner", "remaining")

    def __init__(self, owner: list[float], remaining: float, action: Callable[[], None]) -> None:
        self.owner = owner
        self.remaining = remaining
        self.action = action


class Clock:
    """Virtual ns from 0.

    Args:
        cores: processors.
        slowdown: factor by which everyone is slower for each processor at work beyond the first.
        passing: called with the moment that comes next, before anything happens at it.
    """

    def __init__(self, cores: int, *, slowdown: float = 1.0, passing: Callable[[float], None]) -> None:
        self.now = 0.0
        self._passing = passing
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._tasks: list[Task] = []
        self._sequence = 0
        self._cores = cores
        self._slowdown = slowdown
        self.share = 1.0  # of a processor, that each task has
        self.rate = 1.0  # ns of work done in a ns

    def at(self, moment: float, action: Callable[[], None]) -> None:
        """Call ``action`` at ``moment``, now if that is past."""
        self._sequence += 1
        heapq.heappush(self._timers, (max(moment, self.now), self._sequence, action))

    def work(self, owner: list[float], amount: float, action: Callable[[], None]) -> Task:
        """Call ``action`` once ``amount`` ns of work are done. ``owner[0]`` grows by the processor time taken."""
        task = Task(owner, amount, action)
        self._tasks.append(task)
        self._divide()
        return task

    def advance(self) -> bool:
        """Go to the next event and let it happen. False: there is none."""
        first = None
        ends = float("inf")
        for task in self._tasks:
            if task.remaining < ends:
                first, ends = task, task.remaining
        moment = self.now + max(ends, 0.0) / self.rate
        timers = self._timers
        if timers and timers[0][0] <= moment:
            self._pass(timers[0][0])
            heapq.heappop(timers)[2]()
            return True
        if first is None:
            return False
        self._pass(moment)
        self._tasks.remove(first)
        self._divide()
        first.action()
        return True

    def _pass(self, moment: float) -> None:
        """Time goes by: everyone who works has done some of it."""
        elapsed = moment - self.now
        if elapsed > 0:
            done, taken = elapsed * self.rate, elapsed * self.share
            for task in self._tasks:
                task.remaining -= done
                task.owner[0] += taken
                if task.remaining < _EARLIEST:
                    task.remaining = 0.0
            self._passing(moment)
            self.now = moment

    def _divide(self) -> None:
        """Share the processors out anew."""
        busy = min(len(self._tasks), self._cores)
        self.share = self._cores / len(self._tasks) if len(self._tasks) > self._cores else 1.0
        self.rate = self.share / self._slowdown ** max(busy - 1, 0)
