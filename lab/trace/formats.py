"""What a file is, told by its first bytes and never by its name: compression, a page around a trace, other tools."""

from __future__ import annotations

import contextlib
import lzma
import os
import sys
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from common.errors import UsageError

__all__ = ["EXPECTED", "STDIN", "Pages", "open_input", "pieces"]

STDIN = "-"
EXPECTED = (
    "the text of ftrace (trace, trace_pipe), of trace-cmd report, of perf script or of Perfetto's systrace export, "
    "plain or packed by gzip, xz or zstd"
)
_READ_BYTES = 1 << 18
_MAGIC = ((b"\x1f\x8b", "gzip"), (b"\xfd7zXZ\x00", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"))
# Recordings in a tool's own binary form, and what gives their text.
_BINARY = (
    (b"\x17\x08\x44tracing", "is trace-cmd's trace.dat", "its text: trace-cmd report -t -i {0} > trace.txt"),
    (b"PERFILE2", "is perf.data", "its text: perf script --ns -i {0} > trace.txt"),
    (b"2ELIFREP", "is perf.data of the other byte order", "its text: perf script --ns -i {0} > trace.txt"),
    (b"PAR1", "is a Parquet file", f"{EXPECTED}; if it is an imported trace, use it as it is"),
    (b"PK\x03\x04", "is a zip archive", EXPECTED),
    (b"BZh", "is packed by bzip2", EXPECTED),
    (b"\x7fELF", "is a program", EXPECTED),
)
_PERFETTO = b"\x0a"  # with zeros behind it: a line feed alone may begin a text
_BOM = b"\xef\xbb\xbf"
_ASKED_OF_A_PACK = 1 << 16
_HEAD_BYTES = 4096  # a page begins within them


def open_input(path: str, expected: str = EXPECTED) -> BinaryIO:
    """The bytes of ``path``, or of standard input for ``-``. ``expected``: what an error asks for.

    Raises:
        UsageError: it is not there, not a file, or may not be read.
    """
    if path == STDIN:
        if sys.stdin is None:
            raise UsageError("standard input is closed; name a file instead of -")
        return sys.stdin.buffer
    try:
        if os.path.isdir(path):
            raise UsageError(f"{path}: is a folder; expected {expected}")
        return open(path, "rb", buffering=0)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path!r}: {reason}; expected {expected}") from None


def pieces(
    stream: BinaryIO, name: str, *, binary: bool = False, expected: str = EXPECTED
) -> tuple[str, Iterator[bytes]]:
    """The compression of ``stream`` (plain, gzip, xz, zstd) and its unpacked bytes, piece by piece.

    Args:
        binary: anything will do, not only text. expected: what an error asks for.

    Raises:
        UsageError: it is another tool's binary form, empty, or (while iterating) damaged or cut off; names ``name``.
    """
    head = b""
    while len(head) < 16 and (more := stream.read(_READ_BYTES)):
        head += more
    if not head:
        raise UsageError(f"{name}: line 1: is empty; expected {expected}")
    packing = next((kind for magic, kind in _MAGIC if head.startswith(magic)), "plain")
    unpacked = _plain(head, stream) if packing == "plain" else _unpacked(packing, head, stream, name)
    first = next(unpacked, b"")
    while len(first) < 16 and (following := next(unpacked, b"")):
        first += following
    if not first:
        raise UsageError(f"{name}: line 1: is empty; expected {expected}")
    if binary:
        return packing, _chained(first, unpacked)
    _refuse_binary(first, name)
    return packing, _chained(first.removeprefix(_BOM), unpacked)


def _refuse_binary(first: bytes, name: str) -> None:
    for magic, what, wanted in _BINARY:
        if first.startswith(magic):
            raise UsageError(f"{name}: line 1: {what}; expected {wanted.format(name)}")
    if b"\0" in first[:4096]:
        hint = "; Perfetto's own form becomes text by: traceconv systrace" if first.startswith(_PERFETTO) else ""
        raise UsageError(f"{name}: line 1: is binary; expected {EXPECTED}{hint}")
    for mark in (b"\xff\xfe", b"\xfe\xff"):
        if first.startswith(mark):
            raise UsageError(f"{name}: line 1: is UTF-16; expected {EXPECTED}, a byte a character")


def _chained(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _plain(head: bytes, stream: BinaryIO) -> Iterator[bytes]:
    yield head
    while piece := stream.read(_READ_BYTES):
        yield piece


class _Source:
    """The packed bytes: those already read, then the stream's."""

    def __init__(self, head: bytes, stream: BinaryIO) -> None:
        self._head = head
        self._stream = stream
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        """At most ``size`` bytes, none at the end."""
        if self._head:
            wanted = len(self._head) if size < 0 else size
            given, self._head = self._head[:wanted], self._head[wanted:]
            return given
        return self._stream.read(size if size > 0 else _READ_BYTES)

    def readable(self) -> bool:
        """As a file says it."""
        return True

    def writable(self) -> bool:
        """As a file says it."""
        return False

    def seekable(self) -> bool:
        """As a file says it."""
        return False

    def close(self) -> None:
        """The stream is its owner's to close."""
        self.closed = True

    def flush(self) -> None:
        """Nothing is written."""


def _unpacked(packing: str, head: bytes, stream: BinaryIO, name: str) -> Iterator[bytes]:
    """Unpacked bytes in pieces of at most ``_READ_BYTES``, several packs behind each other included."""
    source = _Source(head, stream)
    line = 1
    try:
        for piece in _zstd(source) if packing == "zstd" else _members(packing, source):
            yield piece
            line += piece.count(b"\n")
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        raise _damaged(name, packing, line, error) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise _damaged(name, packing, line, error) from None


def _damaged(name: str, packing: str, line: int, error: Exception) -> UsageError:
    reason = (
        "ends in the middle" if isinstance(error, EOFError) or "runcated" in str(error) else f"is damaged ({error})"
    )
    return UsageError(f"{name}: line {line}: the {packing} archive {reason} here; expected the whole of it")


def _members(packing: str, source: _Source) -> Iterator[bytes]:
    """Unpack gzip members or xz streams, one behind the other."""
    data = source.read(_ASKED_OF_A_PACK)
    while data:
        unpacker: Any = zlib.decompressobj(31) if packing == "gzip" else lzma.LZMADecompressor(lzma.FORMAT_XZ)
        while not unpacker.eof:
            piece = unpacker.decompress(data, _READ_BYTES)
            if piece:
                yield piece
            data = unpacker.unconsumed_tail if packing == "gzip" else b""
            if data or unpacker.eof or (packing == "xz" and not unpacker.needs_input):
                continue
            data = source.read(_ASKED_OF_A_PACK)
            if not data and not (packing == "gzip" and piece):
                raise EOFError
        data = unpacker.unused_data or source.read(_ASKED_OF_A_PACK)
        while data and not data.strip(b"\0"):  # padding
            data = source.read(_ASKED_OF_A_PACK)


def _zstd(source: _Source) -> Iterator[bytes]:
    """Unpack zstd frames by pyarrow, which says when one is cut off."""
    import pyarrow as pa

    with contextlib.closing(pa.CompressedInputStream(pa.PythonFile(source, "r"), "zstd")) as stream:
        while piece := stream.read(_READ_BYTES):
            yield piece


class Pages:
    """Leaves of an HTML page what stands in its ``trace-data`` scripts; a text passes unchanged.

    Line breaks of what is left out stay, so that line numbers are those of the page.
    """

    _OPEN, _CLOSE, _KEEP = b'class="trace-data"', b"</script>", 32

    def __init__(self) -> None:
        self.is_html: bool | None = None
        self._inside = False
        self._rest = b""

    def feed(self, piece: bytes, *, last: bool = False) -> bytes:
        """What ``piece`` brings, as far as it can be told yet. ``last``: nothing follows."""
        data = self._rest + piece
        self._rest = b""
        if self.is_html is None:
            start = data.lstrip()[:64].lower()
            if len(start) < 15 and len(data) < _HEAD_BYTES and not last:
                self._rest = data
                return b""
            self.is_html = start.startswith((b"<!doctype html", b"<html"))
        return self._cut(data, last=last) if self.is_html else data

    def _cut(self, data: bytes, *, last: bool) -> bytes:
        found = []
        while True:
            mark = self._CLOSE if self._inside else self._OPEN
            at = data.find(mark)
            if at < 0:
                keep = 0 if last else min(len(data), self._KEEP)
                body, self._rest = data[: len(data) - keep], data[len(data) - keep :]
                found.append(body if self._inside else b"\n" * body.count(b"\n"))
                return b"".join(found)
            body, data = data[:at], data[at + len(mark) :]
            found.append(body if self._inside else b"\n" * body.count(b"\n"))
            if not self._inside:  # the rest of the opening tag
                _, bracket, behind = data.partition(b">")
                data = behind if bracket else data
            self._inside = not self._inside
