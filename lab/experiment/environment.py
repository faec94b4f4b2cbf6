"""Where and with what an experiment ran, for whoever reads its directory later."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["environment", "git_commit", "project_version"]

_ROOT = Path(__file__).resolve().parents[2]
_PROJECT = "fpr-lab"
_GIT_LIMIT_S = 10
# What can change a figure or a picture; the extra is there or it is not.
_PACKAGES = (
    "distributed",
    "jinja2",
    "llvmlite",
    "matplotlib",
    "msgpack",
    "numba",
    "numpy",
    "posix_ipc",
    "rich",
    "scipy",
)


def environment() -> dict[str, Any]:
    """This machine at this moment, as plain JSON values.

    Returns:
        kernel, machine, cpu_model (None where /proc/cpuinfo names none), cores of the machine and those that this
        process may use, memory_bytes, load_average (1, 5 and 15 minutes), python, and packages: version by name, None
        where a package is absent.
    """
    system = os.uname()
    return {
        "kernel": f"{system.sysname} {system.release}",
        "machine": system.machine,
        "cpu_model": _first_value("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def project_version() -> str:
    """The version of this project: that of the sources beside this file, else that of the installed package."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
        if project["name"] == _PROJECT:
            return str(project["version"])
    return _version(_PROJECT) or "unknown"


def git_commit() -> str | None:
    """The commit of the sources beside this file, with ``+`` where they were changed since; None outside a checkout."""
    git = shutil.which("git")
    if git is None or not (_ROOT / ".git").exists():
        return None
    commit = _git(git, "rev-parse", "HEAD")
    if commit is None:
        return None
    return commit + ("+" if _git(git, "status", "--porcelain", "--untracked-files=no") else "")


def _git(git: str, *arguments: str) -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(  # noqa: S603  fixed arguments, no shell
            [git, "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True, timeout=_GIT_LIMIT_S
        )
        return done.stdout.strip()
    return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first_value(path: str, key: str) -> str | None:
    """What stands behind the first ``key :`` of a file of /proc."""
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as stream:
        for line in stream:
            name, colon, value = line.partition(":")
            if colon and name.strip() == key:
                return value.strip()
    return None
