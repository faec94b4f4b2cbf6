"""The script of ``python -m lab record --script``, run in a tree made for it, and on this machine's own kernel."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lab.cli import main
from lab.trace.events import PAGE_EVENTS
from lab.trace.record import instructions, script
from lab.trace.snapshot import read_snapshot
from tests.lab.traces import ftrace, read, same, story

KEPT = ("buddyinfo", "pagetypeinfo", "zoneinfo", "vmstat", "kpageflags")
BUDDY = 1 << 10
DEADLINE_S = 120


def shells() -> list[list[str]]:
    found = [[path] for name in ("dash", "bash") if (path := shutil.which(name))]
    busybox = shutil.which("busybox")
    return [*found, [busybox, "sh"]] if busybox else found


def tree(folder: Path, *, lost: int = 0, left: int = 0) -> tuple[str, Path]:
    """A tracefs and a /proc of plain files, and the script as it would be printed for a machine that has them there.

    Where the kernel fills a new instance, a template is copied, and where it removes one, it is moved to ``done``.

    Args:
        lost: events that the buffer of CPU 1 lost. left: entries that are never read.
    """
    instance = folder / "template"
    for event in PAGE_EVENTS:
        (instance / "events/kmem" / event.name).mkdir(parents=True)
        (instance / "events/kmem" / event.name / "enable").write_text("0\n")
    for cpu in (0, 1):
        (instance / f"per_cpu/cpu{cpu}").mkdir(parents=True)
        (instance / f"per_cpu/cpu{cpu}/stats").write_text(
            f"entries: {left}\noverrun: {lost * cpu}\ncommit overrun: 0\nbytes: 0\ndropped events: 0\nread events: 7\n"
        )
    (instance / "trace_pipe").write_text(ftrace(story(200)))
    tracefs, proc = folder / "tracing", folder / "proc"
    shutil.copytree(instance / "events", tracefs / "events")
    (tracefs / "instances").mkdir()
    proc.mkdir()
    for name in KEPT[:-1]:
        (proc / name).write_text(f"this is {name}\n")
    flags = np.zeros(4096, "<u8")
    flags[1024:] = BUDDY
    (proc / "kpageflags").write_bytes(flags.tobytes())
    text = script()
    for old, new in (
        ("/sys/kernel/tracing", str(tracefs)),
        ("/proc/", f"{proc}/"),
        ('mkdir "$instance"', f'cp -R "{instance}" "$instance"'),
        ('rmdir "$instance"', f'mv "$instance" "{folder}/done"'),
        ('"$(id -u)" = 0', "0 = 0"),
        ("sleep 1 ", "sleep 0 "),  # nothing is read from a pipe here
    ):
        assert old in text
        text = text.replace(old, new)
    return text, folder / "done"


def run(text: str, shell: list[str], folder: Path, *words: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """Run it from its standard input."""
    return subprocess.run(
        [*shell, "-s", "--", *words],
        cwd=folder,
        input=text,
        text=True,
        capture_output=True,
        check=False,
        timeout=DEADLINE_S,
        env={**os.environ, "PATH": path or os.environ["PATH"]},
    )


@pytest.mark.parametrize("name", ["dash", "bash", "busybox"])
def test_it_switches_on_keeps_and_cleans_up(name: str, tmp_path: Path) -> None:
    """With busybox there is nothing else to be found on the path."""
    shell = next((shell for shell in shells() if Path(shell[0]).name == name), None)
    if shell is None:
        pytest.skip(f"there is no {name} here")
    text, done = tree(tmp_path)
    path = ""
    if name == "busybox":
        (tmp_path / "bin").mkdir()
        subprocess.run([shell[0], "--install", "-s", tmp_path / "bin"], check=True)
        path = str(tmp_path / "bin")
    found = run(text, shell, tmp_path, "-b", "512", "-o", "kept", "sh", "-c", "cat proc/vmstat; exit 3", path=path)
    assert (found.returncode, found.stdout, found.stderr) == (3, "this is vmstat\n", "")
    kept = tmp_path / "kept"
    same(read(kept / "trace.txt"), story(200))
    for moment in ("start", "end"):
        for file in KEPT[:-1]:
            assert (kept / f"{moment}.{file}").read_text() == f"this is {file}\n"
        assert read_snapshot(str(kept / f"{moment}.kpageflags")).free_pages == 3072
    about = (kept / "about.txt").read_text()
    for line in ("clock: mono", "buffer: 512 KiB a CPU", "cpu0: overrun: 0; commit overrun: 0; dropped events: 0"):
        assert line in about
    for event in PAGE_EVENTS:
        assert (done / "events/kmem" / event.name / "enable").read_text() == "1\n", "it was recorded"
    told = {
        file: (done / file).read_text() for file in ("tracing_on", "trace_clock", "buffer_size_kb", "events/enable")
    }
    assert told == {"tracing_on": "0\n", "trace_clock": "mono\n", "buffer_size_kb": "512\n", "events/enable": "0\n"}
    assert (done / "trace_marker").read_text() == "end\n"
    assert not list((tmp_path / "tracing/instances").iterdir()), "nothing is left behind"


def test_it_says_when_events_were_lost(tmp_path: Path) -> None:
    text, _ = tree(tmp_path, lost=5)
    found = run(text, ["/bin/sh"], tmp_path, "-o", "kept", "true")
    assert found.returncode == 0
    assert found.stderr == "record.sh: events were lost (kept/about.txt); record again with a larger -b\n"
    assert "cpu1: overrun: 5;" in (tmp_path / "kept/about.txt").read_text()


def test_it_cleans_up_when_it_is_interrupted(tmp_path: Path) -> None:
    """The command ends it, as Ctrl-C would."""
    text, done = tree(tmp_path)
    found = run(text, ["/bin/sh"], tmp_path, "-o", "kept", "sh", "-c", "kill -TERM $PPID; sleep 0.2")
    assert found.returncode == 1
    assert (done / "tracing_on").read_text() == "0\n"
    assert (done / "events/enable").read_text() == "0\n"
    assert not list((tmp_path / "tracing/instances").iterdir())


def test_it_names_an_event_that_the_kernel_lacks_and_goes_on(tmp_path: Path) -> None:
    text, _ = tree(tmp_path)
    shutil.rmtree(tmp_path / "template/events/kmem/mm_page_alloc_extfrag")
    found = run(text, ["/bin/sh"], tmp_path, "-o", "kept", "true")
    assert (found.returncode, found.stderr) == (0, "record.sh: this kernel has no event mm_page_alloc_extfrag\n")


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("tracing/events/kmem/mm_page_alloc", "this kernel has no event kmem:mm_page_alloc"),
        ("", "exists; name another"),
    ],
)
def test_it_refuses_before_it_begins(gone: str, message: str, tmp_path: Path) -> None:
    text, done = tree(tmp_path)
    if gone:
        shutil.rmtree(tmp_path / gone)
    else:
        (tmp_path / "kept").mkdir()
    before = sorted(tmp_path.rglob("*"))
    found = run(text, ["/bin/sh"], tmp_path, "-o", "kept", "true")
    assert found.returncode == 1
    assert found.stderr.count("\n") == 1
    assert message in found.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert not done.exists()


# In a mount namespace of its own, so that a tracefs that was not mounted before is not afterwards.
APART = ("unshare", "--mount")
HOG = "b = bytearray(128 << 20); b[::4096] = b'x' * len(b[::4096]); del b; import time; time.sleep(1)"
# Memory that the kernel takes into use while it is recorded was on no list before; what is free after this will do.
WARM = "b = bytearray(256 << 20); b[::4096] = b'x' * len(b[::4096])"
ATTEMPTS = 3
OTHER_MACHINE = "expected a snapshot of the same machine"


def _needs_tracefs() -> None:
    if os.geteuid() != 0:
        pytest.skip("tracefs and /proc/kpageflags are for root")
    if shutil.which(APART[0]) is None:
        pytest.skip("there is no unshare here")
    place = "/sys/kernel/tracing"
    check = f"mount -t tracefs tracefs {place}; test -w {place}/events/kmem/mm_page_alloc/enable"
    done = subprocess.run([*APART, "sh", "-c", check], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"tracefs is not there or not writable: {done.stderr.strip()}")


def _managed(zoneinfo: str) -> list[str]:
    return re.findall(r"managed +(\d+)", zoneinfo)


def _replayed(record: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Record, import and replay by the commands; the answer.

    A snapshot of a busy machine is out of date when the trace begins, above all right after much was freed: lists of
    the CPUs are drained, and a kernel that initialises its memory late puts more on the lists. Then it is done again.

    Args:
        record: records into a folder; returns the trace. The snapshot lies beside it.
    """
    told = ""
    for attempt in range(ATTEMPTS):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        subprocess.run([sys.executable, "-c", WARM], check=True)
        before = Path("/proc/zoneinfo").read_text()
        trace = record(folder)
        start, columns, answer = trace.parent / "start.kpageflags", folder / "trace.parquet", folder / "answer.json"
        code = main(["import", str(trace), "--start", str(start), "--out", str(columns)])
        told = capsys.readouterr().err
        if code == 0:
            flags = ("--min-order", "4", "--delay", "250ms", "--json", str(answer), "--quiet")
            code = main(["replay", str(columns), "--start", str(start), *flags])
            told = capsys.readouterr().err
            if code and "--mode page" in told:  # nothing reached the buddy lists: as the message says
                code = main(["replay", str(columns), "--start", str(start), "--mode", "page", *flags])
                told = capsys.readouterr().err
        if code == 0:
            found: dict[str, Any] = json.loads(answer.read_text())
            return found
        assert OTHER_MACHINE in told
        if attempt == ATTEMPTS - 1 and _managed(before) != _managed(Path("/proc/zoneinfo").read_text()):
            pytest.skip("this kernel takes more memory into use again and again, which is on no list before")
    raise AssertionError(told)


def _is_sound(found: dict[str, Any]) -> None:
    by_type = found["health"]["by_type"]
    for name in ("mm_page_alloc", "mm_page_free"):
        assert by_type[name] > 100, name
    assert found["health"]["unrecognised_lines"] == 0
    assert found["moves"] > 32_768, "the hog alone touches so many pages"
    missed = found["unknown"]["taken_not_free_pages"] + found["unknown"]["freed_not_used_pages"]
    assert missed < 0.5 * found["moves"], "the free lists follow this machine's, busy or not"
    # Whether anything is reported is this machine's affair: per-CPU lists of a gigabyte may have kept what was freed.
    assert found["resident"], "the host's memory over time"


@pytest.mark.stress
def test_a_recording_of_this_machine_is_imported_and_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _needs_tracefs()
    shell = shells()[-1] if shells() else ["/bin/sh"]

    def record(folder: Path) -> Path:
        kept = folder / "kept"
        found = run(script(), [*APART, *shell], folder, "-b", "16384", "-o", str(kept), sys.executable, "-c", HOG)
        assert found.returncode == 0, found.stderr
        assert "clock: mono" in (kept / "about.txt").read_text()
        return kept / "trace.txt"

    answer = _replayed(record, tmp_path, capsys)
    _is_sound(answer)
    assert answer["health"]["by_type"]["mark"] == 2


@pytest.mark.stress
@pytest.mark.parametrize("tool", ["ftrace", "trace-cmd", "perf"])
def test_the_printed_commands_record_this_machine(
    tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Word for word, but for how long, where to, and the buffer; a hog runs meanwhile."""
    _needs_tracefs()
    if tool != "ftrace" and shutil.which(tool) is None:
        pytest.skip(f"there is no {tool} here")
    block = re.search(rf"^{tool}\n((?:  .*\n)+)", instructions(), re.MULTILINE)
    assert block is not None
    (tmp_path / "hog.py").write_text(HOG)

    def record(folder: Path) -> Path:
        commands = block[1]
        for old, new in (
            ("/tmp/", f"{folder}/"),  # noqa: S108  it is what is printed
            ("sleep 60", f"{sys.executable} {tmp_path}/hog.py"),
            ("65536", "16384"),
        ):
            commands = commands.replace(old, new)
        mount = "mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null\nset -m\n"
        found = run(mount + commands, [*APART, "bash"], folder)
        if "Can't enable ftrace" in found.stderr:
            pytest.skip(f"this kernel does not let {tool} in: {found.stderr.strip()}")
        return folder / "trace.txt"

    _is_sound(_replayed(record, tmp_path, capsys))
