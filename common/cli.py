"""The one place where an error becomes a line on standard error and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from common.errors import LabError

__all__ = ["EXIT_FAILED", "EXIT_INTERRUPTED", "EXIT_OK", "run_command"]

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell shows it


def run_command(main: Callable[[], int]) -> int:
    """Run a command's ``main`` and return its exit code, or that of the ``LabError`` which it raised.

    Other exceptions are bugs and pass through with their traceback, as does argparse's ``SystemExit``.
    """
    try:
        try:
            return main()
        except LabError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        finally:
            # Here, and not at interpreter exit, where a reader that went away can no longer be handled.
            sys.stdout.flush()
    except BrokenPipeError:
        _silence_stdout()
        return EXIT_FAILED


def _silence_stdout() -> None:
    """Point standard output at /dev/null: what is still buffered would raise once more at interpreter exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
