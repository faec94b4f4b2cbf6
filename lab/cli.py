"""``python -m lab``: finds the command and hands over to its module. Only that module is loaded, and it is light."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Protocol, cast

from common.cli import CommandParser, run_command

__all__ = ["COMMANDS", "PROGRAM", "Command", "main"]

PROGRAM = "python -m lab"

# Name, module and one line. What a module needs beyond the standard library it imports in ``run``.
COMMANDS = {
    "compare": ("lab.commands.compare", "run policies on the same work, and tell them apart"),
    "sweep": ("lab.commands.sweep", "run a grid of settings, and go on where it was interrupted"),
    "report": ("lab.commands.report", "turn a run directory into tables, plots and one page"),
    "calibrate": ("lab.commands.calibrate", "measure what virtual time charges on this machine"),
    "show": ("lab.commands.show", "settle one of five arguments: measure, a table, a picture"),
    "import": ("lab.commands.import_trace", "read a trace of your own kernel into columns, and say how sound it is"),
    "doctor": ("lab.commands.doctor", "what this machine allows, whether it suffices, and the command that mends it"),
    "record": ("lab.commands.record", "how to record such a trace in a guest"),
    "replay": ("lab.commands.replay", "replay such a trace under any policy, and compare with what the guest did"),
    "advise": ("lab.commands.advise", "which settings to take for such a trace: what they return, and what they cost"),
    "explore": ("lab.commands.explore", "every interleaving on a zone of a few pages, each step checked"),
    "chaos": ("lab.commands.chaos", "kill processes at random moments, and see that nothing is lost"),
    "soak": ("lab.commands.soak", "everything at once for an hour, with every process and every account looked at"),
    "shared-host": ("lab.commands.shared_host", "a host that guests trust: it claims their free memory itself"),
}


class Command(Protocol):
    """What the module of a command has."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's flags; loads nothing heavy."""

    def run(self, namespace: argparse.Namespace) -> int:
        """Do it; the exit code. ``namespace.command_line`` is the command as it was typed."""


def main(arguments: list[str] | None = None) -> int:
    """Exit code of one command."""
    given = sys.argv[1:] if arguments is None else arguments
    return run_command(lambda: _run(given))


def _run(arguments: list[str]) -> int:
    parser = CommandParser(prog=PROGRAM, description="Experiments with free page reporting: policies on the same work.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = arguments[0] if arguments else ""
    for name, (_, summary) in COMMANDS.items():
        added = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == chosen:
            _module(name).add_arguments(added)
    namespace = parser.parse_args(arguments)
    namespace.command_line = [*PROGRAM.split(), *arguments]
    return _module(namespace.command).run(namespace)


def _module(name: str) -> Command:
    return cast(Command, importlib.import_module(COMMANDS[name][0]))
