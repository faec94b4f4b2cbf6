"""SIGBUS in words: a page of shared memory that the kernel has no room for is a signal, not an error.

The handler is Python, called through ctypes in the thread that touched the page. That is sound because this signal is
*synchronous*: it comes at a load or store into a mapped object, and those are in compiled code, which holds no lock of
the C library and no GIL, or in a copy of NumPy's, which holds the GIL that the handler then has already. So the handler
cannot meet a lock of its own thread; it waits for the GIL as any callback does, and whoever has it gives it up, since
nobody waits for a zone lock with the GIL in hand. It never returns: it writes one line, removes the names of the guests
that this process owns (those that are kept left out), and ends the process. A zone lock that the thread held is
repaired by whoever is attached.

Rejected: ``faulthandler`` and ``signal.signal`` (the first says nothing that helps, the second returns to the very
store that failed, for ever); a watching parent (a guest would then be two processes, and neither a kill nor a stop
would mean the right one); populating all memory at the start (no first touch would be left to measure).

A SIGBUS that somebody sends with kill(1) meets the thread anywhere; it has its usual effect.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from common.errors import LabError, MachineError
from common.names import SHM_DIR, ack_queue, report_queue, zone_object
from common.queues import unlink_queue
from common.ramobject import GATE_BYTES, owned_names
from common.units import format_size

__all__ = ["catch_bus_errors"]

_SA_SIGINFO = 4  # include/uapi/asm-generic/signal.h
_MASK_BYTES = 128  # sigset_t of the C library
_FULL_BYTES = 1 << 20  # with less left than this, it is full for whoever needs huge pages or several at once


class _Action(ctypes.Structure):
    """``struct sigaction`` of the C library on 64-bit Linux."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_byte * _MASK_BYTES),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_libc = ctypes.CDLL(None, use_errno=True)
_first = threading.Lock()


@contextlib.contextmanager
def catch_bus_errors() -> Iterator[None]:
    """While entered, a touch of memory that is not to be had ends this process with one line, no names and code 3."""
    # SAFETY: both structures and the callback live until the old action is back in place.
    action, before = _Action(), _Action()
    action.handler = ctypes.cast(_end, ctypes.c_void_p)
    action.flags = _SA_SIGINFO
    _libc.sigaction(int(signal.SIGBUS), ctypes.byref(action), ctypes.byref(before))
    try:
        yield
    finally:
        _libc.sigaction(int(signal.SIGBUS), ctypes.byref(before), None)


def _handle(number: int, info: int, _context: Any) -> None:
    # SAFETY: the kernel passes a siginfo_t; si_code is its third int.
    if ctypes.c_int.from_address(info + 8).value <= 0:  # SI_USER and its like: somebody sent it
        _libc.signal(number, None)  # SIG_DFL; of the signal module only the main thread may ask that
        os.kill(os.getpid(), number)
        return
    if not _first.acquire(blocking=False):
        while True:  # another thread met the same, and ends the process now
            time.sleep(1)
    names = owned_names()
    with contextlib.suppress(OSError):
        os.write(2, f"error: {' '.join(_words(names).split())}\n".encode())
    for lab, guest in names:
        if _is_kept(f"{SHM_DIR}/fpr.{lab}.{guest}.ram"):
            continue
        for queue in (report_queue(lab, guest), ack_queue(lab, guest)):
            with contextlib.suppress(LabError, OSError):
                unlink_queue(queue)
        for name in (zone_object(lab, guest), f"/fpr.{lab}.{guest}.ram"):
            with contextlib.suppress(OSError):
                os.unlink(SHM_DIR + name)
    os._exit(MachineError.exit_code)


_end = _Handler(_handle)


def _is_kept(path: str) -> bool:
    """Whether the second word behind the memory says that the guest's names outlive its process. Raises nothing."""
    try:
        with open(path, "rb", buffering=0) as stream:
            stream.seek(-GATE_BYTES, os.SEEK_END)
            return stream.read(16)[8:] == b"\1".ljust(8, b"\0")
    except OSError:
        return False


def _words(names: list[tuple[str, str]]) -> str:
    """What happened, and what to do."""
    who = ", ".join(guest for _lab, guest in names) or "this process"
    try:
        space = os.statvfs(SHM_DIR)
    except OSError as error:
        return f"{who}: a page of memory is not to be had: {SHM_DIR}: {error.strerror}"
    free_bytes = space.f_bavail * space.f_frsize
    if free_bytes < _FULL_BYTES:
        return (
            f"{who}: {SHM_DIR} is full: of its {format_size(space.f_blocks * space.f_frsize)} nothing is left for "
            f"the next page of the guest's memory; enlarge it (mount -o remount,size=... {SHM_DIR}), or use fewer or "
            "smaller guests"
        )
    return (
        f"{who}: a page of the guest's memory is not to be had, though {SHM_DIR} has {format_size(free_bytes)} left; "
        "its object was made smaller by somebody, or a quota (quota -s) or the memory of the machine is used up"
    )
