"""``python -m guest``: parse, run one guest, say what it did. Heavy imports wait until the flags are good."""

from __future__ import annotations

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
    if namespace.warm_up:
        return _warm_up()

    if settings.join:
        return _join(settings)
    from guest.machine import Machine
    from guest.view import open_view

    stop = _Stop()  # before the machine is built: a signal then sets a flag and cannot tear a half-built one apart
    with Machine(settings) as machine:
        stop.end(machine.ended)
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


def _join(settings: GuestSettings) -> int:
    """One more process of a running guest, to its end."""
    from guest.joined import Joined

    stop = _Stop()
    with Joined(settings) as joined:
        stop.end(joined.ended)
        joined.wait(settings.duration_s)
        joined.stop()
        result = joined.result()
    if settings.json:
        write_json(result, settings.json, force=settings.force)
    joined.check()
    return EXIT_INTERRUPTED if stop.interrupted else EXIT_OK


class _Stop:
    """SIGINT, SIGTERM and SIGHUP as flags, and the event to set once there is one."""

    def __init__(self) -> None:
        self.interrupted = False
        self._asked = False
        self._event: threading.Event | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._handle)

    def end(self, event: threading.Event) -> None:
        """Set ``event`` at a signal; at once if one has come already."""
        self._event = event
        if self._asked:
            event.set()

    def _handle(self, number: int, _frame: object) -> None:
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
