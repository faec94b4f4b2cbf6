"""Ctrl-C from a program's first line to its last: at once while nothing has been made, in order afterwards.

Python turns SIGINT into an exception at whatever line it meets. While a program is still importing that is a traceback;
in a destructor or a callback of a library it is a traceback too, and the interrupt is lost; on the way out it is a
traceback after the result. So a program has three phases:

* *starting*: nothing has been made, the process ends at once with 130;
* *working*, from ``begin`` on: ``KeyboardInterrupt``, as everywhere, for whoever cleans up. One that was swallowed
  is raised again;
* *over*, from ``end`` on: the result is out and leaving takes milliseconds, so the signal is ignored.

What needs more (a guest, a host, whoever has children) brings handlers of its own. Known gap: the time before the first
line, some 20 ms in which the interpreter starts, is Python's own. Import-light: every program imports it first.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

__all__ = ["EXIT_INTERRUPTED", "begin", "end", "run_program"]

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell shows it
_AGAIN_S = 0.01  # by then the destructor that swallowed the interrupt has returned

_STARTING, _WORKING, _OVER = range(3)


class _Phase:
    """Which of the three it is. Read by a signal handler, so it is one word."""

    now = _STARTING
    installed = False


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run ``main``, which imports what it needs itself, and leave with its exit code. The first call of a program."""
    signal.signal(signal.SIGINT, _handle)
    sys.unraisablehook = _hear_what_was_swallowed
    _Phase.installed = True
    raise SystemExit(main())


def begin() -> None:
    """From now on somebody cleans up after a ``KeyboardInterrupt``."""
    _Phase.now = _WORKING


def end() -> None:
    """From now on there is nothing left to interrupt."""
    if _Phase.installed:
        _Phase.now = _OVER


def _handle(_number: int, _frame: FrameType | None) -> None:
    if _Phase.now == _STARTING:
        os._exit(EXIT_INTERRUPTED)
    if _Phase.now == _WORKING:
        raise KeyboardInterrupt


def _hear_what_was_swallowed(unraisable: Any) -> None:
    """Instead of printing an interrupt that a destructor or a callback cannot pass on, raise it where it can be."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
    elif _Phase.now == _WORKING:
        import threading

        again = threading.Timer(_AGAIN_S, signal.raise_signal, (signal.SIGINT,))
        again.daemon = True
        again.start()
