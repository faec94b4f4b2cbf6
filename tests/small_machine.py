"""Processes on a machine that is too small for them: a private /dev/shm of some pages, limits, another user."""

from __future__ import annotations

import functools
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

__all__ = ["OTHER_USER", "ROOT", "in_small_shm", "limited", "may_mount", "needs_mount", "needs_root"]

ROOT = Path(__file__).resolve().parents[1]
OTHER_USER = 54321  # nobody's, so nothing else counts against its limits
_PATIENCE_S = 100
# The mount is private to the process and goes with it.
_SCRIPT = 'mount -t tmpfs -o "$0" tmpfs /dev/shm && exec "$@"'


def _unshare() -> list[str]:
    return ["unshare", "--mount", "--ipc", *([] if os.geteuid() == 0 else ["--map-root-user"])]


@functools.cache
def may_mount() -> bool:
    """Whether this user may have a /dev/shm of its own, as root or in a user namespace."""
    if shutil.which("unshare") is None:
        return False
    command = [*_unshare(), "sh", "-c", _SCRIPT, "size=4k", "true"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


needs_mount = pytest.mark.skipif(
    not may_mount(), reason="this user may not mount a file system of its own (unshare --mount)"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="another user can be tried by root alone")


def in_small_shm(options: str, *arguments: str, check: bool = False) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` with a /dev/shm and queues of its own, mounted with ``options``."""
    return subprocess.run(
        [*_unshare(), "sh", "-c", _SCRIPT, f"mode=1777,{options}", sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=check,
        timeout=_PATIENCE_S,
    )


def limited(program: str, *arguments: str, **limits: int) -> subprocess.CompletedProcess[str]:
    """``python -c PROGRAM ARGUMENTS`` with soft limits, by the names of ``resource`` (``FSIZE=4096``)."""

    def starve() -> None:
        for name, value in limits.items():
            which = getattr(resource, f"RLIMIT_{name}")
            resource.setrlimit(which, (value, resource.getrlimit(which)[1]))

    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=_PATIENCE_S,
        preexec_fn=starve,
    )
