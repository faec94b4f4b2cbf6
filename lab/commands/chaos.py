"""``python -m lab chaos``: kill processes of a lab at random moments, and see that nothing is lost."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from common.cli import EXIT_INTERRUPTED, EXIT_OK
from common.errors import InvariantViolation
from common.options import Option
from common.output import check_output, write_json
from lab.commands.flags import whole_number

if TYPE_CHECKING:  # --help answers in 0.3 s: compiled code comes after the flags
    from lab.chaos.run import ChaosResult

__all__ = ["add_arguments", "run"]

# Flag, default, bounds, help.
_FLAGS = (
    ("kills", 1000, 1, 1_000_000, "how many processes to kill"),
    ("seed", 1, 0, (1 << 32) - 1, "decides who is killed, after how long, and who comes next"),
    ("guests", 2, 1, 16, "guests of 64 MiB"),
    ("joined", 1, 0, 4, "processes that join each guest"),
)
_SHOWN = (
    "kills", "killed", "named_places", "stops", "repairs", "restarts", "longest_stop_s", "page_operations",
    "pulled_blocks", "returned_pages", "lost_pages", "violations", "breaches", "names_left", "hung", "unsound",
    "duration_s",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the subcommand."""
    for flag, default, low, high, text in _FLAGS:
        parser.add_argument(f"--{flag}", metavar="N", help=f"{text} ({low} to {high}; default: {default})")
    parser.add_argument("--json", default="", metavar="PATH|-", help="write the result as one JSON object")
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")
    parser.add_argument("--quiet", action="store_true", help="print nothing while it runs")


def run(namespace: argparse.Namespace) -> int:
    """Kill, look, say what was found; the exit code.

    Raises:
        InvariantViolation: something was lost, or wrong, or hung. UsageError: a flag. LabError, MachineError: it could
            not be started.
    """
    chosen = {flag: _read(namespace, flag, default, low, high) for flag, default, low, high, _ in _FLAGS}
    if namespace.json:
        check_output(namespace.json, force=namespace.force)
    from lab.chaos.run import Plan, run_chaos

    result = run_chaos(Plan(**chosen), (lambda _result: None) if namespace.quiet else _tell)
    facts = {name: getattr(result, name) for name in _SHOWN}
    if namespace.json:
        write_json(
            {"ok": result.ok, "seed": result.seed, **facts, "complaints": result.complaints},
            namespace.json,
            force=namespace.force,
        )
    if not namespace.quiet:
        sys.stderr.write("\n" + "".join(f"  {name:16} {value}\n" for name, value in facts.items()))
    if not result.ok:
        raise InvariantViolation("; ".join(result.complaints))
    enough: bool = result.kills >= chosen["kills"]
    return EXIT_OK if enough else EXIT_INTERRUPTED


def _read(namespace: argparse.Namespace, flag: str, default: int, low: int, high: int) -> int:
    text = getattr(namespace, flag)
    if text is None:
        return default
    described = Option(flag, flag, default_text=str(default), **whole_number(low, high))
    value: int = described.read(text, f"--{flag}")
    return value


def _tell(result: ChaosResult) -> None:
    if result.kills % 25 == 0 or sys.stderr.isatty():
        end = "\r" if sys.stderr.isatty() else "\n"
        sys.stderr.write(
            f"{result.kills} killed, longest stop {result.longest_stop_s:.2f} s, {result.breaches} breaches, "
            f"{result.hung} hung, {result.duration_s:.0f} s{end}"
        )
        sys.stderr.flush()
