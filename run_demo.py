"""Free page reporting, end to end: one host, some guests, all of it for real. See ``lab.demo``."""

from __future__ import annotations

import sys

from common.cli import CommandParser, run_command
from common.settings import DemoSettings, add_flags, load

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Read the flags and run the demo; the exit code."""
    parser = CommandParser(
        prog="run_demo.py",
        description="Start a host and some guests, let the guests work and give their free memory back, and show it.",
    )
    add_flags(parser, DemoSettings)
    settings = load(DemoSettings, parser.parse_args(arguments))
    from lab.demo import run_demo  # NumPy and more: not for --help

    return run_demo(settings)


if __name__ == "__main__":
    sys.exit(run_command(main))
