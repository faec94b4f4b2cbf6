"""Where the results of a comparison go: a run directory, or nowhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from common.errors import UsageError
from common.output import STDOUT
from lab.experiment.metrics import RunResult

__all__ = ["Store", "check_not_inside", "open_store"]

# What an experiment keeps beside its series; a sweep's picture is one of them.
_OWN_FILES = ("run.json", "costs.json", "results.jsonl", "pareto.png")
_SERIES = "series"


@dataclass(frozen=True)
class Store:
    """Keeps results while a comparison runs.

    Attributes:
        environment: machine and versions, as plain JSON values.
        there: results of an interrupted comparison of the same settings, by key of the specification and repeat.
        append: keeps one more.
    """

    environment: dict[str, Any]
    there: dict[tuple[str, int], RunResult]
    append: Callable[[RunResult, int], None]


def check_not_inside(flag: str, path: str, folder: str) -> None:
    """Find out before a run whether another output would replace what the experiment itself keeps in ``folder``.

    Args:
        flag: the flag of ``path``, a file; empty and ``-`` are none.

    Raises:
        UsageError: it is one of the experiment's own files, links followed, or among its series.
    """
    if not path or path == STDOUT or not folder:
        return
    target, kept = os.path.realpath(path), os.path.realpath(folder)
    own = {os.path.realpath(os.path.join(kept, name)) for name in _OWN_FILES}
    own |= {f"{name}.part" for name in own}
    series = os.path.realpath(os.path.join(kept, _SERIES))
    if target in own or os.path.commonpath((target, series)) == series:
        raise UsageError(f"{flag}: {path!r} belongs to what --out keeps in {folder}; name another path")


@contextlib.contextmanager
def open_store(
    path: str,
    *,
    kind: str,
    settings: dict[str, Any],
    command: list[str],
    costs: dict[str, Any] | None,
    force: bool,
) -> Iterator[Store]:
    """A run directory at ``path``; nothing is kept when that is empty.

    Raises:
        UsageError: something else is at ``path``. MachineError: it cannot be written.
    """
    if not path:
        from lab.experiment.environment import environment

        yield Store(environment(), {}, lambda _result, _repeat: None)
        return
    from lab.experiment.directory import RunDirectory

    with RunDirectory.open(path, kind=kind, settings=settings, costs=costs, force=force, command=command) as directory:
        there = {(kept.result.spec.key(), kept.repeat): kept.result for kept in directory.results()}
        yield Store(directory.record["environment"], there, directory.append)
