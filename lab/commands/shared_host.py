"""``python -m lab shared-host``: serve guests of the policy ``shared``, which let a host claim their free blocks."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from common.cli import EXIT_INTERRUPTED, EXIT_OK
from common.output import check_output, write_json
from common.settings import SharedHostSettings, add_flags, load

if TYPE_CHECKING:  # --help answers in 0.3 s: compiled code comes after the flags
    from lab.shared_host.host import SharedHost

__all__ = ["DESCRIPTION", "add_arguments", "run"]

DESCRIPTION = """\
Serve the guests of one lab that were started with --policy shared: map their zones, claim free blocks without
a message, give that memory back to the operating system, and populate what they ask for again. Stop with Ctrl-C."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the subcommand."""
    add_flags(parser, SharedHostSettings)


def run(namespace: argparse.Namespace) -> int:
    """Serve until stopped; write the account.

    Raises:
        UsageError: settings. NameInUseError: the lab has such a host already. MachineError: shared memory.
    """
    settings = load(SharedHostSettings, namespace)
    if settings.json:
        check_output(settings.json, force=settings.force)
    from lab.shared_host.host import SharedHost

    with SharedHost(settings.name, every_ns=settings.every_ns) as host, _stopping(host) as received:
        if not settings.quiet and sys.stderr is not None:
            sys.stderr.write(f"shared host {settings.name}: serving\n")
        account = host.run(settings.duration_s)
    if settings.json:
        write_json(account, settings.json, force=settings.force)
    if not settings.quiet and sys.stderr is not None:
        total = account["host"]
        sys.stderr.write(
            f"shared host {settings.name}: {total['guests_seen']} guests, {total['blocks']} blocks claimed, "
            f"{total['freed_bytes'] >> 20} MiB freed, {total['installs']} blocks populated again\n"
        )
    return EXIT_INTERRUPTED if signal.SIGINT in received else EXIT_OK


@contextlib.contextmanager
def _stopping(host: SharedHost) -> Iterator[list[int]]:
    """SIGINT, SIGTERM and SIGHUP stop ``host``; yields the signals that came."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        received.append(number)
        host.stop()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
