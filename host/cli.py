"""``python -m host``: parses, runs a host until it is told to stop, hands its statistics on."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from common.cli import EXIT_INTERRUPTED, EXIT_OK, CommandParser, run_command
from common.output import check_output, write_json
from common.settings import HostSettings, add_flags, load

if TYPE_CHECKING:  # NumPy comes with it, and --help must answer in 0.3 s
    from host.loop import Host

__all__ = ["main"]

_DESCRIPTION = """\
Serve the guests of one lab: take their reports of free pages and give that memory back to the operating system.
Guests may start before or after; stop with Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    parser = CommandParser(prog="python -m host", description=_DESCRIPTION)
    add_flags(parser, HostSettings)
    return run_command(lambda: _serve(load(HostSettings, parser.parse_args(arguments))))


def _serve(settings: HostSettings) -> int:
    """Serve, then write the statistics. Interrupted or not, they are complete."""
    from host.loop import Host
    from host.view import make_view

    if settings.json:
        check_output(settings.json, force=settings.force)
    # Signals first: one that came between making the queue and listening for it would leave the queue behind.
    with (
        _signals() as signals,
        make_view(settings.name, quiet=settings.quiet) as view,
        Host(
            settings.name,
            slow_ns=settings.slow_ns,
            slow_where=settings.slow_where,
            inhibit_discard=settings.inhibit_discard,
            hint_every_ns=settings.hint_every_ns,
            max_reports_per_s=settings.max_reports_per_s,
            view=view,
        ) as host,
        signals.stopping(host),
    ):
        statistics = host.run(settings.duration_s)
        view.show(statistics)
    if settings.json:
        write_json(statistics.as_dict(), settings.json, force=settings.force)
    return EXIT_INTERRUPTED if signal.SIGINT in signals.received else EXIT_OK


class _Signals:
    """SIGINT and SIGTERM, noted; while a host is served, they stop it."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._host: Host | None = None

    def note(self, number: int, _frame: object) -> None:
        """The handler."""
        self.received.append(number)
        if self._host is not None:
            self._host.stop()

    @contextlib.contextmanager
    def stopping(self, host: Host) -> Iterator[None]:
        """Stop ``host`` at a signal, one that came earlier included.

        The wakeup descriptor closes the gap between the last look at Python's own flag and the wait in the kernel.
        """
        wakeup = signal.set_wakeup_fd(host.wake_write, warn_on_full_buffer=False)
        self._host = host
        if self.received:
            host.stop()
        try:
            yield
        finally:
            self._host = None
            signal.set_wakeup_fd(wakeup)


@contextlib.contextmanager
def _signals() -> Iterator[_Signals]:
    """Handlers for the signals that end a host; those of before are put back."""
    signals = _Signals()
    before = {number: signal.signal(number, signals.note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
