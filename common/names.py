"""Names of shared objects and queues, all derived from a lab name and a guest name.

A peer sends the *guest name* only; every object name is derived here, so that no message can point the
other side at an object of somebody else or outside the namespace.
"""

from __future__ import annotations

import re

from common.errors import UsageError

__all__ = [
    "SHM_DIR",
    "ack_queue",
    "check_name",
    "control_queue",
    "guests_in_shm",
    "ram_object",
    "report_queue",
    "zone_object",
]

SHM_DIR = "/dev/shm"  # noqa: S108  POSIX shared memory lives here on Linux: it is the API, not a temporary file
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")


def check_name(kind: str, name: str) -> str:
    """``name`` itself if it may be used in an object name.

    Raises:
        UsageError: not 1 to 32 characters of a-z, 0-9 and inner hyphens.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"{kind}: {name!r}; allowed are 1 to 32 characters of a-z, 0-9 and inner hyphens")
    return name


def control_queue(lab: str) -> str:
    """Guests to host: hello, goodbye."""
    return f"/fpr.{lab}.control"


def report_queue(lab: str, guest: str) -> str:
    """One guest to host: reports."""
    return f"/fpr.{lab}.{guest}.report"


def ack_queue(lab: str, guest: str) -> str:
    """Host to one guest: welcome, acknowledgement, announcement."""
    return f"/fpr.{lab}.{guest}.ack"


def zone_object(lab: str, guest: str) -> str:
    """Shared memory: page metadata of one guest."""
    return f"/fpr.{lab}.{guest}.zone"


def ram_object(lab: str, guest: str) -> str:
    """Shared memory: the RAM of one guest and its gate page."""
    return f"/fpr.{lab}.{guest}.ram"


def guests_in_shm(lab: str, listing: list[str]) -> list[str]:
    """Guest names of ``lab`` that have a RAM object among ``listing`` (entries of ``SHM_DIR``), sorted."""
    pattern = re.compile(rf"fpr\.{re.escape(lab)}\.({_NAME.pattern})\.ram")
    return sorted(match[1] for entry in listing if (match := pattern.fullmatch(entry)))
