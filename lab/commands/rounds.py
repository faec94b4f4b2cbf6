"""``--rounds``: how often a measurement is repeated."""

from __future__ import annotations

from common.options import Option
from lab.commands.flags import whole_number

__all__ = ["read_rounds"]


def read_rounds(text: str | None, *, default: int, most: int) -> int:
    """The number of rounds that the flag names, ``default`` if it was not given.

    Raises:
        UsageError: no number of 1 to ``most``.
    """
    if text is None:
        return default
    described = Option("rounds", "interleaved rounds", default_text=str(default), **whole_number(1, most))
    value: int = described.read(text, "--rounds")
    return value
