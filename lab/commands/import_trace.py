"""``python -m lab import``: recordings of a guest's page events, as text, to one file of columns, and their health."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING, Any, Self, TextIO

from common.cli import EXIT_OK
from common.errors import UsageError
from common.output import STDOUT, check_distinct, check_one_stream, check_output, write_json

if TYPE_CHECKING:
    from lab.trace.reader import Source

__all__ = ["add_arguments", "run"]

_SUFFIXES = (".gz", ".xz", ".zst", ".zstd", ".txt", ".html", ".trace", ".log")
_EVERY_S = 0.5
_EVERY_LINE_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's flags on ``parser``."""
    parser.add_argument(
        "trace",
        nargs="+",
        metavar="TRACE",
        help="text of ftrace (trace, trace_pipe), trace-cmd report, perf script, Perfetto's systrace export, or a "
        "recording; plain or packed by gzip, xz or zstd; - for standard input; several follow each other in time",
    )
    parser.add_argument("--out", default="", metavar="FILE.parquet", help="default: the first trace's name, here")
    parser.add_argument(
        "--start", default="", metavar="SNAPSHOT", help="the free lists when the trace begins: kpageflags or blocks.csv"
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="refuse a trace with lost, overwritten, unrecognised or cut-off events, or with more than 0.1 %% that "
        "contradict each other (5 %% of the frees)",
    )
    parser.add_argument("--json", default="", metavar="PATH|-", help="write the trace's health as JSON")
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(namespace: argparse.Namespace) -> int:
    """Import the traces; the exit code.

    Raises:
        UsageError: a trace, the snapshot or an output cannot be used, or ``--strict`` refuses; nothing is written then.
    """
    traces: list[str] = namespace.trace
    out = namespace.out or _default_out(traces[0])
    if out == STDOUT:
        raise UsageError("--out: '-' is no file; name one, such as trace.parquet")
    check_distinct({"--out": out, "--json": namespace.json})
    for path in (out, namespace.json):
        if path:
            check_output(path, force=namespace.force, stream=path != out)
    check_distinct({"--out": out, **{f"TRACE {path}": path for path in traces}, "--start": namespace.start})

    from lab.trace.health import Watch
    from lab.trace.reader import read_all
    from lab.trace.snapshot import read_snapshot
    from lab.trace.store import TraceWriter

    check_one_stream([*traces, namespace.start])
    start = read_snapshot(namespace.start) if namespace.start else None
    watch = Watch(start)
    with _Progress(sys.stderr, quiet=namespace.quiet) as progress, TraceWriter(out) as writer:
        for batch in read_all(traces):
            watch.see(batch)
            writer.write(batch.columns)
            progress.tell(batch.source, len(batch.columns))
        health = watch.health()
        if namespace.strict and health.refusals:
            raise UsageError(
                f"--strict: {traces[0]}: {'; '.join(health.refusals)}; without --strict it is imported as it is"
            )
        sources = health.facts["sources"]
        clocks = {source["clock"] for source in sources}
        size = writer.finish(
            {
                "sources": [
                    {key: source[key] for key in ("name", "format", "compression", "text_bytes", "lines")}
                    for source in sources
                ],
                "clock": clocks.pop() if len(clocks) == 1 else "unknown",
                "start": health.facts["start"],
                "health": health.facts,
            }
        )
    text_bytes = sum(source["text_bytes"] for source in sources)
    talk = sys.stderr if namespace.json == STDOUT else sys.stdout
    _print(talk, health.facts, health.lines(), f"{out}: {size} bytes, 1/{text_bytes / size:.1f} of the text")
    if namespace.json:
        answer = {"out": out, "bytes": size, "text_bytes": text_bytes, "health": health.facts}
        write_json(answer, namespace.json, force=namespace.force)
    return EXIT_OK


def _print(talk: TextIO, facts: dict[str, Any], lines: list[str], written: str) -> None:
    for source in facts["sources"]:
        packed = "" if source["compression"] == "plain" else f", {source['compression']}"
        talk.write(
            f"{source['name']}: {source['format']}{packed}, {source['lines']} lines, {source['events']} events\n"
        )
    talk.write("".join(f"  {line}\n" for line in lines))
    talk.write(f"  written      {written}\n")


def _default_out(trace: str) -> str:
    """In the current folder: the trace's folder may be somebody else's."""
    name = "trace" if trace == STDOUT else os.path.basename(trace)
    while name.endswith(_SUFFIXES):
        name = name[: name.rindex(".")]
    return f"{name or 'trace'}.parquet"


class _Progress:
    """How far it is, on standard error: in place on a terminal, now and then a line elsewhere."""

    def __init__(self, stream: TextIO | None, *, quiet: bool) -> None:
        self._stream = None if quiet else stream
        self._in_place = stream is not None and stream.isatty()
        self._begun = self._told = time.monotonic()
        self._events = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None and self._in_place:
            self._stream.write("\r\x1b[K")

    def tell(self, source: Source, events: int) -> None:
        """``events`` more."""
        self._events += events
        now = time.monotonic()
        if self._stream is None or now - self._told < (_EVERY_S if self._in_place else _EVERY_LINE_S):
            return
        self._told = now
        text = (
            f"{source.name}: {source.bytes >> 20} MiB of text, {self._events / 1e6:.1f} million events, "
            f"{self._events / (now - self._begun) / 1e6:.2f} million a second"
        )
        self._stream.write(f"\r\x1b[K{text}" if self._in_place else f"{text}\n")
        self._stream.flush()
