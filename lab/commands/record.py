"""``python -m lab record``: the commands that record a guest's page events, and a script that does it all."""

from __future__ import annotations

import argparse
import sys

from common.cli import EXIT_OK
from lab.trace.record import instructions, script

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's flags on ``parser``; its help holds the commands, word for word."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = instructions()
    parser.add_argument("--script", action="store_true", help="print the shell script, for busybox and any POSIX shell")


def run(namespace: argparse.Namespace) -> int:
    """Print the instructions, or the script with ``--script``."""
    sys.stdout.write(script() if namespace.script else instructions())
    return EXIT_OK
