"""Errors become one line and the exit code of their cause, in one place."""

from __future__ import annotations

import subprocess
import sys

import pytest

from common.cli import run_command
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
