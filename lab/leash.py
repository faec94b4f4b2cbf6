"""Start a program that ends when its parent ends, however the parent ends.

Run by path, before any of the project is imported:
``python -I -S lab/leash.py PARENT_PID GRACE_S PROGRAM ARGUMENT...``, as the leader of a session of its own.

A parent killed with SIGKILL cannot stop its children; the kernel does it for us, with SIGTERM, so that a child still
removes its shared objects. SIGTERM alone would leave a child that is stopped or that hangs. So a guard, a fork of this
process in the same group, sleeps until the parent is gone, wakes a stopped child, gives it GRACE_S seconds and kills
the group: the child, what it started, and itself. While the parent lives, it is the parent that kills the group.

Set here and not in a ``preexec_fn``, which would run Python between fork and exec of a process that may have threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys

__all__ = ["main"]

PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h; kept across execve, not across fork


def main(arguments: list[str]) -> None:
    """Tie this process to the parent whose pid is the first argument, then become the program of the others."""
    parent, grace_s, *program = arguments
    # SAFETY: prctl(2) with two integers; no address is passed. A failure only costs the leash, not the run.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != int(parent):  # it died before prctl: no signal will come any more
        raise SystemExit(1)
    if os.getpgrp() == os.getpid():  # else the group is not ours to kill
        _start_guard(int(parent), float(grace_s))
    os.execv(program[0], program)  # noqa: S606  the parent chose the program


def _start_guard(parent: int, grace_s: float) -> None:
    """Fork the guard; returns in the process that becomes the program."""
    # Both are closed by the exec. The parent lives: its death would have ended this process already.
    orchestrator, program = os.pidfd_open(parent), os.pidfd_open(os.getpid())
    if os.fork():
        return
    try:
        select.select([orchestrator], [], [])
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(program, signal.SIGCONT)
        select.select([program], [], [], grace_s)
    finally:
        os.killpg(0, signal.SIGKILL)  # the group keeps its number while this process is in it


if __name__ == "__main__":
    main(sys.argv[1:])
