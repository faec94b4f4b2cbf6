"""The doctor names each limit with its fix, on a machine that hides half of them too, and removes only what is dead."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import posix_ipc
import pytest

from common.names import SHM_DIR, ack_queue, control_queue, ram_object, report_queue, zone_object
from common.queues import create_ack_queue, create_report_queue, queue_bytes
from common.ramobject import GATE_BYTES, RamObject
from guest.reporting.table import POLICIES
from host.loop import Host
from host.takeover import LabName, lock_object
from lab.commands.doctor import DoctorSettings
from lab.doctor.leftovers import Leftover, State, clean, find_leftovers, leftover_limit
from lab.doctor.limit import Limit, Plan, Verdict
from lab.doctor.machine import Machine
from lab.doctor.memory import memory_limits
from lab.doctor.platform import platform_limits
from lab.doctor.process import process_limits
from lab.doctor.queues import MQUEUE_DIR, bytes_needed, queue_limits
from lab.doctor.shared_memory import shared_memory_limits
from tests.host.stand_in import StandIn
from tests.small_machine import OTHER_USER, ROOT, in_small_shm, limited, needs_mount
from tests.support import leftovers, wait_until

MIB = 1 << 20
PLAN = Plan(guests=4, memory_bytes=256 * MIB, capacity=32, backend="shared")
GROUPS: tuple[Callable[[Machine, Plan], list[Limit]], ...] = (
    shared_memory_limits,
    queue_limits,
    process_limits,
    memory_limits,
    lambda machine, _plan: platform_limits(machine),
)


def machine_with(folder: Path, **files: str) -> Machine:
    """A machine that has these files and no others; ``__`` in a name is a slash."""
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Machine(str(folder))


def named(limits: Iterable[Limit], start: str) -> Limit:
    (found,) = [limit for limit in limits if limit.name.startswith(start)]
    return found


# What is short


@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_a_machine_that_hides_its_files_is_no_error(tmp_path: Path, group: int) -> None:
    limits = GROUPS[group](Machine(str(tmp_path / "nothing")), PLAN)
    assert limits
    assert json.dumps([limit.as_dict() for limit in limits])
    for limit in limits:
        assert limit.verdict is not Verdict.SHORT or limit.fix, limit


def test_queues_that_are_too_few_or_too_small_are_short(tmp_path: Path) -> None:
    settings = {"queues_max": "7", "msg_max": "4", "msgsize_max": "128"}
    machine = machine_with(tmp_path, **{f"proc__sys__fs__mqueue__{key}": value for key, value in settings.items()})
    (tmp_path / "dev/mqueue").mkdir(parents=True)
    limits = queue_limits(machine, PLAN)
    assert named(limits, "message queues, number").fix == "sudo sysctl -w fs.mqueue.queues_max=9"
    assert named(limits, "fs.mqueue.msg_max").fix == "sudo sysctl -w fs.mqueue.msg_max=8"
    assert named(limits, "fs.mqueue.msgsize_max").fix == "sudo sysctl -w fs.mqueue.msgsize_max=512"


def test_a_limit_that_is_lower_than_what_is_used_is_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Lowered after the fact: nothing is left, which is not the same as no limit."""
    monkeypatch.setattr(Machine, "limits", staticmethod(lambda _which: (10, 10)))
    monkeypatch.setattr("lab.doctor.queues._bytes_in_use", lambda _machine: (5000, ""))
    machine = machine_with(tmp_path, proc__1__status=f"Uid:\t{os.geteuid()}\nThreads:\t500\n")
    queues = named(queue_limits(machine, PLAN), "message queues, bytes")
    wanted = 5000 + bytes_needed(PLAN)
    assert (queues.verdict, queues.fix) == (Verdict.SHORT, f"sudo prlimit --pid $$ --msgqueue={wanted}:{wanted}")
    assert named(process_limits(machine, PLAN), "processes and threads").verdict is Verdict.SHORT


def test_who_is_exempt_is_told_so(tmp_path: Path) -> None:
    machine = machine_with(
        tmp_path,
        proc__sys__fs__mqueue__queues_max="1",
        proc__self__status="CapEff:\t000001ffffffffff\n",
        proc__self__uid_map="0 0 4294967295",
    )
    limit = named(queue_limits(machine, PLAN), "message queues, number")
    assert (limit.verdict, limit.note) == (Verdict.OK, "this user is exempt")
    in_a_container = machine_with(tmp_path, proc__self__uid_map="0 100000 65536")
    assert not in_a_container.has_resource_capability()


@pytest.mark.parametrize(
    ("files", "value"),
    [
        (
            {
                "proc__self__cgroup": "0::/work/one\n",
                "sys__fs__cgroup__work__memory.max": str(300 * MIB),
                "sys__fs__cgroup__work__memory.current": str(100 * MIB),
                "sys__fs__cgroup__work__one__memory.max": "max\n",
            },
            "200MiB left",
        ),
        (
            {
                "proc__self__cgroup": "4:cpu,memory:/work\n0::/\n",
                "sys__fs__cgroup__memory__work__memory.limit_in_bytes": str(64 * MIB),
                "sys__fs__cgroup__memory__memory.limit_in_bytes": str((1 << 63) - 4096),
            },
            "64MiB left",
        ),
    ],
)
def test_the_control_group_that_leaves_least_is_named(tmp_path: Path, files: dict[str, str], value: str) -> None:
    limit = named(memory_limits(machine_with(tmp_path, **files), PLAN), "memory of the control group")
    assert (limit.verdict, limit.value) == (Verdict.SHORT, value)
    assert limit.fix.startswith("echo ")
    assert "/sys/fs/cgroup/" in limit.fix


def test_threads_of_a_control_group_are_short(tmp_path: Path) -> None:
    machine = machine_with(
        tmp_path,
        **{
            "proc__self__cgroup": "0::/work\n",
            "sys__fs__cgroup__work__pids.max": "20",
            "sys__fs__cgroup__work__pids.current": "5",
        },
    )
    limit = named(process_limits(machine, PLAN), "threads of the control group")
    assert limit.verdict is Verdict.SHORT
    assert limit.fix == "echo 37 | sudo tee /sys/fs/cgroup/work/pids.max"


@pytest.mark.parametrize(
    ("line", "verdict", "fix"),
    [
        ("25 20 0:22 / {} rw,nosuid - tmpfs tmpfs rw,size=64k", Verdict.OK, ""),
        ("25 20 0:22 / {} rw - tmpfs tmpfs ro", Verdict.SHORT, "remount,rw"),
        ("25 20 0:22 / {} rw - ext4 /dev/sda rw", Verdict.UNKNOWN, "mount -t tmpfs"),
        ("25 20 0:22 / /elsewhere rw - tmpfs tmpfs rw", Verdict.SHORT, "mount -t tmpfs"),
    ],
)
def test_what_is_mounted_is_looked_at(tmp_path: Path, line: str, verdict: Verdict, fix: str) -> None:
    machine = machine_with(tmp_path, proc__self__mountinfo=line.format(SHM_DIR) + "\n")
    limit = named(shared_memory_limits(machine, PLAN), f"{SHM_DIR}, mounted")
    assert limit.verdict is verdict
    assert fix in limit.fix


@pytest.mark.parametrize(
    ("mode", "verdict"),
    [(0o1777, Verdict.OK), (0o700, Verdict.OK), (0o777, Verdict.SHORT), (0o770, Verdict.SHORT)],
)
def test_a_folder_where_others_may_remove_our_names_is_short(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: int, verdict: Verdict
) -> None:
    monkeypatch.setattr("lab.doctor.shared_memory.SHM_DIR", str(tmp_path))
    tmp_path.chmod(mode)
    found = named(shared_memory_limits(Machine(), PLAN), f"{tmp_path}, permissions")
    assert found.verdict is verdict
    assert bool(found.fix) == bool(found.note) == (verdict is Verdict.SHORT)


def test_advice_is_no_failure(tmp_path: Path) -> None:
    machine = machine_with(
        tmp_path,
        sys__kernel__mm__transparent_hugepage__shmem_enabled="always within_size advise [never] deny force",
        sys__devices__system__clocksource__clocksource0__current_clocksource="hpet",
    )
    for limit in (named(memory_limits(machine, PLAN), "huge pages"), named(platform_limits(machine), "clock")):
        assert limit.verdict is Verdict.OK
        assert limit.note.startswith("advice")
        assert limit.fix


# What is needed


def test_the_queues_of_a_plan_take_exactly_what_is_said(lab_name: str) -> None:
    """A host and its guests in a user's name who has no others: with a byte less the last queue is refused."""
    program = (
        "import os, resource, sys\n"
        "from common.errors import LabError\n"
        "from common.queues import create_ack_queue, create_control_queue, create_report_queue\n"
        "lab, guests, capacity, needed = sys.argv[1], *map(int, sys.argv[2:])\n"
        f"if os.geteuid() == 0: os.setresuid(*[{OTHER_USER}] * 3)\n"
        "def start(limit):\n"
        "    resource.setrlimit(resource.RLIMIT_MSGQUEUE, (limit, resource.getrlimit(resource.RLIMIT_MSGQUEUE)[1]))\n"
        "    made = []\n"
        "    try:\n"
        "        made.append(create_control_queue(lab))\n"
        "        for guest in range(guests):\n"
        "            made.append(create_ack_queue(lab, f'g{guest}'))\n"
        "            made.append(create_report_queue(lab, f'g{guest}', capacity=capacity))\n"
        "    except LabError:\n"
        "        pass\n"
        "    for queue in made: queue.unlink(); queue.close()\n"
        "    return len(made)\n"
        "print(start(needed), start(needed - 1))\n"
    )
    if os.geteuid() and os.path.isdir(MQUEUE_DIR) and os.listdir(MQUEUE_DIR):
        pytest.skip("other queues count against this user's limit")
    needed = bytes_needed(PLAN)
    done = limited(program, lab_name, str(PLAN.guests), str(PLAN.capacity), str(needed))
    assert done.stdout.split() == ["9", "8"], done.stderr


def test_the_default_capacity_is_enough_for_every_policy() -> None:
    assert DoctorSettings().capacity >= max(policy.capacity for policy in POLICIES.values() if not policy.virtual_only)


def test_the_queues_of_a_running_lab_are_in_use(lab_name: str) -> None:
    before = in_use(lab_name)
    with LabName(lab_name), RamObject.create(lab_name, "g0", ram_bytes=0) as ram:
        reports, acks = create_report_queue(lab_name, "g0", capacity=8), create_ack_queue(lab_name, "g0")
        expected = queue_bytes(8, 512) + queue_bytes(2, 96) + queue_bytes(8, 256)
        assert in_use(lab_name) - before == expected
        for queue in (reports, acks):
            queue.unlink()
            queue.close()
        ram.unlink()


def in_use(lab: str) -> int:
    """Bytes of the queues of one lab, as the doctor counts them where queues cannot be listed."""

    class OnlyThisLab(Machine):
        def listing(self, path: str) -> list[str] | None:
            names = None if path == MQUEUE_DIR else super().listing(path)
            return names and [name for name in names if f".{lab}." in name]

    value = named(queue_limits(OnlyThisLab(), PLAN), "message queues, bytes").value
    return int(value.partition(", ")[2].split()[0])


def test_a_host_needs_no_more_descriptors_than_is_said(lab_name: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Host(lab_name) as host, contextlib.ExitStack() as guests:
        beside_guests = len(os.listdir("/proc/self/fd")) - before
        joined = [guests.enter_context(StandIn(lab_name, f"g{index}")) for index in range(PLAN.guests)]
        with_theirs = len(os.listdir("/proc/self/fd"))
        for guest in joined:
            guest.hello()
            host.turn(5)
        assert len(host.registry.guests) == PLAN.guests
        of_guests = len(os.listdir("/proc/self/fd")) - with_theirs
    said = int(named(process_limits(Machine(), PLAN), "open files (ulimit -n)").needed)
    assert of_guests == 4 * PLAN.guests
    assert 3 + beside_guests + of_guests <= said


# What is left


def of_lab(lab: str) -> list[Leftover]:
    return [leftover for leftover in find_leftovers() if leftover.lab == lab]


def die(program: str, *arguments: str) -> None:
    """Run ``program`` in a process that ends without cleaning up."""
    ending = "\nimport os\nos._exit(0)"
    subprocess.run([sys.executable, "-c", program + ending, *arguments], cwd=ROOT, check=True)


DEAD_GUEST = """
import sys
from common.queues import create_ack_queue, create_report_queue
from common.ramobject import RamObject
from common.segment import Segment
from common.names import zone_object
lab = sys.argv[1]
ram = RamObject.create(lab, "g0", ram_bytes=1 << 20)
ram.map()[:8192] = bytes(8192)
segment = Segment.create(zone_object(lab, "g0"), 8192)
create_ack_queue(lab, "g0")
create_report_queue(lab, "g0", capacity=8)
"""
DEAD_HOST = "import sys\nfrom host.takeover import LabName\nname = LabName(sys.argv[1])\n"
DEAD_SHARED_HOST = """
import os, sys
from common.names import SHM_DIR
from lab.shared_host.names import lock_object
os.open(SHM_DIR + lock_object(sys.argv[1]), os.O_CREAT | os.O_RDWR, 0o600)
"""


@pytest.mark.parametrize(
    ("program", "kind", "names"),
    [(DEAD_GUEST, "guest", 4), (DEAD_HOST, "host", 2), (DEAD_SHARED_HOST, "shared host", 1)],
)
def test_what_is_dead_is_listed_left_alone_and_removed_when_asked(
    lab_name: str, program: str, kind: str, names: int
) -> None:
    die(program, lab_name)
    (found,) = of_lab(lab_name)
    assert (found.kind, found.state, len(found.names)) == (kind, State.DEAD, names)
    assert lab_name in str(found)
    assert leftover_limit([found]).fix == "python -m lab doctor --clean"
    assert len(leftovers(lab_name, ["g0"])) == names, "looking changes nothing"
    assert [gone for _leftover, gone in clean([found])] == [True]
    assert leftovers(lab_name, ["g0"]) == []
    assert of_lab(lab_name) == []


def test_what_lives_is_not_even_listed(lab_name: str) -> None:
    with LabName(lab_name), RamObject.create(lab_name, "g0", ram_bytes=MIB) as ram:
        assert of_lab(lab_name) == []
        ram.unlink()


def test_the_names_of_a_guest_that_is_just_starting_stay(lab_name: str) -> None:
    """It has made its object, and not yet locked it."""
    path = Path(SHM_DIR + ram_object(lab_name, "g0"))
    path.touch(0o600)
    assert of_lab(lab_name) == []
    path.unlink()


def test_what_somebody_uses_stays_though_its_owner_is_dead(lab_name: str) -> None:
    die(DEAD_GUEST, lab_name)
    user = (
        "import mmap, os, sys\nfd = os.open(sys.argv[1], os.O_RDONLY)\nm = mmap.mmap(fd, 4096, prot=1)\nos.close(fd)\n"
    )
    command = [
        sys.executable,
        "-c",
        user + "print(flush=True)\nsys.stdin.read()",
        SHM_DIR + zone_object(lab_name, "g0"),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as attached:
        assert attached.stdout is not None
        attached.stdout.readline()
        (found,) = of_lab(lab_name)
        assert found.state is State.IN_USE
        assert list(clean([found])) == []
        attached.kill()
    wait_until(lambda: of_lab(lab_name)[0].state is State.DEAD, what="the end of who was attached")
    assert all(gone for _leftover, gone in clean(of_lab(lab_name)))


def test_what_is_kept_goes_only_when_that_is_asked_for(lab_name: str) -> None:
    die(DEAD_GUEST, lab_name)
    with open(SHM_DIR + ram_object(lab_name, "g0"), "r+b") as stream:
        stream.seek(-GATE_BYTES + 8, os.SEEK_END)
        stream.write((1).to_bytes(8, "little"))
    (found,) = of_lab(lab_name)
    assert found.state is State.KEPT
    assert leftover_limit([found]).verdict is Verdict.OK
    assert list(clean([found])) == []
    assert [gone for _leftover, gone in clean([found], kept=True)] == [True]


def test_names_without_the_memory_are_removed_under_its_name(lab_name: str) -> None:
    die(DEAD_GUEST, lab_name)
    os.unlink(SHM_DIR + ram_object(lab_name, "g0"))
    (found,) = of_lab(lab_name)
    assert (found.state, len(found.names)) == (State.DEAD, 3)
    assert [gone for _leftover, gone in clean([found])] == [True]
    assert leftovers(lab_name, ["g0"]) == []


def test_a_name_that_was_taken_meanwhile_stays(lab_name: str) -> None:
    die(DEAD_GUEST, lab_name)
    found = of_lab(lab_name)
    with RamObject.create(lab_name, "g0", ram_bytes=MIB) as successor:
        assert [gone for _leftover, gone in clean(found)] == [False]
        assert os.path.exists(SHM_DIR + ram_object(lab_name, "g0"))
        successor.unlink()
    os.unlink(SHM_DIR + zone_object(lab_name, "g0"))
    for queue in (report_queue(lab_name, "g0"), ack_queue(lab_name, "g0")):
        posix_ipc.unlink_message_queue(queue)


def test_a_host_that_came_meanwhile_stays(lab_name: str) -> None:
    die(DEAD_HOST, lab_name)
    found = of_lab(lab_name)
    with LabName(lab_name):
        assert [gone for _leftover, gone in clean(found)] == [False]
        assert os.path.exists(SHM_DIR + lock_object(lab_name))
        posix_ipc.MessageQueue(control_queue(lab_name)).close()


# The command


def doctor(*flags: str, **others: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lab", "doctor", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
        **others,
    )


def test_in_a_pipe_it_is_plain_data_on_standard_output() -> None:
    done = doctor("--guests", "240", "--memory", "1TiB")
    assert (done.returncode, done.stderr) == (3, "")
    assert "\x1b" not in done.stdout
    headings, *_rows = done.stdout[done.stdout.index("limit  ") :].splitlines()
    assert headings.split() == ["limit", "value", "needed", "verdict"]
    assert f"mend   {SHM_DIR}, free: sudo mount -o remount,size=" in done.stdout
    assert "limits are short" in done.stdout


def test_the_json_is_one_object_with_every_limit() -> None:
    done = doctor("--guests", "1", "--memory", "16MiB", "--backend", "model", "--json", "-")
    said = json.loads(done.stdout)
    assert said["plan"] == {"guests": 1, "memory_bytes": 16 * MIB, "capacity": 32, "backend": "model"}
    assert len(said["limits"]) > 25
    assert {limit["verdict"] for limit in said["limits"]} <= {"ok", "short", "unknown"}
    assert done.returncode == (0 if said["ok"] else 3)
    assert all(limit["fix"] for limit in said["limits"] if limit["verdict"] == "short")


def test_on_a_terminal_it_is_a_table() -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lab", "doctor"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    ) as run:
        os.close(theirs)
        shown = b""
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # its end
                break
    os.close(ours)
    assert b"\x1b[" in shown
    assert b"verdict" in shown
    assert run.returncode in (0, 3)


def test_wrong_usage_is_named() -> None:
    for flags, named_flag in ((["--guests", "0"], "--guests"), (["--memory", "3"], "--memory"), (["--kept"], "--kept")):
        done = doctor(*flags)
        assert done.returncode == 2
        assert named_flag in done.stderr


@needs_mount
def test_clean_removes_what_is_dead_and_makes_room() -> None:
    """A machine whose /dev/shm a dead guest has filled to the last page."""
    program = (
        "import os, subprocess, sys\n"
        f"dead = {DEAD_GUEST.replace('1 << 20', '4 << 20')!r}\n"
        "subprocess.run([sys.executable, '-c', dead + '\\nimport os\\nos._exit(0)', 'gone'], check=True)\n"
        "free = os.statvfs('/dev/shm').f_bavail * 4096\n"
        "open('/dev/shm/filler', 'wb').write(bytes(free))\n"
        "doctor = [sys.executable, '-m', 'lab', 'doctor', '--guests', '1', '--memory', '16MiB', '--backend', 'model']\n"
        "for more in ([], ['--clean'], []):\n"
        "    done = subprocess.run([*doctor, *more], capture_output=True, text=True)\n"
        "    said = [line for line in done.stdout.splitlines() if line.startswith(('left', 'removed'))]\n"
        "    print(done.returncode, said, sorted(os.listdir('/dev/shm')), done.stderr)\n"
    )
    done = in_small_shm("size=6M", "-c", program)
    before, cleaning, after = done.stdout.splitlines()
    assert before.startswith("3 ['left  guest g0 of lab gone, dead"), done.stderr
    assert "fpr.gone.g0.ram" in before.partition("]")[2]
    assert "removed  guest g0 of lab gone" in cleaning
    assert cleaning.endswith("['filler'] ")
    assert after.endswith("[] ['filler'] ")
