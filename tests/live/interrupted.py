"""Interrupt a program at many moments: ``python -m tests.live.interrupted PROGRAM LAB MOMENTS SIGNAL``.

Everything is imported and compiled once; then a fork runs the program's command, with the signal sent at its k-th call
of a function since it took charge of signals. One line a fork: the moment, the exit code, and what it wrote to standard
error and left of names. Moment 0: it is not interrupted.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from common import interrupts
from common.interrupts import run_program
from tests.support import leftovers, remove_leftovers

__all__ = ["main"]


def _guest(lab: str) -> Callable[[], int]:
    for name in ("buserror", "machine", "view"):  # what the command imports itself, once and for all
        importlib.import_module(f"guest.{name}")
    from guest.cli import main
    from guest.warmup import load_kernels

    load_kernels("churn", "boundary")
    flags = "--memory 16MiB --vcpus 1 --workload churn --fill 0.5 --min-order 4 --delay 0 --high-water-mark 0"
    return lambda: main(["--host", lab, "--name", "g0", "--quiet", "--duration", "0.02", *flags.split()])


def _host(lab: str) -> Callable[[], int]:
    for name in ("loop", "view"):
        importlib.import_module(f"host.{name}")
    from host.cli import main

    return lambda: main(["--name", lab, "--quiet", "--duration", "0.01"])


def _life(program: Callable[[], int], moment: int, number: int) -> tuple[int, str, int]:
    """Exit code, standard error and number of calls of one fork."""
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as told:
        child = os.fork()
        if child == 0:
            os.dup2(errors.fileno(), 2)
            calls = 0

            def count(_frame: Any, _event: str, _argument: Any) -> None:
                nonlocal calls
                calls += interrupts._Phase.installed  # what is before that is the interpreter's
                if calls == moment > 0:
                    os.kill(os.getpid(), number)

            code = 99
            try:
                sys.setprofile(count)
                run_program(program)
            except SystemExit as leaving:
                code = int(leaving.code or 0)
            except BaseException:  # noqa: BLE001  what the interpreter would print
                sys.excepthook(*sys.exc_info())
            finally:
                sys.setprofile(None)
                os.pwrite(told.fileno(), str(calls).encode(), 0)
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        calls = int(os.pread(told.fileno(), 20, 0) or b"0")
        return os.waitstatus_to_exitcode(status), os.pread(errors.fileno(), 4096, 0).decode(), calls


def main() -> None:
    """See above."""
    kind, lab, moments, number = sys.argv[1], sys.argv[2], int(sys.argv[3]), signal.Signals[sys.argv[4]]
    program = {"guest": _guest, "host": _host}[kind](lab)
    code, said, calls = _life(program, 0, number)
    sys.stdout.write(f"0 {code} {said!r}\n")
    sys.stdout.flush()
    for index in range(moments):
        moment = 1 + index * calls // moments
        code, said, _calls = _life(program, moment, number)
        left = leftovers(lab, ["g0"])  # now: the next life would remove them
        remove_leftovers(left)
        sys.stdout.write(f"{moment} {code} {said + ' '.join(left)!r}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
