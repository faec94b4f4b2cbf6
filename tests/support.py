"""Helpers for tests: waiting for a condition, and what a lab has left behind."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from common.errors import LabError
from common.names import SHM_DIR, ack_queue, control_queue, report_queue
from common.queues import Queue, unlink_queue

__all__ = ["leftovers", "long_enough", "remove_leftovers", "wait_until"]

_MQUEUE_DIR = "/dev/mqueue"  # where it is mounted, queues can be listed

Result = TypeVar("Result")


def wait_until(condition: Callable[[], object], timeout_s: float = 60.0, *, what: str = "condition") -> None:
    """Return once ``condition()`` is true.

    Raises:
        AssertionError: it was not within ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        if time.monotonic() >= deadline:
            raise AssertionError(f"{what} did not come true within {timeout_s} s")
        pause.wait(0.002)


def long_enough(run: Callable[[int], Result], enough: Callable[[Result], bool]) -> Result:
    """What ``run`` returns, made as long as the machine needs: 1, then 5, then 25 times its usual duration.

    For runs that end when their time is over: on a machine that others use, it may be over before anything happened.
    What must hold of each of them ``run`` asserts itself. The last is returned whether it is ``enough`` or not.
    """
    for factor in (1, 5):
        result = run(factor)
        if enough(result):
            return result
    return run(25)


def leftovers(lab: str, guests: Iterable[str] = ()) -> list[str]:
    """Shared-memory objects and queues of ``lab`` that exist.

    Queues can be listed only where their file system is mounted; elsewhere those of the lab, of ``guests`` and of every
    guest with an object in shared memory are tried one by one.
    """
    found = [f"{SHM_DIR}/{entry}" for entry in os.listdir(SHM_DIR) if entry.startswith(f"fpr.{lab}.")]
    with contextlib.suppress(OSError):
        return found + [f"/{entry}" for entry in os.listdir(_MQUEUE_DIR) if entry.startswith(f"fpr.{lab}.")]
    names = {*guests, *(path.split(".")[2] for path in found)}
    queues = [control_queue(lab), *(kind(lab, name) for name in sorted(names) for kind in (report_queue, ack_queue))]
    return found + [name for name in queues if _exists(name)]


def remove_leftovers(paths: Iterable[str]) -> None:
    """Remove what ``leftovers`` found."""
    for path in paths:
        if path.startswith(SHM_DIR):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        else:
            unlink_queue(path)


def _exists(queue: str) -> bool:
    try:
        Queue.open(queue, read=True, write=False).close()
    except LabError:
        return False
    return True
