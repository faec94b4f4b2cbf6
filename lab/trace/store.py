"""Imported traces: one Parquet file, a column a field, some bytes an event."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import UsageError
from common.parts import Part
from common.refusals import refusal
from lab.trace.columns import DTYPES, NO_TEXT, Columns
from lab.trace.events import PAGE_BYTES, Event

__all__ = ["VERSION", "TraceFile", "TraceWriter"]

VERSION = 1
_KEY = "fpr-lab trace"
_GROUP_ROWS = 1 << 20
_LEVEL = 9
# Times and pages go up by small steps; the rest has few values, which a dictionary does best.
_DELTA = ("t_ns", "pfn")
_SCHEMA = pa.schema([*(pa.field(name, pa.from_numpy_dtype(np.dtype(dtype)), nullable=False)
                       for name, dtype in DTYPES.items()), pa.field("text", pa.string())])  # fmt: skip


class TraceWriter:
    """Writes a trace that gets its name when everything is there, see ``common.parts``.

    Use as a context manager: leaving it by an exception, or without ``finish``, leaves no file.

    Raises:
        MachineError: space, quota or permissions; from ``write`` and ``finish`` too.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._waiting: list[Columns] = []
        self._rows = 0
        self._writer: Any = None
        try:
            self._part = Part(path)
        except OSError as error:
            raise refusal(path, error) from error

    def __enter__(self) -> Self:
        self._writer = pq.ParquetWriter(
            self._part.stream,
            _SCHEMA,
            compression="zstd",
            compression_level=_LEVEL,
            use_dictionary=[name for name in _SCHEMA.names if name not in _DELTA],
            column_encoding=dict.fromkeys(_DELTA, "DELTA_BINARY_PACKED"),
            write_statistics=True,
            write_page_checksum=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):  # what went wrong is on its way already
            self._writer.close()
        self._part.close()

    def write(self, rows: Columns) -> None:
        """Take some events, behind those before."""
        self._waiting.append(rows)
        self._rows += len(rows)
        if self._rows >= _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            try:
                self._writer.write_table(_table(Columns.joined(self._waiting)), row_group_size=_GROUP_ROWS)
            except OSError as error:
                raise refusal(self.path, error) from error
        self._waiting, self._rows = [], 0

    def finish(self, metadata: dict[str, Any]) -> int:
        """Write what waits and ``metadata``, and give the file its name; its size in bytes."""
        self._flush()
        described = {
            "version": VERSION,
            "page_bytes": PAGE_BYTES,
            "events": {event.name: int(event) for event in Event},
            **metadata,
        }
        self._writer.add_key_value_metadata({_KEY: json.dumps(described, allow_nan=False)})
        try:
            self._writer.close()
            return self._part.finish()
        except OSError as error:
            raise refusal(self.path, error) from error


def _table(rows: Columns) -> pa.Table:
    arrays = [pa.array(rows[name]) for name in DTYPES]
    ids = rows["text_id"]
    texts: npt.NDArray[Any] = np.full(len(rows), None, object)
    told = np.flatnonzero(ids != NO_TEXT)
    if told.size:
        texts[told] = [rows.texts[number] for number in ids[told].tolist()]
        arrays.append(pa.array(texts, pa.string()))
    else:
        arrays.append(pa.nulls(len(rows), pa.string()))
    return pa.Table.from_arrays(arrays, schema=_SCHEMA)


class TraceFile:
    """An imported trace.

    Attributes:
        metadata: version, page_bytes, events (number by name), sources, clock, health, start.
    """

    def __init__(self, path: str) -> None:
        """Open ``path``.

        Raises:
            UsageError: it is not there, or not such a file.
        """
        self.path = path
        try:
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
        except OSError as error:
            reason = error.strerror or "is no Parquet file"
            raise UsageError(f"{path}: {reason}; expected a file that `python -m lab import` wrote") from None
        except (pa.ArrowInvalid, pa.ArrowException):
            raise UsageError(f"{path}: is no Parquet file; expected one that `python -m lab import` wrote") from None
        written = self._file.metadata.metadata or {}
        try:
            self.metadata: dict[str, Any] = json.loads(written[_KEY.encode()])
            version = self.metadata["version"]
        except (KeyError, ValueError, TypeError):
            raise UsageError(
                f"{path}: is no imported trace; expected a file that `python -m lab import` wrote"
            ) from None
        if version != VERSION:
            raise UsageError(f"{path}: is of version {version}; expected {VERSION}; import the trace again")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, KeyError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0][:120]
            raise UsageError(f"{self.path}: is damaged ({reason}); import the trace again") from None

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def columns(self, *names: str) -> dict[str, npt.NDArray[Any]]:
        """Whole columns, all of ``DTYPES`` if none is named.

        Raises:
            UsageError: the file is damaged; so do the others.
        """
        with self._told():
            table = self._file.read(list(names or DTYPES))
            return {name: table.column(name).to_numpy() for name in table.column_names}

    def groups(self, *names: str) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """The same, a million rows or so at a time."""
        for number in range(self._file.num_row_groups):
            with self._told():
                table = self._file.read_row_group(number, list(names or DTYPES))
                found = {name: table.column(name).to_numpy() for name in table.column_names}
            yield found

    def texts(self) -> tuple[npt.NDArray[np.int64], list[str]]:
        """The rows that have a text, and their texts."""
        with self._told():
            column = self._file.read(["text"]).column("text")
        valid = column.is_valid().to_numpy()
        return np.flatnonzero(valid).astype(np.int64), column.drop_null().to_pylist()
