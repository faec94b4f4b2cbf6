"""Runs that the host starts, at guests whose policy waits for that (virtio-balloon's free page hinting).

One run at a time a guest: the next is due so long after the start of the last, and not before the guest has said that
the last is complete, which is answered by DONE. What it says of a run that never was is counted and dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from common.messages import CMD_DONE, CMD_FIRST_RUN, MAX_COMMAND, Command, RunEnd
from host.registry import Guest

__all__ = ["Commands"]

_RETRY_S = 1.0  # after a command that found the guest's queue full


class Commands:
    """Starts and ends runs. ``every_s``: from the start of one to that of the next; 0: one a connection.

    ``clock``: seconds, monotonic.
    """

    def __init__(self, every_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s = every_s
        self._clock = clock

    def welcomed(self, guest: Guest) -> None:
        """A guest was welcomed, anew or again. If it takes commands, its first run starts; what was before is over."""
        if guest.hello.commands:
            guest.run_in_progress = False
            self._start(guest)

    def ended(self, guest: Guest, end: RunEnd) -> None:
        """The guest says that a run is complete: every report of it has been answered by now."""
        if end.epoch != guest.hello.epoch or end.id > guest.run_id:
            guest.counters.malformed += 1
        if end.epoch != guest.hello.epoch or not guest.run_in_progress or end.id != guest.run_id:
            return  # one that was overtaken by another ends too
        guest.run_in_progress = False
        self._send(guest, CMD_DONE)  # lost, the guest's own deadline stands for it

    def start_due(self, guests: Iterable[Guest]) -> None:
        """Start every run that is due now."""
        now = self._clock()
        for guest in guests:
            if _waits(guest) and guest.next_run_s is not None and guest.next_run_s <= now:
                self._start(guest)

    def next_due_s(self, guests: Iterable[Guest]) -> float | None:
        """When ``start_due`` has to be called next, by ``clock``; None: not before somebody says something."""
        due = [guest.next_run_s for guest in guests if _waits(guest) and guest.next_run_s is not None]
        return min(due) if due else None

    def _start(self, guest: Guest) -> None:
        number = max(guest.run_id + 1, CMD_FIRST_RUN)
        if number > MAX_COMMAND:  # after 272 years at the default
            guest.next_run_s = None
            return
        now = self._clock()
        if self._send(guest, number):
            guest.run_id = number
            guest.run_in_progress = True
            guest.next_run_s = now + self._every_s if self._every_s else None
        else:
            guest.next_run_s = now + _RETRY_S

    @staticmethod
    def _send(guest: Guest, number: int) -> bool:
        sent = guest.answer(Command(guest.hello.epoch, number))
        guest.counters.commands += sent
        return sent


def _waits(guest: Guest) -> bool:
    """Whether the guest takes commands and has none to do."""
    return guest.objects is not None and guest.hello.commands and not guest.run_in_progress
