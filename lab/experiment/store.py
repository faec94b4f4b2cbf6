"""Where the results of a comparison go: a run directory, or nowhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lab.experiment.metrics import RunResult

__all__ = ["Store", "counting", "open_store"]


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


def counting(store: Store) -> tuple[Store, set[tuple[str, int]]]:
    """The same store, and key and repeat of each result that is in it, also of those that it gets later."""
    ended = set(store.there)

    def append(result: RunResult, repeat: int) -> None:
        store.append(result, repeat)
        ended.add((result.spec.key(), repeat))

    return Store(store.environment, store.there, append), ended


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
