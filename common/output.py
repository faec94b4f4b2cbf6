"""Results on their way to a file or standard output. Nothing is overwritten unasked, nothing is left half written."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from common.errors import MachineError, UsageError
from common.parts import Part, is_stream, part_name
from common.refusals import fix_of

__all__ = ["STDOUT", "check_distinct", "check_one_stream", "check_output", "write_bytes", "write_json"]

STDOUT = "-"


def check_output(path: str, *, force: bool, make_folder: bool = False, stream: bool = True) -> None:
    """Find out before a run what would spoil its result after it.

    Args:
        path: a file, or ``-`` for standard output, which is fine unless it is closed.
        force: whether a file that exists may be replaced.
        make_folder: create a missing folder (for a default path, which nobody typed) instead of refusing.
        stream: whether a device, pipe or socket will do, which takes bytes in their order.

    Raises:
        UsageError: the path cannot be written to; names the fix.
    """
    if path == STDOUT:
        if sys.stdout is None:
            raise UsageError("standard output is closed; name a file instead of -")
        return
    folder = os.path.dirname(os.path.realpath(path))
    if make_folder:
        with contextlib.suppress(OSError):  # told below, in the words of the user's path
            os.makedirs(folder, exist_ok=True)
    if not path or os.path.isdir(path):
        raise UsageError(f"{path!r}: is not a file; name a file, or - for standard output")
    if not os.path.isdir(folder):
        raise UsageError(f"{path}: there is no folder {folder}; make it first: mkdir -p {folder}")
    if is_stream(path):
        if not stream:
            raise UsageError(f"{path}: is a device, a pipe or a socket; name a file")
        if not os.access(path, os.W_OK):
            raise UsageError(f"{path}: may not be written to; name another path")
        return
    if os.path.exists(path) and not force:
        raise UsageError(f"{path}: exists; give --force to overwrite it, or another path")
    sibling = part_name(os.path.realpath(path))
    try:  # Really: access(2) grants root a file in /proc, and knows neither quotas nor the length of a name.
        os.close(os.open(sibling, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        with contextlib.suppress(FileNotFoundError):  # somebody who writes there took it for a dead one's
            os.unlink(sibling)
    except OSError as error:
        raise UsageError(f"{path}: cannot write in {folder}: {error.strerror}; name another path") from None


def check_distinct(paths: dict[str, str]) -> None:
    """Find out before a run whether two results would go to the same file. Empty paths and ``-`` are none.

    Args:
        paths: path by flag.

    Raises:
        UsageError: two are the same file, links followed; names both flags.
    """
    flags: dict[str, str] = {}
    for flag, path in paths.items():
        if not path or path == STDOUT:
            continue
        other = flags.setdefault(os.path.realpath(path), flag)
        if other != flag:
            raise UsageError(f"{flag}: {path!r} is the file of {other} too; name another path")


def check_one_stream(paths: Sequence[str]) -> None:
    """Refuse to read standard input, ``-``, as two things.

    Raises:
        UsageError: it is named more than once.
    """
    if sum(path == STDOUT for path in paths) > 1:
        raise UsageError("-: standard input can be read once only; name a file for the other")


def write_json(result: Any, path: str, *, force: bool) -> None:
    """Write ``result`` (text that is JSON already, or an object) to ``path``, or to standard output if it is ``-``.

    Raises:
        UsageError: as ``check_output``. MachineError: as ``write_bytes``.
    """
    text = result if isinstance(result, str) else json.dumps(result, indent=2, allow_nan=False)
    text = text.rstrip("\n") + "\n"
    if path != STDOUT:
        write_bytes(text.encode(), path, force=force)
        return
    check_output(path, force=force)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # as in write_bytes
    except OSError as error:
        raise MachineError(f"standard output: {error.strerror}; free some space or name a file") from error


def write_bytes(data: bytes, path: str, *, force: bool) -> None:
    """Write ``data`` to the file ``path``: all of it or nothing, see ``common.parts``.

    Raises:
        UsageError: as ``check_output``. MachineError: the write failed (space, quota, permissions).
    """
    check_output(path, force=force)
    try:
        if is_stream(path):  # /dev/null, a FIFO: a rename would replace the device itself
            with open(path, "wb") as stream:
                stream.write(data)
        else:
            with Part(path) as part:  # through a link: replaces what it points at, keeps the link
                part.stream.write(data)
                part.finish()
    except BrokenPipeError:
        raise  # the reader went away, which is not this machine's fault
    except OSError as error:
        fix = fix_of(error) or "free some space"
        raise MachineError(f"{path}: {error.strerror}; {fix}, or name another path") from error
