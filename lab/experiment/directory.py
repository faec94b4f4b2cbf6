"""Run directories: everything that a table or a picture of an experiment is made of, and nothing else.

    run.json                     kind, settings, command, versions, environment
    costs.json                   the costs of virtual time, or null for real processes
    results.jsonl                one line a finished run, without its series
    series/<key>-<repeat>.csv    the series of that run

A result is identified by the key of its specification and its repeat number. One writer at a time holds ``flock`` on
the folder; readers need no lock. A line of results.jsonl is there only when its series is, and a line that a killed
writer left without its end is not there: readers ignore it, the next writer cuts it off. A line whose series was lost
is an error for who reads series; the next writer drops it and so has its run done again. Damage of any other kind is an
error in one line, and never a result that is silently missing.
"""

from __future__ import annotations

import contextlib
import csv
import datetime as dt
import errno
import fcntl
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from common.errors import LabError, MachineError, UsageError
from common.files import read_regular
from lab.experiment.difference import difference
from lab.experiment.environment import environment, git_commit, project_version
from lab.experiment.metrics import METRICS, SERIES, RunResult

__all__ = ["FORMAT", "KeptResult", "RunDirectory"]

FORMAT = 1
_RUN, _COSTS, _RESULTS, _SERIES = "run.json", "costs.json", "results.jsonl", "series"
_SERIES_FILE = re.compile(r"[0-9a-f]{16}-[0-9]{1,9}\.csv")
_RECORD = {
    "format": int,
    "kind": str,
    "settings": dict,
    "command": list,
    "version": str,
    "commit": str | None,
    "created": str,
    "environment": dict,
}


@dataclass(frozen=True)
class KeptResult:
    """A result and the number of its repeat."""

    repeat: int
    result: RunResult


class RunDirectory:
    """An experiment's folder, made by ``open`` for writing or by ``read`` for reading.

    Attributes:
        path: as it was given.
        record: run.json: format, kind, settings, command, version, commit, created (UTC), environment.
        costs: costs.json, None for real processes.
    """

    def __init__(self, path: str, record: dict[str, Any], costs: dict[str, Any] | None, lock: int = -1) -> None:
        self.path = path
        self.record = record
        self.costs = costs
        self._lock = lock
        self._stream = -1
        self._done: set[tuple[str, int]] = set()

    @classmethod
    def open(
        cls,
        path: str,
        *,
        kind: str,
        settings: dict[str, Any],
        costs: dict[str, Any] | None,
        force: bool = False,
        command: list[str] | None = None,
    ) -> Self:
        """Make ``path``, or go on in it if it holds the same experiment; holds the lock until ``close``.

        Args:
            kind: "sweep", "compare"; part of what has to be the same, as are settings and costs.
            settings: plain JSON values.
            force: replace another experiment that is there. Only what a run directory consists of is removed.
            command: the command line, that of this process if None.

        Raises:
            UsageError: another experiment or something else is there, or another process writes to it.
            MachineError: the folder cannot be made.
        """
        record = {
            "format": FORMAT,
            "kind": kind,
            "settings": _plain(settings),
            "command": list(sys.orig_argv) if command is None else command,
            "version": project_version(),
            "commit": git_commit(),
            "created": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "environment": environment(),
        }
        costs = None if costs is None else _plain(costs)
        try:
            directory = cls._make(path, record, costs) if _is_free(path) else None
            if directory is None:  # something is there, or came to be there just now
                directory = cls._take(path, record, costs, force=force)
        except OSError as error:
            raise MachineError(f"{path}: {error.strerror}; name another path") from error
        try:
            directory._begin_writing()  # noqa: SLF001  an instance of this class
        except BaseException:
            directory.close()
            raise
        return directory

    @classmethod
    def read(cls, path: str) -> Self:
        """The experiment in ``path``, which may be growing; nothing is locked or changed.

        Raises:
            UsageError: there is no run directory, or run.json or costs.json is damaged.
        """
        if not os.path.isdir(path):
            what = "is no folder" if os.path.lexists(path) else "there is no such folder"
            raise UsageError(f"{path}: {what}; name the folder of a sweep or a comparison")
        if not os.path.exists(os.path.join(path, _RUN)):
            raise UsageError(f"{path}: is no run directory, it has no {_RUN}; name the folder of an experiment")
        record = _read_object(os.path.join(path, _RUN))
        for key, kind in _RECORD.items():
            if not isinstance(record.get(key), kind) or isinstance(record.get(key), bool):
                raise UsageError(f"{path}/{_RUN}: {key} is missing or damaged; is this a run directory?")
        if record["format"] != FORMAT:
            raise UsageError(
                f"{path}: has format {record['format']}, allowed is {FORMAT}; use the version that made it"
            )
        costs = _read_object(os.path.join(path, _COSTS), or_null=True)
        return cls(path, record, costs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back. What was appended is on the disk already."""
        for descriptor in (self._stream, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._stream = self._lock = -1

    @property
    def kind(self) -> str:
        """What made it: "sweep", "compare"."""
        return str(self.record["kind"])

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the experiment."""
        return dict(self.record["settings"])

    def done(self) -> frozenset[tuple[str, int]]:
        """(key, repeat) of each result, when open for writing."""
        return frozenset(self._done)

    def append(self, result: RunResult, repeat: int = 1) -> None:
        """Keep ``result``: on the disk when this returns.

        Raises:
            ValueError: that run is kept already, or the result is no JSON (a NaN).
            MachineError: it could not be written; what was written of it is ignored by readers.
        """
        key = result.spec.key()
        if (key, repeat) in self._done:
            raise ValueError(f"{key}-{repeat} is kept already")
        values = result.as_dict()
        series = values.pop("series")
        line = json.dumps({"repeat": repeat, **values}, separators=(",", ":"), allow_nan=False) + "\n"
        try:
            self._write_series(f"{key}-{repeat}.csv", [series[name] for name in SERIES])
            _write_all(self._stream, line.encode())
            os.fsync(self._stream)
        except OSError as error:
            raise MachineError(f"{self.path}: {error.strerror}; free some space and start again to go on") from error
        self._done.add((key, repeat))

    def results(self, *, series: bool = False) -> list[KeptResult]:
        """All results in the order in which they came.

        Args:
            series: read the series too; empty arrays otherwise.

        Raises:
            UsageError: results.jsonl or a series is damaged; names the line.
        """
        return [
            KeptResult(repeat, self._with_series(result, repeat) if series else result)
            for repeat, result in self._lines()
        ]

    def _with_series(self, result: RunResult, repeat: int) -> RunResult:
        name = f"{result.spec.key()}-{repeat}.csv"
        where = f"{self.path}/{_SERIES}/{name}"
        try:
            text = read_regular(where, None).decode()
        except OSError as error:
            fix = f"start the same {self.kind} again to have its run done again"
            raise UsageError(f"{where}: cannot be read: {error.strerror}; {fix}") from None
        except ValueError:
            raise UsageError(f"{where}: is damaged, it is no text; remove it to have its run done again") from None
        rows = list(csv.reader(io.StringIO(text)))
        if not rows or tuple(rows[0]) != SERIES or any(len(row) != len(SERIES) for row in rows):
            raise UsageError(f"{where}: is damaged; its columns should be {', '.join(SERIES)}")
        try:
            table = np.array(rows[1:], dtype=np.float64).reshape(-1, len(SERIES))
        except ValueError:
            raise UsageError(f"{where}: is damaged; it holds something that is no number") from None
        columns = {name: np.ascontiguousarray(table[:, index]) for index, name in enumerate(SERIES)}
        return RunResult(spec=result.spec, metrics=result.metrics, series=columns, facts=result.facts)

    def _lines(self) -> Iterator[tuple[int, RunResult]]:
        """Repeat and result of each whole line."""
        where = os.path.join(self.path, _RESULTS)
        try:
            data = read_regular(where, None)
        except OSError as error:
            raise UsageError(f"{where}: cannot be read: {error.strerror}; put back the file that was there") from None
        seen: dict[tuple[str, int], int] = {}
        for number, line in enumerate(data.split(b"\n")[:-1], start=1):  # behind the last newline: empty, or torn
            repeat, result = _parse_line(line, f"{where}, line {number}")
            first = seen.setdefault((result.spec.key(), repeat), number)
            if first != number:
                raise UsageError(f"{where}, line {number}: is the run of line {first} once more; remove one of them")
            yield repeat, result

    @classmethod
    def _make(cls, path: str, record: dict[str, Any], costs: dict[str, Any] | None) -> Self | None:
        """A new folder at ``path``, all of it or nothing, by way of a sibling; None if somebody else was first."""
        target = os.path.realpath(path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        sibling = f"{target}.{os.getpid()}-{os.urandom(4).hex()}.part"
        os.mkdir(sibling)
        lock = -1
        try:
            lock = _lock(sibling, path)  # goes with the folder through the rename: nobody else can be first
            _write_file(os.path.join(sibling, _RUN), _json(record))
            _write_file(os.path.join(sibling, _COSTS), _json(costs))
            _write_file(os.path.join(sibling, _RESULTS), b"")
            os.mkdir(os.path.join(sibling, _SERIES))
            os.fsync(lock)
            os.rename(sibling, target)
            _sync_folder(os.path.dirname(target))
        except BaseException as error:
            _remove_ours(sibling)
            with contextlib.suppress(OSError):
                os.rmdir(sibling)
            if lock >= 0:
                os.close(lock)
            if isinstance(error, OSError) and error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
                return None
            raise
        return cls(path, record, costs, lock)

    @classmethod
    def _take(cls, path: str, record: dict[str, Any], costs: dict[str, Any] | None, *, force: bool) -> Self:
        """The folder that exists at ``path``, if it is one of ours; emptied first when it may and must be."""
        if not os.path.isdir(path):
            raise UsageError(f"{path}: exists and is no folder; name another path")
        try:
            cls.read(path)
        except UsageError as error:
            raise UsageError(
                f"{path}: exists and cannot be used: {_cause(error, path)}; nothing was removed; "
                "name another path with --out, or remove the folder yourself"
            ) from None
        lock = _lock(path, path)
        try:
            there = cls.read(path)  # once more: it may have been replaced before we had the lock
            if not force:
                _check_same(path, there, record, costs)
                return cls(path, there.record, there.costs, lock)
            # Results first, the settings they belong to last: killed in between, it is an experiment without results.
            _remove_ours(path, but=(_RUN, _COSTS))
            _replace_file(os.path.join(path, _RESULTS), b"")
            os.makedirs(os.path.join(path, _SERIES), exist_ok=True)
            _replace_file(os.path.join(path, _COSTS), _json(costs))
            _replace_file(os.path.join(path, _RUN), _json(record))
            _sync_folder(path)
        except BaseException:
            os.close(lock)
            raise
        return cls(path, record, costs, lock)

    def _begin_writing(self) -> None:
        """Check what is there, cut off a torn line, and open for appending; the lock is held.

        A line without its series goes too, so that its run is done again: no table could be made of it.
        """
        there = [(result.spec.key(), repeat) for repeat, result in self._lines()]
        kept = [os.path.isfile(os.path.join(self.path, _SERIES, f"{key}-{repeat}.csv")) for key, repeat in there]
        self._done = {run for run, has_series in zip(there, kept, strict=True) if has_series}
        os.makedirs(os.path.join(self.path, _SERIES), exist_ok=True)
        path = os.path.join(self.path, _RESULTS)
        if not all(kept):
            lines = Path(path).read_bytes().split(b"\n")[:-1]
            whole_lines = (line + b"\n" for line, has_series in zip(lines, kept, strict=True) if has_series)
            _replace_file(path, b"".join(whole_lines))
            _sync_folder(self.path)
        whole = Path(path).read_bytes().rfind(b"\n") + 1
        self._stream = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        os.ftruncate(self._stream, whole)
        os.fsync(self._stream)

    def _write_series(self, name: str, columns: list[list[float]]) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(SERIES)
        writer.writerows(zip(*columns, strict=True))
        folder = os.path.join(self.path, _SERIES)
        _replace_file(os.path.join(folder, name), text.getvalue().encode())
        _sync_folder(folder)


def _parse_line(line: bytes, where: str) -> tuple[int, RunResult]:
    """Repeat and result of a line of results.jsonl.

    Raises:
        UsageError: it is damaged; begins with ``where``.
    """
    try:
        values = json.loads(line)
        repeat, metrics = values["repeat"], values["metrics"]
        result = RunResult.from_dict(values)
        key = result.spec.key()
        whole = (
            isinstance(repeat, int)
            and not isinstance(repeat, bool)
            and repeat >= 0
            and isinstance(values.get("facts"), dict)
            and set(metrics) <= set(METRICS)
            and all(value is None or type(value) in {int, float} for value in metrics.values())
            and values["key"] == key
        )
    except (LabError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        whole, repeat, result = False, 0, None
    if not whole or result is None:
        raise UsageError(f"{where}: is damaged; remove that line to have its run done again")
    return repeat, result


def _check_same(path: str, there: RunDirectory, record: dict[str, Any], costs: dict[str, Any] | None) -> None:
    """Raise unless ``there`` is the experiment that ``record`` and ``costs`` describe.

    Raises:
        UsageError: it is another one; names the first difference.
    """
    differs = difference(there.record, record, there.costs, costs)
    if differs:
        raise UsageError(f"{path}: holds another experiment ({differs}); give --force to replace it, or another path")


def _cause(error: UsageError, path: str) -> str:
    """What ``error`` of reading ``path`` says, without the path and what it advises to a reader."""
    return str(error).removeprefix(path).lstrip(":/ ").partition("; ")[0]


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` as they come back from JSON: tuples are lists."""
    plain: dict[str, Any] = json.loads(json.dumps(values, allow_nan=False))
    return plain


def _json(values: dict[str, Any] | None) -> bytes:
    return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode()


def _read_object(path: str, *, or_null: bool = False) -> Any:
    """The JSON object in a file.

    Raises:
        UsageError: it cannot be read or is something else.
    """
    try:
        values = json.loads(read_regular(path))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; put back the file that was there") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is no JSON: {str(error)[:80]}") from None
    if not isinstance(values, dict) and not (or_null and values is None):
        raise UsageError(f"{path}: is no JSON object; is this a run directory?")
    return values


def _is_free(path: str) -> bool:
    """Whether nothing is at ``path``, or an empty folder."""
    return not os.path.lexists(path) or (os.path.isdir(path) and not os.listdir(path))


def _lock(folder: str, shown: str) -> int:
    """A descriptor of ``folder`` with its lock.

    Raises:
        UsageError: another process has it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UsageError(f"{shown}: another process is writing to it; wait for it, or name another path") from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _remove_ours(folder: str, but: tuple[str, ...] = ()) -> None:
    """Remove from ``folder`` what a run directory consists of, and nothing else; what is a link is not followed."""
    series = os.path.join(folder, _SERIES)
    if os.path.isdir(series) and not os.path.islink(series):
        for name in os.listdir(series):
            if _SERIES_FILE.fullmatch(name.removesuffix(".part")):
                os.unlink(os.path.join(series, name))
        with contextlib.suppress(OSError):  # something of somebody else is in it
            os.rmdir(series)
    for name in {_RUN, _COSTS, _RESULTS} - set(but):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, name))


def _write_file(path: str, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        _write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_file(path: str, data: bytes) -> None:
    """All of ``data`` at ``path``, or what was there before. The lock of the folder makes the sibling's name ours."""
    _write_file(f"{path}.part", data)
    os.replace(f"{path}.part", path)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _sync_folder(path: str) -> None:
    """Make renames in a folder last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
