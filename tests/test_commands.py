"""``--help`` of every command: complete, and so light that it answers at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "host": ("host.__main__", "python -m host", "--inhibit-discard"),
    "guest": ("guest.__main__", "python -m guest", "--workload"),
    "demo": ("run_demo", "run_demo.py", "--guests"),
    "benchmarks": ("benchmarks.__main__", "python -m benchmarks", "--only"),
}
HEAVY = ("numpy", "numba", "llvmlite", "matplotlib", "rich", "msgpack", "posix_ipc")
PROGRAM = """
import json, runpy, sys
module, *sys.argv = sys.argv[1:]
code = None
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as end:
    code = end.code
print(json.dumps([code, sorted(sys.modules)]))
"""


def run_module(module: str, *arguments: str) -> tuple[int, set[str], str, str]:
    """Exit code, modules that were loaded, and both streams."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, module, module, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    *out, last = done.stdout.splitlines()
    code, modules = json.loads(last)
    return code, set(modules), "\n".join(out), done.stderr


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_answers_without_loading_anything_heavy(command: str) -> None:
    module, program, flag = COMMANDS[command]
    code, modules, out, err = run_module(module, "--help")
    assert (code, err) == (0, "")
    assert out.startswith("usage: ")
    assert program in out
    assert flag in out
    assert not modules & set(HEAVY)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_an_unknown_flag_is_wrong_usage_and_loads_nothing_heavy(command: str) -> None:
    code, modules, out, err = run_module(COMMANDS[command][0], "--no-such-flag")
    assert (code, out) == (2, "")
    assert "--no-such-flag" in err
    assert not modules & set(HEAVY)


@pytest.mark.parametrize("command", ["guest", "demo"])
def test_a_wrong_setting_is_found_before_anything_heavy_is_loaded(command: str) -> None:
    code, modules, out, err = run_module(COMMANDS[command][0], "--memory", "17MiB")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "17MiB" in err
    assert not modules & {"numba", "matplotlib"}
