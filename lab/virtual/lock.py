"""Who holds the zone lock for reporting, and which vCPU waits for it.

A vCPU takes the lock in a few of its allocations and frees. How many a step took it is known, when is not: they are
taken to be spread evenly over the step's duration, half a distance from either end. So it is certain for every hold
which acquisition, if any, of which vCPU falls into it:

* The vCPU works on until that acquisition and then waits until the lock is released; the rest of its step moves by as
  much. It is found out when the lock is released, or when the step would have ended.
* A vCPU whose step ends while the lock is held begins the next one at once when the hold is short: its own kernel call
  comes after what the holder did. Under a hold over a whole run it waits, since hardly a step goes without the lock;
  the wait is that of the next step's first acquisition.

At most one acquisition a vCPU waits for a hold; that one is counted with its wait among the latencies if it belongs to
an allocation. vCPUs do not wait for each other here: their own holds are tens of ns long.
"""

from __future__ import annotations

from typing import Protocol

__all__ = ["Waiter", "ZoneLock"]


class Waiter(Protocol):
    """A vCPU, as the lock sees it."""

    def lock_taken(self) -> None:
        """Somebody else holds the lock from now on."""

    def lock_released(self) -> None:
        """It is free again."""


class ZoneLock:
    """Held by the reporter, or by a host that drives the cycle itself; by nobody else here."""

    def __init__(self) -> None:
        self.waiters: list[Waiter] = []
        self.held = False
        self.long = False
        self.taken_at = 0.0

    def take(self, now: float, *, long: bool = False) -> None:
        """Hold the lock; ``long``: over a whole run."""
        assert not self.held
        self.held, self.long, self.taken_at = True, long, now
        for waiter in self.waiters:
            waiter.lock_taken()

    def release(self) -> None:
        """Let it go: whoever waits goes on."""
        assert self.held
        self.held = self.long = False
        for waiter in self.waiters:
            waiter.lock_released()
