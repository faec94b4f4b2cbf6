"""Grids: a TOML file with lists of settings becomes one specification for each combination.

    [grid]
    policy = ["boundary", "rotate"]
    delay = ["100ms", "2s"]
    seed = [1, 2, 3]

    [fixed]
    memory = "512MiB"

Keys, units and bounds are those of the flags; what is in neither table has its default.
"""

from __future__ import annotations

import difflib
import itertools
import math
import tomllib
from dataclasses import dataclass, fields
from typing import Any

from common.errors import UsageError
from common.files import read_regular
from common.options import short_repr
from common.settings import POLICIES, WORKLOADS
from lab.commands.flags import RUN_OPTIONS, VIRTUAL_ONLY
from lab.experiment.spec import Mode, RunSpec

__all__ = ["MOST_RUNS", "Grid", "load_grid", "parse_grid"]

MOST_RUNS = 100_000  # a directory of so many series is still one that a file system and a person can handle
_TABLES = ("grid", "fixed")
# Keys of a grid file by the field of the specification that they set, in the order of the specification.
_KEYS = {
    setting.name: RUN_OPTIONS[setting.name].key if setting.name in RUN_OPTIONS else setting.name
    for setting in fields(RunSpec)
    if setting.name in RUN_OPTIONS or setting.name in {"policy", "workload"}
}
_FIELDS = {key: name for name, key in _KEYS.items()}


@dataclass(frozen=True)
class Grid:
    """What varies and what does not, by field of ``RunSpec`` and in its order, in its units.

    Attributes:
        varied: at least one value each, none twice.
    """

    mode: Mode
    varied: dict[str, list[Any]]
    fixed: dict[str, Any]

    def __len__(self) -> int:
        return math.prod(len(values) for values in self.varied.values())

    def specs(self) -> list[RunSpec]:
        """One specification for each combination; the last field of ``varied`` changes fastest."""
        return [
            RunSpec(mode=self.mode, **self.fixed, **dict(zip(self.varied, values, strict=True)))
            for values in itertools.product(*self.varied.values())
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON: what has to be the same for a sweep to go on."""
        return {"mode": self.mode, "grid": self.varied, "fixed": self.fixed}


def load_grid(path: str, mode: Mode = "virtual") -> Grid:
    """The grid in a TOML file.

    Raises:
        UsageError: it cannot be read, is no grid, or comes to more than ``MOST_RUNS`` runs; names file, key and fix.
    """
    try:
        document = tomllib.loads(read_regular(path).decode())
    except OSError as error:
        raise UsageError(f"--grid: {path!r}; cannot be read: {error.strerror}; name a TOML file") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise UsageError(f"--grid: {path!r}; is not TOML: {error}") from None
    except RecursionError:
        raise UsageError(f"--grid: {path!r}; is nested too deeply; allowed are lists and plain values") from None
    return parse_grid(document, path, mode)


def parse_grid(document: dict[str, Any], where: str, mode: Mode = "virtual") -> Grid:
    """The grid that a TOML document describes.

    Args:
        where: the file's name for messages.

    Raises:
        UsageError: as ``load_grid``.
    """
    for name, table in document.items():
        if name not in _TABLES or not isinstance(table, dict):
            raise UsageError(f"{name}: no table of {where}; allowed are [grid] and [fixed]")
    runs = math.prod(len(raws) for raws in document.get("grid", {}).values() if isinstance(raws, list) and raws)
    if runs > MOST_RUNS:  # before the values are read, which could be millions
        raise UsageError(f"{where}: comes to {runs:,} runs; allowed are {MOST_RUNS:,}; split it")
    varied: dict[str, list[Any]] = {}
    for key, raws in document.get("grid", {}).items():
        place = f"{key} in [grid] of {where}"
        name = _field(key, place)
        if not isinstance(raws, list) or not raws:
            raise UsageError(f"{place}: {short_repr(raws)}; allowed is a list of values; a single one goes to [fixed]")
        values = [_value(name, raw, place, mode) for raw in raws]
        seen: set[Any] = set()
        for raw, value in zip(raws, values, strict=True):
            if value in seen:
                raise UsageError(f"{place}: {short_repr(raw)} is given twice; allowed is once")
            seen.add(value)
        if name in varied:
            raise UsageError(f"{place}: is given twice; allowed is once")
        varied[name] = values
    if not varied:
        raise UsageError(f"{where}: [grid] is missing or empty; allowed is a list for at least one setting")
    fixed: dict[str, Any] = {}
    for key, raw in document.get("fixed", {}).items():
        place = f"{key} in [fixed] of {where}"
        name = _field(key, place)
        if name in fixed or name in varied:
            raise UsageError(f"{place}: is given twice; allowed is once, in [grid] or in [fixed]")
        if isinstance(raw, list):
            raise UsageError(f"{place}: {short_repr(raw)}; allowed is a single value; a list goes to [grid]")
        fixed[name] = _value(name, raw, place, mode)
    return Grid(mode, _in_order(varied), _in_order(fixed))


def _field(key: str, place: str) -> str:
    """The field of ``RunSpec`` that a key sets."""
    name = _FIELDS.get(key.replace("-", "_"))
    if name is None:
        nearest = difflib.get_close_matches(key, _FIELDS, n=1, cutoff=0.0)[0]
        raise UsageError(f"{place}: unknown key; the nearest allowed key is {nearest}")
    return name


def _value(name: str, raw: Any, place: str, mode: Mode) -> Any:
    if name in RUN_OPTIONS:
        value = RUN_OPTIONS[name].read(raw, place)
        return round(value * 1e9) if name == "duration_ns" else value  # the one that is described in seconds
    if name == "policy" and raw in VIRTUAL_ONLY and mode == "live":
        raise UsageError(f"{place}: {raw!r} exists in virtual time only; leave --live away")
    allowed = {"policy": dict.fromkeys((*POLICIES, *VIRTUAL_ONLY)), "workload": dict.fromkeys(WORKLOADS)}[name]
    if not isinstance(raw, str) or raw not in allowed or raw == "none":
        names = ", ".join(known for known in allowed if known != "none")
        raise UsageError(f"{place}: {short_repr(raw)}; allowed is {names}")
    return raw


def _in_order(values: dict[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in _KEYS if name in values}
