"""What the operating system refuses, in words that name the fix: one table for every place that creates or grows.

Light: the command line imports it, and through it every ``--help``.
"""

from __future__ import annotations

import errno
import os

from common.errors import MachineError
from common.names import SHM_DIR

__all__ = ["fix_of", "refusal", "shm_refusal", "thread_refusal"]

_SPACE = f"free some space, in {SHM_DIR} too (df -h {SHM_DIR})"
_PERMISSIONS = f"check the permissions, those of {SHM_DIR} too"
_FIXES = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the machine's limit of open files (/proc/sys/fs/file-max)",
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "raise the limit of file size (ulimit -f)",
    errno.EROFS: "use a place that can be written to",
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.ENOMEM: "free some memory, or use fewer or smaller guests; see ulimit -v too",
    errno.EAGAIN: "raise the limit of processes (ulimit -u)",  # fork(2)
    errno.ENOLCK: "end other programs: the kernel has no room for another file lock",
}
_BUGS = {errno.EBADF, errno.EFAULT, errno.EINVAL}  # the machine is right and we are wrong: those keep their traceback
_NO_THREAD = "can't start new thread"  # all that CPython says when the kernel refuses one


def fix_of(error: OSError) -> str | None:
    """What a user can do about ``error``, an empty string if nothing is known, None if it is a bug of ours."""
    if error.errno is None or error.errno in _BUGS:
        return None
    return _FIXES.get(error.errno, "")


def refusal(what: str, error: OSError) -> MachineError:
    """``what`` could not be done, why, and the fix; for the caller to raise."""
    fix = fix_of(error)
    return MachineError(f"{what}: {error.strerror}" + (f"; {fix}" if fix else ""))


def shm_refusal(what: str, error: OSError) -> MachineError:
    """As ``refusal``, of something in shared memory: says which of its limits it was."""
    match error.errno:
        case errno.ENOSPC if _no_names_left():
            fix = f"there is no room for another name; mount -o remount,nr_inodes=... {SHM_DIR}"
        case errno.ENOSPC:
            fix = f"enlarge it (mount -o remount,size=... {SHM_DIR}), use less memory, or --backend model"
        case errno.EDQUOT:
            fix = f"this user's quota of {SHM_DIR} is used up (quota -s); raise it or use less memory"
        case errno.EROFS:
            fix = f"{SHM_DIR} is mounted read-only; mount -o remount,rw {SHM_DIR}"
        case errno.EACCES | errno.EPERM:
            fix = f"{SHM_DIR} must be mounted and writable for this user (chmod 1777 {SHM_DIR}), and the name ours"
        case errno.ENOENT | errno.ENOTDIR:
            fix = f"is {SHM_DIR} mounted and writable? mount -t tmpfs -o mode=1777 tmpfs {SHM_DIR}"
        case _:
            return refusal(what, error)
    return MachineError(f"{what}: {error.strerror}; {fix}")


def thread_refusal(error: RuntimeError) -> MachineError | None:
    """The error in words if ``error`` says that no thread could be started, else None."""
    if str(error) != _NO_THREAD:
        return None
    return MachineError(
        "no thread can be started; raise the limit of processes and threads (ulimit -u, or pids.max of the control "
        "group) or of address space (ulimit -v)"
    )


def _no_names_left() -> bool:
    """Whether it is inodes that shared memory has run out of."""
    try:
        space = os.statvfs(SHM_DIR)
    except OSError:
        return False
    return space.f_files > 0 and space.f_ffree == 0
