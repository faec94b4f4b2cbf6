"""What a lab has left in shared memory and among the message queues, and its removal."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

import posix_ipc

from common import names

__all__ = ["names_left", "remove_names"]


def names_left(lab: str, guests: Iterable[str]) -> list[str]:
    """Objects of ``lab`` and queues of it and of ``guests`` that exist, as their users name them.

    Queues cannot be listed everywhere, so each is opened by the name that it would have.
    """
    queues = [names.control_queue(lab)]
    for guest in guests:
        queues += [names.report_queue(lab, guest), names.ack_queue(lab, guest)]
    found = [queue for queue in queues if _exists(queue)]
    with contextlib.suppress(OSError):
        found += [f"/{entry}" for entry in os.listdir(names.SHM_DIR) if entry.startswith(f"fpr.{lab}.")]
    return found


def remove_names(left: Iterable[str]) -> None:
    """Remove what ``names_left`` found, now that no process of the lab runs any more."""
    for name in left:
        with contextlib.suppress(posix_ipc.Error):
            posix_ipc.unlink_message_queue(name)
        with contextlib.suppress(OSError):
            os.unlink(names.SHM_DIR + name)


def _exists(queue: str) -> bool:
    try:
        opened = posix_ipc.MessageQueue(queue)
    except posix_ipc.Error:
        return False
    opened.close()
    return True
