"""Shared memory: create, attach, check, map, remove.

A segment is named by its creator and mapped by everybody. Whoever attaches checks owner, mode, magic, version, size and
offsets before it uses a single word.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import signal
import stat
from typing import Any

import numpy as np

from common import faults, layout
from common.errors import NameInUseError, SegmentError
from common.geometry import MAX_PAGES, MIN_MEMORY_BYTES, PAGE_SHIFT, PAGEBLOCK_PAGES
from common.names import SHM_DIR
from common.refusals import refusal, shm_refusal

_RESERVED_BYTES = 256 << 20
# What opening a link, a folder or a socket answers.
_STRANGE = {errno.ELOOP, errno.EISDIR, errno.ENXIO}

__all__ = ["Segment", "check_header", "check_ownership", "open_object", "unlink_object"]


def open_object(name: str, *, create_bytes: int = 0) -> int:
    """File descriptor of shared-memory object ``name``; with ``create_bytes`` a new one of that size, mode 0600.

    Raises:
        NameInUseError: it is to be created and exists.
        SegmentError: it is to be opened and does not exist, or is not ours.
        MachineError: permission or space.
    """
    creating = os.O_CREAT | os.O_EXCL if create_bytes else 0
    try:
        # What shm_open(3) does on Linux. O_NONBLOCK: a FIFO in its place must not make us wait.
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | creating
        descriptor = os.open(SHM_DIR + name, flags, 0o600)
    except FileExistsError as error:
        raise NameInUseError(f"{name}: exists already; choose another name, or remove {SHM_DIR}{name}") from error
    except FileNotFoundError as error:
        if create_bytes:
            raise shm_refusal(name, error) from error
        raise SegmentError(f"{name}: no such shared-memory object; is its guest running?") from error
    except OSError as error:
        if error.errno in _STRANGE:
            raise SegmentError(f"{name}: not a shared-memory object; remove {SHM_DIR}{name}") from error
        raise shm_refusal(name, error) from error
    try:
        if create_bytes:
            faults.reach("segment.created")
            os.fchmod(descriptor, 0o600)  # whatever the umask took away
            _reserve(descriptor, create_bytes)
            faults.reach("segment.sized")
        else:
            check_ownership(descriptor, name)
    except BaseException as error:
        os.close(descriptor)
        if create_bytes:
            unlink_object(name)
        if isinstance(error, OSError):
            raise shm_refusal(f"{name}: {create_bytes} bytes", error) from error
        raise
    return descriptor


def _reserve(descriptor: int, size_bytes: int) -> None:
    """Give the object its size, and its pages where they are few: a touch that finds no page left is a SIGBUS.

    The kernel gives up an allocation at a signal and takes back what it had (shmem_fallocate), so that signals in
    quick succession would keep it from ever coming to an end: they wait here.

    Raises:
        OSError: no space.
    """
    space = os.fstatvfs(descriptor)
    if size_bytes > space.f_bavail * space.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if size_bytes <= _RESERVED_BYTES:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            os.posix_fallocate(descriptor, 0, size_bytes)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    else:
        os.ftruncate(descriptor, size_bytes)


def check_ownership(descriptor: int, name: str) -> None:
    """Refuse an object that another user owns or can open.

    Raises:
        SegmentError: wrong owner or mode.
    """
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise SegmentError(f"{name}: not a plain shared-memory object of one name; remove /dev/shm{name}")
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise SegmentError(
            f"{name}: owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}; "
            f"must be owned by {os.geteuid()} with mode 0600"
        )


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def unlink_object(name: str) -> None:
    """Remove the name if it is there; mappings live on until they are dropped.

    Raises:
        NameInUseError: it is another user's.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(SHM_DIR + name)
    except OSError as error:
        raise NameInUseError(f"{name} belongs to another user; choose another --name") from error


def check_header(header: np.ndarray, size_bytes: int, name: str) -> None:
    """Check a header record (shape (), dtype ``layout.HEADER_DTYPE``) against the size of its object.

    Raises:
        SegmentError: a stranger, another layout version, or damage; says what was found and what is expected.
    """
    if int(header["magic"]) != layout.MAGIC:
        raise SegmentError(f"{name}: not a zone segment (magic {int(header['magic']) & 0xFFFFFFFFFFFFFFFF:#x})")
    version = int(header["layout_version"])
    if version != layout.LAYOUT_VERSION:
        raise SegmentError(f"{name}: layout version {version}; this program reads {layout.LAYOUT_VERSION}")
    n_pages, n_cpus = int(header["n_pages"]), int(header["n_cpus"])
    pages_fit = MIN_MEMORY_BYTES >> PAGE_SHIFT <= n_pages <= MAX_PAGES and n_pages % PAGEBLOCK_PAGES == 0
    if not pages_fit or not 1 <= n_cpus <= layout.MAX_CPUS:
        raise SegmentError(f"{name}: {n_pages} pages and {n_cpus} per-CPU slots are out of bounds")
    offsets = layout.segment_offsets(n_pages, n_cpus)
    found = tuple(int(header[f"{part}_offset"]) for part in ("link", "page", "resident", "block", "bitmap"))
    if found != offsets[:5] or int(header["total_bytes"]) != offsets.total or size_bytes != offsets.total:
        raise SegmentError(f"{name}: {size_bytes} bytes with parts at {found}; expected {offsets}")
    if int(header["ready"]) != 1:
        raise SegmentError(f"{name}: its creator has not finished it")


class Segment:
    """A mapping of a zone segment, named or private. ``address`` is valid until ``close``."""

    def __init__(self, name: str, mapping: mmap.mmap, *, writable: bool, identity: tuple[int, int] = (0, 0)) -> None:
        self.name = name
        self._identity = identity  # device and inode of a named one
        self.writable = writable
        self._mapping = mapping
        # Page records are read at random: with 4 KiB pages most of the time goes into the TLB. Shared memory obeys only
        # where /sys/kernel/mm/transparent_hugepage/shmem_enabled is "advise" or more.
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = np.frombuffer(mapping, dtype=np.uint8)
        self.address = int(self.bytes.ctypes.data)

    @classmethod
    def create(cls, name: str, total_bytes: int) -> Segment:
        """A new named segment, zeroed. Raises as ``open_object``."""
        descriptor = open_object(name, create_bytes=total_bytes)
        try:
            return cls(name, mmap.mmap(descriptor, total_bytes), writable=True, identity=_identity(descriptor))
        except OSError as error:
            unlink_object(name)
            raise refusal(f"{name}: cannot map {total_bytes} bytes", error) from error
        finally:
            os.close(descriptor)

    @classmethod
    def private(cls, total_bytes: int) -> Segment:
        """Anonymous memory of this process alone, zeroed."""
        try:
            private = mmap.mmap(-1, total_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise refusal(f"cannot map {total_bytes} bytes", error) from error
        return cls("", private, writable=True)

    @classmethod
    def attach(cls, name: str, *, writable: bool) -> Segment:
        """Map an existing segment after checking it. Raises ``SegmentError`` or ``MachineError``."""
        descriptor = open_object(name)
        try:
            size = os.fstat(descriptor).st_size
            if size < layout.HEADER_DTYPE.itemsize:
                raise SegmentError(f"{name}: {size} bytes are too few for a zone segment")
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            mapping = mmap.mmap(descriptor, size, access=access)
            segment = cls(name, mapping, writable=writable, identity=_identity(descriptor))
        except OSError as error:
            raise refusal(f"{name}: cannot map", error) from error
        finally:
            os.close(descriptor)
        try:
            check_header(segment.header, size, name)
        except SegmentError:
            segment.close()
            raise
        return segment

    @property
    def header(self) -> Any:
        """The header as a record array of shape (1,), a view."""
        return self.bytes[: layout.HEADER_DTYPE.itemsize].view(layout.HEADER_DTYPE)[0]

    def close(self) -> None:
        """Drop this process's views. The mapping itself goes when the last view (here or in a caller) does."""
        self.bytes = np.zeros(0, dtype=np.uint8)
        self.address = 0
        with contextlib.suppress(BufferError):
            self._mapping.close()

    def is_named(self) -> bool:
        """Whether the name still stands for this very object."""
        try:
            status = os.lstat(SHM_DIR + self.name)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._identity

    def unlink(self) -> None:
        """Remove the name."""
        if self.name:
            unlink_object(self.name)
