"""What tests read from a zone beside its interface: the header and the pageblock types, out of a snapshot.

A snapshot is a byte copy of the segment (common/layout.py), so this looks and never touches.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from common.geometry import N_ORDERS, PAGEBLOCK_ORDER
from common.layout import BLOCK_MT_MASK, HEADER_DTYPE, segment_offsets
from guest.allocator.zone import Zone

__all__ = ["boundary_of", "header_of", "pageblock_types"]


def header_of(zone: Zone) -> Any:
    """The header as one record of HEADER_DTYPE."""
    return np.frombuffer(zone.snapshot(), dtype=HEADER_DTYPE, count=1)[0]


def boundary_of(zone: Zone, order: int, migratetype: int) -> int | None:
    """First page of the reported run that reaches to the tail, or None: the list head."""
    header = header_of(zone)
    node = int(header["boundary"][migratetype * N_ORDERS + order])
    return node if node < int(header["n_pages"]) else None


def pageblock_types(zone: Zone) -> list[int]:
    """Migratetype of each pageblock."""
    header = header_of(zone)
    offsets = segment_offsets(int(header["n_pages"]), int(header["n_cpus"]))
    count = int(header["n_pages"]) >> PAGEBLOCK_ORDER
    raw = np.frombuffer(zone.snapshot(), dtype=np.uint8, count=count, offset=offsets.block)
    return [int(byte) & BLOCK_MT_MASK for byte in raw]
