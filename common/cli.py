"""The one place where an error becomes a line on standard error and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

from common import interrupts
from common.errors import LabError, MachineError, UsageError
from common.interrupts import EXIT_INTERRUPTED
from common.refusals import fix_of, thread_refusal

__all__ = ["EXIT_FAILED", "EXIT_INTERRUPTED", "EXIT_OK", "CommandParser", "run_command"]

EXIT_OK = 0
EXIT_FAILED = 1


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are a ``UsageError``, one line like all others; flags are not abbreviated."""

    def __init__(self, *, prog: str, description: str | None, **others: Any) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, **others)

    def error(self, message: str) -> NoReturn:
        """Raise ``message``, which names the flag.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def run_command(main: Callable[[], int]) -> int:
    """Run a command's ``main`` and return its exit code, or that of the error which it raised.

    What the machine refuses (``OSError``) and nobody explained ends as ``MachineError`` does. Other exceptions are bugs
    and pass through with their traceback, as does argparse's ``SystemExit`` after ``--help``.
    """
    try:
        interrupts.begin()
        return _run(main)
    except KeyboardInterrupt:  # in the few lines between the work and its exit code
        return EXIT_INTERRUPTED
    finally:
        interrupts.end()


def _run(main: Callable[[], int]) -> int:
    """As ``run_command``."""
    _open_closed_streams()
    leaving: SystemExit | None = None
    try:
        code = _code_of(main)
    except SystemExit as error:
        leaving, code = error, EXIT_OK
    # Here, and not at interpreter exit, where a reader that went away can no longer be handled.
    trouble = _flush(sys.stdout)
    if isinstance(trouble, BrokenPipeError):
        code, leaving = EXIT_FAILED, None
    elif trouble is not None and code == EXIT_OK:
        _complain(f"standard output: {_in_words(trouble)}")
        code, leaving = MachineError.exit_code, None
    _flush(sys.stderr)
    if leaving is not None:
        raise leaving
    return code


def _code_of(main: Callable[[], int]) -> int:
    """The exit code of ``main``; an error is told first."""
    try:
        return main()
    except LabError as error:
        _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has had enough
        return EXIT_FAILED
    except MemoryError as error:
        _complain(f"out of memory: {str(error) or 'refused'}; {fix_of(OSError(errno.ENOMEM, ''))}")
        return MachineError.exit_code
    except RuntimeError as error:
        refusal = thread_refusal(error)
        if refusal is None:
            raise
        _complain(str(refusal))
        return refusal.exit_code
    except OSError as error:
        if fix_of(error) is None:
            raise
        _complain(_in_words(error))
        return MachineError.exit_code


def _in_words(error: OSError) -> str:
    """What the system said, about which file if it said that, and what to do."""
    parts = [str(part) for part in (error.filename, error.strerror) if part is not None]
    hint = fix_of(error)
    return ": ".join(parts) + (f"; {hint}" if hint else "")


def _complain(text: str) -> None:
    """One line on standard error, if somebody is there to read it."""
    if sys.stderr is not None:  # print would take standard output instead
        with contextlib.suppress(OSError):
            print(f"error: {' '.join(text.split())}", file=sys.stderr)


def _open_closed_streams() -> None:
    """Open /dev/null for each of the three streams that is closed (``>&-``).

    The next file to be opened would get its number otherwise: a guest's memory, into which an abort writes its message.
    ``sys.stdout`` stays None then, so that a result that should go there is refused and not lost.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number: this one
            if descriptor == 2 and sys.stderr is None:
                sys.stderr = os.fdopen(2, "w", closefd=False)


def _flush(stream: TextIO | None) -> OSError | None:
    """Flush ``stream``; if it cannot be written to, why. What it still holds is then dropped.

    Otherwise it would raise once more at interpreter exit.
    """
    if stream is None:
        return None
    try:
        stream.flush()
    except OSError as error:
        with contextlib.suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        return error
    return None
