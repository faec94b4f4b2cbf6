"""Flags that commands on a recording share: what they read, and the machine that it is of."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

from common.errors import UsageError
from common.units import parse_size

__all__ = ["MACHINE", "START", "Flag", "add_flags", "checked", "whole"]

Flag = tuple[str, dict[str, Any], str]  # what is typed, what argparse is told of it, and its help


def checked(parse: Callable[[str], Any], check: Callable[[Any], bool], allowed: str) -> Callable[[str], Any]:
    """A type for argparse that says what is ``allowed`` of whatever cannot be parsed or does not pass ``check``."""

    def read(text: str) -> Any:
        value = None
        with contextlib.suppress(UsageError, ValueError, OverflowError):
            value = parse(text)
        if value is None or not check(value):
            raise argparse.ArgumentTypeError(f"{text!r}; allowed is {allowed}")
        return value

    return read


def whole(low: int, high: int) -> Callable[[str], Any]:
    """A type for whole numbers, both ends allowed."""

    def parse(text: str) -> int:
        return int(text) if text.isascii() and text.isdigit() else low - 1

    return checked(parse, lambda value: low <= value <= high, f"{low} to {high}")


_MEMORY = checked(
    parse_size, lambda value: value >= 16 << 20 and value % 4096 == 0, "whole pages from 16MiB on, such as 1GiB"
)

START: Flag = (
    "--start",
    {"default": "", "metavar": "SNAPSHOT"},
    "the free lists when it begins: kpageflags or blocks.csv",
)
MACHINE: tuple[Flag, ...] = (
    (
        "--memory",
        {"type": _MEMORY, "default": 0, "metavar": "SIZE"},
        "the guest's memory (default: what the snapshot and the recording name, rounded up)",
    ),
    (
        "--min-free-kbytes",
        {"type": whole(1, 1 << 30), "default": 0, "metavar": "N"},
        "the guest's vm.min_free_kbytes (default: the kernel's own rule with huge pages)",
    ),
)


def add_flags(parser: argparse.ArgumentParser, flags: tuple[Flag, ...]) -> None:
    """The recordings, then ``flags``."""
    parser.add_argument(
        "trace", nargs="+", metavar="TRACE", help="recordings as `import` reads them, or a file that it wrote"
    )
    for flag, told, text in flags:
        parser.add_argument(flag, help=text, **told)
