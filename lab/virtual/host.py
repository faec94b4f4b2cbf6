"""The host in virtual time: busy until it has discarded, then it answers."""

from __future__ import annotations

from collections.abc import Callable

from lab.virtual.survey import Survey
from lab.virtual.world import World

__all__ = ["VirtualHost"]


class VirtualHost:
    """A host that serves one guest. ``cpu_ns[0]``: its processor time."""

    def __init__(self, world: World) -> None:
        self.cpu_ns = [0.0]
        self._world = world

    def serve(self, survey: Survey, answered: Callable[[], None]) -> None:
        """A report has been sent: wake up, read it, discard, answer; ``answered`` once the answer has arrived."""
        world, costs = self._world, self._world.costs

        def wake() -> None:
            world.clock.work(self.cpu_ns, costs.message_host_ns, discard)

        def discard() -> None:
            self.discard(survey, lambda: world.clock.at(world.clock.now + costs.message_wait_ns / 2, answered))

        world.clock.at(world.clock.now + costs.message_wait_ns / 2, wake)

    def install(self, blocks: int, pages: int, populated: Callable[[], None]) -> None:
        """Populate what an allocation asks for, ``pages`` in ``blocks``: two wake-ups a block, and a fault a page.

        What asking takes of either side's processor besides is small against the wake-ups and counts for nothing.
        """
        world, costs = self._world, self._world.costs
        wait_ns = blocks * costs.message_wait_ns / 2

        def done() -> None:
            world.clock.at(world.clock.now + wait_ns, populated)

        def wake() -> None:
            world.clock.work(self.cpu_ns, pages * costs.fault_ns, done)

        world.clock.at(world.clock.now + wait_ns, wake)

    def discard(self, survey: Survey, then: Callable[[], None]) -> None:
        """Punch and prove each range; with discards inhibited, nothing."""
        world, costs = self._world, self._world.costs
        if world.spec.inhibit_discard:
            then()
            return
        world.discarding = True

        def done() -> None:
            world.discarding = False
            then()

        work = survey.ranges * costs.discard_range_ns + survey.resident_pages * costs.discard_page_ns
        world.clock.work(self.cpu_ns, work, done)
