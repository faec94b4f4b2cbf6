"""Traces as text to batches of columns, in the order of time, however large they are.

Memory is bounded: one piece of text, its rows, and the rows of the last tenth of a second, which wait for stragglers of
another CPU.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from common.errors import UsageError
from lab.trace import scan as scanner
from lab.trace.columns import DTYPES, NO_TEXT, Columns
from lab.trace.events import GFP_BITS, MAX_ORDER, PAGE_BYTES, gfp_bits
from lab.trace.formats import EXPECTED, Pages, open_input, pieces

__all__ = ["WINDOW_NS", "Batch", "Source", "read_all"]

WINDOW_NS = 100_000_000  # how far back in time an event may stand and is still put in order
_TEXT_BYTES = 4 << 20
_PEEK_BYTES = 1 << 16  # of each of several files, to see which is first
_ROWS = 1 << 17
_ODDS = 1 << 14
_WAITING_ROWS = 1 << 20
_LONGEST_LINE = 1 << 20
_GFP_SLOTS = 2048
_MAX_GFP = 1024
# What no format explains. Before the first event any of it may be a foreign head; behind it, lines between events.
_NOISE_LINES = 1000
_NOISE_BYTES = 16 << 20
_LOST = re.compile(r"\[LOST (\d+) EVENTS\]|\[(\d+) EVENTS DROPPED\]|PERF_RECORD_LOST(?:_SAMPLES)? lost (\d+)")
_LOST_UNCOUNTED = re.compile(r"\[(?:LOST )?EVENTS(?: DROPPED)?\]|PERF_RECORD_LOST")
_WRITTEN = re.compile(r"entries-in-buffer/entries-written: (\d+)/(\d+)")
_SHOWN = 80
_SHOWN_WHOLE = 240  # of a line that is refused for one of its fields, which stand behind the head


@dataclass
class Batch:
    """Some events of one source, in the order of time."""

    columns: Columns
    source: Source


@dataclass
class Source:
    """One trace: where it comes from, and what was seen of it so far.

    Attributes:
        format: which tool printed it, as far as its text tells.
        clock: ``monotonic`` where the text says so, else ``unknown``.
        lost: events that the recorder says are missing in the middle, of ``lost_places`` places; a place that does
            not say how many counts as one.
        overwritten: events that the ring buffer no longer held when it was read.
        out_of_order: events that stood behind a later one, put in order.
        noise: lines that no format explains; ``first_noise`` shows the first. ``cut``: the last line broke off.
        first_ns: time of its first event, -1 before there is one.
    """

    name: str
    format: str = "unknown"
    packing: str = "plain"
    clock: str = "unknown"
    bytes: int = 0
    lost: int = 0
    lost_places: int = 0
    overwritten: int = 0
    out_of_order: int = 0
    events: int = 0
    cut: int = 0
    unknown_gfp: int = 0
    first_noise: str = ""
    first_ns: int = -1
    last_ns: int = -1
    totals: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(scanner.COUNTERS, np.int64))

    @property
    def lines(self) -> int:
        """Lines read."""
        return int(self.totals[scanner.C_LINES])

    @property
    def noise(self) -> int:
        """Lines that no format explains."""
        return int(self.totals[scanner.C_NOISE])

    @property
    def seen(self) -> int:
        """Lines that were events, of any name."""
        totals = self.totals
        kinds = (scanner.C_RECORDING, scanner.C_PLAIN, scanner.C_PERF, scanner.C_OTHER)
        return int(sum(totals[kind] for kind in kinds))

    def as_dict(self) -> dict[str, Any]:
        """For a file's metadata and the JSON."""
        return {
            "name": self.name,
            "format": self.format,
            "compression": self.packing,
            "clock": self.clock,
            "text_bytes": self.bytes,
            "lines": self.lines,
            "events": self.events,
            "other_events": int(self.totals[scanner.C_OTHER]),
            "stack_lines": int(self.totals[scanner.C_STACK]),
            "failed_allocations": int(self.totals[scanner.C_FAILED]),
            "unrecognised_lines": self.noise,
            "first_unrecognised": self.first_noise or None,
            "cut_lines": self.cut,
            "lost_events": self.lost,
            "lost_places": self.lost_places,
            "overwritten_events": self.overwritten,
            "out_of_order_events": self.out_of_order,
            "unknown_gfp_words": self.unknown_gfp,
            "first_s": None if self.first_ns < 0 else self.first_ns / 1e9,
            "last_s": None if self.last_ns < 0 else self.last_ns / 1e9,
        }


class _Scanner:
    """The kernel, its arrays, and what it leaves to Python. One for all sources, one after the other."""

    def __init__(self) -> None:
        self._hashes, self._numbers = scanner.name_table()
        self._keys: npt.NDArray[np.int64] = np.zeros(_GFP_SLOTS, np.int64)
        self._values: npt.NDArray[np.uint32] = np.zeros(_GFP_SLOTS, np.uint32)
        self._words = 0
        self._odd: npt.NDArray[np.int64] = np.zeros((_ODDS, 5), np.int64)
        self._counts: npt.NDArray[np.int64] = np.zeros(2, np.int64)
        self._head: npt.NDArray[np.int64] = np.zeros(8, np.int64)
        self._got: npt.NDArray[np.int64] = np.zeros(8, np.int64)
        self._rows = Columns.empty(_ROWS)
        for word in GFP_BITS:
            self._learn(word)

    def run(self, text: bytes, source: Source) -> Iterator[Columns]:
        """The events of ``text``, which ends with a whole line.

        Raises:
            UsageError: a line cannot be; names the source, the line and what was expected.
        """
        view = np.frombuffer(text, np.uint8)
        at, line = 0, source.lines + 1
        while at < len(text):
            self._counts[:] = 0
            rows = self._rows
            code, at, line = scanner.scan(
                view, at, len(text), line, self._hashes, self._numbers, self._keys, self._values,
                *(rows[name] for name in DTYPES), rows["line"],
                self._odd, source.totals, self._counts, self._head, self._got,
            )  # fmt: skip
            found = self._found(text, source)
            stop = (int(code), int(at), int(line))  # the arrays are another source's as soon as this one is left
            if code == scanner.UNKNOWN_GFP:
                self._learn(text[int(self._got[6]) : int(self._got[7])].decode("latin-1"), source, stop[2])
            if found is not None:
                yield found
            if stop[0] not in (scanner.DONE, scanner.FULL, scanner.UNKNOWN_GFP):
                raise _refusal(*stop, text, source)

    def _found(self, text: bytes, source: Source) -> Columns | None:
        """A copy of the rows that the kernel filled."""
        texts = self._odds(text, source)
        count = int(self._counts[0])
        if not count:
            return None
        rows = self._rows.take(slice(0, count))
        rows.texts = texts
        found = rows.owned()
        rows["text_id"][:] = NO_TEXT
        return found

    def _odds(self, text: bytes, source: Source) -> list[str]:
        """Handle the lines that the kernel left; the texts of the rows."""
        texts: list[str] = []
        for row, kind, line, first, behind in self._odd[: int(self._counts[1])].tolist():
            if kind == scanner.ODD_NOISE:
                source.first_noise = source.first_noise or f"line {line}: {_shown(text[first:behind])}"
                if source.totals[scanner.C_NOISE] > _NOISE_LINES and source.totals[scanner.C_NOISE] > source.seen:
                    raise UsageError(_not_an_event(source, line, text[first:behind]))
                continue
            said = text[first:behind].decode("utf-8", "surrogateescape").encode("utf-8", "replace").decode()
            if kind == scanner.ODD_TEXT:
                self._rows["text_id"][row] = len(texts)
                texts.append(said)
            else:
                _note(said, source)
        return texts

    def _learn(self, words: str, source: Source | None = None, line: int = 0) -> None:
        """Put flags in words into the kernel's table."""
        if self._words >= _MAX_GFP:
            name = source.name if source else ""
            raise UsageError(f"{name}: line {line}: more than {_MAX_GFP} sets of gfp flags; expected those of a kernel")
        bits, unknown = gfp_bits(words)
        if source is not None:
            source.unknown_gfp += len(unknown)
        key = scanner.word_hash(words.encode("latin-1"))
        slot = key % _GFP_SLOTS
        while self._keys[slot] not in (0, key):
            slot = (slot + 1) % _GFP_SLOTS
        self._keys[slot], self._values[slot] = key, bits
        self._words += 1


def _note(said: str, source: Source) -> None:
    """Take from a comment or a note what it tells of the recording."""
    if match := _LOST.search(said):
        source.lost += int(next(group for group in match.groups() if group is not None))
        source.lost_places += 1
    elif _LOST_UNCOUNTED.search(said):
        source.lost += 1
        source.lost_places += 1
    elif match := _WRITTEN.search(said):
        source.overwritten += max(0, int(match[2]) - int(match[1]))
    elif "clockid = 1" in said or re.match(r"# clockid.*\bmonotonic\b", said):
        source.clock = "monotonic"
    elif said.startswith("cpus="):
        source.format = "trace-cmd report"


def _shown(line: bytes, most: int = _SHOWN) -> str:
    text = ascii(line.strip()[: most + 1].decode("latin-1"))[1:-1]
    return repr(text[:most] + ("…" if len(text) > most else ""))


def _not_an_event(source: Source, line: int, text: bytes) -> str:
    return f"{source.name}: line {line}: {_shown(text)} is no line of a trace; expected {EXPECTED}"


def _refusal(code: int, at: int, line: int, text: bytes, source: Source) -> UsageError:
    end = text.find(b"\n", at)
    shown = _shown(text[at : end if end >= 0 else len(text)], _SHOWN_WHOLE)
    wanted = {
        scanner.BAD_EVENT: "pfn=, order= and the other fields of this event as numbers",
        scanner.BAD_ORDER: f"orders 0 to {MAX_ORDER}: a trace of pages of {PAGE_BYTES} bytes",
        scanner.BAD_PFN: "a page below 16 TiB",
        scanner.BAD_CLOCK: "a time in seconds; record with the clock mono (trace_clock)",
    }[code]
    return UsageError(f"{source.name}: line {line}: {shown}; expected {wanted}")


def _name_format(source: Source, pages: Pages, start: bytes) -> None:
    """Say which tool printed it, by the lines that were read."""
    if source.format != "unknown":
        return
    totals = source.totals
    counted = {
        "recording": totals[scanner.C_RECORDING],
        "ftrace": totals[scanner.C_PLAIN],
        "perf script": totals[scanner.C_PERF],
    }
    name = max(counted, key=lambda kind: int(counted[kind]))
    if not counted[name]:
        return
    if name == "recording":
        source.clock = "monotonic"
    elif name == "ftrace":
        if pages.is_html or (totals[scanner.C_TGID] and start.lstrip().startswith(b"# tracer")):
            name = "systrace"
        elif b"# tracer" not in start and re.search(rb"\d: +(?:\w+:) {2,}", start):
            name = "trace-cmd report"
    source.format = name


def _lines(source: Source, stream: BinaryIO, pages: Pages) -> Iterator[tuple[bytes, bool]]:
    """Text in whole lines, and whether it is an unfinished last one. The first is short, to see an event soon."""
    source.packing, parts = pieces(stream, source.name)
    rest, waiting, size = b"", [], 0
    enough = _PEEK_BYTES
    for part in parts:
        source.bytes += len(part)
        text = pages.feed(part)
        waiting.append(text)
        size += len(text)
        if size < enough:
            continue
        text = rest + b"".join(waiting)
        cut = text.rfind(b"\n") + 1
        if cut == 0 and len(text) > _LONGEST_LINE:
            raise UsageError(_not_an_event(source, source.lines + 1, text[: 4 * _SHOWN]))
        rest, waiting, size = text[cut:], [], 0
        if cut:
            yield text[:cut], False
        enough = _TEXT_BYTES
    text = rest + b"".join(waiting) + pages.feed(b"", last=True)
    cut = text.rfind(b"\n") + 1
    if cut:
        yield text[:cut], False
    if text[cut:]:
        yield text[cut:], True


def _scanned(source: Source, stream: BinaryIO, scanner_: _Scanner) -> Iterator[Columns]:
    """The events of one source as they stand in it."""
    pages = Pages()
    start = b""
    for text, unfinished in _lines(source, stream, pages):
        start = (start + text)[:_PEEK_BYTES]
        if unfinished:  # whatever it says, more may have followed: order=1 of order=10
            source.cut += 1
            source.totals[scanner.C_LINES] += 1
            continue
        for rows in scanner_.run(text, source):
            _name_format(source, pages, start)
            yield rows
        _refuse_noise(source, text, pages)
    if not sum(int(source.totals[kind]) for kind in (scanner.C_RECORDING, scanner.C_PLAIN, scanner.C_PERF)):
        what = "no page event" if source.totals[scanner.C_OTHER] else "no event"
        raise UsageError(
            f"{source.name}: line {max(1, source.lines)}: {what} up to the end; expected mm_page_alloc, mm_page_free "
            f"and the like in {EXPECTED}"
        )


def _refuse_noise(source: Source, text: bytes, pages: Pages) -> None:
    """Stop at a text that goes on and on without an event."""
    few = source.lines < 10 * _NOISE_LINES and source.bytes < _NOISE_BYTES
    if source.seen or few or (pages.is_html and source.bytes < 4 * _NOISE_BYTES):
        return
    first = text.lstrip().split(b"\n", 1)[0]
    raise UsageError(_not_an_event(source, source.lines, first))


class _Order:
    """Rows in, rows in the order of time out; a few wait for those of another CPU that stand behind them."""

    def __init__(self, source: Source, after_ns: int, before: str) -> None:
        self._source = source
        self._waiting: list[Columns] = []
        self._after_ns = after_ns  # the last time that has left
        self._before = before  # the source that it was of
        self._top_ns = after_ns

    def feed(self, rows: Columns) -> Columns | None:
        """Take ``rows``; what may leave now."""
        times = rows["t_ns"]
        tops = np.maximum.accumulate(times)
        earlier = np.empty_like(tops)
        earlier[0], earlier[1:] = self._top_ns, tops[:-1]
        np.maximum(earlier, self._top_ns, out=earlier)
        behind = times < earlier
        late = np.count_nonzero(behind)
        if late:
            self._source.out_of_order += int(late)
            wrong = np.flatnonzero((times < earlier - WINDOW_NS) | (times < self._after_ns))
            if wrong.size:
                raise self._refusal(rows, int(wrong[0]), int(earlier[wrong[0]]))
        self._top_ns = max(self._top_ns, int(tops[-1]))
        self._waiting.append(rows)
        return self._leaving(all_of_them=False)

    def rest(self) -> Columns | None:
        """What still waits."""
        return self._leaving(all_of_them=True)

    def _refusal(self, rows: Columns, row: int, top_ns: int) -> UsageError:
        line, time_s = int(rows["line"][row]), int(rows["t_ns"][row]) / 1e9
        if self._source.events == row == 0 and self._before:
            return UsageError(
                f"{self._source.name}: line {line}: begins at {time_s:.6f} s, before {self._before} ends; expected "
                "traces that follow each other; merge them by time first, or import them one by one"
            )
        return UsageError(
            f"{self._source.name}: line {line}: goes back in time, from {top_ns / 1e9:.6f} to {time_s:.6f} s; expected "
            f"events in the order of time, within {WINDOW_NS / 1e9:.1f} s; sort them, or import each recording alone"
        )

    def _leaving(self, *, all_of_them: bool) -> Columns | None:
        if not self._waiting:
            return None
        rows = Columns.joined(self._waiting)
        times = rows["t_ns"]
        if np.any(times[1:] < times[:-1]):
            rows = rows.take(np.argsort(times, kind="stable"))
            times = rows["t_ns"]
        count = len(rows)
        if not all_of_them:
            count = int(np.searchsorted(times, self._top_ns - WINDOW_NS))
            count = max(count, len(rows) - _WAITING_ROWS)
        self._waiting = [] if count == len(rows) else [rows.take(slice(count, None)).owned()]
        if not count:
            return None
        self._after_ns = int(times[count - 1])
        return rows.take(slice(0, count))


def _account(source: Source, rows: Columns) -> None:
    """Count ``rows`` as events of ``source``."""
    if source.first_ns < 0:
        source.first_ns = int(rows["t_ns"][0])
    source.last_ns = int(rows["t_ns"][-1])
    source.events += len(rows)


def read_all(
    names: list[str],
    *,
    opener: Callable[[str], BinaryIO] = open_input,
    begun: Callable[[Source], None] = lambda _source: None,
) -> Iterator[Batch]:
    """All events of the sources ``names``, the source with the first event first, in the order of time.

    Args:
        opener: gives the bytes of a name.
        begun: told of each source before its first batch.

    Raises:
        UsageError: something in a source cannot be read; names the source, the line and what was expected.
    """
    if len(set(names)) != len(names):
        raise UsageError("a trace is named twice; expected each once")
    one_for_all = _Scanner()
    with contextlib.ExitStack() as open_files:
        started: list[tuple[int, Source, Columns, Iterator[Columns]]] = []
        for name in names:
            source = Source("standard input" if name == "-" else name)
            stream = opener(name) if name == "-" else open_files.enter_context(opener(name))
            scanned = _scanned(source, stream, one_for_all)
            first = next(scanned, None)
            if first is not None:
                started.append((int(first["t_ns"].min()), source, first, scanned))
        started.sort(key=lambda entry: entry[0])
        after_ns, before = 0, ""
        for _, source, opening, others in started:
            begun(source)
            order = _Order(source, after_ns, before)
            for rows in _then(opening, others):
                ready = order.feed(rows)
                if ready is not None:
                    _account(source, ready)
                    yield Batch(ready, source)
            ready = order.rest()
            if ready is not None:
                _account(source, ready)
                yield Batch(ready, source)
            after_ns, before = max(after_ns, source.last_ns), source.name


def _then(first: Columns, others: Iterator[Columns]) -> Iterator[Columns]:
    yield first
    yield from others
