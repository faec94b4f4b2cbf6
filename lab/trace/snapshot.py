"""The free lists at one moment: ``/proc/kpageflags`` as it is, or a list of free blocks (``blocks.csv``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from common.errors import UsageError
from common.geometry import MAX_PAGES
from lab.trace.events import MAX_ORDER
from lab.trace.formats import open_input, pieces

__all__ = ["UNKNOWN_PAGES", "Snapshot", "free_heads", "read_snapshot"]

UNKNOWN_PAGES = -1
_HEADER = "pfn,order,reported,host_allocated_pages"
_COLUMNS = tuple(_HEADER.split(","))
_NEEDED = 2
_EXPECTED = f"a copy of /proc/kpageflags (8 bytes a page) or a table with the head {_HEADER}"
# include/uapi/linux/kernel-page-flags.h and its twin in include/linux: bits 27 to 31 and from 48 on have no name.
_BUDDY, _REPORTED = 10, 3  # PG_reported is PG_uptodate on a free block: include/linux/page-flags.h
_NAMELESS = np.uint64(0xFFFF_0000_F800_0000 & ~(1 << 63))
_ENTRY_BYTES = 8


@dataclass(frozen=True)
class Snapshot:
    """Free blocks, by pfn.

    Attributes:
        pfn: int64, heads, ascending. order: uint8. reported: bool.
        host_allocated_pages: int64, how many of a block's pages the host holds, ``UNKNOWN_PAGES`` where not told.
        n_pages: pages of the machine, 0 where the form does not tell.
    """

    name: str
    form: str
    pfn: npt.NDArray[np.int64]
    order: npt.NDArray[np.uint8]
    reported: npt.NDArray[np.bool_]
    host_allocated_pages: npt.NDArray[np.int64]
    n_pages: int

    @property
    def free_pages(self) -> int:
        """Pages on the free lists."""
        return int((np.int64(1) << self.order.astype(np.int64)).sum())

    def free_map(self, pages: int) -> npt.NDArray[np.bool_]:
        """Whether each of the first ``pages`` pages is free."""
        free: npt.NDArray[np.bool_] = np.zeros(pages, np.bool_)
        for pfn, order in zip(self.pfn.tolist(), self.order.tolist(), strict=True):
            free[pfn : pfn + (1 << order)] = True
        return free

    def as_dict(self) -> dict[str, Any]:
        """For a file's metadata and the JSON."""
        return {
            "name": self.name,
            "form": self.form,
            "pages": self.n_pages or None,
            "blocks": len(self.pfn),
            "free_pages": self.free_pages,
            "reported_pages": int((np.int64(1) << self.order[self.reported].astype(np.int64)).sum()),
        }


def read_snapshot(name: str) -> Snapshot:
    """The snapshot in the file ``name``, in either form, plain or packed.

    Raises:
        UsageError: it is in neither, cut off, or contradicts itself; names the file, the line or pfn, and what was
            expected.
    """
    stream: BinaryIO = open_input(name, _EXPECTED)
    try:
        _, parts = pieces(stream, name, binary=True, expected=_EXPECTED)
        first = next(parts)
        table = first.lstrip(b"\xef\xbb\xbf")[:4] == b"pfn,"
        whole = bytearray(first)
        for part in parts:
            whole += part
    finally:
        stream.close()
    return _from_table(name, whole.decode("utf-8-sig", "replace")) if table else _from_flags(name, whole)


def _from_flags(name: str, whole: bytearray) -> Snapshot:
    if len(whole) % _ENTRY_BYTES:
        raise UsageError(f"{name}: is {len(whole)} bytes, which is no multiple of {_ENTRY_BYTES}; expected {_EXPECTED}")
    if len(whole) > MAX_PAGES * _ENTRY_BYTES:
        raise UsageError(f"{name}: is of more than {MAX_PAGES} pages; expected {_EXPECTED}, of 1 TiB at most")
    flags = np.frombuffer(whole, "<u8")
    wrong = np.flatnonzero(flags & _NAMELESS)
    if wrong.size:
        pfn = int(wrong[0])
        raise UsageError(
            f"{name}: pfn {pfn}: has flags {int(flags[pfn]):#x}, which no kernel has; expected {_EXPECTED}"
        )
    buddy = (flags >> np.uint64(_BUDDY)) & np.uint64(1) != 0
    if not buddy.any():
        raise UsageError(f"{name}: has no free page (bit {_BUDDY}) among {flags.size}; expected {_EXPECTED}")
    heads, order = free_heads(buddy)
    reported = (flags[heads] >> np.uint64(_REPORTED)) & np.uint64(1) != 0
    unknown = np.full(heads.size, UNKNOWN_PAGES, np.int64)
    return Snapshot(name, "kpageflags", heads, order, reported, unknown, int(flags.size))


def free_heads(free: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Heads and orders of the free blocks: buddies that are both free have merged, up to the top order."""
    padded = np.zeros(-(-free.size >> MAX_ORDER) << MAX_ORDER, np.bool_)
    padded[: free.size] = free
    heads, orders = [], []
    whole = padded
    for order in range(MAX_ORDER + 1):
        above = whole[0::2] & whole[1::2] if order < MAX_ORDER else np.zeros(-(-whole.size // 2), np.bool_)
        alone = np.flatnonzero(whole & ~np.repeat(above, 2)[: whole.size])
        heads.append(alone.astype(np.int64) << order)
        orders.append(np.full(alone.size, order, np.uint8))
        whole = above
    pfn, order_of = np.concatenate(heads), np.concatenate(orders)
    by_pfn = np.argsort(pfn)
    return pfn[by_pfn], order_of[by_pfn]


def _from_table(name: str, text: str) -> Snapshot:
    lines = text.splitlines()
    given = tuple(lines[0].strip().split(","))
    if given != _COLUMNS[: len(given)] or len(given) < _NEEDED:
        raise UsageError(f"{name}: line 1: {lines[0][:80]!r}; expected the head {_HEADER}")
    if text[-1] != "\n":
        raise UsageError(
            f"{name}: line {len(lines)}: breaks off; expected {len(given)} numbers and the end of the line"
        )
    rows = []
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        words = line.split(",")
        try:
            row = [int(word, 0) for word in words]
        except ValueError:
            row = []
        if len(row) != len(given) or not (0 <= row[0] < MAX_PAGES and 0 <= row[1] <= MAX_ORDER):
            raise UsageError(
                f"{name}: line {number}: {line[:80]!r}; expected {','.join(given)} as numbers, orders 0 to {MAX_ORDER}"
                f" and pfns below {MAX_PAGES:#x} (1 TiB)"
            )
        pages = 1 << row[1]
        if row[0] % pages:
            raise UsageError(
                f"{name}: line {number}: pfn {row[0]} is not aligned to order {row[1]}; expected a multiple of {pages}"
            )
        if len(row) == len(_COLUMNS) and not UNKNOWN_PAGES <= row[3] <= pages:
            raise UsageError(
                f"{name}: line {number}: the host holds {row[3]} pages of a block of {pages}; expected 0 to {pages}"
            )
        rows.append([*row, 0, UNKNOWN_PAGES][: 3 + _NEEDED - 1] if len(row) == _NEEDED else [*row, UNKNOWN_PAGES][:4])
    if not rows:
        raise UsageError(f"{name}: line {len(lines)}: has no free block; expected one a line")
    array = np.array(rows, np.int64)
    array = array[np.argsort(array[:, 0], kind="stable")]
    ends = array[:, 0] + (np.int64(1) << array[:, 1])
    over = np.flatnonzero(array[1:, 0] < ends[:-1])
    if over.size:
        one, other = array[over[0]], array[over[0] + 1]
        raise UsageError(
            f"{name}: pfn {other[0]}: lies in the block of order {one[1]} at pfn {one[0]}; expected none to overlap"
        )
    return Snapshot(
        name,
        "blocks",
        array[:, 0].copy(),
        array[:, 1].astype(np.uint8),
        array[:, 2] != 0,
        array[:, 3].copy(),
        0,
    )
