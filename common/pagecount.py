"""How many pages of a range of a memory object there are: ``cachestat`` (Linux 6.5 and later), in one call.

It counts what is populated, written or not; SEEK_DATA passes over pages that were populated and never written.
"""

from __future__ import annotations

import ctypes
import os

__all__ = ["PageCount"]

_NR_CACHESTAT = 451  # one number for all architectures but alpha: scripts/syscall.tbl

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
_syscall.restype = ctypes.c_long


class _CachestatRange(ctypes.Structure):
    """``struct cachestat_range`` of include/uapi/linux/mman.h."""

    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Cachestat(ctypes.Structure):
    """``struct cachestat`` of include/uapi/linux/mman.h. ``evicted`` counts pages of shared memory in swap."""

    _fields_ = (
        ("cache", ctypes.c_uint64),
        ("dirty", ctypes.c_uint64),
        ("writeback", ctypes.c_uint64),
        ("evicted", ctypes.c_uint64),
        ("recently_evicted", ctypes.c_uint64),
    )


class PageCount:
    """Counts pages. For one thread at a time."""

    def __init__(self) -> None:
        self._range = _CachestatRange()
        self._counts = _Cachestat()
        # SAFETY: both structures live as long as self, which every call below goes through.
        self._range_address = ctypes.addressof(self._range)
        self._counts_address = ctypes.addressof(self._counts)

    def pages(self, descriptor: int, offset: int, length: int) -> int:
        """Pages of the range that hold data. Raises ``OSError``."""
        self._range.offset = offset
        self._range.length = length
        # SAFETY: the kernel reads 16 bytes and writes 40 at the addresses of our own structures of those sizes.
        if _syscall(_NR_CACHESTAT, descriptor, self._range_address, self._counts_address, 0):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return int(self._counts.cache + self._counts.evicted)
