"""What every page of a guest is at one moment, from its page records and its resident map.

The two arrays are copied one after the other while the guest runs, so a page can change in between; a class is a
picture of a moment, not an account. Accounts come from ``ZoneStatistics``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from common import layout
from common.geometry import PAGE_BYTES, TOP_ORDER

__all__ = ["OUTSIDE", "PageClass", "PageGrid", "classify", "grid"]

_CHUNK_PAGES = 1 << 20  # bounds the temporary arrays; a multiple of the largest block, so none is cut

OUTSIDE = 255
"""Cell of a grid that lies behind the last page."""


class PageClass(IntEnum):
    """State of one page; free pages are told apart by whether the host still holds memory for them."""

    NEVER_TOUCHED = 0  # free, no memory behind it and none was ever given back
    FREE_RESIDENT = 1  # free, yet it costs the host a page, whatever its flag says (S12)
    REPORTED_UNTOUCHED = 2  # free and flagged Reported, but it never had memory behind it
    REPORTED_RETURNED = 3  # free, flagged Reported, and its memory was given back
    FREE_RETURNED = 4  # free and given back, but a split or merge dropped the flag (S7)
    ALLOCATED = 5
    IN_FLIGHT = 6
    PER_CPU = 7
    UNCLEAR = 8  # inside no block: the copy was torn


@dataclass(frozen=True)
class PageGrid:
    """Page classes in address order, down each column and then on to the next; 1024 columns of 256 cells at most.

    ``cells`` is u8 of shape (rows, columns); a cell shows the commonest class of its ``pages_per_cell`` pages.
    ``pages`` counts pages by class, before any thinning, so it is exact for every size of guest.
    """

    cells: npt.NDArray[np.uint8]
    pages_per_cell: int
    pages_per_column: int
    n_pages: int
    pages: tuple[int, ...]

    @property
    def column_bytes(self) -> int:
        """Guest memory shown in one column."""
        return self.pages_per_column * PAGE_BYTES


def classify(states: npt.NDArray[np.uint16], resident: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """``PageClass`` of every page, u8 of the shape of ``states``.

    A page inside a block has the class of the block's head, except that free pages are told apart page by page by the
    resident map: one free block may be resident in part. A held block counts as a reported one.

    Raises:
        ValueError: the arrays differ in length.
    """
    if states.shape != resident.shape or states.ndim != 1:
        raise ValueError(f"page records {states.shape} and resident map {resident.shape} differ in shape")
    classes = np.empty(len(states), np.uint8)
    for start in range(0, len(states), _CHUNK_PAGES):
        chunk = slice(start, start + _CHUNK_PAGES)
        classes[chunk] = _classify_chunk(states[chunk], resident[chunk])
    return classes


def _classify_chunk(states: npt.NDArray[np.uint16], resident: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """``classify`` for pages of which the first is aligned to the largest block."""
    pfns = np.arange(len(states), dtype=np.int32)
    heads = np.maximum.accumulate(np.where((states & layout.KIND_MASK) != layout.INTERIOR, pfns, np.int32(-1)))
    # No head in front gives -1; the lookup then reads the last page, and `covered` throws that away.
    head_states = states[heads]
    orders = np.minimum(head_states & layout.ORDER_MASK, TOP_ORDER).astype(np.int32)
    covered = (heads >= 0) & (pfns - heads < np.left_shift(np.int32(1), orders))
    head_kinds = head_states & layout.KIND_MASK

    by_flag_and_residency = np.zeros((2, 4), np.uint8)
    by_flag_and_residency[:, layout.RESIDENT] = PageClass.FREE_RESIDENT
    by_flag_and_residency[:, layout.INSTALLED] = PageClass.FREE_RESIDENT
    by_flag_and_residency[:, layout.NEVER_TOUCHED] = PageClass.NEVER_TOUCHED, PageClass.REPORTED_UNTOUCHED
    by_flag_and_residency[:, layout.RETURNED] = PageClass.FREE_RETURNED, PageClass.REPORTED_RETURNED
    held = head_kinds == layout.HELD  # reported and kept: no flag, and on no free list
    flagged = (held | ((head_states & layout.REPORTED) != 0)).astype(np.uint8)
    free_class = by_flag_and_residency[flagged, np.minimum(resident, 3)]
    classes = np.full(len(states), PageClass.UNCLEAR, np.uint8)
    for kind, page_class in (
        (layout.ALLOCATED, PageClass.ALLOCATED),
        (layout.IN_FLIGHT, PageClass.IN_FLIGHT),
        (layout.ON_PCP, PageClass.PER_CPU),
    ):
        classes[covered & (head_kinds == kind)] = page_class
    is_free = covered & (held | (head_kinds == layout.FREE))
    classes[is_free] = free_class[is_free]
    return classes


def grid(classes: npt.NDArray[np.uint8], *, max_columns: int = 1024, max_rows: int = 256) -> PageGrid:
    """Fold ``classes`` into columns for drawing; see ``PageGrid``. Both limits are powers of two."""
    n_pages = len(classes)
    pages_per_column = 1
    while pages_per_column * max_columns < n_pages:
        pages_per_column *= 2
    pages_per_column = max(pages_per_column, 64)  # fewer rows than that make a strip too thin to read
    pages_per_cell = max(1, pages_per_column // max_rows)
    columns = max(1, -(-n_pages // pages_per_column))
    padded = np.full(columns * pages_per_column, OUTSIDE, np.uint8)
    padded[:n_pages] = classes
    if pages_per_cell > 1:
        padded = _commonest(padded.reshape(-1, pages_per_cell))
    cells = padded.reshape(columns, -1).T.copy()
    counts = np.bincount(classes, minlength=len(PageClass))
    return PageGrid(cells, pages_per_cell, pages_per_column, n_pages, tuple(int(count) for count in counts))


def _commonest(groups: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The commonest value of each row; a tie goes to the lower class, ``OUTSIDE`` only wins alone."""
    values = np.array([*PageClass, OUTSIDE], np.uint8)
    counts = np.stack([(groups == value).sum(axis=1) for value in values])
    counts[-1] = np.where(counts[:-1].sum(axis=0) > 0, 0, 1)
    picked: npt.NDArray[np.uint8] = values[counts.argmax(axis=0)]
    return picked
