"""A file that appears under its name when it is whole, and leaves nothing behind if its writer is killed before.

While it is written it has no name at all (O_TMPFILE), so that the kernel drops it with the process. A file system that
knows no nameless files gets a sibling ``NAME.PID-RANDOM.part`` instead, on which the writer holds ``flock``; a sibling
that nobody holds is a dead writer's, and the next write to that name removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from typing import IO, Self

from common.errors import UsageError

__all__ = ["Part", "is_stream", "part_name"]

_NAMELESS_UNKNOWN = {errno.EISDIR, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOENT}
_DESCRIPTORS = "/proc/self/fd"


def part_name(target: str) -> str:
    """A name beside ``target`` that nobody else uses."""
    return f"{target}.{os.getpid()}-{os.urandom(4).hex()}.part"


def is_stream(path: str) -> bool:
    """Whether ``path`` exists and is a device, pipe or socket."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


class Part:
    """What will be the file ``target``, links followed: write to ``stream``, then ``finish``; unfinished it is nothing.

    Raises:
        UsageError: ``target`` is a device, a pipe or a socket, in whose place a file would come.
        OSError: space, quota, permissions; from every method, and nothing is left then.
    """

    def __init__(self, target: str) -> None:
        self.target = os.path.realpath(target)
        if is_stream(self.target):
            raise UsageError(f"{target}: is a device, a pipe or a socket; name a file")
        self._name = ""
        _remove_dead(self.target)
        self._descriptor = self._open()
        self.stream: IO[bytes] = os.fdopen(self._descriptor, "wb")

    def _open(self) -> int:
        folder = os.path.dirname(self.target)
        descriptor = -1
        try:
            descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno not in _NAMELESS_UNKNOWN:
                raise
        if descriptor >= 0 and not os.path.exists(f"{_DESCRIPTORS}/{descriptor}"):  # without /proc it gets no name
            os.close(descriptor)
            descriptor = -1
        if descriptor < 0:
            self._name = part_name(self.target)
            descriptor = os.open(self._name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks: then a dead writer's sibling stays
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor

    def finish(self) -> int:
        """Give the file its name, in place of what had it before; its size in bytes."""
        self.stream.flush()
        size = os.fstat(self._descriptor).st_size
        if not self._name:
            folder = os.open(_DESCRIPTORS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._name = part_name(self.target)
                os.link(str(self._descriptor), self._name, src_dir_fd=folder)  # a link cannot replace; a rename can
            except OSError:
                self._name = ""
                raise
            finally:
                os.close(folder)
        os.replace(self._name, self.target)
        self._name = ""
        return size

    def close(self) -> None:
        """Close; without ``finish`` all that was written is gone. Idempotent."""
        if self._name:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._name)
            self._name = ""
        if not self.stream.closed:
            with contextlib.suppress(OSError):  # what could not be written has been told by ``finish`` or a write
                self.stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_details: object) -> None:
        self.close()


def _remove_dead(target: str) -> None:
    """Remove the siblings of ``target`` whose writers were killed."""
    folder, base = os.path.split(target)
    pattern = re.compile(rf"{re.escape(base)}\.[0-9]+-[0-9a-f]{{8}}\.part")
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if pattern.fullmatch(name):
                with contextlib.suppress(OSError):
                    _remove_if_dead(os.path.join(folder, name))


def _remove_if_dead(path: str) -> None:
    """Remove one of them if nobody holds it. Raises ``OSError``."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(status, os.lstat(path)):
            os.unlink(path)
    finally:
        os.close(descriptor)
