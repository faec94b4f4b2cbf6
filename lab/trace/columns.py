"""Events in columns: one NumPy array a field, rows in the order of time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lab.trace.events import NO_MIGRATETYPE

__all__ = ["DTYPES", "NO_TEXT", "Columns"]

NO_TEXT = -1

# t_ns: nanoseconds of the trace's clock. pfn, order, migratetype and gfp are 0, 0, -1 and 0 where an event has none.
DTYPES: dict[str, Any] = {
    "t_ns": np.int64,
    "cpu": np.int16,
    "pid": np.int32,
    "event": np.uint8,
    "pfn": np.uint32,
    "order": np.uint8,
    "migratetype": np.int8,
    "gfp": np.uint32,
    "flags": np.uint8,
}
_WITH_PLACE = {**DTYPES, "line": np.int64, "text_id": np.int32}


@dataclass
class Columns:
    """Some events.

    Attributes:
        arrays: by name: those of ``DTYPES``, ``line`` (int64, the line in the source that an event comes from) and
            ``text_id`` (int32, index into ``texts``, -1 for none). All of the same length.
        texts: what the text events said, word for word.
    """

    arrays: dict[str, npt.NDArray[Any]]
    texts: list[str] = field(default_factory=list)

    @classmethod
    def empty(cls, rows: int = 0) -> Columns:
        """``rows`` rows of nothing."""
        arrays: dict[str, npt.NDArray[Any]] = {name: np.zeros(rows, dtype) for name, dtype in _WITH_PLACE.items()}
        arrays["text_id"][:] = NO_TEXT
        arrays["migratetype"][:] = NO_MIGRATETYPE
        return cls(arrays)

    def __len__(self) -> int:
        return len(self.arrays["t_ns"])

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self.arrays[name]

    def take(self, rows: Any) -> Columns:
        """The rows of a slice or index array. Views of these where a slice allows it."""
        return Columns({name: array[rows] for name, array in self.arrays.items()}, self.texts)

    def owned(self) -> Columns:
        """A copy that keeps nothing but its own rows alive."""
        ids = self.arrays["text_id"]
        used = np.unique(ids[ids != NO_TEXT])
        copied = {name: array.copy() for name, array in self.arrays.items()}
        copied["text_id"] = np.where(ids == NO_TEXT, NO_TEXT, np.searchsorted(used, ids)).astype(np.int32)
        return Columns(copied, [self.texts[number] for number in used])

    @classmethod
    def joined(cls, parts: list[Columns]) -> Columns:
        """One after the other."""
        if len(parts) == 1:
            return parts[0]
        arrays = {
            name: np.concatenate([part[name] for part in parts] or [np.empty(0, dtype)])
            for name, dtype in _WITH_PLACE.items()
            if name != "text_id"
        }
        texts: list[str] = []
        ids = [np.empty(0, np.int32)]
        for part in parts:
            own = part["text_id"]
            ids.append(np.where(own == NO_TEXT, NO_TEXT, own + len(texts)).astype(np.int32))
            texts += part.texts
        arrays["text_id"] = np.concatenate(ids)
        return cls(arrays, texts)

    def text(self, row: int) -> str | None:
        """What the text event in ``row`` said, None for others."""
        number = int(self.arrays["text_id"][row])
        return None if number == NO_TEXT else self.texts[number]
