"""The shape of a free list: runs of Reported and unreported blocks."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["shape_of"]


def shape_of(reported: Iterable[bool]) -> str:
    """Runs of a list as letters: U unreported, R reported; "URU" is the idle shape of D5."""
    shape = ""
    for flag in reported:
        letter = "R" if flag else "U"
        if not shape.endswith(letter):
            shape += letter
    return shape
