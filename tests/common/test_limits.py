"""What the machine refuses: each creation and growth says so in one line with the fix, and leaves nothing behind."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from typing import Any

import posix_ipc
import pytest

from common.errors import LabError, MachineError, NameInUseError
from common.geometry import PAGE_BYTES
from common.names import SHM_DIR, control_queue, ram_object, zone_object
from common.queues import Queue, create_ack_queue, queue_bytes, unlink_queue
from common.ramobject import GATE_BYTES, RamObject
from common.refusals import fix_of
from common.segment import Segment
from host.takeover import LabName
from tests.small_machine import OTHER_USER, in_small_shm, limited, needs_mount, needs_root
from tests.support import leftovers

MIB = 1 << 20

# What is tried in a process of its own. Each prints the error, then what it has left in shared memory.
TRIES = """
import os, sys
from common.errors import LabError
from common.names import SHM_DIR

def ram(mib=4):
    from common.ramobject import RamObject
    with RamObject.create("small", "g0", ram_bytes=mib << 20) as made:
        try:
            made.map()
        finally:
            made.unlink()

def segment():
    from common.segment import Segment
    Segment.create("/fpr.small.g0.zone", 8 << 20).unlink()

def host():
    from host.takeover import LabName
    LabName("small").close()

def queue():
    from common.queues import create_ack_queue
    create_ack_queue("small", "g0").unlink()

def queue_without_files():
    import common.queues
    taken = []
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return queue()
    finally:
        for descriptor in taken:
            os.close(descriptor)

def result():
    from common.output import write_bytes
    write_bytes(bytes(1 << 20), SHM_DIR + "/result", force=False)

def trace():
    import numpy as np
    from lab.trace.columns import Columns
    from lab.trace.store import TraceWriter
    with TraceWriter(SHM_DIR + "/trace") as writer:
        random = np.random.default_rng(1)
        columns = Columns.empty(1 << 17)
        columns["pfn"][:] = random.integers(0, 1 << 30, len(columns))
        writer.write(columns)
        writer.finish({})

def ours():
    kinds = ("fpr.small.", "result", "trace")
    return {name for name in os.listdir(SHM_DIR) if any(kind in name for kind in kinds)}

for name in sys.argv[1].split(","):
    before = ours()
    try:
        globals()[name]()
        print(name, "nothing was refused")
    except LabError as error:
        left = sorted(ours() - before)
        print(name, error.exit_code, left, " ".join(str(error).split()))
"""


def tried(out: str) -> dict[str, str]:
    """What each said, by its name; all of them refused with exit code 3 and nothing left."""
    said = {}
    for line in out.splitlines():
        name, _, rest = line.partition(" ")
        assert rest.startswith("3 [] "), line
        said[name] = rest.removeprefix("3 [] ")
    return said


# Limits of a process


@pytest.mark.parametrize(
    ("name", "limits", "fix"),
    [
        ("ram", {"FSIZE": MIB}, "ulimit -f"),
        ("segment", {"FSIZE": MIB}, "ulimit -f"),
        ("queue", {"MSGQUEUE": 100}, "ulimit -q"),
        ("queue_without_files", {"NOFILE": 64}, "ulimit -n"),
    ],
)
def test_a_limit_of_the_process_is_named_with_its_fix(name: str, limits: dict[str, int], fix: str) -> None:
    done = limited(TRIES, name, **limits)
    assert done.stderr == ""
    assert fix in tried(done.stdout)[name]


def test_address_space_that_is_short_is_named_with_its_fix() -> None:
    program = (
        "import resource, numpy, common.ramobject\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), resource.getrlimit(resource.RLIMIT_AS)[1]))\n"
    )
    done = limited(program + TRIES.replace("mib=4", "mib=64"), "ram")
    assert "ulimit -v" in tried(done.stdout)["ram"], done.stderr


@needs_root
def test_a_thread_that_cannot_be_started_is_one_line() -> None:
    """Root is exempt, so another user tries it."""
    program = (
        "import os, resource, sys, threading\n"
        "from common.cli import run_command\n"
        "resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))\n"
        f"os.setresuid({OTHER_USER}, {OTHER_USER}, {OTHER_USER})\n"
        "def main():\n"
        "    threading.Thread(target=bool).start()\n"
        "sys.exit(run_command(main))\n"
    )
    done = limited(program)
    assert done.returncode == 3
    assert "ulimit -u" in done.stderr
    assert done.stderr.count("\n") == 1


# Shared memory that is full, without names, read-only, not ours, or not there


@needs_mount
def test_a_full_disk_is_named_with_its_fix() -> None:
    done = in_small_shm("size=2M", "-c", TRIES, "ram,segment")
    said = tried(done.stdout)
    assert "remount,size=" in said["ram"], done.stderr
    assert "remount,size=" in said["segment"]


@needs_mount
def test_a_host_a_result_and_a_trace_meet_a_full_disk() -> None:
    fill = f"open('{SHM_DIR}/filler', 'wb').write(bytes(128 << 10))\n"
    done = in_small_shm("size=128k", "-c", fill + TRIES, "host,result,trace")
    said = tried(done.stdout)
    assert "remount,size=" in said["host"], done.stderr
    assert f"{SHM_DIR}/result: No space left on device; free some space" in said["result"]
    assert f"{SHM_DIR}/trace: No space left on device; free some space" in said["trace"]


@needs_mount
def test_names_that_have_run_out_are_told_from_space() -> None:
    done = in_small_shm("size=64M,nr_inodes=1", "-c", TRIES, "ram,segment,host")
    for text in tried(done.stdout).values():
        assert "nr_inodes" in text


@needs_mount
def test_a_file_system_that_is_read_only_is_named_with_its_fix() -> None:
    done = in_small_shm("size=64M,ro", "-c", TRIES, "ram,segment,host")
    for text in tried(done.stdout).values():
        assert "remount,rw" in text


@needs_mount
@needs_root
def test_no_permission_is_named_with_its_fix() -> None:
    become = f"import os, numpy, common.segment, host.takeover\nos.setresuid(*[{OTHER_USER}] * 3)\n"
    done = in_small_shm("size=64M,mode=0755", "-c", become + TRIES, "ram,segment,host")
    for text in tried(done.stdout).values():
        assert "chmod 1777" in text


def test_a_queue_of_another_user_is_told_and_not_a_traceback(lab_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_name: str) -> None:
        raise posix_ipc.PermissionsError

    monkeypatch.setattr(posix_ipc, "unlink_message_queue", refuse)
    with pytest.raises(NameInUseError, match="another user"):
        unlink_queue(control_queue(lab_name))
    with pytest.raises(NameInUseError, match="another user"):
        LabName(lab_name)


def test_the_bytes_of_a_queue_are_those_that_the_kernel_counts(lab_name: str) -> None:
    """mqueue_get_inode of ipc/mqueue.c: with one byte less than that another queue is refused."""
    program = (
        "import os, resource, sys, posix_ipc\n"
        f"if os.geteuid() == 0: os.setresuid(*[{OTHER_USER}] * 3)\n"
        "def fits(limit, depth, size):\n"
        "    resource.setrlimit(resource.RLIMIT_MSGQUEUE, (limit, resource.getrlimit(resource.RLIMIT_MSGQUEUE)[1]))\n"
        "    try:\n"
        "        queue = posix_ipc.MessageQueue(sys.argv[1], posix_ipc.O_CREX, max_messages=depth, "
        "max_message_size=size)\n"
        "    except (posix_ipc.Error, OSError):\n"
        "        return False\n"
        "    queue.close(); queue.unlink()\n"
        "    return True\n"
        "def least(depth, size):\n"
        "    low, high = 0, resource.getrlimit(resource.RLIMIT_MSGQUEUE)[1]\n"
        "    while low < high:\n"
        "        middle = (low + high) // 2\n"
        "        low, high = (low, middle) if fits(middle, depth, size) else (middle + 1, high)\n"
        "    return low\n"
        "print(*[least(*map(int, pair.split('x'))) for pair in sys.argv[2:]])\n"
    )
    shapes = [(1, 1), (2, 128), (8, 512), (10, 8192)]
    done = limited(program, f"/fpr.{lab_name}.probe", *[f"{depth}x{size}" for depth, size in shapes])
    found = [int(word) for word in done.stdout.split()]
    assert found, done.stderr
    used = found[0] - queue_bytes(1, 1)  # by queues of this user that are there already
    assert [value - used for value in found] == [queue_bytes(*shape) for shape in shapes]


# Every step of a creation, refused in every way


ERRORS = [
    errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EFBIG,
    errno.EROFS,
]  # fmt: skip


def refuse_at(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, number: int) -> None:
    """Let each call of ``module.name`` fail with error ``number``."""

    def refuse(*_arguments: Any, **_others: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, name, refuse)


CREATIONS: dict[str, tuple[Callable[[str], Any], list[tuple[Any, str]]]] = {
    "ram": (
        lambda lab: RamObject.create(lab, "g0", ram_bytes=PAGE_BYTES),
        [(os, "open"), (os, "fchmod"), (os, "ftruncate"), (os, "pwrite"), (fcntl, "lockf")],
    ),
    "segment": (
        lambda lab: Segment.create(zone_object(lab, "g0"), PAGE_BYTES),
        [(os, "open"), (os, "fchmod"), (os, "posix_fallocate"), (os, "fstatvfs"), (mmap, "mmap")],
    ),
    "host": (LabName, [(os, "open"), (os, "ftruncate"), (os, "pwrite"), (posix_ipc, "MessageQueue")]),
    "queue": (lambda lab: create_ack_queue(lab, "g0"), [(posix_ipc, "MessageQueue")]),
}


@pytest.mark.parametrize("number", ERRORS, ids=[errno.errorcode[number] for number in ERRORS])
@pytest.mark.parametrize("what", sorted(CREATIONS))
def test_every_step_may_be_refused_in_every_way(
    lab_name: str, monkeypatch: pytest.MonkeyPatch, what: str, number: int
) -> None:
    create, steps = CREATIONS[what]
    for module, name in steps:
        if name == "lockf" and number == errno.EACCES:
            continue  # that is how it says that somebody else has the lock
        with monkeypatch.context() as patched:
            refuse_at(patched, module, name, number)
            with pytest.raises(MachineError) as raised:
                create(lab_name)
        assert "; " in str(raised.value), f"{name}: no fix in {raised.value}"
        assert leftovers(lab_name, ["g0"]) == [], name


def test_each_error_has_a_fix_and_a_bug_has_none() -> None:
    assert all(fix_of(OSError(number, "")) for number in ERRORS)
    assert fix_of(OSError(errno.EBADF, "")) is None
    assert fix_of(OSError("without a number")) is None


def test_a_mapping_that_is_refused_is_told(lab_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with RamObject.create(lab_name, "g0", ram_bytes=PAGE_BYTES) as ram:
        ram.unlink()
        refuse_at(monkeypatch, mmap, "mmap", errno.ENOMEM)
        with pytest.raises(MachineError, match="ulimit -v"):
            ram.map()


def test_an_object_in_the_way_of_a_segment_is_told(lab_name: str) -> None:
    first = Segment.create(zone_object(lab_name, "g0"), PAGE_BYTES)
    with pytest.raises(NameInUseError, match="exists already"):
        Segment.create(zone_object(lab_name, "g0"), PAGE_BYTES)
    first.unlink()
    first.close()


def test_what_may_be_larger_than_what_is_free_when_overcommitted(
    lab_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(SHM_DIR)
    nothing_free = os.statvfs_result((*real[:3], 0, 0, *real[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _path: nothing_free)
    with pytest.raises(MachineError, match="0 MiB left"):
        RamObject.create(lab_name, "g0", ram_bytes=MIB)
    with RamObject.create(lab_name, "g0", ram_bytes=MIB, overcommit=True) as ram:
        ram.unlink()
        assert os.fstat(ram.fileno()).st_size == MIB + GATE_BYTES


def test_a_foreign_lock_object_is_no_bug(lab_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_at(monkeypatch, os, "open", errno.EACCES)
    with pytest.raises(LabError, match="the name ours"):
        LabName(lab_name)


def test_a_queue_opened_with_no_descriptor_left_names_the_fix(lab_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_at(monkeypatch, posix_ipc, "MessageQueue", errno.EMFILE)
    with pytest.raises(MachineError, match="ulimit -n"):
        Queue.open(ram_object(lab_name, "g0"), read=True, write=False)
