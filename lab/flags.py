"""Command lines for our own programs, from values as their settings have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from common.options import Settings, option_of

__all__ = ["flags_of"]


def flags_of(cls: type[Settings], values: Mapping[str, Any]) -> tuple[str, ...]:
    """Flags that give the settings ``cls`` those of ``values`` that it has, by field name; None is left out."""
    flags: list[str] = []
    for setting in fields(cls):
        value = values.get(setting.name)
        if value is None:
            continue
        flag = option_of(setting).flag
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", _text(setting.name, value)]
    return tuple(flags)


def _text(name: str, value: float | str) -> str:
    """A value as its flag takes it: durations with their unit, numbers without an exponent."""
    if name.endswith("_ns"):
        return f"{value}ns"
    return f"{value:.9f}" if isinstance(value, float) else str(value)
