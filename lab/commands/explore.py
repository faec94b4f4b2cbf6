"""``python -m lab explore``: every interleaving of the actors on a zone of a few pages, each step checked."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from common.cli import EXIT_OK
from common.errors import InvariantViolation, UsageError
from common.geometry import PAGEBLOCK_ORDER, PAGEBLOCK_ORDER_VARIABLE
from common.output import STDOUT, check_distinct, check_output, write_bytes, write_json
from common.units import parse_duration_ns, parse_size

__all__ = ["add_arguments", "run"]

ALL = "all"
_SMALL = 2  # pageblocks of four pages, blocks of eight at most
_LARGEST = 3
_POLICIES = ("boundary", "scan", "skip-walk", "rotate", "walk-locked", "hint", "bitmap", "hold", "shared")
_DAY_NS = 24 * 3600 * 10**9


def _read(parse: Callable[[str], int], low: int, high: int, allowed: str) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = low - 1
        with contextlib.suppress(UsageError, ValueError, OverflowError):
            value = parse(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r}; allowed is {allowed}")
        return value

    return read


_FLAGS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("--policy", {"choices": (*_POLICIES, ALL), "default": "boundary"}, "who reports (default: boundary), or all"),
    ("--pages", {"type": _read(int, 8, 64, "8 to 64"), "metavar": "N"}, "of the zone (default: 16; 24 for hint)"),
    (
        "--slots",
        {"type": _read(int, 1, 2, "1 or 2")},
        "vCPUs with per-CPU lists (default: 1; the other goes past)",
    ),
    (
        "--for",
        {"dest": "for_ns", "type": _read(parse_duration_ns, 1, _DAY_NS, "up to 24h with a unit, such as 5m")},
        "how long, for each policy (default: 5m)",
    ),
    ("--depth", {"type": _read(int, 1, 1000, "1 to 1000"), "metavar": "N"}, "most steps from a root (default: no end)"),
    (
        "--memory",
        {"type": _read(parse_size, 1 << 20, 1 << 40, "1MiB to 1TiB"), "default": 2 << 30, "metavar": "SIZE"},
        "for states that wait, and the table of those seen (default: 2GiB)",
    ),
    ("--bug", {"default": "", "metavar": "NAME"}, "plant a bug first, or each in turn (all), and find it"),
    ("--plain", {"action": "store_true"}, "kernels as plain Python: nothing to compile, some hundred times slower"),
    ("--json", {"default": "", "metavar": "PATH|-"}, "write the result as JSON"),
    ("--trace", {"default": "", "metavar": "FILE"}, "write what was found as a test (default: standard output)"),
    ("--force", {"action": "store_true"}, "overwrite files that exist"),
    ("--quiet", {"action": "store_true"}, "no progress while exploring"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's flags on ``parser``."""
    for flag, told, text in _FLAGS:
        parser.add_argument(flag, help=text, **told)


def run(namespace: argparse.Namespace) -> int:
    """Explore; the exit code. In a process of its own, unless this one has small pageblocks and plain kernels if asked.

    Raises:
        UsageError: a setting or an output cannot be used. InvariantViolation: something did not hold.
    """
    outputs = {"--json": namespace.json, "--trace": namespace.trace}
    check_distinct(outputs)
    for path in outputs.values():
        if path:
            check_output(path, force=namespace.force)
    wanted = {PAGEBLOCK_ORDER_VARIABLE: str(_SMALL)} if PAGEBLOCK_ORDER > _LARGEST else {}
    if (namespace.plain or namespace.bug) and os.environ.get("NUMBA_DISABLE_JIT") != "1":
        wanted["NUMBA_DISABLE_JIT"] = "1"
    if wanted:
        command = [sys.executable, *namespace.command_line[1:]]
        return subprocess.run(command, env=os.environ | wanted, check=False).returncode  # noqa: S603  ourselves
    from lab.explore.run import explore_bugs, explore_policies

    if namespace.bug:
        found = explore_bugs(namespace.bug, depth=namespace.depth, quiet=namespace.quiet)
    else:
        chosen = {key: value for key in ("pages", "slots") if (value := getattr(namespace, key)) is not None}
        found = explore_policies(
            _POLICIES if namespace.policy == ALL else (namespace.policy,),
            chosen,
            seconds=(namespace.for_ns or 300 * 10**9) / 1e9,
            depth=namespace.depth,
            memory_bytes=namespace.memory,
            quiet=namespace.quiet,
        )
    _write(namespace, found)
    broken = [one for one in found["explorations"] if one["breaches"] and not one["bug"]]
    if broken:
        raise InvariantViolation(f"{broken[0]['policy']}: {'; '.join(broken[0]['breaches'])}")
    return EXIT_OK


def _write(namespace: argparse.Namespace, found: dict[str, Any]) -> None:
    """The result where it was asked for, for people, and each trace as a test."""
    traces = "\n\n".join(one["test"] for one in found["explorations"] if one["breaches"])
    if namespace.trace:
        write_bytes(traces.encode(), namespace.trace, force=namespace.force)
    if namespace.json:
        write_json(found, namespace.json, force=namespace.force)
    talk = sys.stderr if namespace.json == STDOUT else sys.stdout
    for one in found["explorations"]:
        who = f"{one['policy']}{', bug ' + one['bug'] if one['bug'] else ''}"
        talk.write(
            f"{who}: {one['states']} states, {one['transitions']} steps checked, complete to depth {one['depth']}, "
            f"{one['seconds']:.1f} s, ended by {one['why']}\n"
        )
        for breach in one["breaches"]:
            talk.write(f"  {breach}\n")
        if one["breaches"]:
            talk.write("".join(f"    {step}\n" for step in one["trace"]))
    if traces and not namespace.trace and not found["explorations"][0]["bug"]:
        talk.write(f"\n{traces}")
