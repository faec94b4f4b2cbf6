"""Shared memory: the file system that holds the memory of all guests."""

from __future__ import annotations

import os
import stat

from common.geometry import PAGE_BYTES, PAGE_SHIFT
from common.layout import segment_offsets
from common.names import SHM_DIR
from common.pagecount import PageCount
from common.promises import promises
from common.ramobject import GATE_BYTES
from common.units import format_size
from host.proof import punch_hole
from lab.doctor.limit import Limit, Plan, Verdict, at_least
from lab.doctor.machine import Machine

__all__ = ["object_bytes", "shared_memory_limits"]

_SPARE_CPUS = 2  # of guest/machine.py
_NAMES_A_GUEST = 2  # its memory and its zone
_STAT_BLOCK_BYTES = 512
_MOUNT = f"sudo mount -t tmpfs -o mode=1777,size=SIZE tmpfs {SHM_DIR}"
_REMOUNT = f"sudo mount -o remount,size=SIZE {SHM_DIR}"
_IN_A_CONTAINER = "in a container: docker run --shm-size=SIZE"


def object_bytes(plan: Plan) -> tuple[int, int]:
    """Bytes of a guest's RAM object with its gate, and of its zone."""
    zone = segment_offsets(plan.memory_bytes >> PAGE_SHIFT, plan.vcpus + _SPARE_CPUS).total
    return plan.ram_bytes + GATE_BYTES, zone


def shared_memory_limits(machine: Machine, plan: Plan) -> list[Limit]:
    """All of them, as far as /dev/shm is there to be asked."""
    mounted = _mounted(machine)
    try:
        space = os.statvfs(SHM_DIR)
        promised = promises()
    except OSError:
        return [mounted]
    needed = plan.guests * sum(object_bytes(plan))
    size, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    left = max(0, free - promised.promised_bytes)
    fitting = format_size(_rounded_up(size - left + needed))
    room = Limit(
        f"{SHM_DIR}, free",
        f"{format_size(left)} of {format_size(size)}",
        format_size(needed),
        at_least(left, needed) if size else Verdict.OK,
        fix=_REMOUNT.replace("SIZE", fitting.replace("iB", "")) if size and left < needed else "",
        note=f"{format_size(promised.promised_bytes)} more are promised to {promised.guests} guests that run"
        if promised.promised_bytes
        else "",
    )
    return [mounted, _permitted(), room, _inodes(space, plan), *_punch()]


def _mounted(machine: Machine) -> Limit:
    mount = machine.mount(SHM_DIR)
    name = f"{SHM_DIR}, mounted"
    if mount is None:
        there = os.path.isdir(SHM_DIR)
        known = machine.text("/proc/self/mountinfo") is not None
        return Limit(
            name,
            "a plain folder" if there else "no",
            "tmpfs",
            Verdict.SHORT if known or not there else Verdict.UNKNOWN,
            fix=_MOUNT.replace("SIZE", "8G"),
            note=_IN_A_CONTAINER.replace("SIZE", "8g"),
        )
    if not mount.writable:
        return Limit(
            name, f"{mount.kind}, read-only", "tmpfs", Verdict.SHORT, fix=f"sudo mount -o remount,rw {SHM_DIR}"
        )
    verdict = Verdict.OK if mount.kind == "tmpfs" else Verdict.UNKNOWN
    return Limit(name, mount.kind, "tmpfs", verdict, fix="" if verdict is Verdict.OK else _MOUNT.replace("SIZE", "8G"))


def _permitted() -> Limit:
    may = os.access(SHM_DIR, os.R_OK | os.W_OK | os.X_OK)
    mode = os.stat(SHM_DIR).st_mode
    guarded = bool(mode & stat.S_ISVTX) or not mode & (stat.S_IWGRP | stat.S_IWOTH)
    return Limit(
        f"{SHM_DIR}, permissions",
        f"{stat.S_IMODE(mode):04o}",
        "read and write; sticky",
        Verdict.OK if may and guarded else Verdict.SHORT,
        fix="" if may and guarded else f"sudo chmod 1777 {SHM_DIR}",
        note="" if guarded else "others may remove what is yours",
    )


def _inodes(space: os.statvfs_result, plan: Plan) -> Limit:
    needed = _NAMES_A_GUEST * plan.guests + 1  # and the host's lock
    unlimited = space.f_files == 0
    verdict = at_least(-1 if unlimited else space.f_favail, needed)
    return Limit(
        f"{SHM_DIR}, names free",
        "without limit" if unlimited else f"{space.f_favail} of {space.f_files}",
        str(needed),
        verdict,
        fix=f"sudo mount -o remount,nr_inodes={space.f_files + needed} {SHM_DIR}" if verdict is Verdict.SHORT else "",
    )


def _punch() -> list[Limit]:
    """What a host does, tried on a file that has no name and is gone at once."""
    name, counting = f"{SHM_DIR}, holes", "proof of what was freed"
    try:
        descriptor = os.open(SHM_DIR, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        return [Limit(name, f"not tried: {error.strerror}", "punched", Verdict.UNKNOWN)]
    try:
        os.ftruncate(descriptor, 2 * PAGE_BYTES)
        os.pwrite(descriptor, b"\1" * PAGE_BYTES, 0)
        count = _count(descriptor)
        punch_hole(descriptor, 0, PAGE_BYTES)
        freed = os.fstat(descriptor).st_blocks * _STAT_BLOCK_BYTES < PAGE_BYTES
        told = "punched" if freed else "punched, and nothing was freed"
    except OSError as error:
        freed, told, count = False, str(error.strerror), None
    finally:
        os.close(descriptor)
    proof = Limit(
        counting,
        "st_blocks" if count is None else "cachestat",
        "either",
        Verdict.OK,
        note="exact only while the guest is quiet; Linux 6.5 has cachestat" if count is None else "",
    )
    remedy = "" if freed else _MOUNT.replace("SIZE", "8G")
    return [Limit(name, told, "punched", Verdict.OK if freed else Verdict.SHORT, fix=remedy), proof]


def _count(descriptor: int) -> int | None:
    """Pages that ``cachestat`` counts; None where the kernel or a sandbox does not know it."""
    try:
        return PageCount().pages(descriptor, 0, PAGE_BYTES)
    except OSError:
        return None


def _rounded_up(size_bytes: int) -> int:
    """To whole MiB, or whole GiB beyond one, so that it reads well."""
    unit = 1 << 30 if size_bytes >= 1 << 30 else 1 << 20
    return -(-size_bytes // unit) * unit
