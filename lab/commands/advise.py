"""``python -m lab advise``: a recording in, the settings of free page reporting out."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from common.cli import EXIT_OK
from common.errors import MachineError, UsageError
from common.output import STDOUT, check_distinct, check_one_stream, check_output, write_bytes, write_json
from common.settings import POLICIES
from common.units import parse_duration_ns
from lab.advise.wants import BUDGET_WORDS, TARGET_WORDS, parse_budget, parse_target
from lab.commands.trace_flags import MACHINE, START, Flag, add_flags
from lab.experiment.engines import ADDRESSES, check_address

if TYPE_CHECKING:
    from lab.advise.advise import Advice

__all__ = ["add_arguments", "run"]

_HOUR_NS = 3600 * 10**9
_TRIED = tuple(name for name in POLICIES if name not in {"off", "hint", "shared", "oracle"})
_FILES = ("answer.md", "picture.png", "picture.svg", "memory.png", "memory.svg", "data.json", "index.html")


def _typed(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return parse(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _list(parse: Callable[[str], Any], check: Callable[[Any], bool], allowed: str) -> Callable[[str], Any]:
    """A comma list, each value once."""

    def read(text: str) -> tuple[Any, ...]:
        try:
            values = tuple(parse(part.strip()) for part in text.split(","))
        except (UsageError, ValueError):
            values = ()
        if not values or len(set(values)) < len(values) or not all(check(value) for value in values):
            raise argparse.ArgumentTypeError(f"{text!r}; allowed is a comma list, each once, of {allowed}")
        return values

    return read


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(text)
    return int(text)


_FLAGS: tuple[Flag, ...] = (
    START,
    (
        "--orders",
        {"type": _list(_whole, lambda value: value <= 10, "0 to 10"), "default": "0,4,9", "metavar": "LIST"},
        "lowest orders to try (default: 0,4,9)",
    ),
    (
        "--delays",
        {
            "type": _list(parse_duration_ns, lambda value: value <= _HOUR_NS, "0 to 1h with a unit, such as 100ms,2s"),
            "default": "100ms,250ms,1s,2s",
            "metavar": "LIST",
        },
        "delays to try (default: 100ms,250ms,1s,2s)",
    ),
    (
        "--capacities",
        {"type": _list(_whole, lambda value: 1 <= value <= 1024, "1 to 1024"), "default": "32,512", "metavar": "LIST"},
        "blocks a report to try (default: 32,512)",
    ),
    (
        "--policies",
        {
            "type": _list(str, lambda value: value in _TRIED, ", ".join(_TRIED)),
            "default": "rotate,boundary",
            "metavar": "LIST",
        },
        "policies to try (default: rotate,boundary; rotate is mainline)",
    ),
    (
        "--budget",
        {"type": _typed(parse_budget), "metavar": "SHARE"},
        f"choose the smallest footprint that costs no more: {BUDGET_WORDS.replace('%', '%%')}",
    ),
    (
        "--target",
        {"type": _typed(parse_target), "metavar": "TARGET"},
        f"choose the cheapest under which memory falls so far after each large free: {TARGET_WORDS}",
    ),
    *MACHINE,
    (
        "--engine",
        {"type": _typed(check_address), "default": "processes", "metavar": "ADDRESS"},
        f"where the replays take place: {ADDRESSES} (default: processes)",
    ),
    ("--json", {"default": "", "metavar": "PATH|-"}, "write the result as JSON"),
    (
        "--out",
        {"default": "", "metavar": "DIR"},
        "write the page index.html, its pictures, answer.md, data.json",
    ),
    ("--force", {"action": "store_true"}, "overwrite files that exist"),
    ("--quiet", {"action": "store_true"}, "print nothing"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's flags on ``parser``."""
    add_flags(parser, _FLAGS)


def run(namespace: argparse.Namespace) -> int:
    """Advise; the exit code.

    Raises:
        UsageError: the recording, the snapshot, a setting or an output cannot be used; nothing is written then.
    """
    if STDOUT in namespace.trace:
        raise UsageError("TRACE: '-' can be read once only; python -m lab import - --out FILE first, then give FILE")
    outputs = [os.path.join(namespace.out, name) for name in _FILES] if namespace.out else []
    _check_outputs(namespace, outputs)
    from lab.advise.advise import Question, advise

    advice = advise(
        Question(
            traces=tuple(namespace.trace),
            start=namespace.start,
            policies=namespace.policies,
            orders=namespace.orders,
            delays_ns=namespace.delays,
            capacities=namespace.capacities,
            memory_bytes=namespace.memory,
            min_free_kbytes=namespace.min_free_kbytes,
            budget=namespace.budget,
            target=namespace.target,
            engine=namespace.engine,
        ),
        None if namespace.quiet or not sys.stderr.isatty() else _tell,
    )
    _write(namespace, advice)
    return EXIT_OK


def _tell(done: int, of: int) -> None:
    sys.stderr.write(f"\r{done} of {of} replays done" + ("\n" if done == of else ""))
    sys.stderr.flush()


def _check_outputs(namespace: argparse.Namespace, outputs: list[str]) -> None:
    """Find out ahead of the sweep what would spoil its result."""
    read = {f"TRACE {path}": path for path in namespace.trace}
    written = {f"--out {os.path.basename(path)}": path for path in outputs}
    check_one_stream([*namespace.trace, namespace.start])
    check_distinct({"--json": namespace.json, **written, **read, "--start": namespace.start})
    if namespace.json:
        check_output(namespace.json, force=namespace.force)
    if not namespace.out:
        return
    if os.path.isdir(namespace.out):
        for path in outputs:
            check_output(path, force=namespace.force)
    elif os.path.lexists(namespace.out):
        raise UsageError(f"--out: {namespace.out!r} is not a folder; name another one")
    else:
        check_output(namespace.out, force=False)  # that its parent is there and takes a new name


def _write(namespace: argparse.Namespace, advice: Advice) -> None:
    """To the terminal and to where it was asked for; the page last, so that all it speaks of is there."""
    from lab.advise.text import markdown

    facts = advice.as_dict()
    if namespace.out:
        for name, content in _contents(advice, facts, namespace.command_line).items():
            write_bytes(content, os.path.join(_folder(namespace.out), name), force=namespace.force)
    if not namespace.quiet:
        (sys.stderr if namespace.json == STDOUT else sys.stdout).write(markdown(advice))
    if namespace.json:
        write_json(facts, namespace.json, force=namespace.force)


def _folder(path: str) -> str:
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise MachineError(f"--out: {path}: {error.strerror}; name another folder") from error
    return path


def _contents(advice: Advice, facts: dict[str, Any], command: list[str]) -> dict[str, bytes]:
    """Every one of ``_FILES``, in their order."""
    from lab.advise.page import page
    from lab.advise.picture import pictures
    from lab.advise.text import markdown

    drawn = pictures(advice)
    found = {
        "answer.md": markdown(
            advice, {title: [(f"{one.name}.png", one.title)] for title, one in drawn.items()}
        ).encode(),
        "data.json": (json.dumps(facts, indent=2, allow_nan=False) + "\n").encode(),
        "index.html": page(advice, drawn, command).encode(),
    }
    for one in drawn.values():
        found |= {f"{one.name}.png": one.png, f"{one.name}.svg": one.svg}
    return {name: found[name] for name in _FILES}
