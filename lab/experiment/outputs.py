"""What is written beside an experiment may not replace the experiment. Import-light: flags are checked with it."""

from __future__ import annotations

import os

from common.errors import UsageError
from common.output import STDOUT

__all__ = ["check_not_inside", "is_kept"]

# What an experiment keeps beside its series; a sweep's picture is one of them.
_OWN_FILES = ("run.json", "costs.json", "results.jsonl", "pareto.png")
_SERIES = "series"


def check_not_inside(flag: str, path: str, folder: str) -> None:
    """Find out before a run whether another output would replace what the experiment itself keeps in ``folder``.

    Args:
        flag: the flag of ``path``, a file; empty and ``-`` are none.

    Raises:
        UsageError: it is one of the experiment's own files, links followed, or among its series.
    """
    if path and path != STDOUT and folder and is_kept(path, folder):
        raise UsageError(f"{flag}: {path!r} belongs to what --out keeps in {folder}; name another path")


def is_kept(path: str, folder: str) -> bool:
    """Whether ``path`` is one of the files of the experiment in ``folder``, or among its series; links are followed."""
    target, kept = os.path.realpath(path), os.path.realpath(folder)
    own = {os.path.realpath(os.path.join(kept, name)) for name in _OWN_FILES}
    own |= {f"{name}.part" for name in own}
    series = os.path.realpath(os.path.join(kept, _SERIES))
    return target in own or os.path.commonpath((target, series)) == series
