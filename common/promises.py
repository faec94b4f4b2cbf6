"""Memory that guests were promised and have not touched yet, against what shared memory has left.

A guest's memory is sparse: each page is taken from /dev/shm at its first use, and one that finds none left is a bus
error. Several guests can each fit and not all of them together. So a guest that starts adds up what all that live may
still touch, its own included, and is refused if that is more than there is, unless it is overcommitted on purpose.

The guest's own object has its size already when this is looked at, so of two that start at the same moment at least one
sees the other. Rejected: ``fallocate`` of all memory at the start, which would leave no first touch and no fault.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass

from common.errors import MachineError
from common.names import SHM_DIR
from common.ramobject import RamObject, is_owned
from common.units import format_size

__all__ = ["Promises", "check_promises", "promises"]

_OBJECT = re.compile(r"fpr\.[a-z0-9-]+\.[a-z0-9-]+\.(?:ram|zone)")
_STAT_BLOCK_BYTES = 512  # unit of st_blocks, stat(2)
_BYTES_OF_A_METADATA_BYTE = 256  # its zone, which is made later, takes 16 bytes a page at most


@dataclass(frozen=True)
class Promises:
    """What shared memory has left, and what guests that live may still take of it.

    Attributes:
        bytes_of_others: of users other than this one, whose objects cannot be told from those of dead guests.
    """

    free_bytes: int
    promised_bytes: int
    guests: int
    bytes_of_others: int


def promises(*, but: tuple[int, int] | None = None) -> Promises:
    """Look through shared memory; the object ``but`` (device and inode) is left out.

    Raises:
        OSError: there is no shared memory.
    """
    space = os.statvfs(SHM_DIR)
    promised = others = guests = 0
    for name in os.listdir(SHM_DIR):
        if not _OBJECT.fullmatch(name):
            continue
        path = f"{SHM_DIR}/{name}"
        try:
            status = os.lstat(path)
        except OSError:
            continue  # gone meanwhile
        if not stat.S_ISREG(status.st_mode) or (status.st_dev, status.st_ino) == but:
            continue
        missing = max(0, status.st_size - status.st_blocks * _STAT_BLOCK_BYTES)
        if status.st_uid != os.geteuid():
            others += missing
        elif not _is_live(f"{path.rpartition('.')[0]}.ram"):
            continue
        promised += missing
        guests += name.endswith(".ram")
    return Promises(space.f_bavail * space.f_frsize, promised, guests, others)


def _is_live(ram_path: str) -> bool:
    """Whether the guest lives whose RAM object this is; one that cannot be asked passes for alive."""
    try:
        return is_owned(ram_path)
    except FileNotFoundError:
        return False
    except OSError:
        return True


def check_promises(ram: RamObject) -> None:
    """Refuse a guest whose memory cannot all be there beside that of the others.

    Raises:
        MachineError: it cannot; with figures, and what can be done.
    """
    found = promises(but=ram.identity)
    own_bytes = ram.ram_bytes + ram.ram_bytes // _BYTES_OF_A_METADATA_BYTE - ram.resident_bytes()
    if own_bytes + found.promised_bytes <= found.free_bytes:
        return
    others = f", {format_size(found.bytes_of_others)} of it to other users" if found.bytes_of_others else ""
    raise MachineError(
        f"the guest's memory takes {format_size(own_bytes)}; {SHM_DIR} has {format_size(found.free_bytes)} left, of "
        f"which {format_size(found.promised_bytes)} is promised to {found.guests} other guests{others}: a guest that "
        f"finds no page ends; use a smaller --memory, end others, enlarge it (mount -o remount,size=... {SHM_DIR}), "
        "or give --overcommit if they will never use all of it at once"
    )
