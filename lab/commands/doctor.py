"""``python -m lab doctor``: each limit of this machine, its value, whether it suffices, and what mends it."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import ClassVar

from common.cli import EXIT_OK
from common.errors import MachineError, UsageError
from common.options import Settings, add_flags, option
from common.output import STDOUT, check_output, write_json
from common.settings import load
from lab.commands.flags import as_elsewhere, whole_number

__all__ = ["DoctorSettings", "add_arguments", "run"]

_MOST_GUESTS = 240  # as many as one host serves
_CAPACITY = "32"  # mainline's, and the largest that a policy has by itself


@dataclass(frozen=True, kw_only=True)
class DoctorSettings(Settings):
    """What is to run on this machine."""

    table: ClassVar[str] = "demo"

    guests: int = option(
        "guests", "2", help="how many guests, beside what runs already", **whole_number(1, _MOST_GUESTS)
    )
    memory: int = as_elsewhere("memory")
    vcpus: int = as_elsewhere("vcpus")
    capacity: int = option("capacity", _CAPACITY, help="most blocks in one report", **whole_number(1, 1024))
    backend: str = as_elsewhere("backend")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the subcommand."""
    parser.description = (
        "Name each limit of this machine that a lab can run into, its value, whether it suffices for some guests, and "
        "the command that mends it. Changes nothing, except with --clean. Exit code 3: something does not suffice."
    )
    add_flags(parser, DoctorSettings)
    parser.add_argument(
        "--clean", action="store_true", help="remove the names of runs of this user that are provably dead"
    )
    parser.add_argument(
        "--kept", action="store_true", help="with --clean: those of guests that wanted theirs to outlive them too"
    )
    parser.add_argument("--json", default="", metavar="PATH|-", help="write the same as one JSON object")
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")


def run(namespace: argparse.Namespace) -> int:
    """Look, and say what was found; 3 if something is short.

    Raises:
        UsageError: a wrong value, or the JSON could not be written where it shall go.
    """
    settings = load(DoctorSettings, namespace)
    if namespace.kept and not namespace.clean:
        raise UsageError("--kept: says what --clean removes; allowed is it with --clean")
    if namespace.json:
        check_output(namespace.json, force=namespace.force)
    from lab.doctor.leftovers import clean, find_leftovers, leftover_limit
    from lab.doctor.limit import Limit, Plan, Verdict
    from lab.doctor.machine import Machine
    from lab.doctor.memory import memory_limits
    from lab.doctor.platform import platform_limits
    from lab.doctor.process import process_limits
    from lab.doctor.queues import queue_limits
    from lab.doctor.shared_memory import shared_memory_limits
    from lab.doctor.view import as_json, show

    plan = Plan(settings.guests, settings.memory, settings.capacity, settings.backend, settings.vcpus)
    removed: list[str] = []
    talk = sys.stderr if namespace.json == STDOUT else sys.stdout
    found = find_leftovers()
    if namespace.clean:
        for leftover, gone in clean(found, kept=namespace.kept):
            talk.write(f"{'removed' if gone else 'stays'}  {leftover}\n")
            removed += leftover.names if gone else ()
        found = find_leftovers()
    machine = Machine()
    limits: list[Limit] = [
        *shared_memory_limits(machine, plan),
        leftover_limit(found),
        *queue_limits(machine, plan),
        *process_limits(machine, plan),
        *memory_limits(machine, plan),
        *platform_limits(machine),
    ]
    if namespace.json != STDOUT:
        for leftover in found:
            talk.write(f"left  {leftover}\n")
        show(limits)
    if namespace.json:
        write_json(as_json(plan, limits, found, removed), namespace.json, force=namespace.force)
    short = any(limit.verdict is Verdict.SHORT for limit in limits)
    return MachineError.exit_code if short else EXIT_OK
