"""Start a program that ends when its parent ends, however the parent ends.

Run by path, before any of the project is imported: ``python -I -S lab/leash.py PARENT_PID PROGRAM ARGUMENT...``. A
parent killed with SIGKILL cannot stop its children; the kernel does it for us, with SIGTERM, so that a child still
removes its shared objects. Set here and not in a ``preexec_fn``, which would run Python between fork and exec of a
process that may have threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

__all__ = ["main"]

PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h; kept across execve


def main(arguments: list[str]) -> None:
    """Tie this process to the parent whose pid is the first argument, then become the program of the others."""
    parent, *program = arguments
    # SAFETY: prctl(2) with two integers; no address is passed. A failure only costs the leash, not the run.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != int(parent):  # it died before prctl: no signal will come any more
        raise SystemExit(1)
    os.execv(program[0], program)  # noqa: S606  the parent chose the program


if __name__ == "__main__":
    main(sys.argv[1:])
