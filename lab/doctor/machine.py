"""Where limits stand: files of /proc and /sys, half of which a container may lack, and this process's own limits."""

from __future__ import annotations

import contextlib
import os
import resource
from dataclasses import dataclass

__all__ = ["Machine", "Mount"]

_CAP_SYS_RESOURCE = 24  # include/uapi/linux/capability.h
_ALL_IDS = 4294967295  # what /proc/self/uid_map maps in the first user namespace


@dataclass(frozen=True)
class Mount:
    """A mounted file system: its type, and whether it may be written to."""

    kind: str
    writable: bool


class Machine:
    """Reads below ``root``, which a test may set; every answer may be None: this machine does not say."""

    def __init__(self, root: str = "") -> None:
        self._root = root

    def text(self, path: str) -> str | None:
        """A file, without white space at its ends."""
        with contextlib.suppress(OSError, UnicodeDecodeError), open(self._root + path, encoding="utf-8") as stream:
            return stream.read().strip()
        return None

    def number(self, path: str) -> int | None:
        """The first number of a file; -1 for the word ``max``."""
        words = (self.text(path) or "").split()
        if words[:1] == ["max"]:
            return -1
        return int(words[0]) if words and words[0].lstrip("-").isdigit() else None

    def field(self, path: str, key: str) -> list[str] | None:
        """The words behind ``key:`` in a file of such lines."""
        for line in (self.text(path) or "").splitlines():
            name, colon, rest = line.partition(":")
            if colon and name.strip() == key:
                return rest.split()
        return None

    def kib(self, path: str, key: str) -> int | None:
        """Bytes of a field that is given in kB."""
        words = self.field(path, key)
        return int(words[0]) * 1024 if words and words[0].isdigit() else None

    def listing(self, path: str) -> list[str] | None:
        """Names in a folder, sorted."""
        with contextlib.suppress(OSError):
            return sorted(os.listdir(self._root + path))
        return None

    def mount(self, point: str) -> Mount | None:
        """What is mounted at ``point``, the last of several; see proc_pid_mountinfo(5)."""
        found = None
        for line in (self.text("/proc/self/mountinfo") or "").splitlines():
            before, _, after = line.partition(" - ")
            fields, kind = before.split(), after.split()
            if len(fields) > 5 and kind and fields[4] == point:
                options = {*fields[5].split(","), *(kind[2].split(",") if len(kind) > 2 else ())}
                found = Mount(kind[0], "ro" not in options)
        return found

    def has_resource_capability(self) -> bool:
        """CAP_SYS_RESOURCE in the first user namespace: several limits do not hold for such a process."""
        effective = self.field("/proc/self/status", "CapEff")
        ids = (self.text("/proc/self/uid_map") or "").split()
        first_namespace = len(ids) == 3 and int(ids[2]) == _ALL_IDS
        if not effective or not first_namespace:
            return False
        return bool(int(effective[0], 16) >> _CAP_SYS_RESOURCE & 1)

    @staticmethod
    def limits(which: int) -> tuple[int, int]:
        """Soft and hard limit (``resource.RLIMIT_...``) of this process; -1 for none."""
        soft, hard = resource.getrlimit(which)
        unlimited = resource.RLIM_INFINITY
        return (-1 if soft == unlimited else soft, -1 if hard == unlimited else hard)
