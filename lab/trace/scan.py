"""The text of all formats to columns, by one compiled scanner that is told nothing but bytes.

The formats differ in what stands before the time and agree behind it, so that one kernel reads them all:

    recordings   14.135752452 [0] 145 mm_page_alloc: pfn=0x1f33 order=0 ...
    ftrace       cat-15372   [000] ...1. 13569.992124: mm_page_alloc: page=... pfn=0x1a3c3d order=0 ...
    with tgid    cat-15372   (  15300) [000] ...1. 13569.992124: mm_page_alloc: ...
    trace-cmd    cat-15372 [000] ...1. 13569.992124: mm_page_alloc:        page=...
    perf script  cat 15372 [000] 13569.992124:       kmem:mm_page_alloc: page=...

A command may hold spaces, brackets and colons: the CPU is the first ``[number]`` behind which a time and a name follow.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from common.native import kernel
from lab.trace.events import ALIASES, FLAG_REFILL, MAX_ORDER, Event

__all__ = [
    "BAD_CLOCK",
    "BAD_EVENT",
    "BAD_ORDER",
    "BAD_PFN",
    "COUNTERS",
    "C_BLANK",
    "C_FAILED",
    "C_LINES",
    "C_NOISE",
    "C_OTHER",
    "C_PERF",
    "C_PLAIN",
    "C_RECORDING",
    "C_STACK",
    "C_TGID",
    "DONE",
    "FULL",
    "ODD_COMMENT",
    "ODD_NOISE",
    "ODD_NOTE",
    "ODD_TEXT",
    "UNKNOWN_GFP",
    "name_table",
    "scan",
    "word_hash",
]

# Why the scanner stopped.
DONE, FULL, UNKNOWN_GFP, BAD_EVENT, BAD_ORDER, BAD_PFN, BAD_CLOCK = range(7)
# What it leaves to Python, a row (row or -1, kind, line, first byte, one behind the last) each.
ODD_TEXT, ODD_COMMENT, ODD_NOTE, ODD_NOISE = range(4)
# What it counts.
(C_LINES, C_BLANK, C_OTHER, C_STACK, C_NOISE, C_FAILED, C_RECORDING, C_PLAIN, C_PERF, C_TGID, COUNTERS) = range(11)

_FIRST_TEXT = int(Event.mark)
_EXTFRAG, _ALLOC = int(Event.mm_page_alloc_extfrag), int(Event.mm_page_alloc)
_REFILL = FLAG_REFILL
_MAX_ORDER = MAX_ORDER
_MAX_PFN = 0xFFFFFFFF
_MAX_CPU, _MAX_PID = 0x7FFF, 0x7FFFFFFF
_NO_EVENT, _OTHER_EVENT, _STACK_EVENT, _NOTE_EVENT, _CLOCKLESS = -1, -2, -3, -4, -5
_LONGEST = 10**18  # a number beyond this is none


def word_hash(word: bytes) -> int:
    """FNV-1a in 32 bits with the length above it: what the kernel knows a word by."""
    value = 0x811C9DC5
    for byte in word:
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    return value | len(word) << 32


def name_table() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Hashes (int64) of the events' names and aliases, and their numbers (int64)."""
    names = {event.name: int(event) for event in Event} | {name: int(event) for name, event in ALIASES.items()}
    return np.array([word_hash(name.encode()) for name in names]), np.array(list(names.values()))


_PFN = word_hash(b"pfn")
_ORDER = word_hash(b"order")
_MIGRATETYPE = word_hash(b"migratetype")
_GFP, _GFP_FLAGS = word_hash(b"gfp"), word_hash(b"gfp_flags")
_PERCPU_REFILL = word_hash(b"percpu_refill")
_ALLOC_ORDER, _ALLOC_MIGRATETYPE = word_hash(b"alloc_order"), word_hash(b"alloc_migratetype")
_PAGEBLOCK_ORDER, _FALLBACK_ORDER = word_hash(b"pageblock_order"), word_hash(b"fallback_order")
# -1UL, the pfn of an allocation that failed, where a tool prints the raw field.
_NO_PFN = (word_hash(b"0xffffffffffffffff"), word_hash(b"18446744073709551615"), word_hash(b"-1"))
_PAGE = word_hash(b"page")


@kernel
def _is_digit(byte):  # type: ignore[no-untyped-def]
    return 48 <= byte <= 57


@kernel
def _is_space(byte):  # type: ignore[no-untyped-def]
    return byte == 32 or byte == 9


@kernel
def _spaces(text, at, end):  # type: ignore[no-untyped-def]
    """The first byte from ``at`` on that is no space."""
    while at < end and _is_space(text[at]):
        at += 1
    return at


@kernel
def _decimal(text, at, end):  # type: ignore[no-untyped-def]
    """Value of the digits at ``at`` and the byte behind them; too many are ``_LONGEST``."""
    value = np.int64(0)
    while at < end and _is_digit(text[at]):
        value = value * 10 + (np.int64(text[at]) - 48) if value < _LONGEST // 10 else np.int64(_LONGEST)
        at += 1
    return value, at


@kernel
def _number(text, at, end):  # type: ignore[no-untyped-def]
    """Value of the whole of ``text[at:end]``: decimal, a minus before it, or hex with 0x. (value, valid)."""
    if end - at > 2 and text[at] == 48 and (text[at + 1] | 32) == 120:
        if end - at > 18:
            return np.int64(0), False
        value = np.int64(0)
        for place in range(at + 2, end):
            byte = np.int64(text[place])
            low = byte | 32
            if _is_digit(byte):
                digit = byte - 48
            elif 97 <= low <= 102:
                digit = low - 87
            else:
                return np.int64(0), False
            if value >= np.int64(1) << 58:
                return np.int64(_LONGEST), True
            value = (value << 4) | digit
        return value, True
    negative = end - at > 1 and text[at] == 45
    value, behind = _decimal(text, at + 1 if negative else at, end)
    return (-value if negative else value), behind == end and end > at


@kernel
def _time(text, at, end):  # type: ignore[no-untyped-def]
    """(ns, byte behind) of ``seconds.fraction`` at ``at``; (-1, at) if there is none."""
    seconds, dot = _decimal(text, at, end)
    if dot == at or dot >= end or text[dot] != 46 or seconds > 9_000_000_000:
        return np.int64(-1), at
    value, behind = _decimal(text, dot + 1, end)
    places = behind - dot - 1
    if places < 1 or places > 9:
        return np.int64(-1), at
    for _ in range(9 - places):
        value *= 10
    return seconds * 1_000_000_000 + value, behind


@kernel
def _event(text, at, end, hashes, numbers):  # type: ignore[no-untyped-def]
    """Number of the event named at ``at`` and the byte behind its colon; ``kmem:`` before it is skipped."""
    value = np.int64(0x811C9DC5)
    first = at
    place = at
    while place < end:
        byte = np.int64(text[place])
        if byte == 58:
            if place + 1 < end and not _is_space(text[place + 1]):
                value = np.int64(0x811C9DC5)
                place += 1
                first = place
                continue
            key = value | (np.int64(place - first) << 32)
            for entry in range(hashes.size):
                if hashes[entry] == key:
                    return numbers[entry], place + 1
            return (_OTHER_EVENT if place > first else _NO_EVENT), place + 1
        if _is_space(byte):
            break
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
        place += 1
    if place > at and text[at] == 60:  # <stack trace>
        return _STACK_EVENT, place
    if place - at > 12 and text[at] == 80 and text[at + 4] == 95 and text[at + 5] == 82 and text[at + 11] == 95:
        return _NOTE_EVENT, place  # PERF_RECORD_LOST
    return _NO_EVENT, place


@kernel
def _pid_before(text, start, bracket):  # type: ignore[no-untyped-def]
    """(pid, dash before it, tgid between) of the task that stands before ``[cpu]``; a pid of -1 for none."""
    at = bracket - 1
    while at >= start and _is_space(text[at]):
        at -= 1
    tgid = at >= start and text[at] == 41
    if tgid:
        while at >= start and text[at] != 40:
            at -= 1
        at -= 1
        while at >= start and _is_space(text[at]):
            at -= 1
    behind = at + 1
    while at >= start and _is_digit(text[at]):
        at -= 1
    if at + 1 == behind or at < start:
        return np.int64(-1), False, tgid
    value, _ = _decimal(text, at + 1, behind)
    return value, text[at] == 45, tgid


@kernel
def _recording(text, start, end, hashes, numbers, head):  # type: ignore[no-untyped-def]
    """Read ``time [cpu] pid name:`` into ``head`` (t, cpu, pid, behind); the event's number or ``_NO_EVENT``."""
    t, at = _time(text, start, end)
    if t < 0 or at + 1 >= end or text[at] != 32 or text[at + 1] != 91:
        return _NO_EVENT
    cpu, behind = _decimal(text, at + 2, end)
    if behind == at + 2 or behind + 1 >= end or text[behind] != 93 or text[behind + 1] != 32:
        return _NO_EVENT
    pid, at = _decimal(text, behind + 2, end)
    if at == behind + 2 or at >= end or text[at] != 32:
        return _NO_EVENT
    number, behind = _event(text, at + 1, end, hashes, numbers)
    head[0], head[1], head[2], head[3] = t, cpu, pid, behind
    return number


@kernel
def _common(text, start, end, hashes, numbers, head):  # type: ignore[no-untyped-def]
    """As ``_recording``, of the tools' forms; ``head[4]`` is 1 for perf's, ``head[5]`` is 1 where a tgid stands."""
    clockless = False
    for bracket in range(start, end):
        if text[bracket] != 91:
            continue
        cpu, behind = _decimal(text, bracket + 1, end)
        if behind == bracket + 1 or behind + 1 >= end or text[behind] != 93 or not _is_space(text[behind + 1]):
            continue
        at = _spaces(text, behind + 1, end)
        t, behind = _time(text, at, end)
        if t < 0:  # the column of irqs-off and the like
            token = at
            while at < end and not _is_space(text[at]):
                at += 1
            if at > token and text[at - 1] == 58 and _is_digit(text[token]):
                clockless = True
                continue
            at = _spaces(text, at, end)
            t, behind = _time(text, at, end)
            if t < 0:
                _, behind = _decimal(text, at, end)
                clockless = clockless or (behind > at and behind < end and text[behind] == 58)
                continue
        if behind >= end or text[behind] != 58:
            continue
        at = _spaces(text, behind + 1, end)
        _, behind = _decimal(text, at, end)
        if behind > at and behind < end and _is_space(text[behind]):  # perf's period
            at = _spaces(text, behind, end)
        number, behind = _event(text, at, end, hashes, numbers)
        if number == _NO_EVENT:
            continue
        pid, dash, tgid = _pid_before(text, start, bracket)
        if pid < 0:
            continue
        head[0], head[1], head[2], head[3] = t, cpu, pid, behind
        head[4], head[5] = (0 if dash else 1), (1 if tgid else 0)
        return number
    return _CLOCKLESS if clockless else _NO_EVENT


@kernel
def _gfp(text, at, end, keys, values):  # type: ignore[no-untyped-def]
    """(bits, known) of flags as a number or in words that ``keys`` holds."""
    value, valid = _number(text, at, end)
    if valid and 0 <= value <= 0xFFFFFFFF:
        return value, True
    word = np.int64(0x811C9DC5)
    for place in range(at, end):
        word = ((word ^ np.int64(text[place])) * 0x01000193) & 0xFFFFFFFF
    word |= np.int64(end - at) << 32
    slot = word % keys.size
    while keys[slot] != 0:
        if keys[slot] == word:
            return np.int64(values[slot]), True
        slot = (slot + 1) % keys.size
    return np.int64(slot), False


@kernel
def _is_nil(text, at, end):  # type: ignore[no-untyped-def]
    """Whether a printed pointer is NULL: ``(nil)``, ``(null)``, or nothing but zeros."""
    if at < end and text[at] == 40:
        return end - at > 2 and (text[at + 1] | 32) == 110
    for place in range(at, end):
        if text[place] != 48 and text[place] != 120:
            return False
    return end > at


@kernel
def _is_no_pfn(text, at, end):  # type: ignore[no-untyped-def]
    """Whether a pfn is printed as -1UL."""
    word = np.int64(0x811C9DC5)
    for place in range(at, end):
        word = ((word ^ np.int64(text[place])) * 0x01000193) & 0xFFFFFFFF
    word |= np.int64(end - at) << 32
    return word == _NO_PFN[0] or word == _NO_PFN[1] or word == _NO_PFN[2]


@kernel
def _fields(text, at, end, keys, values, got):  # type: ignore[no-untyped-def]
    """Read ``key=value`` words into ``got`` (pfn, order, migratetype, gfp, refill, failed); a stop code.

    ``got[6]`` and ``got[7]`` bound the flags that ``keys`` does not hold.
    """
    got[0], got[1], got[2], got[3], got[4], got[5] = -1, -1, -1, 0, 0, 0
    nil = False
    told_pfn = False
    while True:
        at = _spaces(text, at, end)
        if at >= end:
            break
        word = np.int64(0x811C9DC5)
        first = at
        while at < end and text[at] != 61 and not _is_space(text[at]):
            word = ((word ^ np.int64(text[at])) * 0x01000193) & 0xFFFFFFFF
            at += 1
        if at >= end or text[at] != 61:
            continue
        word |= np.int64(at - first) << 32
        first = at + 1
        at = first
        while at < end and not _is_space(text[at]):
            at += 1
        if word == _GFP or word == _GFP_FLAGS:
            value, known = _gfp(text, first, at, keys, values)
            if not known:
                got[6], got[7] = first, at
                return UNKNOWN_GFP
            got[3] = value
            continue
        if word == _PAGE:
            nil = _is_nil(text, first, at)
            continue
        known = (
            word == _PFN or word == _ORDER or word == _MIGRATETYPE or word == _PERCPU_REFILL
            or word == _ALLOC_ORDER or word == _ALLOC_MIGRATETYPE or word == _PAGEBLOCK_ORDER
            or word == _FALLBACK_ORDER
        )  # fmt: skip
        if not known:
            continue
        value, valid = _number(text, first, at)
        if not valid:
            return BAD_EVENT
        if word == _PFN:
            told_pfn = True
            got[0] = np.int64(-1) if _is_no_pfn(text, first, at) else value
        elif word == _ORDER or word == _ALLOC_ORDER:
            got[1] = value
        elif word == _MIGRATETYPE or word == _ALLOC_MIGRATETYPE:
            got[2] = value
        elif word == _PERCPU_REFILL:
            got[4] = 1 if value else 0
        elif value > _MAX_ORDER or value < 0:
            return BAD_ORDER
    got[5] = 1 if (got[0] == -1 and told_pfn) or (nil and got[0] <= 0) else 0
    return DONE


@kernel
def _checked(got, number):  # type: ignore[no-untyped-def]
    """A stop code for what an event told."""
    if got[5] == 1 and number == _ALLOC:
        return DONE
    if got[0] < 0 or got[1] < 0 or got[2] < -1 or got[2] > 127:
        return BAD_EVENT
    if got[1] > _MAX_ORDER:
        return BAD_ORDER
    if got[0] > _MAX_PFN:
        return BAD_PFN
    return DONE


@kernel
def _is_stack(text, start, at, end):  # type: ignore[no-untyped-def]
    """A line of a stack: `` => symbol``, or perf's ``    address symbol+offset (file)``."""
    if end - at >= 2 and text[at] == 61 and text[at + 1] == 62:
        return True
    first = at
    while at < end and (_is_digit(text[at]) or 97 <= text[at] <= 102):
        at += 1
    return first > start and at > first and at < end and text[at] == 32 and (at - first >= 4 or text[end - 1] == 41)


@kernel
def _is_note(text, at, end):  # type: ignore[no-untyped-def]
    """A line that begins with CPU, cpus= or version: of a CPU's buffer, or of a report's head."""
    if end - at < 4:
        return False
    a, b, c = text[at], text[at + 1], text[at + 2]
    return (
        (a == 67 and b == 80 and c == 85) or (a == 99 and b == 112 and c == 117) or (a == 118 and b == 101 and c == 114)
    )


@kernel
def _leave(odd, counts, row, kind, line, first, behind):  # type: ignore[no-untyped-def]
    """Note something for Python."""
    place = counts[1]
    odd[place, 0], odd[place, 1], odd[place, 2], odd[place, 3], odd[place, 4] = row, kind, line, first, behind
    counts[1] = place + 1


@kernel
def _is_comment(text, at, end):  # type: ignore[no-untyped-def]
    """A line that begins with ``#``, unless a word follows at once: that is a task whose name begins so."""
    return text[at] == 35 and (at + 1 >= end or _is_space(text[at + 1]) or text[at + 1] == 35)


@kernel
def _unread(text, start, first, end, line, odd, counts, totals):  # type: ignore[no-untyped-def]
    """File the line at ``start``, whose first word is at ``first``, and which is no event."""
    if text[first] == 35:
        _leave(odd, counts, -1, ODD_COMMENT, line, first, end)
    elif _is_note(text, first, end):
        _leave(odd, counts, -1, ODD_NOTE, line, first, end)
    elif _is_stack(text, start, first, end):
        totals[C_STACK] += 1
    else:
        totals[C_NOISE] += 1
        _leave(odd, counts, -1, ODD_NOISE, line, first, end)


@kernel
def scan(  # type: ignore[no-untyped-def]
    text, start, size, line, hashes, numbers, keys, values, t_ns, cpus, pids, events, pfns, orders, migratetypes, gfps,
    flags, lines, odd, totals, counts, head, got,
):  # fmt: skip
    """Read lines of ``text[start:size]`` (uint8, whole lines) until an array is full or something is wrong.

    Args:
        line: number of the line at ``start``, from 1.
        hashes, numbers: as ``name_table``.
        keys, values: open hash table of flags in words (int64 and uint32; an empty slot's key is 0).
        t_ns ... lines: the columns, filled from row ``counts[0]`` on.
        odd: int64 (n, 5), what is left to Python, from ``counts[1]`` on.
        totals: int64[COUNTERS], added to.
        head, got: int64[8], scratch.

    Returns:
        (stop code, byte to go on at, number of the line there). ``counts`` tells the rows in use. For a code from
        ``UNKNOWN_GFP`` on the byte and the line are those of the offending line.
    """
    at = start
    while at < size:
        if counts[0] >= t_ns.size or counts[1] >= odd.shape[0]:
            return FULL, at, line
        end = at
        while end < size and text[end] != 10:
            end += 1
        behind = end + 1
        if end > at and text[end - 1] == 13:
            end -= 1
        first = _spaces(text, at, end)
        if first >= end:
            totals[C_BLANK] += 1
        else:
            number = np.int64(_NO_EVENT)
            form = C_RECORDING
            if _is_digit(text[first]):
                number = np.int64(_recording(text, first, end, hashes, numbers, head))
            if number == _NO_EVENT and not _is_comment(text, first, end):
                number = np.int64(_common(text, first, end, hashes, numbers, head))
                form = C_PERF if head[4] == 1 else C_PLAIN
            if number == _CLOCKLESS:
                return BAD_CLOCK, at, line
            if number == _NO_EVENT:
                _unread(text, at, first, end, line, odd, counts, totals)
            elif number == _NOTE_EVENT:
                _leave(odd, counts, -1, ODD_NOTE, line, first, end)
            elif number == _STACK_EVENT:
                totals[C_STACK] += 1
            elif number == _OTHER_EVENT:
                totals[C_OTHER] += 1
            else:
                failed = False
                row = counts[0]
                got[0], got[1], got[2], got[3], got[4] = 0, 0, -1, 0, 0
                if head[1] > _MAX_CPU or head[2] > _MAX_PID:
                    return BAD_EVENT, at, line
                if number < _FIRST_TEXT:
                    code = _fields(text, head[3], end, keys, values, got)
                    if code == DONE:
                        code = _checked(got, number)
                    if code != DONE:
                        return code, at, line
                    failed = got[5] == 1 and number == _ALLOC
                if failed:
                    totals[C_FAILED] += 1
                else:
                    t_ns[row], cpus[row], pids[row], events[row] = head[0], head[1], head[2], number
                    pfns[row], orders[row], migratetypes[row] = got[0], got[1], got[2]
                    gfps[row], lines[row] = got[3], line
                    flags[row] = _REFILL if got[4] == 1 else 0
                    if number >= _FIRST_TEXT or number == _EXTFRAG:
                        _leave(odd, counts, row, ODD_TEXT, line, _spaces(text, head[3], end), end)
                    counts[0] = row + 1
                totals[form] += 1
                if form != C_RECORDING and head[5] == 1:
                    totals[C_TGID] += 1
        totals[C_LINES] += 1
        line += 1
        at = behind
    return DONE, size, line
