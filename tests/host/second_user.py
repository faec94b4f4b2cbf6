"""What another user of the machine can do to a lab: run as root, this becomes user 65534 and tries.

``python -m tests.host.second_user ACTION LAB [PID]`` writes one JSON object: each attempt, and ``done`` or the error.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable

import posix_ipc

from common.errors import LabError
from common.messages import Hello
from common.names import SHM_DIR, ack_queue, control_queue, ram_object, report_queue, zone_object
from common.queues import Queue, create_ack_queue, create_control_queue, create_report_queue
from common.ramobject import RamObject, remove_if_dead
from common.segment import Segment, open_object, unlink_object
from host.loop import Host
from host.takeover import lock_object

NOBODY = 65534
N_PAGES = 4096
Attempts = dict[str, Callable[[], object]]


def attack(lab: str, pid: int) -> Attempts:
    """Join, read or remove what a host of process ``pid`` and its guest g0 have."""
    attempts: Attempts = {}
    for name in (zone_object(lab, "g0"), ram_object(lab, "g0"), lock_object(lab)):
        path = SHM_DIR + name
        attempts |= {
            f"read {name}": functools.partial(os.open, path, os.O_RDONLY),
            f"write {name}": functools.partial(os.open, path, os.O_RDWR),
            f"truncate {name}": functools.partial(os.truncate, path, 0),
            f"remove {name}": functools.partial(os.unlink, path),
            f"rename {name}": functools.partial(os.rename, path, path + ".gone"),
            f"replace {name}": functools.partial(_replace, path),
            f"open to all {name}": functools.partial(os.chmod, path, 0o640),
        }
    for name in (control_queue(lab), report_queue(lab, "g0"), ack_queue(lab, "g0")):
        attempts |= {
            f"read {name}": functools.partial(posix_ipc.MessageQueue, name, read=True, write=False),
            f"write {name}": functools.partial(posix_ipc.MessageQueue, name, read=False, write=True),
            f"remove {name}": functools.partial(posix_ipc.unlink_message_queue, name),
        }
    hello = Hello("g1", os.getpid(), 1, N_PAGES, "shared", 16, 0)
    return attempts | {
        "join": lambda: _say(control_queue(lab), hello),
        "attach the zone": lambda: Segment.attach(zone_object(lab, "g0"), writable=False),
        "be the host": lambda: Host(lab),
        "be the guest": lambda: RamObject.create(lab, "g0", ram_bytes=N_PAGES << 12),
        "open as the host": lambda: RamObject.open(lab, "g0", ram_bytes=N_PAGES << 12),
        "take it for dead": lambda: remove_if_dead(SHM_DIR + ram_object(lab, "g0")),
        "its descriptors": lambda: os.listdir(f"/proc/{pid}/fd"),
        "its memory": lambda: os.open(f"/proc/{pid}/mem", os.O_RDONLY),
        "kill it": lambda: os.kill(pid, signal.SIGTERM),
    }


def plant(lab: str, _pid: int) -> Attempts:
    """Make objects under the names of a lab that is another user's, and leave them there."""
    g0 = SHM_DIR + ram_object(lab, "g0")

    def guest(name: str) -> None:
        RamObject.create(lab, name, ram_bytes=N_PAGES << 12)
        create_report_queue(lab, name, capacity=16)
        create_ack_queue(lab, name)
        open_object(zone_object(lab, name), create_bytes=4096)

    return {
        "guest": lambda: guest("g1"),
        "link to memory": lambda: os.symlink(g0, SHM_DIR + ram_object(lab, "g2")),
        "link to a zone": lambda: os.symlink(SHM_DIR + zone_object(lab, "g0"), SHM_DIR + zone_object(lab, "g2")),
        "fifo": lambda: os.mkfifo(SHM_DIR + ram_object(lab, "g3"), 0o666),
        "folder": lambda: os.mkdir(SHM_DIR + ram_object(lab, "g4")),
        "queues": lambda: (create_report_queue(lab, "g5", capacity=16), create_ack_queue(lab, "g5")),
        "host": lambda: os.close(os.open(SHM_DIR + lock_object(f"{lab}-b"), os.O_CREAT | os.O_RDWR, 0o666)),
        "control": lambda: create_control_queue(f"{lab}-c"),
    }


def suffer(lab: str, _pid: int) -> Attempts:
    """Start up where another user has taken each name already."""
    from guest.machine import remove_leftovers  # compiled code comes with it, which the others do without
    from guest.reporting.link import Link

    hello = Hello("g1", os.getpid(), 1, 1, "model", 16, 0)

    def link() -> None:
        with RamObject.create(lab, "g1", ram_bytes=0) as ram:
            try:
                Link(lab, hello, ram, deadline_ns=1, on_refused=print)
            finally:
                ram.unlink()

    return {
        "host": lambda: Host(lab),
        "control": lambda: Host(f"{lab}-c"),
        "memory": lambda: RamObject.create(lab, "g0", ram_bytes=0),
        "zone": lambda: open_object(zone_object(lab, "g0"), create_bytes=4096),
        "attach": lambda: Segment.attach(zone_object(lab, "g0"), writable=True),
        "queues": link,
        "leftovers": lambda: remove_leftovers(lab, "g0"),
        "remove zone": lambda: unlink_object(zone_object(lab, "g0")),
        "write": lambda: Queue.open(control_queue(f"{lab}-c"), read=False, write=True),
    }


def _replace(path: str) -> None:
    mine = f"{path}.mine"
    os.close(os.open(mine, os.O_CREAT | os.O_RDWR, 0o600))
    try:
        os.replace(mine, path)
    finally:
        os.unlink(mine)


def _say(queue: str, _hello: Hello) -> None:
    with Queue.open(queue, read=False, write=True) as control:
        control.send(b"", 0)


def _main(action: str, lab: str, pid: int) -> None:
    attempts = {"attack": attack, "plant": plant, "suffer": suffer}[action](lab, pid)
    # Nothing can be imported from here on: this user cannot read the interpreter's own files.
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except (LabError, OSError, posix_ipc.Error) as error:
            found[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = "done"
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
