"""``python -m lab record``: the commands it prints, and that any POSIX shell takes the script."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from common.cli import CommandParser
from lab.commands import record
from lab.trace.events import PAGE_EVENTS
from lab.trace.record import instructions, script


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


def test_shellcheck_has_nothing_to_say() -> None:
    found = shutil.which("shellcheck")
    if found is None:
        pytest.skip("there is no shellcheck here")
    # SC2317: it does not see that the trap calls `finish`.
    command = [found, "--shell=sh", "--exclude=SC2317", "-"]
    done = subprocess.run(command, input=script(), text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
