"""``python -m lab``: finds its commands, and answers --help without loading anything heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lab.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"numpy", "numba", "llvmlite", "matplotlib", "rich", "scipy", "jinja2", "msgpack", "posix_ipc", "distributed"}
PROGRAM = """
import json, sys
from lab.cli import main
code = None
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print()
print(json.dumps([code, sorted(sys.modules)]))
"""


def run_lab(*arguments: str) -> tuple[int, set[str], str, str]:
    """Exit code, modules that were loaded, and both streams."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    *out, last = done.stdout.splitlines()
    code, modules = json.loads(last)
    return code, set(modules), "\n".join(out).strip(), done.stderr


def test_help_names_every_command_and_loads_none() -> None:
    code, modules, out, err = run_lab("--help")
    assert (code, err) == (0, "")
    assert out.startswith("usage: python -m lab")
    for name, (module, _) in COMMANDS.items():
        assert name in out
        assert module not in modules
    assert not modules & HEAVY


@pytest.mark.parametrize(
    ("command", "flag"),
    [("compare", "--policies"), ("report", "--out"), ("doctor", "--clean"), ("soak", "--for"), ("chaos", "--kills")],
)
def test_help_of_a_command_is_light(command: str, flag: str) -> None:
    code, modules, out, err = run_lab(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: python -m lab {command}")
    assert flag in out
    assert not modules & HEAVY
    assert COMMANDS[command][0] in modules
    assert not modules & {module for name, (module, _) in COMMANDS.items() if name != command}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((), "COMMAND"),
        (("contrast",), "contrast"),
        (("compare", "--no-such-flag"), "--no-such-flag"),
        (("compare", "--policies", "boundary,best"), "best"),
        (("compare", "--memory", "17MiB"), "17MiB"),
        (("compare", "--repeat", "0"), "--repeat"),
        (("report",), "DIR"),
        (("soak", "--for", "1s"), "1s"),
    ],
)
def test_wrong_usage_ends_with_2_and_one_line_and_loads_nothing_heavy(arguments: tuple[str, ...], word: str) -> None:
    code, modules, out, err = run_lab(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert word in err
    assert not modules & HEAVY


def test_an_unknown_policy_is_told_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--policies", "best"]) == 2
    err = capsys.readouterr().err
    assert "'best'" in err
    assert "boundary" in err
    assert "off" in err


def test_a_report_of_nothing_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_the_program_is_the_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lab", "--help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert "compare" in done.stdout
