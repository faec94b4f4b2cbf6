"""Synthetic traces in every form, printed as the tools print them."""

from __future__ import annotations

import argparse
import gzip
import lzma
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from common.cli import CommandParser
from lab.commands import import_trace
from lab.trace.columns import DTYPES, Columns
from lab.trace.events import GFP_BITS, Event
from lab.trace.reader import read_all

WORDS = "GFP_HIGHUSER_MOVABLE|__GFP_ZERO|__GFP_COMP"
GFP = GFP_BITS["GFP_HIGHUSER_MOVABLE"] | GFP_BITS["__GFP_ZERO"] | GFP_BITS["__GFP_COMP"]
COMMANDS = ("cat", "python3", "kworker/0:1-events-12", "Web Content", "a [1] 2.5: x", "<...>", "-", "(sd-pam)", "#odd")


@dataclass(frozen=True)
class Row:
    """One event, times in microseconds so that every form can hold it."""

    t_us: int
    cpu: int
    pid: int
    event: Event
    pfn: int
    order: int = 0
    migratetype: int = -1

    @property
    def command(self) -> str:
        return COMMANDS[self.pid % len(COMMANDS)]


def story(count: int, seed: int = 0) -> list[Row]:
    """Allocations and frees that fit each other, with the events that go with them."""
    chance = random.Random(seed)
    held: list[tuple[int, int]] = []
    rows: list[Row] = []
    t_us, next_pfn = 12_000_000, 1 << 10
    while len(rows) < count:
        t_us += chance.randrange(50)
        cpu, pid = chance.randrange(4), 100 + chance.randrange(16)
        if held and chance.random() < 0.45:
            pfn, order = held.pop(chance.randrange(len(held)))
            rows.append(Row(t_us, cpu, pid, Event.mm_page_free, pfn, order))
            if order == 0:
                rows.append(Row(t_us, cpu, pid, Event.mm_page_free_batched, pfn, order))
            rows.append(Row(t_us + 1, cpu, pid, Event.mm_page_pcpu_drain, pfn, order, 1))
        else:
            order = chance.choice((0, 0, 0, 0, 2, 9))
            next_pfn = -(-next_pfn >> order) << order
            rows.append(Row(t_us, cpu, pid, Event.mm_page_alloc_zone_locked, next_pfn, order, 1))
            rows.append(Row(t_us + 1, cpu, pid, Event.mm_page_alloc, next_pfn, order, 1))
            held.append((next_pfn, order))
            next_pfn += 1 << order
        t_us += 1
    return rows[:count]


def _fields(row: Row, *, decimal: bool = False, words: str = WORDS) -> str:
    pfn = str(row.pfn) if decimal else f"{row.pfn:#x}"
    page = "page=00000000127720e1 "
    match row.event:
        case Event.mm_page_alloc:
            return f"{page}pfn={pfn} order={row.order} migratetype={row.migratetype} gfp_flags={words}"
        case Event.mm_page_alloc_zone_locked:
            return f"{page}pfn={pfn} order={row.order} migratetype={row.migratetype} percpu_refill=1"
        case Event.mm_page_pcpu_drain:
            return f"{page}pfn={pfn} order={row.order} migratetype={row.migratetype}"
        case _:
            return f"{page}pfn={pfn} order={row.order}"


def recording(rows: Iterable[Row]) -> str:
    lines = []
    for row in rows:
        fields = _fields(row, words=f"{GFP:#x}").split(" ", 1)[1].replace("gfp_flags", "gfp")
        lines.append(f"{row.t_us / 1e6:.6f}000 [{row.cpu}] {row.pid} {row.event.name}: {fields}\n")
    return "".join(lines)


def ftrace(rows: Iterable[Row], *, flags: bool = True, decimal: bool = False) -> str:
    column = " ...1." if flags else ""
    head = "# tracer: nop\n#\n# entries-in-buffer/entries-written: 7/7   #P:4\n#\n"
    head += "#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION\n"
    head += "#              | |         |   |||||     |         |\n"
    return head + "".join(
        f"{row.command:>16}-{row.pid:<7} [{row.cpu:03d}]{column} {row.t_us / 1e6:.6f}: {row.event.name}: "
        f"{_fields(row, decimal=decimal)}\n"
        for row in rows
    )


def trace_cmd(rows: Iterable[Row]) -> str:
    lines = ["version = 6\n", "CPU 3 is empty\n", "cpus=4\n"]
    for row in rows:
        name = f"{row.event.name}: {'':{max(0, 20 - len(row.event.name))}}"
        lines.append(
            f"{row.command:>16}-{row.pid:<5} [{row.cpu:03d}] ..... {row.t_us / 1e6:.6f}000: {name}{_fields(row)}\n"
        )
    return "".join(lines)


def perf(rows: Iterable[Row], *, stacks: bool = False) -> str:
    lines = ["# ========\n", "# captured on    : Mon Nov 23 07:09:06 2026\n", "# ========\n", "#\n"]
    for row in rows:
        name = f"kmem:{row.event.name}: "
        lines.append(f"{row.command:>16} {row.pid:5d} [{row.cpu:03d}] {row.t_us / 1e6:.6f}: {name:>31}{_fields(row)}\n")
        if stacks:
            lines.append("\tffffffff8161f3ab __alloc_frozen_pages_noprof+0x26b ([kernel.kallsyms])\n")
            lines.append("\t             1f2 [unknown] (/usr/bin/perf)\n\n")
    return "".join(lines)


def systrace(rows: Iterable[Row], *, html: bool = False) -> str:
    head = "# tracer: nop\n#\n#           TASK-PID    TGID   CPU#  ||||    TIMESTAMP  FUNCTION\n"
    body = head + "".join(
        f"{row.command:>16}-{row.pid:<5} ({row.pid if row.pid % 2 else '-----':>5}) [{row.cpu:03d}] .... "
        f"{row.t_us / 1e6:.6f}: {row.event.name}: {_fields(row, decimal=True, words=f'{GFP:#x}')}\n"
        for row in rows
    )
    if not html:
        return body
    return (
        "<!DOCTYPE html>\n<html>\n<head><script>\nvar a = [0];\n</script></head>\n<body>\n"
        f'  <script class="trace-data" type="application/text">\n{body}</script>\n</body>\n</html>\n'
    )


FORMS: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "recording": ("recording", recording),
    "ftrace": ("ftrace", ftrace),
    "ftrace without the flags": ("ftrace", lambda rows: ftrace(rows, flags=False, decimal=True)),
    "trace-cmd": ("trace-cmd report", trace_cmd),
    "perf": ("perf script", perf),
    "perf with stacks": ("perf script", lambda rows: perf(rows, stacks=True)),
    "systrace": ("systrace", systrace),
    "systrace page": ("systrace", lambda rows: systrace(rows, html=True)),
}


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


PACKS: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "zstd": zstd,
}


def read(*paths: Path | str) -> Columns:
    """All events of some files."""
    return Columns.joined([batch.columns for batch in read_all([str(path) for path in paths])])


def same(columns: Columns, rows: list[Row]) -> None:
    """The columns say what the rows say."""
    assert columns["t_ns"].tolist() == [row.t_us * 1000 for row in rows]
    for name in ("cpu", "pid", "event", "pfn", "order", "migratetype"):
        assert columns[name].tolist() == [int(getattr(row, name)) for row in rows], name
    assert columns["gfp"].tolist() == [GFP if row.event == Event.mm_page_alloc else 0 for row in rows]
    assert columns["flags"].tolist() == [int(row.event == Event.mm_page_alloc_zone_locked) for row in rows]
    assert all(columns[name].dtype == dtype for name, dtype in DTYPES.items())


def arguments(*words: str) -> argparse.Namespace:
    """What ``python -m lab import`` would be given."""
    parser = CommandParser(prog="import", description=None)
    import_trace.add_arguments(parser)
    return parser.parse_args(list(words))


def run_import(*words: str) -> int:
    return import_trace.run(arguments(*words))
