"""Errors become one line and the exit code of their cause, in one place."""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys

import pytest

from common.cli import CommandParser, run_command
from common.errors import InvariantViolation, LabError, MachineError, PeerError, UsageError


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [(LabError, 1), (PeerError, 1), (UsageError, 2), (MachineError, 3), (InvariantViolation, 4)],
)
def test_an_error_is_one_line_and_its_exit_code(
    error: type[LabError], exit_code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise error("first\n  second")

    assert run_command(main) == exit_code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: first second\n")


def test_the_code_of_main_is_passed_on() -> None:
    assert [run_command(lambda code=code: code) for code in (0, 1, 130)] == [0, 1, 130]  # type: ignore[misc]


def test_an_interrupt_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise KeyboardInterrupt

    assert run_command(main) == 130
    assert capsys.readouterr().err == ""


def test_a_bug_keeps_its_traceback() -> None:
    def main() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(main)


def test_a_reader_that_went_away_makes_no_noise() -> None:
    program = (
        "import sys\n"
        "from common.cli import run_command\n"
        "def main():\n"
        "    sys.stdin.readline()\n"
        "    print('data')\n"
        "    return 0\n"
        "sys.exit(run_command(main))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        child.stdin.write("go\n")
        child.stdin.close()
        noise = child.stderr.read()
        assert child.wait(timeout=60) == 1
    assert noise == ""


# The machine


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.EMFILE, "ulimit -n"),
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "can be written to"),
        (errno.EACCES, "permissions"),
        (errno.ENOMEM, "smaller guests"),
    ],
)
def test_what_the_machine_refuses_is_one_line_with_a_hint(
    number: int, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise OSError(number, os.strerror(number), "/some/file")

    assert run_command(main) == 3
    said = capsys.readouterr().err
    assert said.startswith(f"error: /some/file: {os.strerror(number)}; ")
    assert hint in said
    assert said.count("\n") == 1


def test_memory_that_ran_out_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise MemoryError

    assert run_command(main) == 3
    assert capsys.readouterr().err.startswith("error: out of memory")


def test_a_call_that_the_system_found_wrong_is_a_bug() -> None:
    def main() -> int:
        raise OSError(errno.EBADF, "Bad file descriptor")

    with pytest.raises(OSError, match="Bad file descriptor"):
        run_command(main)


# Streams

PRINTING = """
import os, sys
from common.cli import run_command
def main():
    with open(os.devnull) as later:
        assert later.fileno() > 2, "it took the place of a closed stream"
    print("data")
    sys.stderr.write("talk\\n")
    return 0
sys.exit(run_command(main))
"""


def shell(redirection: str) -> tuple[int, str, str]:
    """Exit code and both streams of the program above, started by a shell with ``redirection``."""
    command = ["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, PRINTING]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("redirection", "out", "err"),
    [
        ("", "data\n", "talk\n"),
        (">&-", "", "talk\n"),
        ("2>&-", "data\n", ""),
        ("<&- >&- 2>&-", "", ""),
    ],
)
def test_closed_streams_are_no_trouble(redirection: str, out: str, err: str) -> None:
    assert shell(redirection) == (0, out, err)


def test_output_that_cannot_be_written_is_one_line_and_3() -> None:
    code, _, err = shell(">/dev/full")
    assert code == 3
    assert err.splitlines()[1:] == [
        "error: standard output: No space left on device; free some space, in /dev/shm too (df -h /dev/shm)"
    ]


def test_talk_that_cannot_be_written_is_an_exit_code_all_the_same() -> None:
    assert shell("2>/dev/full") == (3, "data\n", "")


# Flags


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--bogus"], "--bogus"),
        (["stray"], "stray"),
        (["--delay"], "--delay"),
        (["--delay", "-1ms"], "--delay"),
        (["--del", "1"], "--del"),
        (["--rounds", "two"], "--rounds"),
    ],
)
def test_wrong_flags_are_one_line_that_names_them_and_help(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = CommandParser(prog="command", description=None)
    parser.add_argument("--delay")
    parser.add_argument("--rounds", type=int)

    def main() -> int:
        parser.parse_args(arguments, argparse.Namespace())
        return 0

    assert run_command(main) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert named in err
    assert err.endswith("; see command --help\n")
    assert err.count("\n") == 1
