"""POSIX message queues: bytes of a user, number of a machine, length and depth of each."""

from __future__ import annotations

import contextlib
import os
import resource

import posix_ipc

from common.errors import LabError
from common.messages import ACK_MSG_BYTES, CONTROL_MSG_BYTES, report_msg_bytes
from common.names import SHM_DIR, ack_queue, control_queue, report_queue
from common.queues import ACK_DEPTH, CONTROL_DEPTH, REPORT_DEPTH, Queue, queue_bytes
from lab.doctor.limit import Limit, Plan, Verdict, at_least, left_of
from lab.doctor.machine import Machine

__all__ = ["MQUEUE_DIR", "bytes_needed", "queue_limits"]

MQUEUE_DIR = "/dev/mqueue"  # where it is mounted, queues can be listed
_SETTINGS = "/proc/sys/fs/mqueue"
_QUEUES_A_GUEST = 2  # reports, acknowledgements
_NOBODY = "/fpr.no-such-lab.control"


def bytes_needed(plan: Plan) -> int:
    """What one host and the guests of ``plan`` take of RLIMIT_MSGQUEUE."""
    guest = queue_bytes(REPORT_DEPTH, report_msg_bytes(plan.capacity)) + queue_bytes(ACK_DEPTH, ACK_MSG_BYTES)
    return queue_bytes(CONTROL_DEPTH, CONTROL_MSG_BYTES) + plan.guests * guest


def queue_limits(machine: Machine, plan: Plan) -> list[Limit]:
    """All of them."""
    there = _known_to_the_kernel()
    if there.verdict is Verdict.SHORT:
        return [there]
    longest = max(CONTROL_MSG_BYTES, ACK_MSG_BYTES, report_msg_bytes(plan.capacity))
    deepest = max(CONTROL_DEPTH, ACK_DEPTH, REPORT_DEPTH)
    return [
        there,
        _bytes(machine, plan),
        _number(machine, plan),
        _setting(machine, "msg_max", deepest),
        _setting(machine, "msgsize_max", longest),
    ]


def _known_to_the_kernel() -> Limit:
    name, needed = "message queues", "POSIX"
    try:
        Queue.open(_NOBODY, read=True, write=False).close()
    except LabError as error:
        missing = isinstance(error.__cause__, OSError)  # ENOSYS; that there is no such queue is no OSError
        if missing:
            fix = "use a kernel with CONFIG_POSIX_MQUEUE=y"
            return Limit(name, str(error.__cause__), needed, Verdict.SHORT, fix=fix)
    return Limit(name, "POSIX", needed, Verdict.OK)


def _bytes(machine: Machine, plan: Plan) -> Limit:
    soft, hard = machine.limits(resource.RLIMIT_MSGQUEUE)
    used, how = _bytes_in_use(machine)
    needed = bytes_needed(plan)
    verdict = at_least(left_of(soft, used), needed)
    fix = ""
    if verdict is Verdict.SHORT:
        wanted = used + needed
        fix = f"ulimit -q {wanted}"
        if 0 <= hard < wanted:
            fix = f"sudo prlimit --pid $$ --msgqueue={wanted}:{wanted}"
    return Limit(
        "message queues, bytes (ulimit -q)",
        f"{'without limit' if soft < 0 else soft}, {used} in use",
        str(needed),
        verdict,
        fix=fix,
        note=how,
    )


def _bytes_in_use(machine: Machine) -> tuple[int, str]:
    """What this user's queues take, and what is not in that number. No file of the kernel tells it."""
    names = machine.listing(MQUEUE_DIR)
    if names is None:
        found = sum(_bytes_of(name) for name in _our_queues(machine))
        return found, f"queues of other programs are not seen: sudo mount -t mqueue none {MQUEUE_DIR} (mkdir it first)"
    return sum(_bytes_of(f"/{name}") for name in names if _is_ours(f"{MQUEUE_DIR}/{name}")), ""


def _our_queues(machine: Machine) -> list[str]:
    """Names that the objects in shared memory let us expect."""
    expected = set()
    for name in machine.listing(SHM_DIR) or []:
        parts = name.split(".")
        if parts[0] == "fpr" and len(parts) > 2:
            expected.add(control_queue(parts[1]))
            if len(parts) == 4:
                expected |= {report_queue(parts[1], parts[2]), ack_queue(parts[1], parts[2])}
    return sorted(expected)


def _bytes_of(name: str) -> int:
    with contextlib.suppress(posix_ipc.Error, OSError, ValueError):
        queue = posix_ipc.MessageQueue(name, read=True, write=False)
        try:
            return queue_bytes(queue.max_messages, queue.max_message_size)
        finally:
            queue.close()
    return 0


def _is_ours(path: str) -> bool:
    with contextlib.suppress(OSError):
        return os.stat(path).st_uid == os.geteuid()
    return False


def _number(machine: Machine, plan: Plan) -> Limit:
    most = machine.number(f"{_SETTINGS}/queues_max")
    names = machine.listing(MQUEUE_DIR)
    there = len(names if names is not None else [name for name in _our_queues(machine) if _bytes_of(name)])
    needed = _QUEUES_A_GUEST * plan.guests + 1
    exempt = machine.has_resource_capability()
    verdict = Verdict.OK if exempt else at_least(left_of(most, there), needed)
    return Limit(
        "message queues, number",
        "unknown" if most is None else f"{most}, {there} there",
        str(needed),
        verdict,
        fix=f"sudo sysctl -w fs.mqueue.queues_max={there + needed}" if verdict is Verdict.SHORT else "",
        note="this user is exempt" if exempt else "",
    )


def _setting(machine: Machine, key: str, needed: int) -> Limit:
    value = machine.number(f"{_SETTINGS}/{key}")
    exempt = machine.has_resource_capability()
    verdict = Verdict.OK if exempt else at_least(value, needed)
    return Limit(
        f"fs.mqueue.{key}",
        "unknown" if value is None else str(value),
        str(needed),
        verdict,
        fix=f"sudo sysctl -w fs.mqueue.{key}={needed}" if verdict is Verdict.SHORT else "",
        note="this user is exempt" if exempt else "",
    )
