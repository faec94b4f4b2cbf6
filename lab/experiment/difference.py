"""In what two experiments differ, in words."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["difference"]

_MOST_TEXT = 60


def difference(
    there: dict[str, Any], here: dict[str, Any], costs_there: dict[str, Any] | None, costs_here: dict[str, Any] | None
) -> str:
    """The first thing in which the experiments of two run.json and costs.json differ; empty if they are the same."""
    if there["kind"] != here["kind"]:
        return f"a {there['kind']}"
    if there["settings"] != here["settings"]:
        path, old, new = _first_difference(there["settings"], here["settings"], "")
        return f"{path or 'settings'}: {old} there, {new} here"
    return "other costs" if costs_there != costs_here else ""


def _first_difference(old: Any, new: Any, path: str) -> tuple[str, str, str]:
    """Path and both values, as short JSON, of the first difference between two plain values that do differ.

    Of lists of different lengths the whole is the difference: what was taken from the middle moves all behind it.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            if key not in old or key not in new or old[key] != new[key]:
                return _first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            if one != other:
                return _first_difference(one, other, f"{path}[{index}]")
    if isinstance(old, list) and isinstance(new, list) and _is_long(old) and _is_long(new):
        return path, f"{len(old)} entries", str(len(new))
    return path, _short(old), _short(new)


def _is_long(value: Any) -> bool:
    return len(json.dumps(value)) > _MOST_TEXT


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _MOST_TEXT else f"{text[: _MOST_TEXT - 3]}..."
