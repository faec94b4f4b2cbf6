"""The RAM of one guest as a shared-memory object, and the gate page behind it.

The guest creates and maps it. The host works on the descriptor alone, so a guest that shrinks the object or scribbles
over it harms only itself. Layout: ``ram_bytes`` of memory (0 for the ``model`` backend), then one page, always
populated, of little-endian u64: ``withdrawn_seq``, and ``kept``, 1 if the guest's names outlive its process. From byte
64 of that page on stands what the guest says of itself, its hello as it is sent. A hello can be sent by anybody and
names a guest; only who has that guest's object can have written it there. So the host believes a hello that stands in
the named guest's gate page, and no other.

The gate: every report with ``seq <= withdrawn_seq`` must not be discarded. Both sides look at that word, and the host
discards, only while they hold ``flock`` on their own open of the object. So a host that was stopped between receive and
discard can never punch a page which the guest has meanwhile taken back and used; and a guest that does not get the lock
knows that a discard is under way. The kernel drops the lock of a process that dies.

The owner: who made the object holds a record lock on it while it lives. Whoever wants to remove what a dead guest left
takes that lock first, so that nobody can make the name anew in the meantime.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import struct
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from common import faults
from common.errors import MachineError, NameInUseError, PeerError
from common.geometry import PAGE_BYTES
from common.names import SHM_DIR, ram_object
from common.refusals import refusal, shm_refusal

__all__ = [
    "GATE_BYTES",
    "RamObject",
    "dead_object",
    "has_said",
    "is_kept",
    "is_owned",
    "owned_names",
    "remove_if_dead",
]

GATE_BYTES = PAGE_BYTES
_SAID_OFFSET = 64
_WORD = struct.Struct("<Q")
_KEPT_OFFSET = _WORD.size
# Reports of one guest process, at most: what a successor gives up of those that it knows nothing of.
_MOST_REPORTS = 1 << 40
_STAT_BLOCK_BYTES = 512  # unit of st_blocks, stat(2)


class RamObject:
    """An open RAM object of ``ram_bytes`` bytes of memory. ``owned``: this process has the owner's lock on it."""

    def __init__(self, name: str, descriptor: int, ram_bytes: int, *, owned: bool = False) -> None:
        self.name = name
        self.ram_bytes = ram_bytes
        self._descriptor = descriptor
        self._owned = _identity(descriptor) if owned else None
        if self._owned is not None:
            _owned_here.add(self._owned)
        self._map: mmap.mmap | None = None

    @classmethod
    def create(
        cls,
        lab: str,
        guest: str,
        *,
        ram_bytes: int,
        kept: bool = False,
        overcommit: bool = False,
        before: Callable[[], object] = bool,
    ) -> Self:
        """A new object, mode 0600, memory not populated, nothing withdrawn. For the guest.

        From now on this process owns the guest's name: what a dead guest of that name left behind is replaced.
        ``kept``: should this process die, nobody but a successor removes its names.
        ``overcommit``: it may be larger than what is free now, though not than all there is.
        ``before``: called before a dead guest's object is replaced, to remove what else it left.

        Raises:
            NameInUseError: a live process owns the name.
            MachineError: shared memory is too small, full or not permitted; the message names the fix.
        """
        name = ram_object(lab, guest)
        path = SHM_DIR + name
        free_bytes = _free_bytes(all_there_is=overcommit)
        if ram_bytes + GATE_BYTES > free_bytes:
            raise _no_space(ram_bytes, free_bytes)
        descriptor = _create_owned(path, before)
        try:
            os.fchmod(descriptor, 0o600)  # whatever the umask took away
            os.ftruncate(descriptor, ram_bytes + GATE_BYTES)
            faults.reach("ram.sized")
            os.pwrite(descriptor, _WORD.pack(0) + _WORD.pack(kept) + bytes(GATE_BYTES - 2 * _WORD.size), ram_bytes)
        except OSError as error:
            os.close(descriptor)
            os.unlink(path)
            raise shm_refusal(f"cannot create {path} of {ram_bytes + GATE_BYTES} bytes", error) from error
        return cls(name, descriptor, ram_bytes, owned=True)

    @classmethod
    def adopt(cls, lab: str, guest: str, *, ram_bytes: int) -> Self:
        """The object of a guest whose process is gone, with its memory as it is. For the guest that takes its place.

        Its names outlive that one too.

        Raises:
            PeerError: as ``open``. NameInUseError: its owner lives.
        """
        path = SHM_DIR + ram_object(lab, guest)
        found = None if _is_ours(path) else cls.open(lab, guest, ram_bytes=ram_bytes)
        if found is None or not _lock(found.fileno()):
            holder = _holder_at(path)
            if found is not None:
                found.close()
            raise NameInUseError(f"guest {guest!r} lives (process {holder}); stop it first, or use --join")
        if not _stands_for(path, found.fileno()):
            found.close()
            raise PeerError(f"guest {guest!r} was removed meanwhile; start it without --attach")
        os.pwrite(found.fileno(), _WORD.pack(1), ram_bytes + _KEPT_OFFSET)
        return cls(found.name, found.fileno(), ram_bytes, owned=True)

    @classmethod
    def open(cls, lab: str, guest: str, *, ram_bytes: int) -> Self:
        """The object of a guest of this user, checked. For the host, which never maps it.

        Raises:
            PeerError: missing, not a regular file, of another user, open to others, of another size, or larger than all
                of shared memory.
        """
        name = ram_object(lab, guest)
        try:
            descriptor = os.open(SHM_DIR + name, _OPEN)
        except OSError as error:
            raise PeerError(f"cannot open shared memory {name}: {error.strerror}") from error
        status, space = os.fstat(descriptor), os.fstatvfs(descriptor)
        wrong = ""
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            wrong = "is not a plain shared-memory object"
        elif status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != 0o600:
            wrong = f"must be owned by user {os.geteuid()} with mode 0600"
        elif status.st_size != ram_bytes + GATE_BYTES:
            wrong = f"has {status.st_size} bytes, not {ram_bytes} and a gate page"
        elif space.f_blocks and ram_bytes > space.f_blocks * space.f_frsize:
            # What the host keeps of a guest grows with its memory: it must not be able to claim what cannot be.
            wrong = f"claims {ram_bytes} bytes, more than all of {SHM_DIR}"
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

    def owner_pid(self) -> int:
        """Process that created the object and still has it open, as the kernel tells; 0 if it is gone."""
        return os.getpid() if self.identity in _owned_here else _lock_holder(self._descriptor)

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
                raise refusal(f"cannot map {self.ram_bytes} bytes", error) from error
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

    def withdraw_all(self) -> int:
        """Give up every report that the process before this one may have sent; the number that the next one follows.

        For a guest that has adopted the object, and holds the gate.
        """
        last = self.withdrawn_seq() + _MOST_REPORTS
        self.withdraw(last)
        return last

    def say(self, hello: bytes) -> None:
        """Write into the gate page what the guest says of itself. For the guest, before it sends the same."""
        os.pwrite(self._descriptor, hello, self.ram_bytes + _SAID_OFFSET)

    def has_said(self, hello: bytes) -> bool:
        """Whether the guest has written ``hello`` there. Raises ``OSError``."""
        return os.pread(self._descriptor, len(hello), self.ram_bytes + _SAID_OFFSET) == hello

    def close(self) -> None:
        """Close the descriptor, and the mapping unless views of it are still in use. Idempotent."""
        if self._map is not None:
            with contextlib.suppress(BufferError):  # arrays over the mapping keep it; it goes with the last of them
                self._map.close()
            self._map = None
        if self._descriptor >= 0:
            if self._owned is not None:
                _owned_here.discard(self._owned)
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


def has_said(lab: str, guest: str, hello: bytes) -> bool:
    """Whether ``hello`` stands in the gate page of this user's RAM object of ``guest``, whatever its size and mode.

    For the host, to tell a hello that the guest has sent from one that somebody else sent in its name.
    """
    try:
        descriptor = os.open(SHM_DIR + ram_object(lab, guest), _OPEN)
    except OSError:
        return False
    try:
        status = os.fstat(descriptor)
        gate = status.st_size - GATE_BYTES
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or gate < 0:
            return False
        return os.pread(descriptor, len(hello), gate + _SAID_OFFSET) == hello
    except OSError:
        return False
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def dead_object(path: str) -> Iterator[bool]:
    """True if the owner of the RAM object at ``path`` (under ``SHM_DIR``) is gone; the object is removed at the end.

    Until then its lock is held, so of two that find the same dead object only one removes it, and nobody can make the
    name anew: what else the dead guest left behind may be removed meanwhile.

    Raises:
        FileNotFoundError: there is no such object (any more).
        OSError: it is not ours to open or to remove.
    """
    if _is_ours(path):
        yield False
        return
    descriptor = os.open(path, _OPEN)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "it belongs to another user")
        if not _lock(descriptor):
            yield False
            return
        if not _stands_for(path, descriptor):
            raise FileNotFoundError(errno.ENOENT, "it has gone, or been replaced, meanwhile")
        yield True
        os.unlink(path)
    finally:
        os.close(descriptor)


def remove_if_dead(path: str, before: Callable[[], object] = bool) -> bool:
    """Remove the RAM object at ``path`` (under ``SHM_DIR``) if its owner is gone; True if it is gone now.

    ``before`` is called with the owner's lock held, to remove what else had that name.

    Raises:
        OSError: it is not ours to open or to remove.
    """
    try:
        with dead_object(path) as dead:
            if dead:
                before()
            return dead
    except FileNotFoundError:
        return True


def is_owned(path: str) -> bool:
    """Whether a live process, of whatever pid namespace, owns the RAM object at ``path``.

    Raises:
        OSError: it is not there, or not ours to open.
    """
    if _is_ours(path):
        return True
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return _lock_of(descriptor)[0] != fcntl.F_UNLCK
    finally:
        os.close(descriptor)


def owned_names() -> list[tuple[str, str]]:
    """Lab and guest of each RAM object that this process owns and whose name is still there. Raises nothing."""
    found = []
    with contextlib.suppress(OSError):
        for entry in os.listdir(SHM_DIR):
            prefix, *name = entry.split(".")
            if (prefix, *name[2:]) == ("fpr", "ram") and _is_ours(f"{SHM_DIR}/{entry}"):
                found.append((name[0], name[1]))
    return found


def is_kept(path: str) -> bool:
    """Whether the RAM object at ``path`` (under ``SHM_DIR``) is that of a guest whose names outlive it. Raises nothing.

    Asked of objects whose owner is gone; of one that is this process's own the answer is False. The word is the guest's
    own claim: it decides what becomes of the guest's own names, and of nothing else.
    """
    if _is_ours(path):
        return False
    try:
        descriptor = os.open(path, _OPEN)
    except OSError:
        return False
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size < GATE_BYTES:
            return False
        word = os.pread(descriptor, _WORD.size, status.st_size - GATE_BYTES + _KEPT_OFFSET)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return len(word) == _WORD.size and _WORD.unpack(word)[0] == 1


# O_NONBLOCK: a FIFO in its place must not make us wait, nor a lease that its guest has taken on it.
_OPEN = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
# Objects that this process owns, by device and inode: the kernel's record locks do not hold against their own process.
_owned_here: set[tuple[int, int]] = set()
# struct flock of bits/fcntl.h on 64-bit Linux: type, whence, start, len, pid.
_FLOCK = struct.Struct("hhqqi4x")


def _create_owned(path: str, before: Callable[[], object]) -> int:
    """Descriptor of a new object at ``path``, with the owner's lock on it. ``before``: see ``remove_if_dead``.

    It is a record lock, which is apart from the ``flock`` of the gate, tells who holds it, and goes with the process.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileExistsError:
            try:
                if remove_if_dead(path, before):
                    continue
                holder = _holder_at(path)
            except OSError as error:
                raise NameInUseError(f"{path} exists and is not ours: {error.strerror}; remove it") from error
            who = f"process {holder}" if holder else "a live process"
            raise NameInUseError(f"{path} belongs to {who}; choose another --name") from None
        except OSError as error:
            raise shm_refusal(f"cannot create {path}", error) from error
        faults.reach("ram.created")
        try:
            ours = _lock(descriptor)
        except OSError as error:
            os.close(descriptor)
            os.unlink(path)
            raise shm_refusal(f"cannot lock {path}", error) from error
        if ours and _stands_for(path, descriptor):
            return descriptor
        os.close(descriptor)  # between our open and our lock somebody took it for a dead one's: try again


def _lock(descriptor: int) -> bool:
    """Take the owner's lock without waiting; False if another process has it."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in {errno.EACCES, errno.EAGAIN}:
            return False
        raise
    return True


def _lock_holder(descriptor: int) -> int:
    """Pid of the process that has the owner's lock; 0 if none has, or this one, or one of another pid namespace."""
    kind, pid = _lock_of(descriptor)
    return 0 if kind == fcntl.F_UNLCK else pid


def _lock_of(descriptor: int) -> tuple[int, int]:
    """Kind of the owner's lock (F_UNLCK: nobody else has it) and the pid of who has it."""
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _whence, _start, _length, pid = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, request))
    return int(kind), int(pid)


def _holder_at(path: str) -> int:
    if _is_ours(path):
        return os.getpid()
    descriptor = os.open(path, _OPEN)
    try:
        return _lock_holder(descriptor)
    finally:
        os.close(descriptor)


def _stands_for(path: str, descriptor: int) -> bool:
    """Whether the name still is that of the object which is open."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _is_ours(path: str) -> bool:
    """Asked by name and not by descriptor: closing a second descriptor would drop this process's own record lock."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return (status.st_dev, status.st_ino) in _owned_here


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _free_bytes(*, all_there_is: bool) -> int:
    """What shared memory can still take, or could if nobody used any.

    Raises:
        MachineError: there is no shared memory.
    """
    try:
        space = os.statvfs(SHM_DIR)
    except OSError as error:
        raise MachineError(f"no shared memory: {SHM_DIR}: {error.strerror}; mount a tmpfs there") from error
    return (space.f_blocks if all_there_is else space.f_bavail) * space.f_frsize


def _no_space(ram_bytes: int, free_bytes: int) -> MachineError:
    """The fix in words. Without this check the guest would die of SIGBUS at the touch that does not fit."""
    return MachineError(
        f"the guest's memory needs {ram_bytes >> 20} MiB and {SHM_DIR} has {free_bytes >> 20} MiB left; "
        f"use a smaller --memory, --backend model, or enlarge it (mount -o remount,size=... {SHM_DIR})"
    )
