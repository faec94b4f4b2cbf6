"""Run a program that may not wait by the wall clock: ``python -m tests.no_wall_clock MODULE ARGUMENT...``.

No test can set the clock of a machine that others use too. Here the kernel refuses, by a seccomp filter, what such a
clock could hold up or cut short, and ends the process with SIGSYS: a message queue, a futex or a sleep that waits
until a time of CLOCK_REALTIME. A program that works under it cannot notice that somebody sets the clock.
"""

from __future__ import annotations

import ctypes
import platform
import runpy
import struct
import sys

__all__ = ["KNOWN", "forbid"]

KNOWN = platform.machine() == "x86_64"  # the numbers below are of this architecture
_AUDIT_ARCH = 0xC000003E
_FUTEX, _CLOCK_NANOSLEEP, _MQ_TIMEDSEND, _MQ_TIMEDRECEIVE = 202, 230, 242, 243
_FUTEX_CLOCK_REALTIME, _CLOCK_REALTIME, _TIMER_ABSTIME = 256, 0, 1
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
# struct seccomp_data of include/uapi/linux/seccomp.h: nr, arch, instruction pointer, six arguments of 64 bits.
_NR, _ARCH = 0, 4
_LOAD, _JUMP_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x45, 0x06  # linux/filter.h


def _low(argument: int) -> int:
    return 16 + 8 * argument


def _given(argument: int) -> list[tuple[int, int, int, int]]:
    """Kill if the pointer is not null; else allow."""
    return [
        (_LOAD, 0, 0, _low(argument)),
        (_JUMP_EQUAL, 0, 2, 0),
        (_LOAD, 0, 0, _low(argument) + 4),
        (_JUMP_EQUAL, 1, 0, 0),
        (_RETURN, 0, 0, _KILL),
        (_RETURN, 0, 0, _ALLOW),
    ]


def _program() -> bytes:
    timed_queue = _given(4)
    futex = [(_LOAD, 0, 0, _low(1)), (_JUMP_SET, 1, 0, _FUTEX_CLOCK_REALTIME), (_RETURN, 0, 0, _ALLOW), *_given(3)]
    sleep = [
        (_LOAD, 0, 0, _low(0)),
        (_JUMP_EQUAL, 0, 3, _CLOCK_REALTIME),
        (_LOAD, 0, 0, _low(1)),
        (_JUMP_EQUAL, 0, 1, _TIMER_ABSTIME),
        (_RETURN, 0, 0, _KILL),
        (_RETURN, 0, 0, _ALLOW),
    ]
    parts = [(_MQ_TIMEDSEND, timed_queue), (_MQ_TIMEDRECEIVE, timed_queue), (_FUTEX, futex), (_CLOCK_NANOSLEEP, sleep)]
    steps = [
        (_LOAD, 0, 0, _ARCH),
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH),
        (_RETURN, 0, 0, _ALLOW),
    ]
    for number, body in parts:
        steps += [(_LOAD, 0, 0, _NR), (_JUMP_EQUAL, 0, len(body), number), *body]
    steps.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("<HBBI", *step) for step in steps)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def forbid() -> None:
    """From now on, in this process and all its threads to come.

    Raises:
        OSError: this kernel has no seccomp.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    code = _program()
    described = _Program(len(code) // 8, code)
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _FILTER, ctypes.byref(described), 0, 0)):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    forbid()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
