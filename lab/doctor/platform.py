"""Python, C library, kernel, processors, clock, and the folders that a lab writes to."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import tempfile
from pathlib import Path

from common.units import format_size
from lab.doctor.limit import Limit, Verdict, at_least
from lab.doctor.machine import Machine

__all__ = ["platform_limits"]

_PYTHON = (3, 11)
_CORES = 2  # a host and a guest
_CACHE_BYTES = 64 << 20  # the kernels of one version take 11 MiB
_TEMPORARY_BYTES = 64 << 20
_PTHREAD_MUTEX_ROBUST = 1
_ATTRIBUTE_BYTES = 64
_CLOCK = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
_SLOW_CLOCKS = {"hpet", "acpi_pm", "jiffies", "refined-jiffies"}  # read by a system call, or by the second


def platform_limits(machine: Machine) -> list[Limit]:
    """All of them."""
    return [_python(), _mutex(), _clockwait(), _pidfd(), _cores(), _clock(machine), _cache(), _temporary()]


def _python() -> Limit:
    good = sys.version_info >= _PYTHON
    return Limit(
        "Python",
        platform.python_version(),
        ".".join(str(part) for part in _PYTHON),
        Verdict.OK if good else Verdict.SHORT,
        fix="" if good else "make PYTHON=/path/to/python3.12 test",
    )


def _mutex() -> Limit:
    """Asked of an attribute object, which is memory of our own."""
    libc = ctypes.CDLL(None, use_errno=True)
    good = False
    if hasattr(libc, "pthread_mutexattr_setrobust"):
        attribute = ctypes.create_string_buffer(_ATTRIBUTE_BYTES)
        # SAFETY: pthread_mutexattr_t takes 4 bytes, and we own 64.
        libc.pthread_mutexattr_init(attribute)
        good = libc.pthread_mutexattr_setrobust(attribute, _PTHREAD_MUTEX_ROBUST) == 0
        libc.pthread_mutexattr_destroy(attribute)
    fix = "" if good else "use a C library with robust mutexes: glibc 2.12 or later"
    return Limit("robust mutexes", "yes" if good else "no", "yes", Verdict.OK if good else Verdict.SHORT, fix=fix)


def _clockwait() -> Limit:
    good = hasattr(ctypes.CDLL(None), "sem_clockwait")
    note = "" if good else "waits for a trusted host look every 0.2 ms instead; glibc 2.30 has it"
    return Limit("waits by the monotonic clock", "yes" if good else "no", "", Verdict.OK, note=note)


def _pidfd() -> Limit:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        fix = "use Linux 5.3 or later, or a container runtime that permits pidfd_open(2)"
        return Limit("pidfd_open", str(error.strerror), "yes", Verdict.SHORT, fix=fix)
    return Limit("pidfd_open", f"yes, Linux {platform.release()}", "yes", Verdict.OK)


def _cores() -> Limit:
    cores = len(os.sched_getaffinity(0))
    good = cores >= _CORES
    note = "" if good else "host and guest take turns: it works, and no time that is measured is worth much"
    fix = "" if good else "taskset -p -c 0-1 $$ (or docker run --cpus 2)"
    return Limit("processors", str(cores), str(_CORES), Verdict.OK if good else Verdict.SHORT, fix=fix, note=note)


def _clock(machine: Machine) -> Limit:
    source = machine.text(_CLOCK)
    if source is None:
        return Limit("clock", "unknown", "", Verdict.UNKNOWN)
    slow = source in _SLOW_CLOCKS
    note = "advice: a look at this clock is slow, and every allocation that is timed takes two" if slow else ""
    return Limit("clock", source, "", Verdict.OK, fix=f"echo tsc | sudo tee {_CLOCK}" if slow else "", note=note)


def _cache() -> Limit:
    """Where compiled kernels are kept, as ``common.native`` finds it; nothing is made here."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return _folder("cache of kernels", Path(home) / "fpr-lab", _CACHE_BYTES, "export XDG_CACHE_HOME=/path/to/a/folder")


def _temporary() -> Limit:
    try:
        folder = Path(tempfile.gettempdir())
    except OSError as error:
        return Limit(
            "temporary files", str(error.strerror), "writable", Verdict.SHORT, fix="export TMPDIR=/path/to/a/folder"
        )
    return _folder("temporary files", folder, _TEMPORARY_BYTES, "export TMPDIR=/path/to/a/folder")


def _folder(name: str, folder: Path, needed: int, fix: str) -> Limit:
    """Whether files can be made in ``folder``, or it can be made, and how much room there is."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    wanted = f"writable, {format_size(needed)}"
    if not os.access(there, os.W_OK | os.X_OK):
        return Limit(name, f"{folder}: may not be written to", wanted, Verdict.SHORT, fix=fix)
    space = os.statvfs(there)
    free = space.f_bavail * space.f_frsize
    verdict = at_least(free if space.f_blocks else -1, needed)
    return Limit(
        name, f"{folder}: {format_size(free)} free", wanted, verdict, fix=fix if verdict is Verdict.SHORT else ""
    )
