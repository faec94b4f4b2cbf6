"""A zone as kernels see it: six integers, and accessors that turn them into arrays where they are used.

Why not arrays: an array from Python is reference counted by atomic additions at each call, and a tuple of arrays is
dozens of words to pass; both cost more than an allocation. Six integers travel in registers, and an accessor followed
by an index compiles to one load or store.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from common.geometry import PAGEBLOCK_ORDER
from common.layout import (
    CPU_WORDS,
    FREE_HEAD_NODES,
    HEADER_WORDS,
    MAX_CPUS,
    PCP_HEAD_NODES,
    W_BITMAP_OFFSET,
    W_BLOCK_OFFSET,
    W_LINK_OFFSET,
    W_N_PAGES,
    W_PAGE_OFFSET,
    W_RESIDENT_OFFSET,
)
from common.native import kernel, thread_id, view_i64, view_u8, view_u16, view_u32

__all__ = ["ZoneView", "bitmap_of", "blocks_of", "ctl_of", "links_of", "open_zone", "pages_of", "residence_of"]


class ZoneView(NamedTuple):
    """Where the parts of one zone lie in this process. It owns nothing."""

    ctl: Any  # address of the header words and the per-CPU slots behind them
    link: Any
    page: Any
    block: Any
    n_pages: Any
    thread: Any  # id of the calling thread: what it writes into a slot's lock


@kernel
def open_zone(address):  # type: ignore[no-untyped-def]
    """View of the zone segment mapped at ``address``."""
    # SAFETY: the caller's handle checked the header when it attached, and keeps the mapping alive.
    header = view_i64(address, HEADER_WORDS)
    return ZoneView(
        address,
        address + header[W_LINK_OFFSET],
        address + header[W_PAGE_OFFSET],
        address + header[W_BLOCK_OFFSET],
        header[W_N_PAGES],
        np.int64(thread_id()),
    )


@kernel
def ctl_of(zone):  # type: ignore[no-untyped-def]
    """int64[]: header words, then the words of the per-CPU slots (as many as the header says, at most MAX_CPUS)."""
    return view_i64(zone.ctl, HEADER_WORDS + MAX_CPUS * CPU_WORDS)


@kernel
def links_of(zone):  # type: ignore[no-untyped-def]
    """uint32[2 * nodes]: next and prev of each node."""
    return view_u32(zone.link, 2 * (zone.n_pages + FREE_HEAD_NODES + MAX_CPUS * PCP_HEAD_NODES))


@kernel
def pages_of(zone):  # type: ignore[no-untyped-def]
    """uint16[n_pages]: state of each page."""
    return view_u16(zone.page, zone.n_pages)


@kernel
def blocks_of(zone):  # type: ignore[no-untyped-def]
    """uint8[pageblocks]: type of each pageblock."""
    return view_u8(zone.block, zone.n_pages >> PAGEBLOCK_ORDER)


@kernel
def residence_of(zone):  # type: ignore[no-untyped-def]
    """uint8[n_pages]: the resident map."""
    return view_u8(zone.ctl + ctl_of(zone)[W_RESIDENT_OFFSET], zone.n_pages)


@kernel
def bitmap_of(zone):  # type: ignore[no-untyped-def]
    """uint8[n_pages / 8]: one bit a block of the minimum order, for the policy that keeps a bitmap."""
    return view_u8(zone.ctl + ctl_of(zone)[W_BITMAP_OFFSET], zone.n_pages >> 3)
