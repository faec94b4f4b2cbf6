"""What the actors of a virtual run share: the zone, the clock, the lock, the books, and how things stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from guest.allocator.zone import Zone
from lab.experiment.spec import RunSpec
from lab.virtual.account import Books
from lab.virtual.clock import Clock
from lab.virtual.costs import Costs
from lab.virtual.counters import ZoneWords
from lab.virtual.lock import ZoneLock

__all__ = ["World"]


@dataclass
class World:
    """One guest and its host in virtual time.

    Attributes:
        look: called after whatever may have asked for a run.
        stop_work: ends the workload.
        budget_pages: most pages of a step while nothing is being reported.
        running: vCPUs that neither pause nor wait nor are done.
        at_rest: vCPUs that are idle or done; all of them: an episode.
        allocated: pages that the vCPUs hold.
        operations: page operations of steps that are over.
        reporting: a run is under way. discarding: the host is at it.
        stopping: the workload is over, everyone frees what it holds.
    """

    spec: RunSpec
    costs: Costs
    zone: Zone
    words: ZoneWords
    clock: Clock
    lock: ZoneLock
    books: Books
    look: Callable[[], None]
    stop_work: Callable[[], None]
    budget_pages: int
    running: int = 0
    at_rest: int = 0
    allocated: int = 0
    operations: int = 0
    reporting: bool = False
    discarding: bool = False
    stopping: bool = False

    def rest(self) -> None:
        """A vCPU is idle, or done. With the last of them an episode begins."""
        self.at_rest += 1
        if self.at_rest == self.spec.vcpus:
            free_resident = self.books.resident - self.allocated
            done = (self.operations, self.allocated)
            self.books.episodes.begin(self.clock.now, free_resident, self.words.returned_pages, done)

    def wake(self) -> None:
        """An idle vCPU works again."""
        self.at_rest -= 1
        self.books.episodes.end()
