"""Run a program with handlers for signals that it does not know: ``python -m tests.live.handled MODULE ARGUMENT...``.

A handled signal interrupts system calls; one that is ignored does not.
"""

from __future__ import annotations

import runpy
import signal
import sys

__all__ = ["NUMBERS"]

NUMBERS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, signal.SIGCHLD, signal.SIGALRM)


class _Count:
    """How many were handled."""

    signals = 0


def _note(_number: int, _frame: object) -> None:
    _Count.signals += 1


if __name__ == "__main__":
    for number in NUMBERS:
        signal.signal(number, _note)
    del sys.argv[0]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    finally:
        sys.stderr.write(f"signals {_Count.signals}\n")
