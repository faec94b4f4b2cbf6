"""``python -m lab.shared_host``: the command ``shared-host`` of ``python -m lab``, by itself."""

from __future__ import annotations

import sys

from common.cli import CommandParser, run_command
from lab.commands import shared_host

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Exit code of one host's life."""
    parser = CommandParser(prog="python -m lab.shared_host", description=shared_host.DESCRIPTION)
    shared_host.add_arguments(parser)
    return run_command(lambda: shared_host.run(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
