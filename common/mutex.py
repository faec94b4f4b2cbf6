"""The robust, process-shared mutex and the semaphore that live inside a segment.

Python only initialises them. Lock, work and unlock happen inside compiled kernels (see ``common.native``), so that no
Python runs with the lock held. When an owner dies the next locker gets EOWNERDEAD and repairs the zone.
"""

from __future__ import annotations

import ctypes
import errno
import os

from common.errors import MachineError
from common.native import libc

__all__ = ["EOWNERDEAD", "initialise_mutex", "initialise_semaphore", "post_semaphore", "wait_semaphore"]

# A lock takes a cache line: pthread_mutex_t is 40 bytes on x86-64, 48 on arm64 (bits/pthreadtypes-arch.h).
EOWNERDEAD = errno.EOWNERDEAD
_ATTRIBUTE_BYTES = 64
_PTHREAD_PROCESS_SHARED = 1
_PTHREAD_MUTEX_ROBUST = 1


def _check(code: int, what: str) -> None:
    if code:
        raise MachineError(f"{what}: {os.strerror(code)}; a glibc or musl with robust process-shared mutexes is needed")


def initialise_mutex(address: int) -> None:
    """Make the 64 bytes at ``address`` an unlocked robust process-shared mutex.

    Raises:
        MachineError: the C library has none.
    """
    attribute = ctypes.create_string_buffer(_ATTRIBUTE_BYTES)
    _check(libc.pthread_mutexattr_init(attribute), "pthread_mutexattr_init")
    try:
        _check(libc.pthread_mutexattr_setpshared(attribute, _PTHREAD_PROCESS_SHARED), "process-shared mutex")
        _check(libc.pthread_mutexattr_setrobust(attribute, _PTHREAD_MUTEX_ROBUST), "robust mutex")
        # SAFETY: the caller owns 64 zeroed, 64-byte aligned bytes at this address.
        _check(libc.pthread_mutex_init(ctypes.c_void_p(address), attribute), "pthread_mutex_init")
    finally:
        libc.pthread_mutexattr_destroy(attribute)


def initialise_semaphore(address: int) -> None:
    """Make the 64 bytes at ``address`` a process-shared semaphore of value 0.

    Raises:
        MachineError: the C library has none.
    """
    # SAFETY: as above; sem_t takes 32 bytes on 64-bit Linux.
    if libc.sem_init(ctypes.c_void_p(address), 1, 0):
        raise MachineError(f"sem_init: {os.strerror(ctypes.get_errno())}")


def wait_semaphore(address: int) -> None:
    """Sleep, without the GIL, until the semaphore at ``address`` is posted, then take one from it."""
    # SAFETY: the caller keeps the mapping alive until this returns.
    while libc.sem_wait(ctypes.c_void_p(address)):
        if ctypes.get_errno() != errno.EINTR:
            raise MachineError(f"sem_wait: {os.strerror(ctypes.get_errno())}")


def post_semaphore(address: int) -> None:
    """Add one to the semaphore at ``address`` and wake a sleeper."""
    # SAFETY: as above.
    libc.sem_post(ctypes.c_void_p(address))
