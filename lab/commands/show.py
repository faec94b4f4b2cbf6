"""``python -m lab show NAME``: one argument about reporting, settled: measurements, a table, a picture, a sentence."""

from __future__ import annotations

import argparse
import sys

from common.cli import EXIT_OK
from lab.commands.rounds import read_rounds

__all__ = ["SHOWS", "add_arguments", "run"]

# Name, module and class.
SHOWS = {
    "cover-letters": ("lab.shows.cover_letters", "CoverLetters"),
    "boundary": ("lab.shows.boundary", "Boundary"),
    "under-lock": ("lab.shows.under_lock", "UnderLock"),
    "published-sweep": ("lab.shows.published_sweep", "PublishedSweep"),
    "reclaim-delay": ("lab.shows.reclaim_delay", "ReclaimDelay"),
}
_MOST_ROUNDS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags."""
    parser.add_argument("name", choices=sorted(SHOWS), metavar="NAME", help=f"one of {', '.join(SHOWS)}")
    parser.add_argument("--out", default="", metavar="DIR", help="where everything goes (default: out/show-NAME)")
    parser.add_argument("--rounds", help=f"interleaved rounds (1 to {_MOST_ROUNDS}; default: 3)")
    parser.add_argument("--engine", default="processes", help="where runs in virtual time go (default: processes)")
    parser.add_argument("--costs", default="", metavar="PATH", help="costs of virtual time, as calibrate wrote them")
    parser.add_argument("--force", action="store_true", help="begin anew where another show is kept")
    parser.add_argument("--quiet", action="store_true", help="no progress while running")


def run(namespace: argparse.Namespace) -> int:
    """Do it, and print what came of it."""
    rounds = read_rounds(namespace.rounds, default=0, most=_MOST_ROUNDS)  # 0: as many as the show has
    from lab.experiment.engines import check_address

    check_address(namespace.engine)
    from lab.shows.run import run_show

    module, name = SHOWS[namespace.name]
    text = run_show(
        module,
        name,
        out=namespace.out or f"out/show-{namespace.name}",
        rounds=rounds,
        engine=namespace.engine,
        costs_path=namespace.costs,
        force=namespace.force,
        quiet=namespace.quiet,
        command=namespace.command_line,
    )
    if sys.stdout is not None:  # closed by whoever started us
        sys.stdout.write(text)
    return EXIT_OK
