"""Sizes and durations as people write them: ``512MiB``, ``100ms``. Exact: nothing is rounded while parsing."""

from __future__ import annotations

import re

from common.errors import UsageError

__all__ = ["format_size", "parse_duration_ns", "parse_seconds", "parse_size"]

_QUANTITY = re.compile(r"([0-9]{1,20})(?:\.([0-9]{1,12}))?\s*([A-Za-z]*)")
_SIZE_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_DURATION_UNITS = {
    "ns": 1,
    "us": 1_000,
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60 * 1_000_000_000,
    "h": 3600 * 1_000_000_000,
}
_LARGEST = (1 << 63) - 1  # what a signed 64-bit word of a segment or a message holds


def _scaled(text: str, units: dict[str, int]) -> int | None:
    """``text`` in base units; None when it is no quantity, has another unit, or is no whole number of base units."""
    match = _QUANTITY.fullmatch(text.strip())
    if match is None or match[3] not in units:
        return None
    whole, fraction, unit = match[1], match[2] or "", match[3]
    scaled, rest = divmod(int(whole + fraction) * units[unit], 10 ** len(fraction))
    return None if rest or scaled > _LARGEST else scaled


def parse_size(text: str) -> int:
    """Bytes in ``text``: a number of bytes, or one with B, KiB, MiB, GiB or TiB.

    Raises:
        UsageError: it is neither, or comes to a fraction of a byte.
    """
    size = _scaled(text, _SIZE_UNITS)
    if size is None:
        raise UsageError(f"size: {text!r}; allowed are bytes or a number with KiB, MiB, GiB or TiB, such as 512MiB")
    return size


def format_size(size_bytes: int) -> str:
    """``size_bytes`` for people, in the largest unit that fits, rounded to a tenth: ``512MiB``, ``1.5GiB``, ``0B``."""
    value, sign = float(abs(size_bytes)), "-" if size_bytes < 0 else ""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if round(value, 1) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{sign}{round(value, 1):g}{unit}"


def parse_duration_ns(text: str) -> int:
    """Nanoseconds in ``text``: a number with ns, us, ms, s, m (minutes) or h, or a plain ``0``.

    Raises:
        UsageError: it is neither (a plain number says no unit), or comes to a fraction of a nanosecond.
    """
    duration_ns = 0 if text.strip() == "0" else _scaled(text, _DURATION_UNITS)
    if duration_ns is None:
        raise UsageError(f"duration: {text!r}; allowed is 0 or a number with ns, us, ms, s, m or h, such as 100ms")
    return duration_ns


def parse_seconds(text: str) -> float:
    """Seconds in ``text``: a plain number of seconds, or a duration with a unit.

    Raises:
        UsageError: it is neither.
    """
    plain = _QUANTITY.fullmatch(text.strip())
    if plain is not None and not plain[3]:
        return float(text)
    return parse_duration_ns(text) / 1e9
