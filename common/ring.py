"""The newest rows of a record that goes on: an array of a fixed size, so that a process weighs the same all along."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["Ring"]


class Ring:
    """The last ``length`` rows of ``width`` integers. For one writer; a reader beside it may miss the newest.

    Its memory is touched when it is made: what fills up slowly would look like a leak for hours.
    """

    def __init__(self, length: int, width: int) -> None:
        self._rows: npt.NDArray[np.int64] = np.full((length, width), -1, dtype=np.int64)
        self._count = 0

    def append(self, *values: int) -> None:
        """Take a row; the oldest goes where there is no room."""
        self._rows[self._count % len(self._rows)] = values
        self._count += 1

    def __len__(self) -> int:
        return min(self._count, len(self._rows))

    def rows(self) -> list[list[int]]:
        """From the oldest to the newest."""
        oldest = self._count % len(self._rows) if self._count > len(self._rows) else 0
        found: list[list[int]] = np.roll(self._rows, -oldest, axis=0)[: len(self)].tolist()
        return found
