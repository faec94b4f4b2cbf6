"""Sizes and kinds that both sides must agree on: pages, orders, pageblocks, migratetypes.

Values are those of x86-64 Linux in the period of the v9 series.

``FPR_PAGEBLOCK_ORDER`` in the environment makes pageblocks smaller, and the top order with them, which stays one more
(CONFIG_PAGE_BLOCK_ORDER and CONFIG_ARCH_FORCE_MAX_ORDER of Linux): a zone of 16 pages then has pageblocks, merges
across them and types to steal. It is read once, as this module is imported, and meant for the explorer and for tests:
all processes of a lab must agree on it, and no figure of any document was made with it.
"""

from __future__ import annotations

import os
from enum import IntEnum

from common.errors import UsageError

__all__ = [
    "DEFAULT_PAGEBLOCK_ORDER",
    "MAX_MEMORY_BYTES",
    "MAX_PAGES",
    "MIN_MEMORY_BYTES",
    "N_MIGRATETYPES",
    "N_ORDERS",
    "PAGEBLOCK_ORDER",
    "PAGEBLOCK_ORDER_VARIABLE",
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
DEFAULT_PAGEBLOCK_ORDER = 9  # include/linux/pageblock-flags.h with huge pages, 2 MiB
PAGEBLOCK_ORDER_VARIABLE = "FPR_PAGEBLOCK_ORDER"
_SMALLEST_PAGEBLOCK_ORDER = 2  # the top order is 3 then: a zone is whole bytes of a bitmap


def _pageblock_order() -> int:
    """Order of a pageblock in this process.

    Raises:
        UsageError: the environment names one that is not allowed.
    """
    given = os.environ.get(PAGEBLOCK_ORDER_VARIABLE, "")
    allowed = range(_SMALLEST_PAGEBLOCK_ORDER, DEFAULT_PAGEBLOCK_ORDER + 1)
    if not given:
        return DEFAULT_PAGEBLOCK_ORDER
    if given not in map(str, allowed):
        raise UsageError(
            f"{PAGEBLOCK_ORDER_VARIABLE}: {given!r}; allowed is {allowed[0]} to {allowed[-1]}, or leave it unset"
        )
    return int(given)


PAGEBLOCK_ORDER = _pageblock_order()
PAGEBLOCK_PAGES = 1 << PAGEBLOCK_ORDER
TOP_ORDER = PAGEBLOCK_ORDER + 1  # MAX_ORDER - 1 of include/linux/mmzone.h: 10, 4 MiB. Kernels rely on the one more.
N_ORDERS = TOP_ORDER + 1


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

# 16 MiB, which is four blocks of the top order; one where pageblocks are small.
MIN_MEMORY_BYTES = 16 << 20 if PAGEBLOCK_ORDER == DEFAULT_PAGEBLOCK_ORDER else PAGE_BYTES << TOP_ORDER
MAX_MEMORY_BYTES = 1 << 40
MAX_PAGES = MAX_MEMORY_BYTES >> PAGE_SHIFT  # 2**28: a pfn and an order fit one u32 on the wire


def check_memory_bytes(memory_bytes: int) -> int:
    """Number of pages in ``memory_bytes``.

    Raises:
        UsageError: not a whole number of pageblocks between 16 MiB and 1 TiB (less where pageblocks are small).
    """
    pageblock_bytes = PAGEBLOCK_PAGES * PAGE_BYTES
    if memory_bytes % pageblock_bytes or not MIN_MEMORY_BYTES <= memory_bytes <= MAX_MEMORY_BYTES:
        allowed = "a multiple of 2 MiB from 16 MiB to 1 TiB, such as 512MiB"
        if PAGEBLOCK_ORDER != DEFAULT_PAGEBLOCK_ORDER:
            allowed = f"a multiple of {pageblock_bytes} bytes from {MIN_MEMORY_BYTES} bytes to 1 TiB"
        raise UsageError(f"memory: {memory_bytes} bytes; allowed is {allowed}")
    return memory_bytes >> PAGE_SHIFT
