"""``python -m lab calibrate``: measure what things cost on this machine, for virtual time."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from common.cli import EXIT_OK
from common.output import check_distinct, check_output, write_json
from lab.commands.rounds import read_rounds

if TYPE_CHECKING:  # --help answers in 0.3 s
    from lab.virtual.calibrate import Calibration

__all__ = ["ROUNDS", "add_arguments", "calibrate_to", "run"]

SUMMARY = "measure what things cost on this machine, for runs in virtual time"
ROUNDS = 9
_MOST_ROUNDS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the subcommand."""
    parser.add_argument(
        "--out", default="", metavar="PATH", help="write the costs to this file (default: the one that runs read)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")
    parser.add_argument("--rounds", help=f"interleaved rounds (1 to {_MOST_ROUNDS}; default: {ROUNDS})")
    parser.add_argument("--json", default="", metavar="PATH|-", help="write the same once more, as one JSON object")


def run(namespace: argparse.Namespace) -> int:
    """Measure, write, say what was found.

    Raises:
        UsageError: a file is there already, or cannot be written. LabError, MachineError: a measurement failed.
    """
    rounds = read_rounds(namespace.rounds, default=ROUNDS, most=_MOST_ROUNDS)
    from lab.virtual.costs import default_path

    path = namespace.out or str(default_path())
    check_distinct({"--out": path, "--json": namespace.json})
    check_output(path, force=namespace.force, make_folder=not namespace.out)
    if namespace.json:
        check_output(namespace.json, force=namespace.force)

    def say(text: str) -> None:
        sys.stderr.write(f"{text}\n")

    found = calibrate_to(path, rounds, force=namespace.force, say=say)
    if namespace.json:
        write_json(found.as_dict(), namespace.json, force=namespace.force)
    for name, value in found.costs.as_dict().items():
        say(f"  {name:24} {value:12.2f}  ±{found.spreads[name]:.1%}")
    say(f"costs of this machine: {path}")
    return EXIT_OK


def calibrate_to(
    path: str, rounds: int, *, force: bool, say: Callable[[str], None] = lambda _text: None
) -> Calibration:
    """Measure in ``rounds`` rounds and write the costs to ``path``, whose folder is made.

    Raises:
        UsageError: the file is there already, or cannot be written. LabError, MachineError: a measurement failed.
    """
    from guest.warmup import warm_up
    from lab.virtual.calibrate import calibrate

    check_output(path, force=force, make_folder=True)
    say("kernels …")
    warm_up()
    found = calibrate(rounds, _machine(), say=say)
    write_json(found.as_dict(), path, force=force)
    return found


def _machine() -> dict[str, Any]:
    """What the costs hold for."""
    return {
        "processor": _processor(),
        "processors": os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    """Its name, as the kernel has it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() == "model name":
                    return value.strip()
    except OSError:
        pass
    return platform.machine()
