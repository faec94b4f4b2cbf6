"""``python -m lab record``: the commands it prints, and the script, which really records where that is possible."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from common.cli import CommandParser
from lab.commands import record
from lab.trace.events import PAGE_EVENTS
from lab.trace.health import Watch
from lab.trace.reader import read_all
from lab.trace.record import instructions, script
from lab.trace.snapshot import read_snapshot

TRACEFS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")


def parser() -> CommandParser:
    made = CommandParser(prog="python -m lab record", description=None)
    record.add_arguments(made)
    return made


def test_the_commands_name_every_event_the_clock_and_what_to_keep(capsys: pytest.CaptureFixture[str]) -> None:
    assert record.run(parser().parse_args([])) == 0
    shown = capsys.readouterr().out
    assert shown == instructions()
    for part in ("ftrace\n", "trace-cmd\n", "perf\n"):
        assert f"\n{part}" in shown
    for event in PAGE_EVENTS:
        assert shown.count(f"kmem:{event.name} ") == 2
        assert f"events/kmem/{event.name}/enable" in shown
    for kept in ("kpageflags", "buddyinfo", "pagetypeinfo", "-C mono", "CLOCK_MONOTONIC", "buffer_size_kb"):
        assert kept in shown


def test_help_holds_the_commands_word_for_word(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    assert instructions().rstrip() in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["sh", "dash", "bash", "busybox"])
def test_every_shell_takes_the_script(shell: str) -> None:
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"there is no {shell} here")
    command = [found, "sh", "-n"] if shell == "busybox" else [found, "-n"]
    done = subprocess.run(command, input=script(), text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_script_is_plain_posix_and_names_every_event(capsys: pytest.CaptureFixture[str]) -> None:
    assert record.run(parser().parse_args(["--script"])) == 0
    text = capsys.readouterr().out
    assert text == script()
    assert text.startswith("#!/bin/sh\n")
    assert not [word for word in ("[[", "function ", "local ", "<<<", "$'", "&>") if word in text]
    for event in PAGE_EVENTS:
        assert event.name in text


@pytest.mark.parametrize("words", [["-s", "x"], ["-b", ""], ["-q"], ["-o", "."]])
def test_the_script_refuses_wrong_usage_in_one_line(words: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        ["/bin/sh", "-s", "--", *words], cwd=tmp_path, input=script(), text=True, capture_output=True, check=False
    )
    assert done.returncode == 1
    assert "record.sh: " in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_recording_of_this_machine_can_be_read(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("tracefs and /proc/kpageflags are for root")
    if not any(os.access(f"{place}/events/kmem/mm_page_alloc/enable", os.W_OK) for place in TRACEFS):
        pytest.skip("tracefs is not mounted or not writable here")
    folder = tmp_path / "recording"
    work = f"dd if=/dev/zero of={tmp_path}/file bs=64k count=64 2>/dev/null; rm {tmp_path}/file"
    command = ["/bin/sh", "-s", "--", "-b", "8192", "-o", str(folder), "sh", "-c", work]
    done = subprocess.run(command, input=script(), text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    start = read_snapshot(str(folder / "start.kpageflags"))
    watch = Watch(start)
    for batch in read_all([str(folder / "trace.txt")]):
        watch.see(batch)
    facts = watch.health().facts
    assert facts["by_type"]["mm_page_alloc"] > 50
    assert facts["by_type"]["mark"] == 2
    assert facts["unrecognised_lines"] == 0
    assert "clock: mono" in (folder / "about.txt").read_text()
