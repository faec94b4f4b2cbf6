"""Reading files that a user names: whatever stands at the path, it neither blocks nor fills the memory."""

from __future__ import annotations

import errno
import os
import stat

__all__ = ["MOST_BYTES", "read_regular"]

MOST_BYTES = 16 << 20  # of a file of settings or costs; those that people write have some thousand


def read_regular(path: str | os.PathLike[str], most_bytes: int | None = MOST_BYTES) -> bytes:
    """All of the regular file ``path``, links followed.

    Args:
        most_bytes: what a larger file is refused for; None for any size.

    Raises:
        OSError: it cannot be opened or read, is no regular file (a device, a FIFO, a folder) or is too large;
            ``strerror`` says which.
    """
    with open(path, "rb", opener=_open_at_once) as stream:  # refuses a folder by itself
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise OSError(errno.EINVAL, "is no regular file")
        # Read rather than asked for its size: files of /proc have none, and others grow.
        data = stream.read(-1 if most_bytes is None else most_bytes + 1)
    if most_bytes is not None and len(data) > most_bytes:
        raise OSError(errno.EFBIG, f"is too large, more than {most_bytes >> 20} MiB")
    return data


def _open_at_once(path: str, flags: int) -> int:
    """Without O_NONBLOCK a FIFO would wait for a writer; without O_NOCTTY a terminal could become this process's."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
