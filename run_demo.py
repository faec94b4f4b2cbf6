"""Free page reporting, end to end: one host, some guests, all of it for real. See ``lab.demo``."""

from __future__ import annotations

from common.interrupts import run_program

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Read the flags and run the demo; the exit code."""
    from common.cli import run_command

    return run_command(lambda: _run(arguments))


def _run(arguments: list[str] | None) -> int:
    from common.cli import CommandParser
    from common.settings import DemoSettings, add_flags, load

    parser = CommandParser(
        prog="run_demo.py",
        description="Start a host and some guests, let the guests work and give their free memory back, and show it.",
    )
    add_flags(parser, DemoSettings)
    settings = load(DemoSettings, parser.parse_args(arguments))
    from lab.demo import run_demo  # NumPy and more: not for --help

    return run_demo(settings)


if __name__ == "__main__":
    run_program(main)
