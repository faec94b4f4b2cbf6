"""``python -m guest``: parse, run one guest, say what it did. Heavy imports wait until the flags are good."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

from common.cli import EXIT_INTERRUPTED, EXIT_OK, CommandParser, run_command
from common.errors import InvariantViolation
from common.output import check_output, write_json
from common.settings import GuestSettings, add_flags, load

if TYPE_CHECKING:
    from guest.machine import Machine

__all__ = ["main"]

_VIEW_PERIOD_S = 0.25


def main(arguments: list[str] | None = None) -> int:
    """Exit code of one guest's life."""
    return run_command(lambda: _run(arguments))


def _run(arguments: list[str] | None) -> int:
    parser = CommandParser(
        prog="python -m guest",
        description="A guest: page allocator, free page reporting and a workload, on real shared memory.",
    )
    add_flags(parser, GuestSettings)
    parser.add_argument("--warm-up", action="store_true", help="compile the kernels into the cache and leave")
    namespace = parser.parse_args(arguments)
    settings = load(GuestSettings, namespace)
    if settings.json:
        check_output(settings.json, force=settings.force)
    stop = _Stop()
    if namespace.warm_up:
        return _warm_up()

    if settings.join:
        return _join(settings, stop)
    from guest.buserror import catch_bus_errors
    from guest.machine import Machine
    from guest.view import open_view
    from guest.warmup import load_kernels

    load_kernels(settings.workload, settings.policy)  # seconds, minutes with an empty cache: Ctrl-C ends it at once
    if not settings.attach:  # what is taken over stays for the next until it is this process's
        stop.hold()
    with catch_bus_errors(), Machine(settings, on_owning=stop.hold) as machine:
        stop.end(machine.ended)
        if machine.replaced and not settings.quiet:
            sys.stderr.write(
                f"guest {machine.name}: begun anew; --attach would have gone on with the killed one's memory\n"
            )
        with open_view(machine, quiet=settings.quiet, period_s=_VIEW_PERIOD_S):
            machine.wait(settings.duration_s)
        result = _finish(machine)
    if settings.json:
        write_json(result, settings.json, force=settings.force)
    if machine.error is not None:
        raise machine.error
    if not result["ok"]:
        raise InvariantViolation("; ".join(result["complaints"]))
    return EXIT_INTERRUPTED if stop.interrupted else EXIT_OK


def _join(settings: GuestSettings, stop: _Stop) -> int:
    """One more process of a running guest, to its end."""
    from guest.buserror import catch_bus_errors
    from guest.joined import Joined

    stop.hold()
    with catch_bus_errors(), Joined(settings) as joined:
        stop.end(joined.ended)
        joined.wait(settings.duration_s)
        joined.stop()
        result = joined.result()
    if settings.json:
        write_json(result, settings.json, force=settings.force)
    joined.check()
    return EXIT_INTERRUPTED if stop.interrupted else EXIT_OK


class _Stop:
    """SIGINT, SIGTERM and SIGHUP: end the process as long as it has made nothing, and are flags from ``hold`` on.

    A flag cannot tear a half-built machine apart. ``end`` names the event to set once there is one.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._holding = False
        self._asked = False
        self._event: threading.Event | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._handle)

    def hold(self) -> None:
        """From now on there is something to take apart in order."""
        self._holding = True

    def end(self, event: threading.Event) -> None:
        """Set ``event`` at a signal; at once if one has come already."""
        self._event = event
        if self._asked:
            event.set()

    def _handle(self, number: int, _frame: object) -> None:
        if not self._holding:
            os._exit(128 + number)
        self._asked = True
        self.interrupted |= number == signal.SIGINT
        if self._event is not None:
            self._event.set()


def _finish(machine: Machine) -> dict[str, Any]:
    """Stop work and reporting in that order; the result as a plain dictionary."""
    from dataclasses import asdict

    machine.stop_work()
    machine.settle()
    machine.stop_reporting()
    result = asdict(machine.result())
    settings = result.pop("settings")
    return {**result, **settings}


def _warm_up() -> int:
    from guest.warmup import warm_up

    seconds = warm_up()
    sys.stderr.write(f"kernels ready after {seconds:.1f} s\n")
    return EXIT_OK
