"""What a trace is made of: its events, its columns, and the words for allocation flags.

Import-light, so that commands can name events in ``--help``.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = [
    "ALIASES",
    "FLAG_REFILL",
    "GFP_BITS",
    "MAX_ORDER",
    "NO_MIGRATETYPE",
    "PAGE_BYTES",
    "PAGE_EVENTS",
    "TRACEPOINTS",
    "Event",
    "gfp_bits",
]

PAGE_BYTES = 4096
MAX_ORDER = 10  # MAX_PAGE_ORDER of a kernel with 4 KiB pages
NO_MIGRATETYPE = -1  # the event does not tell
FLAG_REFILL = 1  # percpu_refill=1: the page went to a per-CPU list


class Event(IntEnum):
    """Number of an event in the column ``event``. The names are the kernel's own and stand in a file's metadata."""

    mm_page_alloc = 0
    mm_page_free = 1
    mm_page_free_batched = 2
    mm_page_alloc_zone_locked = 3
    mm_page_pcpu_drain = 4
    mm_page_alloc_extfrag = 5
    mark = 6
    process = 7
    process_ret = 8
    report = 9
    report_ret = 10
    notify = 11


# With a pfn; the others are text.
PAGE_EVENTS = tuple(event for event in Event if event <= Event.mm_page_alloc_extfrag)
TRACEPOINTS = tuple(f"kmem:{event.name}" for event in PAGE_EVENTS)
# Other names of the same: kernels before 3.3, and what a write to trace_marker is printed as.
ALIASES = {
    "mm_page_free_direct": Event.mm_page_free,
    "mm_pagevec_free": Event.mm_page_free_batched,
    "tracing_mark_write": Event.mark,
}

# include/linux/gfp_types.h of Linux 6.1, the layout of the column ``gfp`` where a trace has words.
_BITS = {
    "__GFP_DMA": 0x01,
    "__GFP_HIGHMEM": 0x02,
    "__GFP_DMA32": 0x04,
    "__GFP_MOVABLE": 0x08,
    "__GFP_RECLAIMABLE": 0x10,
    "__GFP_HIGH": 0x20,
    "__GFP_IO": 0x40,
    "__GFP_FS": 0x80,
    "__GFP_ZERO": 0x100,
    "__GFP_ATOMIC": 0x200,
    "__GFP_DIRECT_RECLAIM": 0x400,
    "__GFP_KSWAPD_RECLAIM": 0x800,
    "__GFP_WRITE": 0x1000,
    "__GFP_NOWARN": 0x2000,
    "__GFP_RETRY_MAYFAIL": 0x4000,
    "__GFP_NOFAIL": 0x8000,
    "__GFP_NORETRY": 0x10000,
    "__GFP_MEMALLOC": 0x20000,
    "__GFP_COMP": 0x40000,
    "__GFP_NOMEMALLOC": 0x80000,
    "__GFP_HARDWALL": 0x100000,
    "__GFP_THISNODE": 0x200000,
    "__GFP_ACCOUNT": 0x400000,
    "__GFP_ZEROTAGS": 0x800000,
    "__GFP_SKIP_ZERO": 0x1000000,
    "__GFP_SKIP_KASAN_UNPOISON": 0x2000000,
    "__GFP_SKIP_KASAN_POISON": 0x4000000,
    "__GFP_NOLOCKDEP": 0x8000000,
}
_RECLAIM = 0xC00
_KERNEL = _RECLAIM | 0xC0
_USER = _KERNEL | 0x100000
_MOVABLE = _USER | 0x02 | 0x08
_TRANSHUGE_LIGHT = (_MOVABLE | 0x40000 | 0x80000 | 0x2000) & ~_RECLAIM
GFP_BITS = {
    **_BITS,
    "__GFP_RECLAIM": _RECLAIM,
    "__GFP_WAIT": _RECLAIM,  # before 4.4
    "__GFP_REPEAT": 0x4000,  # before 4.13
    "__GFP_COLD": 0,  # before 4.15
    "__GFP_OTHER_NODE": 0,
    "__GFP_NO_OBJ_EXT": 0,  # 6.10 and later: a bit that 6.1 does not have
    "GFP_ATOMIC": 0xA20,
    "GFP_KERNEL": _KERNEL,
    "GFP_KERNEL_ACCOUNT": _KERNEL | 0x400000,
    "GFP_NOWAIT": 0x800,
    "GFP_NOIO": _RECLAIM,
    "GFP_NOFS": _RECLAIM | 0x40,
    "GFP_TEMPORARY": _KERNEL | 0x10,
    "GFP_USER": _USER,
    "GFP_DMA": 0x01,
    "GFP_DMA32": 0x04,
    "GFP_HIGHUSER": _USER | 0x02,
    "GFP_HIGHUSER_MOVABLE": _MOVABLE,
    "GFP_TRANSHUGE_LIGHT": _TRANSHUGE_LIGHT,
    "GFP_TRANSHUGE": _TRANSHUGE_LIGHT | 0x400,
    "none": 0,
}


def gfp_bits(words: str) -> tuple[int, list[str]]:
    """Bits of ``GFP_KERNEL|__GFP_ZERO`` in the layout of Linux 6.1, and the words that it does not know.

    A word may be a number: what the kernel has no name for is printed so.
    """
    bits, unknown = 0, []
    for word in words.split("|"):
        if word in GFP_BITS:
            bits |= GFP_BITS[word]
            continue
        try:
            bits |= int(word, 0) & 0xFFFFFFFF
        except ValueError:
            unknown.append(word)
    return bits, unknown
