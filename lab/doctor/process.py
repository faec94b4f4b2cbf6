"""Limits of processes: descriptors, threads, address space, size of a file."""

from __future__ import annotations

import os
import resource

from common.units import format_size
from lab.doctor.limit import Limit, Plan, Verdict, at_least, left_of
from lab.doctor.machine import Machine
from lab.doctor.shared_memory import object_bytes

__all__ = ["process_limits"]

# As counted in /proc/PID of running labs: a host has four descriptors a guest (its RAM, two queues, a pidfd) beside a
# dozen of its own; a guest has some 20 in all, and its threads are the main one, link, reporter and view.
_FILES, _FILES_A_GUEST = 48, 4
_THREADS_A_GUEST = 5  # beside its vCPUs, with its guard (lab/leash.py)
_THREADS_BESIDE = 4  # the host with its guard, and who starts them
_WATCHES_A_GUEST = 2  # of a host's epoll: process and report queue
_ADDRESS_SPACE_BYTES = 1 << 30  # a guest maps 620 MiB beside its memory: interpreter, compiler, stacks


def process_limits(machine: Machine, plan: Plan) -> list[Limit]:
    """All of them."""
    files = _FILES + _FILES_A_GUEST * plan.guests
    threads = _THREADS_BESIDE + plan.guests * (_THREADS_A_GUEST + plan.vcpus)
    largest = max(object_bytes(plan))
    return [
        _rlimit(machine, "open files (ulimit -n)", resource.RLIMIT_NOFILE, files, "ulimit -n {}", "nofile"),
        _all_files(machine, plan),
        _threads(machine, threads),
        _all_threads(machine, threads),
        _group_threads(machine, threads),
        _watches(machine, plan),
        _bytes(
            machine,
            "address space (ulimit -v)",
            resource.RLIMIT_AS,
            _ADDRESS_SPACE_BYTES + sum(object_bytes(plan)),
            "ulimit -v {}",
            "as",
        ),
        _bytes(machine, "file size (ulimit -f)", resource.RLIMIT_FSIZE, largest, "ulimit -f {}", "fsize"),
    ]


def _rlimit(machine: Machine, name: str, which: int, needed: int, raise_it: str, prlimit: str) -> Limit:
    soft, hard = machine.limits(which)
    verdict = at_least(soft, needed)
    fix = ""
    if verdict is Verdict.SHORT:
        fix = raise_it.format(needed) if hard < 0 or hard >= needed else _beyond_hard(prlimit, needed)
    return Limit(name, "without limit" if soft < 0 else str(soft), str(needed), verdict, fix=fix)


def _bytes(machine: Machine, name: str, which: int, needed: int, raise_it: str, prlimit: str) -> Limit:
    """As ``_rlimit``, in bytes; a shell counts in KiB."""
    soft, hard = machine.limits(which)
    verdict = at_least(soft, needed)
    fix = ""
    if verdict is Verdict.SHORT:
        fits = hard < 0 or hard >= needed
        fix = raise_it.format("unlimited" if hard < 0 else -(-needed // 1024))
        fix = fix if fits else _beyond_hard(prlimit, needed)
    return Limit(name, "without limit" if soft < 0 else format_size(soft), format_size(needed), verdict, fix=fix)


def _beyond_hard(prlimit: str, needed: int) -> str:
    """A shell cannot raise its hard limit: root can, for this very shell."""
    return f"sudo prlimit --pid $$ --{prlimit}={needed}:{needed}"


def _all_files(machine: Machine, plan: Plan) -> Limit:
    words = (machine.text("/proc/sys/fs/file-nr") or "").split()
    needed = (_FILES + _FILES_A_GUEST) * (plan.guests + 2)
    left = left_of(int(words[2]), int(words[0])) if len(words) == 3 else None
    verdict = at_least(left, needed)
    return Limit(
        "open files of the machine",
        "unknown" if left is None else f"{_large(int(words[2]))}, {words[0]} in use",
        str(needed),
        verdict,
        fix=f"sudo sysctl -w fs.file-max={int(words[0]) + 2 * needed}" if verdict is Verdict.SHORT else "",
    )


def _threads(machine: Machine, needed: int) -> Limit:
    soft, hard = machine.limits(resource.RLIMIT_NPROC)
    running = _threads_of_user(machine)
    exempt = machine.has_resource_capability()
    verdict = at_least(left_of(soft, running or 0), needed)
    fix = ""
    if exempt:
        verdict = Verdict.OK
    elif verdict is Verdict.SHORT:
        wanted = (running or 0) + needed
        fix = f"ulimit -u {wanted}" if hard < 0 or hard >= wanted else _beyond_hard("nproc", wanted)
    in_use = "" if running is None else f", {running} in use"
    note = "this user is exempt" if exempt else ""
    shown = "without limit" if soft < 0 else f"{soft}{in_use}"
    return Limit("processes and threads (ulimit -u)", shown, str(needed), verdict, fix=fix, note=note)


def _threads_of_user(machine: Machine) -> int | None:
    """Threads of this user's processes, as far as /proc shows them."""
    user, count = str(os.geteuid()), 0
    for name in machine.listing("/proc") or []:
        if name.isdigit():
            owner = machine.field(f"/proc/{name}/status", "Uid")
            threads = machine.field(f"/proc/{name}/status", "Threads")
            if owner and threads and owner[0] == user:
                count += int(threads[0])
    return count or None


def _all_threads(machine: Machine, needed: int) -> Limit:
    """Whichever is less, of threads and of their numbers."""
    most = [machine.number("/proc/sys/kernel/threads-max"), machine.number("/proc/sys/kernel/pid_max")]
    known = [value for value in most if value is not None]
    words = (machine.text("/proc/loadavg") or "").split()
    running = int(words[3].partition("/")[2]) if len(words) > 3 else 0
    least = min(known) if known else None
    verdict = at_least(left_of(least, running), needed)
    key = "pid_max" if least == most[1] else "threads-max"
    return Limit(
        "threads of the machine (pid_max)",
        "unknown" if least is None else f"{least}, {running} in use",
        str(needed),
        verdict,
        fix=f"sudo sysctl -w kernel.{key}={running + 2 * needed}" if verdict is Verdict.SHORT else "",
    )


def _group_threads(machine: Machine, needed: int) -> Limit:
    """``pids.max`` of the control group, of version 2 or 1; without one there is no limit."""
    name = "threads of the control group"
    for line in (machine.text("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        folder = {"": "/sys/fs/cgroup", "pids": "/sys/fs/cgroup/pids"}.get(controllers)
        most = None if folder is None else machine.number(f"{folder}{path.rstrip('/')}/pids.max")
        if folder is None or most is None or most < 0:
            continue
        current = machine.number(f"{folder}{path.rstrip('/')}/pids.current") or 0
        verdict = at_least(left_of(most, current), needed)
        fix = f"echo {current + needed} | sudo tee {folder}{path.rstrip('/')}/pids.max"
        return Limit(
            name,
            f"{most}, {current} in use",
            str(needed),
            verdict,
            fix=fix if verdict is Verdict.SHORT else "",
            note="in a container: docker run --pids-limit" if verdict is Verdict.SHORT else "",
        )
    return Limit(name, "without limit", str(needed), Verdict.OK)


def _watches(machine: Machine, plan: Plan) -> Limit:
    value = machine.number("/proc/sys/fs/epoll/max_user_watches")
    needed = _WATCHES_A_GUEST * plan.guests + 2
    verdict = at_least(value, needed)
    return Limit(
        "descriptors a user may watch",
        "unknown" if value is None else _large(value),
        str(needed),
        verdict,
        fix=f"sudo sysctl -w fs.epoll.max_user_watches={needed}" if verdict is Verdict.SHORT else "",
    )


def _large(value: int) -> str:
    """2**63 and its like are no number that anybody reads."""
    return "without limit" if value >= 1 << 62 else str(value)
