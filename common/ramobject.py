"""The RAM of one guest as a shared-memory object, and the gate page behind it.

The guest creates and maps it. The host works on the descriptor alone, so a guest that shrinks the object or scribbles
over it harms only itself. Layout: ``ram_bytes`` of memory (0 for the ``model`` backend), then one page, always
populated, whose first word is ``withdrawn_seq`` (little-endian u64).

The gate: every report with ``seq <= withdrawn_seq`` must not be discarded. Both sides look at that word, and the host
discards, only while they hold ``flock`` on their own open of the object. So a host that was stopped between receive and
discard can never punch a page which the guest has meanwhile taken back and used; and a guest that does not get the lock
knows that a discard is under way. The kernel drops the lock of a process that dies.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import struct
from types import TracebackType
from typing import Self

from common.errors import MachineError, NameInUseError, PeerError
from common.geometry import PAGE_BYTES
from common.names import SHM_DIR, ram_object

__all__ = ["GATE_BYTES", "RamObject"]

GATE_BYTES = PAGE_BYTES
_WORD = struct.Struct("<Q")
_STAT_BLOCK_BYTES = 512  # unit of st_blocks, stat(2)


class RamObject:
    """An open RAM object of ``ram_bytes`` bytes of memory."""

    def __init__(self, name: str, descriptor: int, ram_bytes: int) -> None:
        self.name = name
        self.ram_bytes = ram_bytes
        self._descriptor = descriptor
        self._map: mmap.mmap | None = None

    @classmethod
    def create(cls, lab: str, guest: str, *, ram_bytes: int) -> Self:
        """A new object, mode 0600, memory not populated, nothing withdrawn. For the guest.

        Raises:
            NameInUseError: it exists; whether it is stale is the caller's to know.
            MachineError: shared memory is too small, full or not permitted; the message names the fix.
        """
        name = ram_object(lab, guest)
        path = SHM_DIR + name
        free_bytes = _free_bytes()
        if ram_bytes + GATE_BYTES > free_bytes:
            raise _no_space(ram_bytes, free_bytes)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileExistsError as error:
            raise NameInUseError(f"shared memory {name} exists already") from error
        except OSError as error:
            raise MachineError(f"cannot create {path}: {error.strerror}; is {SHM_DIR} mounted and writable?") from error
        try:
            os.fchmod(descriptor, 0o600)  # whatever the umask took away
            os.ftruncate(descriptor, ram_bytes + GATE_BYTES)
            os.pwrite(descriptor, bytes(GATE_BYTES), ram_bytes)
        except OSError as error:
            os.close(descriptor)
            os.unlink(path)
            if error.errno in {errno.ENOSPC, errno.EFBIG, errno.ENOMEM}:
                raise _no_space(ram_bytes, _free_bytes()) from error
            raise MachineError(f"cannot create {path}: {error.strerror}") from error
        return cls(name, descriptor, ram_bytes)

    @classmethod
    def open(cls, lab: str, guest: str, *, ram_bytes: int) -> Self:
        """The object of a guest of this user, checked. For the host, which never maps it.

        Raises:
            PeerError: missing, not a regular file, of another user, open to others, or of another size.
        """
        name = ram_object(lab, guest)
        try:
            # O_NONBLOCK: a FIFO in its place must not make us wait.
            descriptor = os.open(SHM_DIR + name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise PeerError(f"cannot open shared memory {name}: {error.strerror}") from error
        status = os.fstat(descriptor)
        wrong = ""
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            wrong = "is not a plain shared-memory object"
        elif status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != 0o600:
            wrong = f"must be owned by user {os.geteuid()} with mode 0600"
        elif status.st_size != ram_bytes + GATE_BYTES:
            wrong = f"has {status.st_size} bytes, not {ram_bytes} and a gate page"
        if wrong:
            os.close(descriptor)
            raise PeerError(f"shared memory {name} {wrong}")
        return cls(name, descriptor, ram_bytes)

    def fileno(self) -> int:
        """Descriptor."""
        return self._descriptor

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode: tells this object from a later one of the same name."""
        status = os.fstat(self._descriptor)
        return status.st_dev, status.st_ino

    def resident_bytes(self) -> int:
        """Bytes of memory that are populated, the gate page left out. Raises ``OSError``."""
        return max(0, os.fstat(self._descriptor).st_blocks * _STAT_BLOCK_BYTES - GATE_BYTES)

    def map(self) -> mmap.mmap:
        """The memory (not the gate page), shared and writable; the same mapping each time. For the guest.

        Raises:
            ValueError: the ``model`` backend has no memory.
            MachineError: no address space.
        """
        if self._map is None:
            if not self.ram_bytes:
                raise ValueError("the model backend has no memory to map")
            try:
                self._map = mmap.mmap(self._descriptor, self.ram_bytes)
            except OSError as error:
                raise MachineError(f"cannot map {self.ram_bytes} bytes: {error.strerror}; see ulimit -v") from error
        return self._map

    def try_gate(self) -> bool:
        """Take the gate without waiting. False: the other side holds it. Raises ``OSError``."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def ungate(self) -> None:
        """Give the gate back."""
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def withdrawn_seq(self) -> int:
        """The last report that the guest gave up; 0 for none. The caller holds the gate.

        Raises:
            OSError: the gate page is gone (the guest shrank its object).
        """
        word = os.pread(self._descriptor, _WORD.size, self.ram_bytes)
        if len(word) != _WORD.size:
            raise OSError(errno.ENODATA, "the gate page is gone")
        return int(_WORD.unpack(word)[0])

    def withdraw(self, seq: int) -> None:
        """Give up every report up to ``seq``; never takes one back. For the guest, which holds the gate."""
        if seq > self.withdrawn_seq():
            os.pwrite(self._descriptor, _WORD.pack(seq), self.ram_bytes)

    def close(self) -> None:
        """Close the descriptor, and the mapping unless views of it are still in use. Idempotent."""
        if self._map is not None:
            with contextlib.suppress(BufferError):  # arrays over the mapping keep it; it goes with the last of them
                self._map.close()
            self._map = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def unlink(self) -> None:
        """Remove the name; the memory goes with the last descriptor and mapping. Idempotent."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(SHM_DIR + self.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _free_bytes() -> int:
    """What shared memory can still take.

    Raises:
        MachineError: there is no shared memory.
    """
    try:
        space = os.statvfs(SHM_DIR)
    except OSError as error:
        raise MachineError(f"no shared memory: {SHM_DIR}: {error.strerror}; mount a tmpfs there") from error
    return space.f_bavail * space.f_frsize


def _no_space(ram_bytes: int, free_bytes: int) -> MachineError:
    """The fix in words. Without this check the guest would die of SIGBUS at the touch that does not fit."""
    return MachineError(
        f"the guest's memory needs {ram_bytes >> 20} MiB and {SHM_DIR} has {free_bytes >> 20} MiB left; "
        f"use a smaller --memory, --backend model, or enlarge it (mount -o remount,size=... {SHM_DIR})"
    )
