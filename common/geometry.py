"""Sizes and kinds that both sides must agree on: pages, orders, pageblocks, migratetypes.

Values are those of x86-64 Linux in the period of the v9 series (reference section 1).
"""

from __future__ import annotations

from enum import IntEnum

from common.errors import UsageError

__all__ = [
    "MAX_MEMORY_BYTES",
    "MAX_PAGES",
    "MIN_MEMORY_BYTES",
    "N_MIGRATETYPES",
    "N_ORDERS",
    "PAGEBLOCK_ORDER",
    "PAGEBLOCK_PAGES",
    "PAGE_BYTES",
    "PAGE_SHIFT",
    "PCP_MIGRATETYPES",
    "TOP_ORDER",
    "Migratetype",
    "check_memory_bytes",
]

PAGE_SHIFT = 12  # arch/x86/include/asm/page_types.h
PAGE_BYTES = 1 << PAGE_SHIFT
TOP_ORDER = 10  # MAX_ORDER - 1 of include/linux/mmzone.h, 4 MiB
N_ORDERS = TOP_ORDER + 1
PAGEBLOCK_ORDER = 9  # include/linux/pageblock-flags.h with huge pages, 2 MiB
PAGEBLOCK_PAGES = 1 << PAGEBLOCK_ORDER


class Migratetype(IntEnum):
    """``enum migratetype`` of include/linux/mmzone.h with CMA and ISOLATE configured."""

    UNMOVABLE = 0
    MOVABLE = 1
    RECLAIMABLE = 2
    HIGHATOMIC = 3
    CMA = 4
    ISOLATE = 5


N_MIGRATETYPES = len(Migratetype)
PCP_MIGRATETYPES = 3  # MIGRATE_PCPTYPES: the first three have per-CPU lists

MIN_MEMORY_BYTES = 16 << 20
MAX_MEMORY_BYTES = 1 << 40
MAX_PAGES = MAX_MEMORY_BYTES >> PAGE_SHIFT  # 2**28: a pfn and an order fit one u32 on the wire


def check_memory_bytes(memory_bytes: int) -> int:
    """Number of pages in ``memory_bytes``.

    Raises:
        UsageError: not a whole number of pageblocks between 16 MiB and 1 TiB.
    """
    pageblock_bytes = PAGEBLOCK_PAGES * PAGE_BYTES
    if memory_bytes % pageblock_bytes or not MIN_MEMORY_BYTES <= memory_bytes <= MAX_MEMORY_BYTES:
        raise UsageError(
            f"memory: {memory_bytes} bytes; allowed is a multiple of 2 MiB from 16 MiB to 1 TiB, such as 512MiB"
        )
    return memory_bytes >> PAGE_SHIFT
