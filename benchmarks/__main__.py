"""``python -m benchmarks [--only NAME] [--rounds N] [--json PATH|-]``: the table, each figure beside its measure."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from common.cli import EXIT_FAILED, EXIT_OK, CommandParser, run_command
from common.interrupts import run_program
from common.output import check_output, write_json

if TYPE_CHECKING:  # NumPy comes with it, and --help must answer in 0.3 s
    from benchmarks.rows import Row

NAMES = ("allocator", "holds", "page-fault", "discard", "returned", "neighbour", "virtual", "trace", "replay")
_ROUNDS = 7


def main() -> int:
    """Exit code: 0 when every bound is met, 1 when one is missed."""
    return run_command(_run)


def _run() -> int:
    parser = CommandParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=NAMES, action="append", help="run this benchmark only (may be repeated)")
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help=f"interleaved rounds (default: {_ROUNDS})")
    parser.add_argument("--json", default="", metavar="PATH|-", help="write the rows as JSON")
    parser.add_argument("--force", action="store_true", help="overwrite the JSON file")
    namespace = parser.parse_args()
    if namespace.rounds < 1:
        parser.error("--rounds: allowed is 1 or more")
    if namespace.json:
        check_output(namespace.json, force=namespace.force)
    chosen = namespace.only or list(NAMES)
    rows = []
    for name in NAMES:
        if name in chosen:
            sys.stderr.write(f"{name} ...\n")
            for row in _suites()[name](namespace.rounds):
                rows.append(row)
                sys.stderr.write(f"  {_line(row)}\n")
    if namespace.json:
        write_json([row.as_dict() for row in rows], namespace.json, force=namespace.force)
    if namespace.json != "-":
        _print_table(rows)
    return EXIT_OK if all(row.ok is not False for row in rows) else EXIT_FAILED


def _suites() -> dict[str, Callable[[int], Iterator[Row]]]:
    from benchmarks import allocator, discard, holds, neighbour, page_fault, replay, returned, trace, virtual
    from guest.warmup import warm_up

    warm_up()
    return {
        "allocator": allocator.run,
        "holds": holds.run,
        "page-fault": page_fault.run,
        "discard": discard.run,
        "returned": returned.run,
        "neighbour": neighbour.run,
        "virtual": virtual.run,
        "trace": trace.run,
        "replay": replay.run,
    }


def _line(row: Row) -> str:
    ratio = "" if row.ratio is None else f"  ratio {row.ratio:.3f}"
    verdict = {True: "  ok", False: "  MISSED", None: ""}[row.ok]
    return f"{row.name}: {row.value:.4g} {row.unit} (±{row.spread:.1%}){ratio}{verdict}"


def _print_table(rows: list[Row]) -> None:
    """A Markdown table: reads on a terminal and goes into the documentation as it is."""
    print("| what | value | spread | against | ratio | target | |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        verdict = {True: "ok", False: "missed", None: ""}[row.ok]
        print(
            f"| {row.name} | {row.value:.4g} {row.unit} | ±{row.spread:.1%} | {row.against} | {ratio} "
            f"| {row.target or ''} | {verdict} |"
        )


if __name__ == "__main__":
    run_program(main)
