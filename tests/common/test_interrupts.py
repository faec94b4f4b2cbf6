"""Ctrl-C at any moment of a program: an exit code, and no traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest

WORK = """
import os, signal, sys, time
from common.interrupts import run_program
INT = lambda: os.kill(os.getpid(), signal.SIGINT)

def starting():
    INT()
    time.sleep(60)

def inside(work):
    from common.cli import run_command
    return run_command(work)

def working():
    def work():
        try:
            INT()
            time.sleep(60)
        finally:
            print("cleaned up", flush=True)
    return inside(work)

def swallowed():
    class Loud:
        def __del__(self):
            INT()
            time.sleep(0)  # here the exception is raised, and can be raised to nobody
    def work():
        loud = Loud()
        del loud
        end = time.monotonic() + 60
        while time.monotonic() < end:
            pass
        return 0
    return inside(work)

def over():
    code = inside(lambda: 7)
    INT()
    time.sleep(0.01)
    return code

def bug_in_a_destructor():
    class Broken:
        def __del__(self):
            raise ValueError("still told")
    def work():
        Broken()
        return 0
    return inside(work)

run_program(globals()[sys.argv[1]])
"""


def run(name: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-c", WORK, name], capture_output=True, text=True, check=False, timeout=50)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("moment", "code", "out"),
    [("starting", 130, ""), ("working", 130, "cleaned up\n"), ("swallowed", 130, ""), ("over", 7, "")],
)
def test_an_interrupt_is_an_exit_code_and_no_traceback(moment: str, code: int, out: str) -> None:
    assert run(moment) == (code, out, "")


def test_any_other_error_of_a_destructor_is_told_as_ever() -> None:
    code, _out, err = run("bug_in_a_destructor")
    assert code == 0
    assert "still told" in err
